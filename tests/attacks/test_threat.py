"""The geometry of the three balls, held to reference solvers and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from ares_lightning.attacks import parse_budget
from ares_lightning.attacks.noise import LEAST_NUMBERS, sample_noise
from ares_lightning.attacks.threat import BALLS

NORMS = ("linf", "l2", "l1")
TOLERANCE = {
    torch.float32: {"linf": 6e-8, "l2": 1e-5, "l1": 1e-5},
    torch.float64: {"linf": 1e-12, "l2": 1e-9, "l1": 1e-9},
}


def random_case(seed: int, spread: float, shape=(4, 3, 5, 4), dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(shape, generator=generator, dtype=dtype)
    clean[0, 0], clean[0, 1] = 0, 1
    return clean, clean + spread * torch.randn(shape, generator=generator, dtype=dtype)


def allowed(norm: str, eps: float, dtype: torch.dtype) -> float:
    tolerance = TOLERANCE[dtype][norm]
    return eps + tolerance if norm == "linf" else eps * (1 + tolerance)


def farthest_along(direction: np.ndarray, norm: str, clean: np.ndarray, eps: float) -> float:
    """The largest `direction · (z − clean)` over ball ∩ box: by linear programming; L2 by bisection."""
    room = np.where(direction > 0, 1 - clean, clean)
    slope = np.abs(direction)
    if norm == "l2":
        if np.linalg.norm(room) <= eps:
            return float(slope @ room)
        low, high = 0.0, 1e12
        for _ in range(200):
            scale = (low * high) ** 0.5 if low else high / 2
            low, high = (scale, high) if np.linalg.norm(np.minimum(slope * scale, room)) < eps else (low, scale)
        return float(slope @ np.minimum(slope * low, room))
    budget = {"A_ub": np.ones((1, len(clean))), "b_ub": [eps]} if norm == "l1" else {}
    reach = np.minimum(room, eps)
    return -linprog(-slope, bounds=list(zip(0 * reach, reach, strict=True)), **budget).fun


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("spread", [0.1, 0.6, 3.0])
def test_projection_is_the_nearest_point_of_ball_and_box(norm, spread):
    """p is the projection of x onto a convex set exactly if no z in the set has (x − p)·(z − p) > 0."""
    clean, point = random_case(3, spread, shape=(20, 2, 3, 2))
    eps = {"linf": 0.2, "l2": 0.5, "l1": 0.8}[norm]
    projected = BALLS[norm].project(point, clean, eps)
    for p, x, c in zip(projected, point, clean, strict=True):
        p, x, c = (t.flatten().numpy() for t in (p, x, c))
        assert farthest_along(x - p, norm, c, eps) - (x - p) @ (p - c) < 1e-8


@pytest.mark.parametrize("norm", NORMS)
@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.0, 1e-4, 0.05, 0.5, 10.0]),
    eps=st.sampled_from([0.0, 1e-3, 4 / 255, 0.3, 1.0, 5.0, 1000.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=40, deadline=None)
def test_projection_keeps_the_contract(norm, seed, spread, eps, dtype):
    ball = BALLS[norm]
    clean, point = random_case(seed, spread, dtype=dtype)
    _, other = random_case(seed + 1, spread, dtype=dtype)
    projected = ball.project(point, clean, eps)
    assert projected.dtype == dtype
    assert projected.min() >= 0
    assert projected.max() <= 1
    assert (ball.distance(projected, clean) <= allowed(norm, eps, dtype)).all()
    slack = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ball.project(projected, clean, eps), projected, atol=slack, rtol=0)
    moved = (projected - ball.project(other, clean, eps)).flatten(1).norm(dim=1)
    assert (moved <= (point - other).flatten(1).norm(dim=1) + 10 * slack).all(), "not non-expansive"
    inside = ball.project(clean, clean, eps)
    assert torch.equal(inside, clean)


def test_l1_projection_is_right_where_the_budget_is_just_what_saturated_pixels_take():
    clean = torch.tensor([0.3, 0.6, 0.5, 0.5], dtype=torch.float64).view(1, 1, 2, 2)
    wanted = clean + torch.tensor([5.0, 4.0, 0.2, -0.1], dtype=torch.float64).view(1, 1, 2, 2)
    projected = BALLS["l1"].project(wanted, clean, 0.7 + 0.4)
    expected = torch.tensor([1.0, 1.0, 0.5, 0.5], dtype=torch.float64).view(1, 1, 2, 2)
    torch.testing.assert_close(projected, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_budgets_may_differ_by_sample(norm):
    clean, point = random_case(5, 1.0)
    eps = torch.tensor([0.05, 0.1, 0.2, 0.4], dtype=torch.float64)
    together = BALLS[norm].project(point, clean, eps)
    alone = [BALLS[norm].project(point[i : i + 1], clean[i : i + 1], float(eps[i])) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-12, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_no_step_of_its_length_raises_the_linear_loss_more(norm):
    images, gradient = random_case(7, 1.0)
    step = BALLS[norm].steepest_step(images, gradient, 0.3)
    gains = (step * gradient).flatten(1).sum(1)
    if norm == "linf":
        best = 0.3 * gradient.flatten(1).abs().sum(1)
    elif norm == "l2":
        best = 0.3 * gradient.flatten(1).norm(dim=1)
    else:  # inside the box: a linear programme
        best = []
        for image, slope in zip(images.flatten(1).numpy(), gradient.flatten(1).numpy(), strict=True):
            bounds = [(0, 1 - x) for x in image] + [(0, x) for x in image]
            result = linprog(
                np.concatenate([-slope, slope]), A_ub=np.ones((1, len(bounds))), b_ub=[0.3], bounds=bounds
            )
            best.append(-result.fun)
        best = torch.tensor(best, dtype=torch.float64)
    torch.testing.assert_close(gains, best, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_steps_survive_vanishing_and_huge_gradients(norm, scale):
    images, gradient = random_case(8, 1.0, dtype=torch.float32)
    step = BALLS[norm].steepest_step(images, gradient * scale, 0.3)
    assert step.isfinite().all()
    if norm == "l2" and scale:
        torch.testing.assert_close(step.flatten(1).norm(dim=1), torch.full((4,), 0.3))


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_are_uniform_in_the_ball(norm):
    """Far from the box, P(distance ≤ r·eps) = r^d, and no direction is preferred."""
    n, shape, eps = 4000, (1, 1, 3), 0.1
    clean = torch.full((n, *shape), 0.5, dtype=torch.float64)
    calls = []

    def noise(kind, size):
        calls.append(kind)
        return sample_noise(kind, ("test", len(calls)), range(n), size, clean)

    points = BALLS[norm].uniform(clean, eps, noise)
    distance = BALLS[norm].distance(points, clean)
    assert (distance <= eps * (1 + 1e-9)).all()
    for r in (0.5, 0.8):
        share = (distance <= r * eps).double().mean().item()
        assert abs(share - r**3) < 4 * (r**3 * (1 - r**3) / n) ** 0.5
    mean = (points - clean).flatten(1).mean(0)
    assert (mean.abs() < 4 * eps / n**0.5).all()


def test_noise_belongs_to_the_sample():
    like = torch.empty(1, dtype=torch.float32)
    together = sample_noise("normal", (0, "pgd", 1), [3, 8, 5], (2, 4), like)
    alone = sample_noise("normal", (0, "pgd", 1), [8], (2, 4), like)
    assert torch.equal(together[1], alone[0])
    for key in ((1, "pgd", 1), (0, "fgsm", 1), (0, "pgd", 2)):
        assert not torch.equal(alone, sample_noise("normal", key, [8], (2, 4), like))


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_noise_has_the_same_bits_however_many_threads_draw_it(kind):
    ids, shape, like = list(range(11)), (3, 200, 200), torch.empty(0)
    assert len(ids) * math.prod(shape) > LEAST_NUMBERS
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        many = sample_noise(kind, (0, "pgd", 1), ids, shape, like)
    finally:
        torch.set_num_threads(before)
    alone = [sample_noise(kind, (0, "pgd", 1), [i], shape, like) for i in ids]
    assert torch.equal(many, torch.cat(alone))


@pytest.mark.parametrize(
    ("text", "value"),
    [("4/255", 4 / 255), ("0.0157", 0.0157), (" 8/255 ", 8 / 255), (0, 0.0), (0.3, 0.3), ("1e-2", 0.01)],
)
def test_budgets_are_read_from_numbers_and_fractions(text, value):
    assert parse_budget(text) == value


@pytest.mark.parametrize("text", ["abc", "-1", -0.1, "1/0", None, "nan", float("inf"), True, [], ""])
def test_budgets_that_make_no_sense_are_refused(text):
    with pytest.raises(ValueError, match="eps="):
        parse_budget(text)
