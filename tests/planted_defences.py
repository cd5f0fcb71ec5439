"""Models that seem robust, and are not: what a sanity check has to see through. And honest ones, which it must not
take for them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ares_lightning.attacks import make_attack
from ares_lightning.models import make_classifier, make_defense


def train_digits(dataset, *, eps: float | None, epochs: int, num_groups: int | None = None) -> nn.Module:
    """Train a small CNN on digits, on PGD-3 images where `eps` is given; with group norms where asked for."""
    torch.manual_seed(0)
    net = make_classifier("cnn", in_chans=1, num_classes=10, img_size=8, mean=[0.305], std=[0.376], width=16)
    if num_groups is not None:
        for name, module in list(net.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                parent = net.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], nn.GroupNorm(num_groups, module.num_features))
    images = torch.stack([dataset[i][0] for i in range(len(dataset))]) / 255
    labels = dataset.labels
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    attack = None if eps is None else make_attack("pgd", eps=eps, steps=3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            batch = images[rows]
            if attack is not None:
                batch = attack.craft(net, batch, labels[rows])
            optimizer.zero_grad()
            F.cross_entropy(net.train()(batch), labels[rows]).backward()
            optimizer.step()
    return net.eval()


class Around(nn.Module):
    """A network with functions before and after it."""

    def __init__(self, net: nn.Module, before: Callable[[Tensor], Tensor] | None = None, after=None) -> None:
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, images: Tensor) -> Tensor:
        logits = self.net(images if self.before is None else self.before(images))
        return logits if self.after is None else self.after(logits)


class StuckInTraining(nn.Module):
    """A network whose batch norms never leave training mode."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def train(self, mode: bool = True) -> nn.Module:
        self.training = mode
        self.net.train(True)
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


class BatchStatistics(nn.Module):
    """Normalises every image by the batch that it is in."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images - images.mean() + 0.305).clamp(0, 1))


class Purifier(nn.Module):
    """Moves the image towards what the network is sure of, by gradients, before it is classified."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        moved = images
        for _ in range(2):
            with torch.enable_grad():
                points = moved.detach().requires_grad_()
                entropy = torch.distributions.Categorical(logits=self.net(points)).entropy().sum()
                (gradient,) = torch.autograd.grad(entropy, points)
            moved = moved - 0.01 * gradient.sign()
        return self.net(moved)


class Counting(nn.Module):
    """Answers otherwise, the more often it is asked."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("asked", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.asked += 1
        return self.net(images) * (1 + 0.01 * self.asked)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, gradient):
        ctx.gradient = gradient
        return images.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.gradient(gradient), None


def with_gradient(of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda images: _WithGradient.apply(images, of)


def straight_through(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda images: images + (function(images) - images).detach()


def nan_for_some(logits: Tensor) -> Tensor:
    return logits.where(logits.argmax(1, keepdim=True) != 3, torch.nan)


def noise_by_position(images: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return images + 0.1 * torch.randn(images.shape, generator=generator).to(images)


def noise_by_content(images: Tensor) -> Tensor:
    """Noise that follows from the bits of the image: the same twice, and another for the nearest neighbour."""
    return images + 0.05 * torch.sin(1e7 * images).detach()


def winners_take_all(images: Tensor) -> Tensor:
    """Keep what is brighter than its image's median after a fine pattern is laid over it."""
    pattern = images + 0.1 * (500 * images).cos()
    return images * (pattern > pattern.flatten(1).median(1).values.view(-1, 1, 1, 1))


def hides_from_gradients(images: Tensor) -> Tensor:
    return images.clamp(0.3, 0.7) if torch.is_grad_enabled() else images


