"""Training loops as the papers write them, with `.backward()` and explicit modes, to hold the objectives to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from networks import SmallNet
from torch import Tensor, nn

from ares_lightning.attacks import make_attack
from ares_lightning.attacks.noise import sample_noise
from ares_lightning.training.objectives import InnerAttack, Objective

EPS, SEED, EPOCH, STEPS, CLASSES, SIZE = 0.1, 3, 1, 20, 10, 8
NOISE_SEED = SEED * 1_000_000 + EPOCH

PlainLoss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""(network, images, labels, sample ids) -> the loss to minimise, after whatever the method does before."""


def network(seed: int = 0) -> SmallNet:
    """A float64 network in training mode with batch norm, and without dropout, whose draws would differ."""
    net = SmallNet(seed=seed).double()
    net.features[5].p = 0.0
    net.head.weight.data /= 4  # so that no probability vanishes
    return net.train()


def inner(name: str = "pgd", *, mode: str = "eval", **settings: object) -> InnerAttack:
    return InnerAttack(attack=make_attack(name, **{"eps": EPS, **settings}), seed=SEED, mode=mode)


def batches(number: int = STEPS, size: int = SIZE) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images, labels and sample ids; every tenth pixel lies at an end of the box."""
    generator = torch.Generator().manual_seed(0)
    for step in range(number):
        images = torch.rand(size, 3, 6, 5, generator=generator, dtype=torch.float64) * 1.1 - 0.05
        labels = torch.randint(CLASSES, (size,), generator=generator)
        yield images.clamp(0, 1), labels, torch.arange(size) + size * step


def soften(labels: Tensor) -> Tensor:
    return F.one_hot(labels, CLASSES) * 0.8 + 0.2 / CLASSES


def assert_same_training(
    objective: Objective, plain: PlainLoss, *, ours: nn.Module | None = None, beside: Iterable[Tensor] = ()
) -> nn.Module:
    """Train with the objective and by the plain loop; losses, weights and running statistics are to agree.

    ours: the network of the objective, where it was made for one; beside: what else the plain loop trains.
    """
    ours, theirs = ours or network(), network()
    auxiliary = [] if objective.auxiliary is None else objective.auxiliary.parameters()
    own = torch.optim.SGD([*ours.parameters(), *auxiliary], lr=0.02)
    other = torch.optim.SGD([*theirs.parameters(), *beside], lr=0.02)
    for step, (images, labels, ids) in enumerate(batches()):
        adversarial = objective.craft(ours, images, labels, step, epoch=EPOCH, sample_ids=ids)
        loss, _ = objective.loss(ours, images, adversarial, labels, step)
        own.zero_grad()
        loss.backward()
        own.step()
        plain_loss = plain(theirs, images, labels, ids)
        torch.testing.assert_close(loss, plain_loss, rtol=1e-9, atol=1e-9)
        other.zero_grad()
        plain_loss.backward()
        other.step()
    assert not torch.equal(ours.head.weight, network().head.weight)
    assert_same_state(ours, theirs)
    return theirs


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in ours.state_dict().items():
        assert torch.allclose(value, theirs.state_dict()[name], rtol=1e-9, atol=1e-9), name


def pgd(
    net: nn.Module, images: Tensor, start: Tensor, loss: Callable[[Tensor], Tensor], *, size: float, steps: int
) -> Tensor:
    """The textbook loop, in the mode that the network is in."""
    x = start
    for _ in range(steps):
        x = x.detach().requires_grad_()
        loss(net(x)).backward()
        x = x + size * x.grad.sign()
        x = torch.max(torch.min(x, images + EPS), images - EPS).clamp(0, 1)
    return x.detach()


def uniform_start(images: Tensor, ids: Tensor, seed: int = NOISE_SEED) -> Tensor:
    return (images + EPS * noise("uniform", (seed, "pgd", 1), images, ids)).clamp(0, 1)


def normal_start(images: Tensor, ids: Tensor) -> Tensor:
    return (images + 0.001 * noise("normal", (NOISE_SEED, "pgd", 1), images, ids)).clamp(0, 1)


def noise(kind: str, key: tuple[object, ...], images: Tensor, ids: Tensor) -> Tensor:
    return sample_noise(kind, key, ids.tolist(), tuple(images.shape[1:]), images)


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    net.eval()
    yield
    net.train()


@contextmanager
def without_trace(net: nn.Module) -> Iterator[None]:
    """Let the network fill copies of its running statistics, and throw them away."""
    before = [(module, module._buffers) for module in net.modules()]
    for module, buffers in before:
        module._buffers = {name: value.clone() for name, value in buffers.items()}
    yield
    for module, buffers in before:
        module._buffers = buffers
