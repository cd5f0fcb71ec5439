"""FAB against the official implementation in float64, its projections against linear and quadratic programs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import Counting, Linear, SmallNet, predicted
from pyautoattack.fab_pt import FABAttack_PT
from scipy.optimize import linprog, minimize
from test_apgd import OFFICIAL_NORMS, Deep

from ares_lightning.attacks import make_attack
from ares_lightning.attacks.fab import boundary_step
from ares_lightning.attacks.threat import BALLS

NORMS = ["linf", "l2", "l1"]
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
STEPS = 30


def hyperplane_case(kind: str, n: int = 30, d: int = 9):
    """Points of the box and linear functions: generic, with zero and equal weights and points on the edge, or with
    no zero in the box."""
    generator = torch.Generator().manual_seed(7)
    points = torch.rand(n, d, generator=generator, dtype=torch.float64)
    normal = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if kind == "degenerate":
        points[:, :2], points[:, 2:4] = 0, 1
        normal = (2 * normal).round() / 4
    reach = torch.where(normal > 0, points, points - 1).mul(normal).sum(1)  # how far down the box lets it go
    share = torch.rand(n, generator=generator, dtype=torch.float64) * 0.98 + (
        1.01 if kind == "out of reach" else 0.01
    )
    sign = torch.ones(n, dtype=torch.float64)
    sign[::2] = -1
    normal[::2] *= -1
    return points, normal, sign * share * reach


def program(norm: str, point: np.ndarray, normal: np.ndarray, value: float) -> float:
    """The least norm of a step inside the box that makes value + normal · step zero, by a solver."""
    d = len(point)
    if norm == "l2":
        box = list(zip(-point, 1 - point, strict=True))
        plane = {"type": "eq", "fun": lambda s: normal @ s + value, "jac": lambda s: normal}
        start = -value * normal / (normal @ normal)
        solved = minimize(
            lambda s: s @ s, start, jac=lambda s: 2 * s, bounds=box, constraints=plane, options={"ftol": 1e-15}
        )
        return float(np.sqrt(solved.fun))
    parts = [(0, room) for room in [*(1 - point), *point]]  # a step is a rise less a fall
    both = np.concatenate([normal, -normal])
    if norm == "l1":
        solved = linprog(np.ones(2 * d), A_eq=both[None], b_eq=[-value], bounds=parts)
    else:
        no_more = np.hstack([np.eye(2 * d), -np.ones((2 * d, 1))])
        goal, plane = np.append(np.zeros(2 * d), 1), np.append(both, 0)[None]
        solved = linprog(
            goal, A_ub=no_more, b_ub=np.zeros(2 * d), A_eq=plane, b_eq=[-value], bounds=[*parts, (0, 1)]
        )
    return float(solved.fun)


@pytest.mark.parametrize("kind", ["generic", "degenerate"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_boundary_step_is_the_shortest_that_a_solver_finds(norm, kind):
    points, normal, value = hyperplane_case(kind)
    step = boundary_step(points, normal, value, norm)
    torch.testing.assert_close((normal * step).sum(1), -value, rtol=0, atol=1e-12)
    assert (points + step).min() >= -1e-15
    assert (points + step).max() <= 1 + 1e-15
    least = [program(norm, *(x.numpy() for x in case)) for case in zip(points, normal, value, strict=True)]
    lengths = torch.linalg.vector_norm(step, ord=ORDER[norm], dim=1)
    torch.testing.assert_close(
        lengths, torch.tensor(least, dtype=torch.float64), rtol=1e-6 if norm == "l2" else 1e-9, atol=1e-12
    )


@pytest.mark.parametrize("norm", NORMS)
def test_where_the_box_holds_no_boundary_the_step_goes_to_its_nearest_corner(norm):
    points, normal, value = hyperplane_case("out of reach")
    normal[:, 3] = 0
    step = boundary_step(points, normal, value, norm)
    corner = (torch.sign(value)[:, None] * normal < 0).double()
    torch.testing.assert_close(step, torch.where(normal == 0, 0, corner - points), rtol=0, atol=1e-15)


@pytest.mark.parametrize("norm", NORMS)
def test_no_step_is_made_from_the_boundary_or_without_a_gradient(norm):
    points, normal, value = hyperplane_case("degenerate")
    assert not boundary_step(points, normal, torch.zeros_like(value), norm).any()
    assert not boundary_step(points, torch.zeros_like(normal), value, norm).any()
    steep = boundary_step(points.float(), normal.float() * 1e-20, value.float() * 1e-20, norm)
    torch.testing.assert_close(steep.double(), boundary_step(points, normal, value, norm), rtol=1e-5, atol=1e-6)


@pytest.fixture
def official(monkeypatch):
    """Make the official attack, which then computes in double precision."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)

    def make(net, norm, targeted, **settings):
        return FABAttack_PT(
            net, norm=OFFICIAL_NORMS[norm], n_iter=STEPS, targeted=targeted, device="cpu", **settings
        )

    yield make
    torch.set_default_dtype(torch.float32)