DEFENCES: dict[str, tuple[Callable[[nn.Module], nn.Module], tuple[str, ...]]] = {
    # masked gradients
    "logits x100": (lambda net: Around(net, after=lambda z: 100 * z), ("gradients_not_zero",)),
    "logits x1e3": (lambda net: Around(net, after=lambda z: 1e3 * z), ("gradients_not_zero",)),
    "logits x1e6": (lambda net: Around(net, after=lambda z: 1e6 * z), ("gradients_not_zero",)),
    "rounded logits": (lambda net: Around(net, after=lambda z: z.round()), ("gradients_not_zero",)),
    "rounded logits, straight through": (
        lambda net: Around(net, after=straight_through(lambda z: (2 * z).round() / 2)),
        ("gradients_point_uphill", "input_not_quantised"),
    ),
    "detached": (lambda net: Around(net, lambda x: x.detach() + 0 * x), ("gradients_not_zero",)),
    "cut off": (lambda net: Around(net, lambda x: x.detach()), ("gradients_not_zero",)),
    "half detached": (
        lambda net: Around(net, lambda x: 0.98 * x.detach() + 0.02 * x.flip(3)),
        ("gradients_point_uphill",),
    ),
    "gradient of the other sign": (
        lambda net: Around(net, with_gradient(lambda gradient: -gradient)),
        ("gradients_point_uphill",),
    ),
    "random gradient": (lambda net: Around(net, with_gradient(torch.randn_like)), ("gradients_point_uphill",)),
    "NaN gradient": (
        lambda net: Around(net, with_gradient(lambda gradient: gradient * torch.nan)),
        ("gradients_not_zero",),
    ),
    "sinusoid": (lambda net: Around(net, lambda x: x + 0.05 * (2000 * x).sin()), ("gradients_point_uphill",)),
    "sinusoid on logits": (
        lambda net: Around(net, after=lambda z: z + 0.5 * (300 * z).sin()),
        ("gradients_point_uphill",),
    ),
    "noise by content": (lambda net: Around(net, noise_by_content), ("gradients_point_uphill",)),
    "clamped input": (lambda net: Around(net, lambda x: x.clamp(0, 1)), ("gradients_point_uphill",)),
    "winners take all": (lambda net: Around(net, winners_take_all), ("gradients_point_uphill",)),
    "logits through tanh": (lambda net: Around(net, after=lambda z: (3 * z).tanh()), ("logits_not_probabilities",)),
    "logarithm with a floor": (
        lambda net: Around(net, after=lambda z: z.softmax(1).clamp(min=0.01).log()),
        ("logits_not_probabilities",),
    ),
    "hides from gradients": (lambda net: Around(net, hides_from_gradients), ("deterministic",)),
    # randomised
    "input noise": (lambda net: Around(net, lambda x: x + 0.1 * torch.randn_like(x)), ("deterministic",)),
    "small input noise": (lambda net: Around(net, lambda x: x + 1e-3 * torch.randn_like(x)), ("deterministic",)),
    "tiny input noise": (lambda net: Around(net, lambda x: x + 1e-4 * torch.randn_like(x)), ("deterministic",)),
    "logit noise": (lambda net: Around(net, after=lambda z: z + 0.1 * torch.randn_like(z)), ("deterministic",)),
    "dropout that stays on": (lambda net: Around(net, lambda x: F.dropout(x, 0.1, True)), ("deterministic",)),
    "random resize and pad": (lambda net: Around(net, make_defense("random_resize_pad")), ("deterministic",)),
    "noise by position": (lambda net: Around(net, noise_by_position), ("independent_of_batch",)),
    "counting": (Counting, ("deterministic",)),
    # probabilities
    "softmax": (lambda net: Around(net, after=lambda z: z.softmax(1)), ("logits_not_probabilities",)),
    "softmax x100": (lambda net: Around(net, after=lambda z: 100 * z.softmax(1)), ("logits_not_probabilities",)),
    "sigmoid": (lambda net: Around(net, after=torch.sigmoid), ("logits_not_probabilities",)),
    "clipped logits": (lambda net: Around(net, after=lambda z: z.clamp(-1, 1)), ("logits_not_probabilities",)),
    # of the batch
    "stuck in training": (StuckInTraining, ("independent_of_batch",)),
    "statistics of the batch": (BatchStatistics, ("independent_of_batch",)),
    # quantised
    "bit depth": (lambda net: Around(net, make_defense("bit_depth", bits=3)), ("input_not_quantised",)),
    "jpeg": (lambda net: Around(net, make_defense("jpeg", quality=75)), ("input_not_quantised",)),
    "rounded input": (lambda net: Around(net, lambda x: (x * 10).round() / 10), ("input_not_quantised",)),
    "cut input": (
        lambda net: Around(net, straight_through(lambda x: (x * 16).floor() / 16)),
        ("input_not_quantised",),
    ),
    "few bits by large numbers": (lambda net: Around(net, lambda x: x + 2**19 - 2**19), ("input_not_quantised",)),
    # others
    "optimises at inference": (Purifier, ("no_gradients_in_forward",)),
    "NaN for some": (lambda net: Around(net, after=nan_for_some), ("finite_logits",)),
    "constant logits": (
        lambda net: Around(net, after=lambda z: 0 * z + torch.arange(10.0)),
        ("gradients_not_zero",),
    ),
}
"""Builders of a defence around a network, with the checks that must fail of it."""

HONEST: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as it is": copy.deepcopy,
    "log-softmax": lambda net: Around(net, after=lambda z: z.log_softmax(1)),
    "logits x5": lambda net: Around(net, after=lambda z: 5 * z),
    "logits / 100": lambda net: Around(net, after=lambda z: z / 100),
    "zero-sum logits": lambda net: Around(net, after=lambda z: z - z.mean(1, keepdim=True)),
    "float32 alone": lambda net: Around(net, lambda x: x.float()),
}
