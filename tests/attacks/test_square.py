"""Square Attack: the authors' trajectory with replayed draws, pass counts, its windows, odd images."""

from __future__ import annotations

import math

import pytest
import torch
from networks import Counting, SmallNet, predicted
from torch import nn

from ares_lightning.attacks import search
from ares_lightning.attacks.square import Square
from ares_lightning.attacks.threat import BALLS

EPS = {"linf": 0.06, "l2": 0.5, "l1": 4.0}


class Recording(nn.Module):
    """Keeps every image that the network is shown, and the logits."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.shown, self.logits = net, [], []

    def forward(self, images):
        logits = self.net(images)
        self.shown.append(images.clone())
        self.logits.append(logits.clone())
        return logits


def without_residue(images, clean):
    """Put back, in place, pixels that rounding alone has moved: an L1 window of such dust would be normalised."""
    return images.copy_(torch.where((images - clean).abs() < 1e-12, clean, images))


def ours(net, image, label, attack, targets, monkeypatch):
    """Our run on one image: the images shown, the logits, the last best image, and the random numbers drawn."""
    tape, draw = [], search.sample_noise

    def recorded(*arguments):
        noise = draw(*arguments)
        tape.append(noise.flatten())
        return noise

    scaled = Square._scaled
    with monkeypatch.context() as patch:
        patch.setattr(search, "sample_noise", recorded)
        patch.setattr(Square, "_scaled", lambda self, *args: without_residue(scaled(self, *args), image))
        recording = Recording(net)
        final = attack.craft(recording, image, label, targets=targets)
    return recording.shown, recording.logits, final, torch.cat(tape)


def official(net, image, label, attack, targets, tape, monkeypatch):
    """The authors' run on one image with these random numbers, in float64."""
    from pyautoattack import square

    position = 0

    def replayed(shape):
        nonlocal position
        size = torch.Size(shape).numel()
        position += size
        return ((tape[position - size : position] + 1) / 2).view(*shape)

    projection = square.L1_projection
    recording = Recording(net)
    norm = {"linf": "Linf", "l2": "L2", "l1": "L1"}[attack.norm]
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "rand", replayed)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(square, "L1_projection", lambda x, delta, eps: projection(x, delta, eps / (1 - 1e-6)))
        torch.set_default_dtype(torch.float64)
        try:
            theirs = square.SquareAttack(
                recording,
                norm=norm,
                n_queries=attack.queries,
                eps=attack.eps,
                resc_schedule=attack.rescale_schedule,
                targeted=targets is not None,
            )
            theirs.init_hyperparam(image)
            judge = theirs.margin_and_loss
            patch.setattr(theirs, "margin_and_loss", lambda x, y: judge(without_residue(x, image), y))
            final = theirs.attack_single_run(image, label if targets is None else targets)[1]
        finally:
            torch.set_default_dtype(torch.float32)
    return recording.shown, recording.logits, final


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("targeted", [False, True])
def test_the_trajectory_is_that_of_the_authors_code_with_the_same_draws(norm, targeted, monkeypatch):
    """Image by image: every query, and so the best loss after each, and the last best image."""
    net = SmallNet().double().eval()
    images = torch.rand(4, 3, 10, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = predicted(net, images)
    attack = Square(norm=norm, eps=EPS[norm] / 4, queries=300, rescale_schedule=not targeted)
    lengths = []
    for i in range(len(images)):
        image, label = images[i : i + 1], labels[i : i + 1]
        targets = (label + 1) % 10 if targeted else None
        shown, logits, final, tape = ours(net, image, label, attack, targets, monkeypatch)
        their_shown, their_logits, their_final = official(net, image, label, attack, targets, tape, monkeypatch)
        lengths.append(len(their_shown))
        for step, (one, other) in enumerate(zip(shown, their_shown, strict=False)):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9, msg=f"image {i}, query {step}")
        if len(their_shown) == len(shown):  # theirs stops at success, crafting does not
            torch.testing.assert_close(final, their_final, rtol=0, atol=1e-9)
            torch.testing.assert_close(torch.cat(logits), torch.cat(their_logits), rtol=0, atol=1e-8)
    assert lengths.count(301) >= 2


