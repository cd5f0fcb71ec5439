"""TRADES, MART and AdvProp: the loss by hand, and training against plain loops of the authors' code."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from plain import (
    EPS,
    assert_same_state,
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

from ares_lightning.training.objectives import MART, TRADES, AdvProp, AuxiliaryNorms

CLEAN = [[2.0, 0.0, -1.0], [0.5, 1.5, 0.0]]
MOVED = [[1.0, 1.5, -1.0], [0.0, 2.0, 1.0]]
LABELS = [0, 2]


def by_hand(objective) -> torch.Tensor:
    """The objective's loss where the clean logits are CLEAN and the adversarial ones MOVED."""
    clean, moved = (torch.tensor(z, dtype=torch.float64).view(2, 3, 1, 1) for z in (CLEAN, MOVED))
    return objective.loss(nn.Flatten(), clean, moved, torch.tensor(LABELS), 0)[0]


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(z) for z in logits)
    return [math.exp(z) / total for z in logits]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_the_loss_of_trades_by_hand():
    clean, moved = [softmax(z) for z in CLEAN], [softmax(z) for z in MOVED]
    ce = -(math.log(clean[0][0]) + math.log(clean[1][2])) / 2
    gap = (kl(clean[0], moved[0]) + kl(clean[1], moved[1])) / 2
    assert by_hand(TRADES(inner(), beta=3.0)).item() == pytest.approx(ce + 3 * gap, rel=1e-12)


def test_the_loss_of_mart_by_hand():
    clean, moved = [softmax(z) for z in CLEAN], [softmax(z) for z in MOVED]
    boosted = [
        -math.log(moved[0][0]) - math.log(1.0001 - moved[0][1] + 1e-12),
        -math.log(moved[1][2]) - math.log(1.0001 - moved[1][1] + 1e-12),
    ]
    weighed = [
        kl(clean[0], moved[0]) * (1.0000001 - clean[0][0]),
        kl(clean[1], moved[1]) * (1.0000001 - clean[1][2]),
    ]
    expected = sum(boosted) / 2 + 4 * sum(weighed) / 2
    assert by_hand(MART(inner(), beta=4.0)).item() == pytest.approx(expected, rel=1e-12)


def test_the_loss_of_advprop_by_hand_is_the_sum_of_both():
    ce = [
        -sum(math.log(softmax(z)[y]) for z, y in zip(logits, LABELS, strict=True)) / 2 for logits in (CLEAN, MOVED)
    ]
    assert by_hand(AdvProp(inner())).item() == pytest.approx(sum(ce), rel=1e-12)


def trades_attack(net, images, ids):
    """The clean forward again at every step, as in the authors' code."""

    def loss(z):
        return F.kl_div(z.log_softmax(1), net(images).softmax(1), reduction="sum")

    return pgd(net, images, normal_start(images, ids), loss, size=EPS / 4, steps=3)


def test_trades_is_the_authors_loop():
    """But for their second clean forward of the update, which enters their running statistics once more, and that
    the start is clamped to the box."""

    def plain(net, images, labels, ids):
        with evaluating(net):
            x = trades_attack(net, images, ids)
        loss = F.cross_entropy(net(images), labels)
        moved = net(x).log_softmax(1)
        with without_trace(net):
            clean = net(images).softmax(1)
        return loss + 6 * F.kl_div(moved, clean, reduction="sum") / len(images)

    assert_same_training(TRADES(inner(steps=3, step_size="1/4 eps", random_start="normal")), plain)


def test_mart_is_the_authors_loop():
    def plain(net, images, labels, ids):
        with evaluating(net):
            start = normal_start(images, ids)
            x = pgd(net, images, start, lambda z: F.cross_entropy(z, labels), size=EPS / 4, steps=3)
        logits, logits_adv = net(images), net(x)
        adv_probs, nat_probs = logits_adv.softmax(1), logits.softmax(1)
        order = adv_probs.argsort(1)[:, -2:]
        new_y = torch.where(order[:, -1] == labels, order[:, -2], order[:, -1])
        loss_adv = F.cross_entropy(logits_adv, labels) + F.nll_loss((1.0001 - adv_probs + 1e-12).log(), new_y)
        true_probs = nat_probs.gather(1, labels[:, None]).squeeze(1)
        gaps = F.kl_div((adv_probs + 1e-12).log(), nat_probs, reduction="none").sum(1)
        return loss_adv + 5 * (gaps * (1.0000001 - true_probs)).mean()

    assert_same_training(MART(inner(steps=3, step_size="1/4 eps", random_start="normal")), plain)


