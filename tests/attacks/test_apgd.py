"""APGD against the official implementation in float64, and what it costs."""

from __future__ import annotations

import pytest
import torch
from networks import Counting, SmallNet, predicted
from pyautoattack import autopgd_base
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import nn

from ares_lightning.attacks import make_attack
from ares_lightning.attacks.search import Search

EPS = {"linf": 0.03, "l2": 0.5, "l1": 6.0}
OFFICIAL_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


class Deep(nn.Module):
    """A deep network with kinks, on which trajectories part as soon as one step differs."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(3)
            layers: list[nn.Module] = []
            for width_in, width in [(3, 16), (16, 16), (16, 16), (16, 16), (16, 32)]:
                layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 8 * 7, num_classes)).double()
            self.layers(torch.rand(64, 3, 8, 7, dtype=torch.float64))
            self.eval()
        self.seen: list[torch.Tensor] = []

    def forward(self, images):
        self.seen.append(images.detach().clone())
        return 3 * self.layers(images)


@pytest.fixture
def case():
    net = Deep()
    images = torch.rand(8, 3, 8, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    labels = predicted(net, images)
    net.seen.clear()
    return net, images, labels


def official(kind: str, norm: str, net, images, labels, targets, start, steps):
    """Run the official attack from a given start; return its best points."""
    settings = {"norm": OFFICIAL_NORMS[norm], "eps": EPS[norm], "n_iter": steps, "device": "cpu", "seed": 0}
    if kind == "apgd_t":
        attack = APGDAttack_targeted(net, **settings)
        attack.y_target = targets
    else:
        attack = APGDAttack(net, loss=kind.removeprefix("apgd_"), **settings)
    attack.init_hyperparam(images)
    if norm != "l1":
        return attack.attack_single_run(images, labels, x_init=start)
    shares = [-(-3 * steps // 10), -(-3 * steps // 10)]
    budgets, iterations = [3 * EPS[norm], 2 * EPS[norm], EPS[norm]], [*shares, steps - sum(shares)]
    return attack.decr_eps_pgd(images, labels, budgets, iterations)


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("kind", ["apgd_ce", "apgd_dlr", "apgd_t"])
def test_every_iterate_is_the_official_one(kind, norm, case, monkeypatch, request):
    net, images, labels = case
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    monkeypatch.setattr(Search, "noise", lambda *_: noise)
    steps = 100
    targets = net(images).detach().argsort(1)[:, -2] if kind == "apgd_t" else None
    net.seen.clear()
    ours = make_attack(kind, norm=norm, eps=EPS[norm], steps=steps).craft(net, images, labels)
    seen = net.seen[1:] if kind == "apgd_t" else list(net.seen)
    net.seen.clear()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the official L1 projection casts
    monkeypatch.setattr(torch, "randn_like", lambda _: noise.clone())
    # Where a pixel goes back to its clean value, rounding leaves a trace that the official count takes for a move.
    monkeypatch.setattr(autopgd_base, "L0_norm", lambda moved: (moved.abs() > 1e-12).flatten(1).sum(1))
    torch.set_default_dtype(torch.float64)
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    best = official(kind, norm, net, images, labels, targets, seen[0], steps)[0]
    assert len(seen) == len(net.seen) == steps + (3 if norm == "l1" else 1)
    for step, (own, theirs) in enumerate(zip(seen, net.seen, strict=True)):
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-9, msg=lambda m, k=step: f"step {k}: {m}")
    torch.testing.assert_close(ours, best, rtol=0, atol=1e-9)
    assert (best - images).abs().amax() > 0


@pytest.mark.parametrize("norm", EPS)
def test_pixels_in_another_order_are_moved_alike(norm, case, monkeypatch):
    """Sums over pixels round differently then, as they do on a GPU in a batch of another size."""
    net, images, labels = case
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    order = torch.randperm(images[0].numel(), generator=torch.Generator().manual_seed(6))
    attack = make_attack("apgd_ce", norm=norm, eps=EPS[norm], steps=100)

    def shuffled(tensor, order=order):
        return tensor.flatten(1)[:, order].view_as(tensor)

    monkeypatch.setattr(Search, "noise", lambda *_: noise)
    crafted = attack.craft(net, images, labels)
    monkeypatch.setattr(Search, "noise", lambda *_: shuffled(noise))
    others = attack.craft(lambda points: net(shuffled(points, order.argsort())), shuffled(images), labels)
    torch.testing.assert_close(others, shuffled(crafted), rtol=0, atol=1e-12)
    assert (crafted - images).abs().amax() > 0


@pytest.mark.parametrize("norm", EPS)
def test_a_survivor_costs_what_the_iterates_need(norm, images):
    net = Counting(SmallNet().double().eval())
    labels = predicted(net, images)
    extra = 2 if norm == "l1" else 0
    for name, runs, settings in [
        ("apgd_ce", 1, {"restarts": 1}),
        ("apgd_dlr", 2, {"restarts": 2}),
        ("apgd_t", 9, {"num_targets": 9}),
    ]:
        net.forwards = net.backwards = 0
        outcome = make_attack(name, norm=norm, eps=1e-7, steps=100, **settings)(net, images, labels)
        assert not outcome.broken.any()
        assert net.backwards == runs * 100 * len(images)
        assert net.forwards == (runs * (101 + extra) + 2) * len(images)
        assert outcome.forwards.tolist() == [runs * (101 + extra)] * len(images)
        assert outcome.backwards.tolist() == [runs * 100] * len(images)


@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_few_classes_have_few_targets_and_margins_for_losses(num_classes, images):
    net = SmallNet(num_classes=num_classes).double().eval()
    labels = predicted(net, images)
    outcome = make_attack("apgd_t", eps=1e-7, steps=5)(net, images, labels)
    assert (outcome.forwards == 6 * (num_classes - 1)).all()
    for name in ("apgd_dlr", "apgd_t"):
        outcome = make_attack(name, eps=0.2, steps=20)(net, images, labels)
        assert outcome.broken.float().mean() > 0.5


@pytest.mark.parametrize("norm", EPS)
def test_defaults_are_the_same_for_every_norm(norm):
    attack = make_attack("apgd_ce", norm=norm, eps=1)
    assert (attack.steps, attack.restarts) == (100, 1)
    assert make_attack("apgd_t", norm=norm, eps=1).num_targets == 9


@pytest.mark.parametrize("norm", EPS)
def test_targets_side_by_side_find_and_count_what_one_after_another_does(norm):
    images = torch.rand(60, 3, 6, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    net = Counting(SmallNet().double().eval())
    labels = predicted(net, images)
    attack = make_attack("apgd_t", norm=norm, eps={"linf": 0.02, "l2": 0.1, "l1": 0.5}[norm], steps=12)
    net.forwards = net.calls = 0
    in_turn = attack(net, images, labels)
    calls_in_turn, net.calls = net.calls, 0
    together = attack(net, images, labels, batch_size=240)
    assert net.calls < 0.6 * calls_in_turn
    assert 20 < in_turn.broken.sum() < 55
    assert in_turn.forwards[in_turn.broken].max() > 2 * 13, "some must break at a later target"
    for column in ("images", "broken", "distance", "forwards", "backwards"):
        torch.testing.assert_close(getattr(together, column), getattr(in_turn, column), rtol=0, atol=1e-12)
