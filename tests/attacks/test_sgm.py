"""SGM against residual branches decayed by hand, in plain networks and in those of timm and torchvision."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from networks import Counting, SmallNet, predicted
from torch import Tensor, nn

from ares_lightning.attacks.passes import Passes
from ares_lightning.attacks.search import Search
from ares_lightning.attacks.sgm import SGM, decay_residual_branches
from ares_lightning.attacks.threat import BALLS
from ares_lightning.attacks.transfer import MIM


class Residual(nn.Module):
    """Residual, projected and dense blocks, with in-place and functional ReLUs."""

    def __init__(self, decay: float | None = None):
        """With a decay, the branches' gradients are scaled by hand, by 0.5 / 0.2 of it where concatenated."""
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True))
            self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
            self.project = nn.Conv2d(8, 8, 1)
            self.dense = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(3))
            self.head = nn.Linear(20, 10)
        self.relu = nn.ReLU(inplace=True)
        self.added, self.concatenated = (1.0, 1.0) if decay is None else (decay, decay)

    def forward(self, images: Tensor) -> Tensor:
        z = self.stem(images)
        branch = self.convs[1](self.relu(self.convs[0](z)))
        branch = branch.clone() if self.added == 1 else self.added * branch + (1 - self.added) * branch.detach()
        branch += z  # the branch first, in place
        z = self.relu(branch)
        branch = self.convs[3](F.relu(self.convs[2](z)))
        z = F.relu(self.project(z) + self.decayed(branch, self.added))
        features = [z]
        for conv in self.dense:
            made = conv(F.relu(torch.cat(features, 1)))
            features.append(self.decayed(made, self.concatenated))
        return 30 * self.head(torch.cat(features, 1).mean((2, 3)))

    @staticmethod
    def decayed(branch: Tensor, decay: float) -> Tensor:
        return branch if decay == 1 else decay * branch + (1 - decay) * branch.detach()


@pytest.fixture
def net() -> Residual:
    return Residual().double().eval()


def by_hand(added: float, concatenated: float) -> Residual:
    net = Residual().double().eval()
    net.added, net.concatenated = added, concatenated
    return net


@pytest.mark.parametrize(
    ("residual_decay", "added", "concatenated"), [(None, 0.2, 0.5), (0.3, 0.3, 0.3), (0.0, 0.0, 0.0)]
)
def test_sgm_is_mim_on_gradients_decayed_in_the_residual_branches(residual_decay, added, concatenated, net, images):
    labels = predicted(net, images)
    attack = SGM(eps=0.05, steps=6, residual_decay=residual_decay)
    crafted = attack.craft(net, images, labels)
    plain = MIM(eps=0.05, steps=6)
    expected = plain.craft(by_hand(added, concatenated), images, labels)
    torch.testing.assert_close(crafted, expected, rtol=0, atol=1e-9)
    assert not torch.allclose(crafted, plain.craft(net, images, labels), atol=1e-3)
    assert torch.equal(crafted, attack.craft(lambda x: net(x), images, labels)), "any function of pixels will do"


def test_without_decay_sgm_is_mim(net, images):
    labels = predicted(net, images)
    crafted = SGM(eps=0.05, steps=4, residual_decay=1).craft(net, images, labels)
    torch.testing.assert_close(crafted, MIM(eps=0.05, steps=4).craft(net, images, labels), rtol=0, atol=1e-9)


NETWORKS = {
    "torchvision resnet18": (torchvision.models.resnet18, {}, (".bn2",), 0.2),
    "torchvision resnet50": (torchvision.models.resnet50, {}, (".bn3",), 0.2),
    "torchvision densenet121": (torchvision.models.densenet121, {}, ("conv2",), 0.5),
    "resnetv2_50": (timm.create_model, {}, (".conv3",), 0.2),
    "efficientnet_b0": (timm.create_model, {}, ("drop_path",), 0.2),
    "convnext_atto": (timm.create_model, {}, ("drop_path",), 0.2),
    "vit_tiny_patch16_224": (timm.create_model, {"img_size": 32}, ("drop_path1", "drop_path2"), 0.2),
    "swin_tiny_patch4_window7_224": (
        timm.create_model,
        {"img_size": 32, "depths": (2, 2), "num_heads": (1, 2), "embed_dim": 24},
        ("drop_path1", "drop_path2"),
        0.2,
    ),
}
"""Builder, settings, ends of the names of the modules whose outputs are the branches, and the decay."""


