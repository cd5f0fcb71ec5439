"""ARD and RSLAD: the loss by hand, and training against plain loops of the authors' code."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from plain import (
    EPS,
    assert_same_training,
    batches,
    evaluating,
    inner,
    network,
    normal_start,
    pgd,
    uniform_start,
    without_trace,
)
from torch import nn

from ares_lightning.training.objectives import ARD, RSLAD

STUDENT, TEACHER = [1.0, 1.5, -1.0], [2.0, 0.0, -1.0]


class Says(nn.Module):
    """Answers every image with the same logits."""

    def __init__(self, logits: list[float]):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([logits], dtype=torch.float64))

    def forward(self, images):
        return self.logits.expand(len(images), -1)


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    total = sum(math.exp(z / temperature) for z in logits)
    return [math.exp(z / temperature) / total for z in logits]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_the_loss_of_ard_by_hand():
    clean, moved = (torch.tensor([z], dtype=torch.float64).view(1, 3, 1, 1) for z in (TEACHER, STUDENT))
    objective = ARD(inner(), Says(TEACHER), temperature=4.0, alpha=0.75)
    loss, _ = objective.loss(nn.Flatten(), clean, moved, torch.tensor([1]), 0)
    gap = kl(softmax(TEACHER, 4.0), softmax(STUDENT, 4.0))
    ce = -math.log(softmax(TEACHER)[1])  # the student's answer to the clean image is TEACHER here
    assert loss.item() == pytest.approx(0.75 * 16 * gap + 0.25 * ce, rel=1e-12)


def test_the_loss_of_rslad_by_hand():
    moved = torch.tensor([STUDENT], dtype=torch.float64).view(1, 3, 1, 1)
    clean = torch.tensor([[0.2, 0.1, 0.0]], dtype=torch.float64).view(1, 3, 1, 1)
    objective = RSLAD(inner(steps=1, step_size=0.0), Says(TEACHER))
    objective.craft(nn.Flatten(), clean, torch.tensor([1]), 0)
    loss, _ = objective.loss(nn.Flatten(), clean, moved, torch.tensor([1]), 0)
    taught = softmax(TEACHER)
    expected = 5 / 6 * kl(taught, softmax(STUDENT)) + 1 / 6 * kl(taught, softmax([0.2, 0.1, 0.0]))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_ard_is_the_authors_loop(alpha):
    """But for the divergence, which is theirs times the number of classes, the start, clamped to the box, and the
    statistics of the attack's forwards."""
    teacher, theirs = network(seed=9), network(seed=9).eval()

    def plain(net, images, labels, ids):
        with without_trace(net):
            start = uniform_start(images, ids)
            x = pgd(net, images, start, lambda z: F.cross_entropy(z, labels), size=EPS / 4, steps=3)
        student, taught = (net(x) / 30).log_softmax(1), (theirs(images).detach() / 30).softmax(1)
        distilled = F.kl_div(student, taught, reduction="none").mean() * student.shape[1]
        loss = alpha * 30 * 30 * distilled
        return loss + (1 - alpha) * F.cross_entropy(net(images), labels) if alpha < 1 else loss

    assert_same_training(ARD(inner(steps=3, step_size="1/4 eps", mode="train"), teacher, alpha=alpha), plain)


def test_rslad_is_the_authors_loop():
    """But for the divergences, which are theirs times the number of classes, and the start, clamped to the box."""
    teacher, theirs = network(seed=9), network(seed=9).eval()

    def plain(net, images, labels, ids):
        taught = theirs(images).softmax(1).detach()
        with evaluating(net):
            start = normal_start(images, ids)
            loss = lambda z: F.kl_div(z.log_softmax(1), taught, reduction="sum")  # noqa: E731
            x = pgd(net, images, start, loss, size=EPS / 4, steps=3)
        clean, moved = net(images), net(x)
        gaps = [F.kl_div(z.log_softmax(1), taught, reduction="none").mean() * z.shape[1] for z in (moved, clean)]
        return 5 / 6 * gaps[0] + 1 / 6 * gaps[1]

    assert_same_training(RSLAD(inner(steps=3, step_size="1/4 eps", random_start="normal"), teacher), plain)


@pytest.mark.parametrize("method", [ARD, RSLAD])
def test_the_teacher_stays_as_it_is_in_eval_mode(method):
    teacher = network(seed=9)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    objective, net = method(inner(steps=1), teacher), network()
    images, labels, _ = next(batches())
    objective.loss(net, images, objective.craft(net, images, labels, 0), labels, 0)[0].backward()
    assert not any(module.training for module in teacher.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert objective.state_dict() == {}


def test_shares_and_temperatures_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"^alpha=1\.5: expected a number from 0 to 1"):
        ARD(inner(), network(), alpha=1.5)
    with pytest.raises(ValueError, match=r"^temperature=0: expected a number of at least 0\.001"):
        ARD(inner(), network(), temperature=0)
