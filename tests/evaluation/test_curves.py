"""Three ways to a robustness curve: what they mean, and what they cost."""

from __future__ import annotations

import pytest
import torch
from networks import Counting, SmallNet, predicted

from ares_lightning.attacks import make_attack
from ares_lightning.attacks.passes import Passes
from ares_lightning.evaluation.curves import BisectedCurve, BracketedCurve, ExactCurve, curve_budgets

GRID = (0.01, 0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.15, 0.2)


@pytest.fixture
def case():
    net = Counting(SmallNet().double().eval())
    images = torch.rand(40, 3, 6, 5, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    labels = predicted(net, images)
    labels[0] = (labels[0] + 1) % 10
    net.forwards = 0
    return net, images, labels, torch.arange(40)


def answers(curve, net, images, labels, ids):
    return list(curve.verdicts(net, images, labels, ids, 0, Passes(batch_size=16)))


def broken(verdicts):
    return torch.stack([answer.outcome.broken for answer in verdicts])


def passes(verdicts):
    return sum(int((answer.outcome.forwards + answer.outcome.backwards).sum()) for answer in verdicts)


@pytest.mark.parametrize("curve", [ExactCurve, BracketedCurve, BisectedCurve])
def test_every_row_is_a_verdict_within_its_budget_and_no_curve_rises(curve, case):
    net, images, labels, _ = case
    rows = answers(curve("curve", make_attack("pgd", steps=10), GRID), *case)
    assert [row.eps for row in rows] == [0.0, *GRID]
    for row in rows:
        assert torch.equal(row.outcome.broken, predicted(net, row.outcome.images) != labels)
        assert (row.outcome.distance <= row.eps + 6e-8).all()
        assert torch.equal(row.outcome.images[~row.outcome.broken], images[~row.outcome.broken])
    assert (broken(rows).int().diff(dim=0) >= 0).all()
    assert rows[0].outcome.broken.tolist() == [True] + 39 * [False]
    assert broken(rows)[-1].float().mean() > 0.9


def test_the_exact_curve_is_at_least_as_strong_as_independent_runs(case):
    net, images, labels, ids = case
    attack = make_attack("pgd", steps=10)
    rows = answers(ExactCurve("curve", attack, GRID), *case)
    for row in rows[1:]:
        alone = attack.replace(eps=row.eps)(net, images, labels, sample_ids=ids).broken
        assert (row.outcome.broken | ~alone).all()


def test_the_bracketed_curve_is_no_higher_than_the_exact_one_of_a_strong_attack_and_costs_a_fraction(case):
    attack = make_attack("apgd_t", steps=30)
    grid = tuple(0.003 * k for k in range(1, 10))
    exact = answers(ExactCurve("curve", attack, grid), *case)
    bracketed = answers(BracketedCurve("curve", attack, grid), *case)
    difference = broken(exact).double().mean(1) - broken(bracketed).double().mean(1)
    assert difference.abs().max() <= 0.05
    assert broken(exact)[-1].double().mean() > 0.5
    net, images, labels, ids = case
    one = attack.replace(eps=grid[0])(net, images, labels, sample_ids=ids)
    assert passes(bracketed) <= 1.25 * int((one.forwards + one.backwards).sum()) + 39 * 201
    assert passes(bracketed) < passes(exact) / 2


def test_the_bisected_curve_closes_in_on_the_smallest_budget(case):
    attack = make_attack("pgd", eps=0.04, steps=20)
    fine = tuple((0.005 * torch.arange(1, 60)).tolist())
    rows = answers(BisectedCurve("curve", attack, fine, bisections=6), *case)
    exact = answers(ExactCurve("curve", attack, fine), *case)
    assert (broken(rows).double().mean(1) - broken(exact).double().mean(1)).abs().max() <= 0.1


@pytest.mark.parametrize("eps", [(), (0.2, 0.1), (0.1, 0.1)])
def test_budgets_must_rise(eps):
    with pytest.raises(ValueError, match="rising list"):
        ExactCurve("curve", make_attack("pgd"), eps)


def test_the_usual_budgets_are_multiples_of_the_threat_models():
    assert curve_budgets(0.1, None) == pytest.approx((0.025, 0.05, 0.075, 0.1, 0.15, 0.2))
    assert curve_budgets(0.1, [0.3]) == (0.3,)


def test_a_curve_of_an_attack_that_needs_targets_is_refused():
    with pytest.raises(ValueError, match="attack=tta: knows a targeted form only"):
        ExactCurve("curve", make_attack("tta"), (0.1,))
