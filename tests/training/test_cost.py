"""What a training step costs is counted right, and is no more than the theory asks for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import SmallNet
from torch import Tensor, nn

from ares_lightning.attacks import make_attack
from ares_lightning.counting import count_flops
from ares_lightning.models import make_classifier
from ares_lightning.training.cost import step_cost
from ares_lightning.training.objectives import AdversarialTraining, InnerAttack, Objective, StandardTraining


def network(name: str, img_size: int = 224) -> nn.Module:
    facts = {"in_chans": 3, "num_classes": 10, "img_size": img_size, "mean": [0.5] * 3, "std": [0.5] * 3}
    return make_classifier(name, **facts)


CONVOLUTIONS = {  # the layer, and the multiplications of one forward of 2 images of 9 x 9 pixels
    "plain": (nn.Conv2d(4, 6, 3, padding=1), 2 * 81 * 6 * 4 * 9),
    "strided": (nn.Conv2d(4, 6, 3, stride=2), 2 * 16 * 6 * 4 * 9),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), 2 * 49 * 6 * 2 * 9),
    "depthwise": (nn.Conv2d(4, 4, 7, padding=3, groups=4), 2 * 81 * 4 * 49),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2), 2 * 81 * 6 * 4 * 4),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), 2 * 81 * 6 * 2 * 4),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_each_gradient_of_a_convolution_costs_as_much_as_its_forward(kind, device):
    layer, products = CONVOLUTIONS[kind]
    layer = layer.to(device)
    images = torch.zeros(2, 4, 9, 9, device=device, requires_grad=True)
    parameters = list(layer.parameters())
    assert count_flops(lambda: layer(images)) == 2 * products
    for wanted, gradients in ([images], 1), (parameters, 1), ([images, *parameters], 2):
        loss = layer(images).sum()
        assert count_flops(lambda loss=loss, wanted=wanted: torch.autograd.grad(loss, wanted)) == (
            2 * products * gradients
        )


def test_a_linear_layer_costs_a_matrix_product_for_its_output_and_each_gradient():
    layer, inputs, images = nn.Linear(5, 7), torch.rand(3, 5, requires_grad=True), torch.rand(3, 4, 5)
    once = 2 * 3 * 5 * 7
    assert count_flops(lambda: layer(inputs)) == once
    assert count_flops(lambda: torch.autograd.grad(layer(inputs).sum(), inputs)) == 2 * once
    assert count_flops(lambda: layer(inputs).sum().backward()) == 3 * once
    with torch.inference_mode():
        assert count_flops(lambda: layer(inputs)) == once
        assert count_flops(lambda: inputs @ layer.weight[0]) == 2 * 3 * 5
        assert count_flops(lambda: torch.einsum("nik,njk->nij", images, images)) == 2 * 3 * 4 * 4 * 5


def test_attention_costs_two_products_and_five_in_the_backward_that_computes_the_scores_again():
    query, key, value = (torch.rand(2, 3, length, 8, requires_grad=True) for length in (5, 6, 6))
    once = 2 * (2 * 3) * (5 * 6 * 8)
    assert count_flops(lambda: F.scaled_dot_product_attention(query, key, value)) == 2 * once
    out = F.scaled_dot_product_attention(query, key, value).sum()
    assert count_flops(lambda: torch.autograd.grad(out, (query, key, value))) == 5 * once
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(query, key, value).sum()
    assert count_flops(lambda: torch.autograd.grad(out, (query, key, value))) == 4 * once


MOST = {"resnet50": 9.0, "vit_base_patch16_224": 9.2, "swin_tiny_patch4_window7_224": 9.1, "convnext_tiny": 9.0}
"""F of a PGD-3 step by architecture: 9, and a little where attention has a gradient for two matrices."""


@pytest.mark.parametrize("name", MOST)
def test_a_pgd_3_step_costs_9_forwards(name):
    """3 forwards and input gradients, then one forward and a full backward: (2 · 3 + 3) F and no more."""
    net = network(name).train()
    images, labels = torch.rand(1, 3, 224, 224), torch.tensor([3])
    objective = AdversarialTraining(InnerAttack(attack=make_attack("pgd", steps=3)))

    def step():
        adversarial = objective.craft(net, images, labels, 0)
        assert all(parameter.grad is None for parameter in net.parameters()), "the attack leaves no gradient"
        objective.loss(net, images, adversarial, labels, 0)[0].backward()

    announced = step_cost(net, objective, images, labels)
    assert announced.step <= MOST[name]
    flops = count_flops(step)
    with torch.inference_mode():
        forward = count_flops(lambda: net.eval()(images))
    assert forward == announced.forward
    assert flops <= MOST[name] * forward
    assert flops == pytest.approx(announced.step * forward, rel=0.01)


def test_the_cost_grows_by_two_forwards_with_each_step_of_the_attack():
    net, images, labels = network("resnet18", 64), torch.rand(2, 3, 64, 64), torch.tensor([3, 4])
    standard = step_cost(net, StandardTraining(), images, labels).step
    assert 2.9 < standard <= 3
    for steps in 1, 2, 10:
        cost = step_cost(
            net, AdversarialTraining(InnerAttack(attack=make_attack("pgd", steps=steps))), images, labels
        ).step
        assert cost == pytest.approx(standard + 2 * steps, abs=0.01)


class CurvedTraining(Objective):
    """A loss that holds the gradient of another, so that its backward goes through a backward."""

    def loss(self, net, images, adversarial, labels, step):
        points = images.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(net(points), labels), points, create_graph=True)
        return slope.square().sum(), {}


@pytest.mark.parametrize(
    "objective", [StandardTraining(), AdversarialTraining(InnerAttack(attack=make_attack("pgd"))), CurvedTraining()]
)
def test_counting_computes_nothing_and_changes_nothing(objective):
    net, images, labels = SmallNet().train(), torch.rand(4, 3, 6, 5), torch.tensor([1, 2, 3, 4])
    net.features[4].eval()
    net.head.weight.grad = torch.ones_like(net.head.weight)
    seen: list[Tensor] = []
    net.register_forward_pre_hook(lambda module, args: seen.extend(args))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    trainable = [parameter.requires_grad for parameter in net.parameters()]
    random = torch.get_rng_state()

    cost = step_cost(net, objective, images, labels)

    assert cost.forward == 2 * 30 * (8 * 3 * 9 + 16 * 8 * 9) + 2 * 16 * 10
    assert cost.step > 2
    assert str(cost) == f"{cost.step:.1f} F an image, F = 8.24e-05 GFLOP"
    assert seen
    assert all(shown.is_meta for shown in seen)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert [parameter.requires_grad for parameter in net.parameters()] == trainable
    assert [parameter.grad is not None for parameter in net.parameters()].count(True) == 1
    assert torch.equal(net.head.weight.grad, torch.ones_like(net.head.weight))
    assert torch.equal(torch.get_rng_state(), random)


def test_an_objective_keeps_no_trace_of_the_counting():
    class Remembering(StandardTraining):
        last = None

        def craft(self, net, images, labels, step, **_):
            self.last = images
            return images

    objective = Remembering()
    step_cost(SmallNet(), objective, torch.rand(2, 3, 6, 5), torch.tensor([1, 2]))
    assert objective.last is None
