"""What a compiled network spends on the attack, and that it is compiled once for each use of it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from ares_lightning.attacks import make_attack
from ares_lightning.models import make_classifier
from ares_lightning.training.objectives import AdversarialTraining, InnerAttack

IMG_SIZE, CLASSES = 32, 10


def cnn() -> nn.Module:
    """Two convolutions, in the layout that they work in, and a linear layer."""
    convolutions = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)
    net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))
    return net.to(memory_format=torch.channels_last)


def tiny_vit() -> nn.Module:
    """A convolution and, in a block and the head, 5 linear layers."""
    facts = {"in_chans": 3, "num_classes": CLASSES, "img_size": IMG_SIZE, "mean": [0.5] * 3, "std": [0.5] * 3}
    return make_classifier("vit_tiny_patch16_224", **facts, depth=1, embed_dim=32, num_heads=2, patch_size=8)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(8, 3, IMG_SIZE, IMG_SIZE, generator=generator)
    return images, torch.randint(CLASSES, (8,), generator=generator)


class Graphs:
    """A compiler that runs what it is given as it is, and keeps the graphs of the backwards.

    A counter of what is dispatched would not do: code under one runs uncompiled.
    """

    def __init__(self) -> None:
        self.backwards: list[torch.fx.GraphModule] = []

    def backend(self):
        def keep(graph, inputs):
            self.backwards.append(graph)
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=keep)

    def gradients(self) -> Counter:
        """Count, in the one backward compiled since the last call, what it differentiates with respect to."""
        (graph,), self.backwards = self.backwards, []
        found = Counter()
        for node in graph.graph.nodes:
            if node.target == torch.ops.aten.convolution_backward.default:
                of_images, of_weights, _ = node.args[-1]
                found.update(images=of_images, weights=of_weights)
            if node.target == torch.ops.aten.mm.default:
                found.update(products=1)
        return found


@pytest.mark.parametrize(("make", "convolutions", "linears"), [(cnn, 2, 1), (tiny_vit, 1, 5)])
def test_the_compiled_backward_of_the_attack_holds_no_gradient_of_a_weight(make, convolutions, linears):
    net, graphs = make().train(), Graphs()
    net.compile(backend=graphs.backend())
    objective = AdversarialTraining(InnerAttack(attack=make_attack("pgd", steps=3)))
    images, labels = batch(0)
    adversarial = objective.craft(net, images, labels, 0)
    assert graphs.gradients() == Counter(images=convolutions, weights=0, products=linears)
    objective.loss(net, images, adversarial, labels, 0)[0].backward()
    assert graphs.gradients() == Counter(images=convolutions - 1, weights=convolutions, products=2 * linears)


@pytest.mark.parametrize("make", [cnn, tiny_vit])
def test_a_network_is_compiled_once_for_the_attack_once_for_the_update_and_once_for_validation(make):
    torch.compiler.reset()
    net = make()
    net.compile()
    objective = AdversarialTraining(InnerAttack(attack=make_attack("pgd", steps=3)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def epoch(number: int) -> None:
        net.train()
        for step in range(3):
            images, labels = batch(step)
            adversarial = objective.craft(net, images, labels, step, epoch=number)
            optimizer.zero_grad()
            objective.loss(net, images, adversarial, labels, step)[0].backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            net(batch(9)[0])

    before = counters["stats"]["unique_graphs"]
    epoch(0)
    assert counters["stats"]["unique_graphs"] - before == 3
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(1, 4):
            epoch(number)
    assert counters["stats"]["unique_graphs"] - before == 3