@pytest.mark.parametrize("name", NETWORKS)
def test_the_branches_of_published_architectures_are_found(name):
    """Equal to a straight-through estimate whose forward hooks name the ends of the branches."""
    build, settings, ends, decay = NETWORKS[name]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = build(*([name] if build is timm.create_model else []), **settings)
        images = torch.rand(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    model = model.double().eval().requires_grad_(False)
    logits = model(images)
    decay_residual_branches(logits, images, None)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), images)
    (plain,) = torch.autograd.grad(model(images)[:, 0].sum(), images)
    for branch_end in (module for module_name, module in model.named_modules() if module_name.endswith(ends)):
        branch_end.register_forward_hook(lambda _, __, out: decay * out + (1 - decay) * out.detach())
    (expected,) = torch.autograd.grad(model(images)[:, 0].sum(), images)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    assert not torch.allclose(gradient, plain, rtol=1e-3, atol=0)


def test_parallel_paths_are_no_residual_branches():
    """Inception and Fire blocks concatenate paths of different depth, none computed from another."""
    for build, settings in (
        (torchvision.models.squeezenet1_1, {}),
        (torchvision.models.googlenet, {"aux_logits": False, "init_weights": False}),
    ):
        model = build(**settings).eval().requires_grad_(False)
        images = torch.rand(1, 3, 64, 64, requires_grad=True)
        assert decay_residual_branches(model(images), images, None) == 0


def test_a_model_without_skip_connections_is_warned_of_and_attacked_by_mim(images):
    net = SmallNet().double()
    labels = predicted(net, images)
    with pytest.warns(UserWarning, match="sgm found no skip connection in the model"):
        crafted = SGM(eps=0.05, steps=3).craft(net, images, labels)
    assert torch.equal(crafted, MIM(eps=0.05, steps=3).craft(net, images, labels))


def test_a_residual_model_is_not_warned_of(net, images):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SGM(eps=0.01, steps=1)(net, images, predicted(net, images))


def state(model: nn.Module) -> list[tuple[object, ...]]:
    """What hooks could be left behind, and what in-place flags changed."""
    return [
        (
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
            dict(module._backward_hooks),
            dict(module._backward_pre_hooks),
            getattr(module, "inplace", None),
            module.training,
        )
        for module in model.modules()
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_without_hooks_and_with_its_in_place_relus(fails, net, images):
    net.train()
    labels = predicted(net, images)
    before = state(net)
    calls = []

    def loss(logits, y):
        calls.append(1)
        if fails and len(calls) == 2:
            raise RuntimeError("interrupted")
        return F.cross_entropy(logits, y, reduction="none")

    attack = SGM(eps=0.05, steps=3)
    if fails:
        with pytest.raises(RuntimeError, match="interrupted"):
            attack.craft(net, images, labels, loss=loss)
    else:
        attack.craft(net, images, labels, loss=loss)
    assert state(net) == before
    image = images.clone().requires_grad_()
    (after,) = torch.autograd.grad(net.eval()(image).sum(), image)
    (fresh,) = torch.autograd.grad(Residual().double().eval()(image).sum(), image)
    assert torch.equal(after, fresh)


@pytest.mark.parametrize("fails", [False, True])
def test_the_next_attack_on_the_same_search_meets_the_model_itself(fails, net, images):
    labels, eps = predicted(net, images), torch.full((len(images),), 0.01, dtype=torch.float64)
    search = Search(net, images, labels, None, eps, BALLS["linf"], range(12), 0, feedback=True, passes=Passes())
    attack = SGM(eps=0.01, steps=1, loss="margin")
    if fails:
        search.labels.fill_(99)
        with pytest.raises(ValueError, match="labels hold 99"):
            attack.take_up(search)
    else:
        attack.take_up(search)
    assert search.model is net


def test_sgm_k_costs_k_passes_each_way(images):
    net = Counting(Residual().double().eval())
    labels = predicted(net, images)
    net.forwards = 0
    outcome = SGM(eps=1e-7, steps=7)(net, images, labels)
    assert not outcome.broken.any()
    assert (net.forwards, net.backwards) == (9 * len(images), 7 * len(images))
    assert outcome.forwards.tolist() == outcome.backwards.tolist() == [7] * len(images)


def test_sgm_decays_in_every_part_of_a_batch_and_for_randomised_models(net, images):
    labels = predicted(net, images)
    attack = SGM(eps=0.02, steps=4)
    whole = attack(net, images, labels)
    parts = attack(net, images, labels, batch_size=5)
    repeated = attack.replace(eot=2)(net, images, labels)
    for other in (parts, repeated):
        torch.testing.assert_close(other.images, whole.images, rtol=0, atol=1e-9)


def test_a_function_that_gives_no_gradient_is_named(net, images):
    with pytest.raises(ValueError, match="gives no gradient"):
        SGM().craft(lambda x: net(x.detach()), images, predicted(net, images))


def test_settings_that_make_no_sense_are_refused_by_name():
    with pytest.raises(ValueError, match=r"residual_decay=1\.5: expected a factor from 0 to 1"):
        SGM(residual_decay=1.5)