@pytest.mark.parametrize("norm", EPS)
def test_a_survivor_costs_a_forward_more_than_its_queries_and_no_backward(norm, images):
    net = Counting(SmallNet().double().eval())
    labels = predicted(net, images)
    net.forwards = 0
    outcome = Square(norm=norm, eps=1e-6, queries=120)(net, images, labels)
    assert outcome.forwards.tolist() == [121] * 12
    assert net.forwards == (121 + 2) * 12
    assert net.backwards == outcome.backwards.sum() == 0
    outcome = Square(norm=norm, eps=1e-6, queries=20, restarts=3)(net, images, labels)
    assert outcome.forwards.tolist() == [3 * 21] * 12


def test_the_defaults_are_those_of_autoattack():
    attack = Square()
    assert (attack.queries, attack.p_init, attack.restarts, attack.rescale_schedule) == (5000, 0.8, 1, False)


@pytest.mark.parametrize("norm", EPS)
def test_more_queries_and_restarts_break_more(norm, images):
    net = SmallNet().double().eval()
    labels = predicted(net, images)
    few, many, again = (
        Square(norm=norm, eps=EPS[norm] * 0.7, queries=queries, restarts=restarts)(net, images, labels)
        for queries, restarts in ((2, 1), (200, 1), (2, 40))
    )
    assert few.broken.sum() < many.broken.sum() < 12
    assert (many.broken | ~few.broken).all(), "the same draws come first"
    assert (again.broken | ~few.broken).all()
    assert again.broken.sum() > few.broken.sum()


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("size", [(5, 5), (3, 9), (1, 1), (14, 14), (7, 2)])
def test_windows_fit_images_of_any_shape(norm, size):
    images = torch.rand(6, 2, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = Recording(SmallNet(in_chans=2).double().eval())
    eps = EPS[norm] / 3
    Square(norm=norm, eps=eps, queries=40).craft(net, images, predicted(net, images))
    clean, start, *proposals = net.shown
    assert len(proposals) == 40
    for shown in (start, *proposals):
        assert shown.min() >= 0
        assert shown.max() <= 1
        assert BALLS[norm].distance(shown, images).max() <= eps * (1 + 1e-9)
    assert not torch.equal(start, clean)


def test_each_sample_draws_its_own_windows():
    """From equal images: what a proposal changes is one square, elsewhere in each sample."""
    images = torch.full((64, 3, 12, 12), 0.5, dtype=torch.float64)
    net = Recording(lambda x: x.flatten(1)[:, :2] * 0)  # nothing is ever better than the start
    Square(eps=0.1, queries=300).craft(net, images, torch.zeros(64, dtype=torch.int64))
    changed = (net.shown[300] != net.shown[0]).any(1)
    side = math.isqrt(int(changed[0].sum()))
    tall, wide = changed.any(2).sum(1), changed.any(1).sum(1)
    assert side < 5
    assert torch.equal(changed.sum((1, 2)), tall * wide), "a rectangle"
    assert (tall <= side + 1).all()
    assert len(changed.flatten(1).unique(dim=0)) > 16


def test_a_windows_side_follows_the_published_schedule():
    images = torch.zeros(1, 3, 32, 32)
    sides = [Square()._window(query, images) for query in (0, 10, 11, 51, 201, 501, 1001, 2001, 4001, 4999)]
    assert sides == [29, 29, 20, 14, 10, 7, 5, 4, 3, 3]
    scaled = Square(queries=1000, rescale_schedule=True)
    assert [scaled._window(query, images) for query in (0, 1, 2, 401, 999)] == [29, 29, 20, 3, 1]
    assert [Square(norm="l2")._window(query, images) for query in (0, 11, 4999)] == [29, 21, 3]


def test_a_randomised_network_is_queried_eot_times(images):
    net = Counting(SmallNet().double().eval())
    labels = predicted(net, images)
    outcome = Square(eps=1e-6, queries=10, eot=3)(net, images, labels)
    assert outcome.forwards.tolist() == [3 * 11] * 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries": 0}, "queries=0"),
        ({"restarts": 0}, "restarts=0"),
        ({"p_init": 0}, "p_init=0"),
        ({"p_init": 1.5}, r"p_init=1\.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        Square(**settings)
