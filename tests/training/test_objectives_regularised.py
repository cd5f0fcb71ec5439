"""Consistency regularisation and the penalty on the gradient, against the authors' code written plainly."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from plain import (
    EPS,
    NOISE_SEED,
    assert_same_training,
    batches,
    evaluating,
    inner,
    network,
    pgd,
    soften,
    uniform_start,
)
from torch import nn

from ares_lightning.attacks import Threat
from ares_lightning.training.objectives import Consistency, GradientNorm
from ares_lightning.training.objectives.objective import EPOCHS_PER_VIEW


def views_start(images, ids):
    """The two views of an image stand one after the other; the second has noise of its own."""
    start = torch.empty_like(images)
    start[0::2] = uniform_start(images[0::2], ids[0::2])
    start[1::2] = uniform_start(images[1::2], ids[1::2], seed=NOISE_SEED + EPOCHS_PER_VIEW)
    return start


def js(first, second, temperature):
    p, q = (first / temperature).softmax(1), (second / temperature).softmax(1)
    middle = ((p + q) / 2).clamp(min=1e-8).log()
    return (F.kl_div(middle, p, reduction="batchmean") + F.kl_div(middle, q, reduction="batchmean")) / 2


def test_consistency_is_the_authors_loss_on_both_attacked_views():
    def plain(net, images, labels, ids):
        with evaluating(net):
            start = views_start(images, ids)
            x = pgd(net, images, start, lambda z: F.cross_entropy(z, labels), size=EPS / 4, steps=3)
        logits = net(x)
        return F.cross_entropy(logits, labels) + 2 * js(logits[0::2], logits[1::2], 0.5)

    assert_same_training(Consistency(inner(steps=3, step_size="1/4 eps"), consistency=2.0), plain)


def test_the_divergence_of_two_views_by_hand():
    logits = torch.tensor([[0.5, 0.0], [0.0, 0.5]], dtype=torch.float64).view(2, 2, 1, 1)
    objective = Consistency(inner(), consistency=1.0, temperature=0.5)
    loss, logs = objective.loss(nn.Flatten(), logits, logits, torch.tensor([0, 0]), 0)
    p = 1 / (1 + math.exp(-1))  # of a logit 0.5 / 0.5 = 1 above the other
    gap = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    assert logs["js"].item() == pytest.approx(gap, rel=1e-12)
    ce = (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(0.5))) / 2
    assert loss.item() == pytest.approx(ce + gap, rel=1e-12)


def test_views_that_the_network_is_sure_of_have_a_finite_divergence():
    logits = torch.tensor([[400.0, 0.0], [0.0, 400.0]]).view(2, 2, 1, 1).requires_grad_()
    loss, logs = Consistency(inner()).loss(nn.Flatten(), logits, logits, torch.tensor([0, 1]), 0)
    assert logs["js"].item() == pytest.approx(math.log(2), rel=1e-6)
    loss.backward()
    assert logits.grad.isfinite().all()


def test_the_two_views_of_an_image_get_noise_of_their_own():
    images = torch.full((6, 3, 6, 5), 0.5, dtype=torch.float64)
    objective, labels = Consistency(inner(steps=1, step_size=0.0)), torch.zeros(6, dtype=torch.int64)
    adversarial = objective.craft(network(), images, labels, 0, sample_ids=torch.tensor([4, 4, 7, 7, 9, 9]))
    assert not torch.equal(adversarial[0], adversarial[1])
    swapped = objective.craft(network(), images, labels, 0, sample_ids=torch.tensor([7, 7, 4, 4, 9, 9]))
    assert torch.equal(swapped, adversarial[[2, 3, 0, 1, 4, 5]])


def gradient_norm(net, images, labels, ramp, order=1):
    """With σ = 0.225 in the network's place: their norm is of the gradient for the normalised image, times ε/σ."""
    sigma = 0.225
    normalised = (images / sigma).requires_grad_()
    mean = F.cross_entropy(net(normalised * sigma), labels)
    (gradient,) = torch.autograd.grad(mean, normalised, create_graph=True)
    norms = (gradient * len(images)).flatten(1).norm(p=order, dim=1)
    return 0.8 * mean + 1.2 * ramp * (EPS / sigma) * norms.mean()


def test_the_gradient_norm_is_the_authors_loss():
    objective = GradientNorm(Threat("linf", EPS))
    assert_same_training(objective, lambda net, images, labels, ids: gradient_norm(net, images, labels, 1 / 5))


def test_the_gradient_norm_takes_soft_labels_and_the_dual_norm():
    images, labels, _ = next(batches())
    for threat, order in (Threat("linf", EPS), 1), (Threat("l2", EPS), 2), (Threat("l1", EPS), math.inf):
        loss, _ = GradientNorm(threat).loss(network(), images, images, soften(labels), 0)
        torch.testing.assert_close(loss, gradient_norm(network(), images, soften(labels), 1.0, order))


@pytest.mark.parametrize(("ramp_epochs", "ramps"), [(5, [0, 0.2, 0.4, 1, 1]), (0, [1, 1, 1, 1, 1])])
def test_the_penalty_grows_with_the_epoch(ramp_epochs, ramps):
    images, labels, _ = next(batches())
    objective = GradientNorm(Threat("linf", EPS), ramp_epochs=ramp_epochs)
    for epoch, ramp in zip([0, 1, 2, 5, 9], ramps, strict=True):
        objective.craft(network(), images, labels, 0, epoch=epoch)
        loss, _ = objective.loss(network(), images, images, labels, 0)
        torch.testing.assert_close(loss, gradient_norm(network(), images, labels, ramp))
