"""Cross-entropy on clean and on adversarial images, against plain loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plain import (
    EPS,
    assert_same_training,
    evaluating,
    inner,
    network,
    noise,
    pgd,
    soften,
    uniform_start,
    without_trace,
)

from ares_lightning.training.objectives import AdversarialTraining, StandardTraining


def test_standard_training_is_cross_entropy_on_the_clean_images():
    net, images, labels = network(), torch.rand(4, 3, 6, 5, dtype=torch.float64), torch.tensor([1, 2, 3, 4])
    objective = StandardTraining()
    assert objective.craft(net, images, labels, 0) is images
    assert_same_training(objective, lambda net, images, labels, ids: F.cross_entropy(net(images), labels))


def test_pgd_training_is_the_papers_loop():
    def plain(net, images, labels, ids):
        with evaluating(net):
            start = uniform_start(images, ids)
            x = pgd(net, images, start, lambda z: F.cross_entropy(z, labels), size=1.25 * EPS, steps=2)
        return F.cross_entropy(net(x), labels)

    assert_same_training(AdversarialTraining(inner(steps=2)), plain)  # 1.25 = 2.5 / steps


def test_soft_labels_count_in_the_attack_and_in_the_loss_alike():
    def plain(net, images, labels, ids):
        with evaluating(net):
            start = uniform_start(images, ids)
            x = pgd(net, images, start, lambda z: F.cross_entropy(z, soften(labels)), size=0.03, steps=2)
        return F.cross_entropy(net(x), soften(labels))

    class Softened(AdversarialTraining):
        def craft(self, net, images, labels, step, **keys):
            return super().craft(net, images, soften(labels), step, **keys)

        def loss(self, net, images, adversarial, labels, step):
            return super().loss(net, images, adversarial, soften(labels), step)

    assert_same_training(Softened(inner(steps=2, step_size=0.03)), plain)


def test_fgsm_training_steps_once_from_the_clean_image():
    def plain(net, images, labels, ids):
        with evaluating(net):
            x = pgd(net, images, images, lambda z: F.cross_entropy(z, labels), size=EPS, steps=1)
        return F.cross_entropy(net(x), labels)

    assert_same_training(AdversarialTraining(inner("fgsm")), plain)


def test_fgsm_rs_steps_five_quarters_of_the_budget_from_a_random_point_in_training_mode():
    """Wong et al.: start clamped to the box, one step, clamped to the ball and the box. The statistics of the
    attack's forward, which their code keeps, are not kept here."""

    def plain(net, images, labels, ids):
        delta = uniform_start(images, ids) - images
        delta.requires_grad_()
        with without_trace(net):
            F.cross_entropy(net(images + delta), labels).backward()
        delta = (delta.detach() + 1.25 * EPS * delta.grad.sign()).clamp(-EPS, EPS)
        return F.cross_entropy(net((images + delta).clamp(0, 1)), labels)

    attack = inner(steps=1, step_size="5/4 eps", mode="train")
    assert_same_training(AdversarialTraining(attack), plain)


def test_apgd_2_is_fgsm_from_the_clean_image_then_a_partial_flip_and_the_best_of_three():
    """Singh et al.: what two iterations of APGD come to, pixel by pixel, written out."""

    def plain(net, images, labels, ids):
        def look(x):
            x = x.detach().requires_grad_()
            losses = F.cross_entropy(net(x), labels, reduction="none")
            losses.sum().backward()
            return losses.detach(), x.grad.sign()

        def into_ball(x):
            return torch.max(torch.min(x, images + EPS), images - EPS).clamp(0, 1)

        with evaluating(net):
            first_loss, sign = look(images)
            first = into_ball(images + 2 * EPS * sign)
            second_loss, sign = look(first)
            stepped = into_ball(first + 2 * EPS * sign)
            second = into_ball(first + 0.75 * (stepped - first) + 0.25 * (first - images))
            third_loss, _ = look(second)
        candidates = torch.stack([images, first, second])
        best = torch.stack([first_loss, second_loss, third_loss]).argmax(0)
        return F.cross_entropy(net(candidates[best, torch.arange(len(images))]), labels)

    assert_same_training(AdversarialTraining(inner("apgd_ce", steps=2, random_start=False)), plain)


def test_noise_changes_with_the_epoch_and_not_with_the_batch():
    objective = AdversarialTraining(inner(steps=1, step_size=0.0))
    net, images = network(), torch.rand(6, 3, 6, 5, dtype=torch.float64)
    labels, ids = torch.zeros(6, dtype=torch.int64), torch.arange(6)
    whole = objective.craft(net, images, labels, 0, epoch=2, sample_ids=ids)
    half = objective.craft(net, images[3:], labels[3:], 9, epoch=2, sample_ids=ids[3:])
    assert torch.equal(whole[3:], half)
    assert not torch.equal(whole, objective.craft(net, images, labels, 0, epoch=3, sample_ids=ids))
    drawn = (images + EPS * noise("uniform", (3_000_002, "pgd", 1), images, ids)).clamp(0, 1)
    torch.testing.assert_close(whole, drawn, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("random_start", "length"), [(True, EPS), ("normal", 0.006)])
def test_a_normal_start_lies_beside_the_clean_image_and_a_uniform_one_anywhere_in_the_ball(random_start, length):
    objective = AdversarialTraining(inner(steps=1, step_size=0.0, random_start=random_start))
    images = torch.full((6, 3, 6, 5), 0.5, dtype=torch.float64)
    moved = objective.craft(network(), images, torch.zeros(6, dtype=torch.int64), 0) - images
    assert length / 3 < moved.abs().max() <= length