def test_mart_wants_class_labels():
    images, labels, _ = next(batches())
    with pytest.raises(ValueError, match=r"^name=mart: its loss needs class labels; set aug\.label_smoothing"):
        MART(inner()).craft(network(), images, F.one_hot(labels, 10).double(), 0)


def split_training(make, plain_loss, attack) -> None:
    """Train a network with split batch norms, and one in which the test itself puts the other norm in."""
    ours = network()
    objective = make(AuxiliaryNorms(ours))
    names = list(ours.state_dict())
    main = network().features[1]
    other = copy.deepcopy(main)

    def plain(net, images, labels, ids):
        main = net.features[1]
        with evaluating(net):
            other.eval()
            x = attack(net, other, images, labels, ids)
            other.train()
        clean = net(images)
        net.features[1] = other
        moved = net(x)
        net.features[1] = main
        return plain_loss(clean, moved, labels)

    assert_same_training(objective, plain, ours=ours, beside=other.parameters())
    assert list(ours.state_dict()) == names
    assert_same_state(objective.auxiliary.norms[0], other)
    assert not torch.allclose(ours.features[1].running_mean, other.running_mean)


def test_advprop_crafts_and_learns_through_norms_of_its_own():
    def attack(net, other, images, labels, ids):
        main, net.features[1] = net.features[1], other
        start = uniform_start(images, ids)
        x = pgd(net, images, start, lambda z: F.cross_entropy(z, labels), size=EPS, steps=1)
        net.features[1] = main
        return x

    split_training(
        lambda norms: AdvProp(inner(steps=1, step_size="1 eps"), norms=norms),
        lambda clean, moved, labels: F.cross_entropy(clean, labels) + F.cross_entropy(moved, labels),
        attack,
    )


def test_trades_with_split_norms_holds_the_prediction_through_one_to_that_through_the_other():
    def attack(net, other, images, labels, ids):
        clean = net(images).softmax(1).detach()
        main, net.features[1] = net.features[1], other
        start = normal_start(images, ids)
        x = pgd(
            net, images, start, lambda z: F.kl_div(z.log_softmax(1), clean, reduction="sum"), size=0.05, steps=2
        )
        net.features[1] = main
        return x

    def loss(clean, moved, labels):
        gap = F.kl_div(moved.log_softmax(1), clean.softmax(1), reduction="batchmean")
        return F.cross_entropy(clean, labels) + 6 * gap

    split_training(
        lambda norms: TRADES(inner(steps=2, step_size=0.05, random_start="normal"), norms=norms), loss, attack
    )


@pytest.mark.parametrize("make", [TRADES, MART, AdvProp])
def test_adversarial_images_never_touch_the_networks_own_statistics(make):
    net, alone = network(), network()
    objective = make(inner(steps=1, mode="train"), norms=AuxiliaryNorms(net))
    for step, (images, labels, ids) in enumerate(batches(3)):
        adversarial = objective.craft(net, images, labels, step, sample_ids=ids)
        objective.loss(net, images, adversarial, labels, step)
        alone(images)
    assert_same_state(net.features[1], alone.features[1])
    assert objective.auxiliary.norms[0].num_batches_tracked == net.features[1].num_batches_tracked


def test_split_norms_come_back_after_an_error():
    net = network()
    own = dict(net.named_parameters())
    with pytest.raises(KeyError), AuxiliaryNorms(net).in_place():
        raise KeyError
    assert all(parameter is own[name] for name, parameter in net.named_parameters())


def test_a_network_without_batch_norms_has_none_to_split():
    with pytest.raises(ValueError, match=r"^split_bn=true: the network has no batch norms"):
        AuxiliaryNorms(nn.Linear(2, 2))