class Steep(Deep):
    """Gradients far above the 1e-8 that the official projections take for 0, which would part the trajectories."""

    def forward(self, images):
        return 1000 * super().forward(images)


@pytest.fixture
def case():
    net = Steep()
    images = torch.rand(6, 3, 8, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    images[0, 0] = 0
    images[1, 1] = 1
    return net, images, predicted(net, images)


@pytest.mark.parametrize("norm", NORMS)
def test_the_nearest_points_are_the_official_ones(norm, case, official):
    net, images, labels = case
    for name, num_runs in (("fab", 1), ("fab_t", 3)):
        settings = {} if name == "fab" else {"num_targets": num_runs}
        ours = make_attack(name, norm=norm, steps=STEPS, **settings)(net, images, labels)
        attack = official(net, norm, name == "fab_t")
        found = []
        for k in range(num_runs):
            attack.target_class = k + 2
            found.append(attack.attack_single_run(images, labels, is_targeted=name == "fab_t"))
        distances = torch.stack([BALLS[norm].distance(adversarial, images) for adversarial in found])
        distance, nearest = torch.where(distances > 0, distances, torch.inf).min(0)
        assert ours.broken.all()
        assert distance.isfinite().all()
        best = torch.stack(found)[nearest, torch.arange(len(images))]
        torch.testing.assert_close(ours.distance, distance, rtol=0, atol=1e-9)
        torch.testing.assert_close(ours.images, best, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_verdicts_within_a_budget_are_the_official_ones(norm, case, official):
    net, images, labels = case
    attack = make_attack("fab_t", norm=norm, steps=STEPS, num_targets=3)
    nearest = attack(net, images, labels)
    eps = nearest.distance.quantile(0.5).item()
    ours = attack.replace(eps=eps)(net, images, labels)
    adversarial = official(net, norm, True, eps=eps, n_target_classes=3).perturb(images, labels)
    theirs = predicted(net, adversarial) != labels
    assert 0 < theirs.sum() < len(images)
    assert torch.equal(ours.broken, theirs)
    assert torch.equal(ours.broken, nearest.distance <= eps)
    assert (ours.forwards[ours.broken] < nearest.forwards[ours.broken]).all(), "they leave as soon as broken"


@pytest.mark.parametrize("norm", NORMS)
def test_the_nearest_point_of_a_linear_model_is_found_though_the_box_is_in_the_way(norm):
    shape = (3, 6, 5)
    net = Linear(shape, 10)
    images = torch.rand(16, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).round(
        decimals=1
    )
    net.bias.data -= net(images).mean(0)
    logits = net(images).detach()
    labels = logits.argmax(1)
    radii = []
    for k in range(10):
        normal, value = (net.weight[k] - net.weight[labels]).detach(), logits[:, k] - logits.amax(1)
        step = boundary_step(images, normal, value, norm)
        reached = (value + (normal * step).sum(1)).abs() < 1e-9
        radii.append(
            torch.linalg.vector_norm(step, ord=ORDER[norm], dim=1).where(reached & (labels != k), torch.inf)
        )
    optimum, nearest_class = torch.stack(radii).min(0)
    for name in ("fab", "fab_t"):
        outcome = make_attack(name, norm=norm)(net, images, labels)
        ratio = outcome.distance / optimum
        assert ratio.min() > 1 - 1e-9
        assert ratio.median() < 1.01
        assert ratio.max() < 1.2
        aimed = make_attack(name, norm=norm)(net, images, labels, targets=nearest_class)
        assert torch.equal(aimed.adversarial_prediction, nearest_class)
        assert (aimed.distance / optimum).median() < 1.01


def test_with_targets_both_forms_aim_at_the_target_alone(case):
    net, images, labels = case
    targets = net(images).detach().argsort(1)[:, -4]
    one, other = (make_attack(name, steps=20)(net, images, labels, targets=targets) for name in ("fab", "fab_t"))
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.adversarial_prediction[one.broken], targets[one.broken])
    assert one.broken.float().mean() > 0.5
    assert (one.backwards < 2 * 20).all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_check_that_finds_nothing_is_the_next_gradient_as_well(norm, images):
    images, net = images[2:5], Counting(Linear((3, 6, 5), 10))
    net.net.bias.data[0] += 1000  # no boundary in the box
    labels = predicted(net, images)
    for name, num_runs, num_boundaries in (("fab", 1, 9), ("fab_t", 9, 1)):
        net.forwards = net.backwards = 0
        outcome = make_attack(name, norm=norm, eps=0.1)(net, images, labels)
        assert not outcome.broken.any()
        assert outcome.forwards.tolist() == [num_runs * 102] * len(images)
        assert outcome.backwards.tolist() == [num_runs * num_boundaries * 100] * len(images)
        assert net.forwards == (num_runs * 102 + 2) * len(images)
        assert net.backwards == outcome.backwards.sum()


@pytest.mark.parametrize("norm", NORMS)
def test_an_adversarial_iterate_costs_a_check_and_a_gradient(norm, images):
    images, net = images[2:5], Counting(Linear((3, 6, 5), 10))
    net.net.bias.data -= net(images).mean(0)
    labels = predicted(net, images)
    for name, num_runs, num_boundaries in (("fab", 1, 9), ("fab_t", 9, 1)):
        net.forwards = net.backwards = 0
        outcome = make_attack(name, norm=norm, eps=1e-6)(net, images, labels)
        assert not outcome.broken.any()
        assert net.forwards == outcome.forwards.sum() + 2 * len(images)
        assert net.backwards == outcome.backwards.sum()
        assert (outcome.forwards <= num_runs * 200).all()
        assert outcome.forwards.max() == num_runs * 200, "on a linear model most steps cross the boundary"
        assert outcome.backwards[outcome.forwards == num_runs * 200].unique() == num_runs * num_boundaries * 100


@pytest.mark.parametrize(("num_classes", "num_boundaries"), [(2, 1), (4, 3), (12, 10), (1000, 10)])
def test_the_ten_likeliest_other_classes_are_held_against_each_other(num_classes, num_boundaries):
    net = Linear((1, 4, 3), num_classes)
    images = torch.rand(8, 1, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = predicted(net, images)
    outcome = make_attack("fab", steps=1)(net, images, labels)
    assert outcome.forwards.tolist() == [2] * 8
    assert outcome.backwards.tolist() == [num_boundaries] * 8
    outcome = make_attack("fab_t", steps=1)(net, images, labels)
    assert outcome.backwards.tolist() == [min(num_classes - 1, 9)] * 8


@pytest.mark.parametrize("name", ["fab", "fab_t"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_restarts_only_bring_examples_nearer(name, norm, case):
    net, images, labels = case
    settings = {"norm": norm, "steps": 8} | ({"num_targets": 1} if name == "fab_t" else {})
    one = make_attack(name, **settings)(net, images, labels)
    many = make_attack(name, restarts=4, **settings)(net, images, labels)
    assert one.broken.any()
    before, after = (torch.where(o.broken, o.distance, torch.inf) for o in (one, many))
    assert (after <= before).all()
    assert (after < before).any()


@pytest.mark.parametrize("norm", NORMS)
def test_a_random_start_lies_half_as_far_as_the_budget(norm, images):
    images = images[2:] * 0.2 + 0.4  # far from the edges of the box
    weight = torch.randn(2, 90, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shown = []

    def net(x):
        shown.append(x.detach().clone())
        return x.flatten(1) @ weight.T + torch.tensor([1000.0, 0.0], dtype=torch.float64)

    make_attack("fab", norm=norm, eps=0.05, steps=1, restarts=2)(net, images, torch.zeros(10, dtype=torch.int64))
    _, first_start, _, second_start, *_ = shown
    assert torch.equal(first_start, images)
    torch.testing.assert_close(BALLS[norm].distance(second_start, images), torch.full((10,), 0.025).double())


def test_crafting_returns_the_nearest_example_of_one_run(images):
    net = SmallNet().double().eval()
    labels = predicted(net, images)
    for name in ("fab", "fab_t"):
        settings = {"num_targets": 1} if name == "fab_t" else {}
        crafted = make_attack(name, steps=20, restarts=3).craft(net, images, labels)
        outcome = make_attack(name, steps=20, **settings)(net, images, labels)
        assert torch.equal(crafted, outcome.images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0: expected"),
        ({"restarts": 0}, "restarts=0: expected"),
        ({"num_targets": 0}, "num_targets=0: expected"),
        ({"max_bias": 1.5}, r"max_bias=1\.5: expected"),
        ({"extrapolation": 0.9}, r"extrapolation=0\.9: expected"),
        ({"backward_step": 0}, "backward_step=0: expected"),
        ({"norm": "l0"}, "norm=l0"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make_attack("fab_t", **settings)


def test_the_defaults_are_the_official_ones():
    attack = make_attack("fab_t")
    official = FABAttack_PT(lambda x: x)
    assert (attack.steps, attack.restarts, attack.num_targets, attack.eps) == (100, 1, 9, None)
    assert attack.max_bias == official.alpha_max
    assert attack.extrapolation == official.eta
    assert attack.backward_step == official.beta
    assert attack.steps == official.n_iter
    assert attack.num_targets == official.n_target_classes
