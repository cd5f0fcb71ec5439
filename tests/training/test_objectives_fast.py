"""Single-step training (N-FGSM, GradAlign, Free) against plain loops of the authors' code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plain import (
    EPOCH,
    EPS,
    NOISE_SEED,
    assert_same_state,
    assert_same_training,
    batches,
    inner,
    network,
    noise,
    without_trace,
)
from torch import nn

from ares_lightning.training.objectives import NFGSM, FreeTraining, GradAlign


@pytest.mark.parametrize("width", [2.0, 1.0])
def test_n_fgsm_is_one_step_from_strong_noise_clamped_to_the_box_alone(width):
    """Of the authors' code, all but the statistics that the attack's forward leaves in batch norms."""

    def plain(net, images, labels, ids):
        eta = width * EPS * noise("uniform", (NOISE_SEED, "n_fgsm"), images, ids)
        eta = torch.max(torch.min(eta, 1 - images), 0 - images).requires_grad_()
        with without_trace(net):
            F.cross_entropy(net(images + eta), labels).backward()
        delta = eta.detach() + EPS * eta.grad.sign()
        return F.cross_entropy(net(images + torch.max(torch.min(delta, 1 - images), 0 - images)), labels)

    assert_same_training(NFGSM(inner("fgsm", mode="train"), noise=width), plain)


def test_n_fgsm_leaves_the_ball_by_up_to_its_noise():
    images, labels, ids = next(batches())
    images = images / 2 + 0.25
    adversarial = NFGSM(inner("fgsm", eps=0.05)).craft(network(), images, labels, 0, sample_ids=ids)
    distance = (adversarial - images).abs().max()
    assert 2.5 * 0.05 < distance <= 3 * 0.05 + 1e-12


def test_gradalign_is_fgsm_and_one_minus_the_cosine_of_two_gradients():
    """The authors' code, but that only the update's forward leaves its statistics in batch norms."""
    weight = 0.7

    def plain(net, images, labels, ids):
        x = images.clone().requires_grad_()
        with without_trace(net):
            F.cross_entropy(net(x), labels).backward()
        delta = (1.25 * EPS * x.grad.sign()).clamp(-EPS, EPS)
        loss = F.cross_entropy(net((images + delta).clamp(0, 1)), labels)
        y = (images + EPS * noise("uniform", (NOISE_SEED, "gradalign"), images, ids)).requires_grad_()
        with without_trace(net):
            (other,) = torch.autograd.grad(F.cross_entropy(net(y), labels), y, create_graph=True)
        one, two = x.grad.flatten(1), other.flatten(1)
        cosine = (one * two).sum(1) / (one.norm(dim=1) * two.norm(dim=1))
        return loss + weight * (1 - cosine.mean())

    assert_same_training(GradAlign(inner("fgsm", mode="train"), gradalign=weight), plain)


class Quadratic(nn.Module):
    """Two classes; the input gradient of a row is a multiple of what `slope` has for it."""

    def __init__(self, slope: torch.Tensor):
        super().__init__()
        self.slope = slope
        self.weight = nn.Parameter(torch.ones((), dtype=slope.dtype))

    def forward(self, images):
        moved = (images.flatten(1) * self.slope * self.weight).sum(1)
        return torch.stack([moved, -moved], dim=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradalign_counts_images_of_any_gradient_but_zero(dtype):
    """Tiny gradients, of images that the network is sure of, count like others; rows without leave the mean."""
    slope = torch.tensor([[1.0, 1.0], [1e-12, 1e-12], [0.0, 0.0]], dtype=dtype)
    net, objective = Quadratic(slope), GradAlign(inner("fgsm"), gradalign=1.0)
    images, labels = torch.full((3, 2, 1, 1), 0.5, dtype=dtype), torch.zeros(3, dtype=torch.int64)
    adversarial = objective.craft(net, images, labels, 0)
    loss, logs = objective.loss(net, images, adversarial, labels, 0)
    assert logs["gradient_cosine"].item() == pytest.approx(1.0, abs=1e-6)
    loss.backward()
    assert net.weight.grad.isfinite()


@pytest.mark.parametrize("objective", [NFGSM, GradAlign, FreeTraining])
def test_these_know_linf_only(objective):
    with pytest.raises(ValueError, match=r"^norm=l2: .* knows linf"):
        objective(inner("fgsm", norm="l2", eps=1.0))


def test_free_training_is_the_authors_loop():
    """δ persists over replays, batches and epochs, moves by the gradient at the old weights, and a smaller batch
    uses its first rows."""
    replays, eps = 3, EPS
    objective = FreeTraining(inner("fgsm"), replays=replays)
    ours, theirs = network(), network()
    own, other = (torch.optim.SGD(net.parameters(), lr=0.02) for net in (ours, theirs))
    delta, step = torch.zeros(8, 3, 6, 5, dtype=torch.float64), 0
    for batch, (images, labels, _) in enumerate(batches(7)):
        size = 5 if batch == 3 else 8
        images, labels = images[:size], labels[:size]
        for _ in range(replays):
            adversarial = objective.craft(ours, images, labels, step, epoch=batch // 2)
            own.zero_grad()
            objective.loss(ours, images, adversarial, labels, step)[0].backward()
            own.step()
            step += 1

            noise_batch = delta[:size].clone().requires_grad_()
            other.zero_grad()
            F.cross_entropy(theirs((images + noise_batch).clamp(0, 1)), labels).backward()
            delta[:size] += eps * noise_batch.grad.sign()
            delta.clamp_(-eps, eps)
            other.step()
    assert_same_state(ours, theirs)
    torch.testing.assert_close(objective.state_dict()["delta"], delta, rtol=0, atol=0)


def test_free_training_goes_on_from_the_perturbation_it_saved():
    images, labels, _ = next(batches())
    first, second = FreeTraining(inner("fgsm")), FreeTraining(inner("fgsm"))
    net = network()
    assert first.state_dict() == {}
    second.load_state_dict({})
    first.loss(net, images, first.craft(net, images, labels, 0, epoch=EPOCH), labels, 0)[0].backward()
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    one, two = (objective.craft(net, images, labels, 1, epoch=EPOCH) for objective in (first, second))
    assert torch.equal(one, two)
    assert not torch.equal(one, images)
