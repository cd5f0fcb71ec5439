"""Folding batch norm into the layer before it."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from networks import SmallNet
from torch import nn

from ares_lightning.models import make_classifier
from ares_lightning.models.folding import fold_batchnorm

SHAPE = (3, 32, 32)


def trained(net):
    """Give a fresh network in eval mode the statistics and affine parameters that training would leave."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.3, generator=generator)
    return net.eval()


def conv_and_norm(channels=4, **settings):
    return nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels, **settings)


def logits_and_gradient(net, images):
    images = images.clone().requires_grad_()
    logits = net(images)
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), images)
    return logits.detach(), gradient


def images(shape=SHAPE, dtype=torch.float64):
    return torch.rand(3, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


class Nested(nn.Module):
    """Blocks in blocks, a default, a residual sum, and a module without batch norm that branches on values."""

    def __init__(self):
        super().__init__()
        self.look = Look()
        self.stem = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)})
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4, affine=False), nn.SiLU())
        self.head = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5))

    def forward(self, images, features=False):
        x = self.stem["norm"](self.stem["conv"](self.look(images))).relu_()
        x = x + self.block(x)
        x = x.mean((2, 3))
        return x if features else self.head(x)


class Look(nn.Module):
    def forward(self, images):
        return images if images.mean() > 0 else -images


NETWORKS = {
    "cnn": (
        lambda: make_classifier("cnn", in_chans=3, num_classes=10, img_size=32, mean=[0.5] * 3, std=[0.2] * 3),
        3,
    ),
    "timm resnet18": (lambda: timm.create_model("resnet18", num_classes=10), 20),
    "timm efficientnet_b0": (lambda: timm.create_model("efficientnet_b0", num_classes=10), 49),
    "torchvision resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 20),
    "sequential": (lambda: nn.Sequential(*conv_and_norm(), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 7)), 1),
    "nested": (Nested, 3),
    "small": (SmallNet, 1),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_and_input_gradients_stay_the_same(name):
    build, num_norms = NETWORKS[name]
    net = trained(build()).double()
    folded = fold_batchnorm(net, SHAPE)
    assert (folded.num_folded, folded.kept) == (num_norms, {})
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.network.modules())
    for ours, given in zip(
        logits_and_gradient(folded.network, images()), logits_and_gradient(net, images()), strict=True
    ):
        torch.testing.assert_close(ours, given, rtol=0, atol=1e-9 * float(given.abs().max()))


def test_float32_logits_agree_within_its_rounding():
    net = trained(
        make_classifier("resnet18", in_chans=3, num_classes=10, img_size=32, mean=[0.5] * 3, std=[0.2] * 3)
    )
    folded = fold_batchnorm(net, SHAPE).network
    with torch.no_grad():
        given = net(images(dtype=torch.float32))
        torch.testing.assert_close(
            folded(images(dtype=torch.float32)), given, rtol=0, atol=1e-5 * float(given.abs().max())
        )
    assert {p.dtype for p in folded.parameters()} == {torch.float32}


def test_the_given_network_is_untouched():
    net = trained(timm.create_model("resnet18", num_classes=10))
    net.conv1.weight.requires_grad_(False)
    before, state, modules = copy.deepcopy(net.state_dict()), torch.get_rng_state(), list(net.modules())
    folded = fold_batchnorm(net, SHAPE).network
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert list(net.modules()) == modules
    assert torch.equal(torch.get_rng_state(), state)
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in folded.parameters()}
    assert not folded.conv1.weight.requires_grad
    assert not any(module.training for module in folded.modules())


def test_weights_stay_in_channels_last():
    net = trained(NETWORKS["timm resnet18"][0]()).to(memory_format=torch.channels_last)
    folded = fold_batchnorm(net, SHAPE).network
    assert folded.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_an_activation_within_the_batch_norm_stays():
    net = trained(timm.create_model("efficientnet_b0", num_classes=10))
    activation = net.bn1.act
    assert type(fold_batchnorm(net, SHAPE).network.bn1[-1]) is type(activation)


def test_it_works_within_inference_mode():
    net = trained(nn.Sequential(*conv_and_norm(), nn.Flatten(), nn.Linear(4096, 7)))
    with torch.inference_mode():
        folded = fold_batchnorm(net, SHAPE)
    assert folded.num_folded == 1
    logits_and_gradient(folded.network, images(dtype=torch.float32))


class TwoInputs(nn.Module):
    """One convolution and one batch norm, put together by `call(conv, norm, images)`."""

    def __init__(self, call, **settings):
        super().__init__()
        self.conv, self.norm = conv_and_norm(3, **settings)
        self.call = call

    def forward(self, images):
        return self.call(self.conv, self.norm, images).flatten(1)[:, :10]


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (TwoInputs(lambda conv, norm, x: norm(conv(norm(conv(x))))), "used more than once"),
        (TwoInputs(lambda conv, norm, x: norm(conv(conv(x)))), "after a layer that is used elsewhere too"),
        (TwoInputs(lambda conv, norm, x: (y := conv(x)) + norm(y)), "after a layer that is used elsewhere too"),
        (
            TwoInputs(lambda conv, norm, x: norm(conv(x)) + conv.weight.sum()),
            "after a layer that is used elsewhere too",
        ),
        (TwoInputs(lambda conv, norm, x: conv(norm(x))), "not directly after a convolution or linear layer"),
        (TwoInputs(lambda conv, norm, x: norm(conv(x).relu())), "not directly after a convolution or linear layer"),
        (TwoInputs(lambda conv, norm, x: conv(x)), "not used"),
        (TwoInputs(lambda conv, norm, x: norm(conv(x)), track_running_stats=False), "without running statistics"),
        (
            TwoInputs(lambda conv, norm, x: norm(conv(x)) if x.mean() > 0.5 else conv(x)),
            "the network cannot be traced",
        ),
    ],
)
def test_what_cannot_be_folded_is_kept_with_the_reason(net, reason):
    net = trained(net)
    folded = fold_batchnorm(net, SHAPE)
    assert folded.network is net
    assert folded.num_folded == 0
    assert folded.kept["norm"].startswith(reason)
    assert f"0 of 1 batch norms folded; 1 kept: {reason}" in str(folded)


def test_a_batch_norm_in_training_mode_is_kept_and_its_statistics_stay():
    net = trained(nn.Sequential(*conv_and_norm(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten()))
    net[1].train()
    folded = fold_batchnorm(net, SHAPE)
    assert (folded.num_folded, folded.kept) == (1, {"1": "in training mode"})
    assert torch.equal(folded.network[1].running_mean, net[1].running_mean)
    assert folded.network[1].training


def test_layers_with_hooks_or_parametrisations_are_left_alone():
    hooked = trained(nn.Sequential(*conv_and_norm(), nn.Flatten()))
    hooked[0].register_forward_hook(lambda module, args, output: output * 2)
    assert "hooks" in fold_batchnorm(hooked, SHAPE).kept["1"]
    normed = trained(nn.Sequential(*conv_and_norm(), nn.Flatten()))
    nn.utils.parametrizations.weight_norm(normed[0])
    assert "not directly after" in fold_batchnorm(normed, SHAPE).kept["1"]


class Float32Inside(TwoInputs):
    def forward(self, images):
        return super().forward(images.float())


class Weight(nn.Module):
    """Multiplies by another module's weight, which it keeps where no trace can see it."""

    def __init__(self, other):
        super().__init__()
        self.hidden = [other]

    def forward(self, logits):
        return logits * self.hidden[0].weight.sum()


class Smuggled(TwoInputs):
    def __init__(self, call):
        super().__init__(call)
        self.weight = Weight(self.conv)

    def forward(self, images):
        return self.weight(super().forward(images))


def test_a_network_whose_logits_would_change_or_cannot_be_compared_comes_back_unfolded():
    for network_class, reason in ((Smuggled, "change the logits by"), (Float32Inside, "comparison does not run")):
        net = trained(network_class(lambda conv, norm, x: norm(conv(x))))
        folded = fold_batchnorm(net, SHAPE)
        assert folded.network is net
        assert reason in folded.kept["norm"]


def test_a_randomised_network_is_compared_on_equal_draws():
    net = trained(TwoInputs(lambda conv, norm, x: norm(conv(x + torch.randn_like(x)))))
    assert fold_batchnorm(net, SHAPE).num_folded == 1


def test_a_network_without_batch_norm_is_returned_as_it_is():
    net = nn.Linear(3, 2)
    folded = fold_batchnorm(net, SHAPE)
    assert folded.network is net
    assert str(folded) == "0 of 0 batch norms folded"
