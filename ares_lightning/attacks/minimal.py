"""Attacks that look for the nearest adversarial example: Carlini & Wagner, DeepFool and FMN."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ares_lightning.attacks.apgd import likeliest_wrong_classes
from ares_lightning.attacks.attack import Attack, check_count
from ares_lightning.attacks.losses import LOSSES, Objective, as_objective, class_gaps, margin
from ares_lightning.attacks.search import Rows, Search
from ares_lightning.attacks.threat import BALLS, DUAL_ORDER, per_sample

FLAT = 1e-20
"""Slope that stands in for zero where one divides by it."""


@dataclass(frozen=True, kw_only=True)
class CW(Attack):
    """Carlini & Wagner's L2 attack: Adam on ‖x − clean‖² + const · max(z_y − max_{k≠y} z_k, 0) in tanh space.

    search_steps: runs, between which each sample's const is bisected or, while nothing is found, multiplied by ten;
        9 as in the authors' code.
    steps: Adam's steps in a run, 1000 as in the authors' example (their code allows up to 10,000). A run costs at
        most `steps` + 1 forwards and `steps` backwards, and ends early for a sample whose lowest objective has not
        fallen by 0.01 % in a tenth of the steps.
    step_size: Adam's, 0.01 as in the authors' code.
    const: the first weight of the misclassification, 0.001 as in the authors' code.

    What is nearest is judged at confidence 0: any misclassification counts.

    Carlini & Wagner 2017, arXiv 1608.04644, section VI.A; defaults from the authors' code, nn_robust_attacks.
    """

    name: ClassVar[str] = "cw"
    kind: ClassVar[str] = "white-box"
    norms: ClassVar[tuple[str, ...]] = ("l2",)
    nearest: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 1608.04644"

    norm: str = "l2"
    search_steps: int = 9
    steps: int = 1000
    step_size: float = 0.01
    const: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("search_steps", self.search_steps)
        check_count("steps", self.steps)
        _check_positive("step_size", self.step_size)
        _check_positive("const", self.const)

    def _objective(self) -> Objective:
        return _negative_hinge

    def _run(self, search: Search) -> None:
        const = torch.full_like(search.eps, self.const)
        rows = search.track(const=const, low=torch.zeros_like(const), high=torch.full_like(const, math.inf))
        for _ in range(self.search_steps):
            self._descend(search, rows)
            if not len(search):
                return
            rows.high = torch.where(rows.found, torch.minimum(rows.high, rows.const), rows.high)
            rows.low = torch.where(rows.found, rows.low, torch.maximum(rows.low, rows.const))
            rows.const = torch.where(rows.high.isfinite(), (rows.low + rows.high) / 2, 10 * rows.const)

    def _descend(self, search: Search, rows: Rows) -> None:
        """Make one run with `rows.const`; `rows.found` says where it met an adversarial example."""
        rows.point = torch.atanh((2 * search.clean - 1) * INSIDE)
        rows.mean, rows.square = torch.zeros_like(rows.point), torch.zeros_like(rows.point)
        rows.found = torch.zeros_like(rows.const, dtype=torch.bool)
        rows.falling = ~rows.found
        rows.lowest = rows.before = torch.full_like(rows.const, math.inf)
        for step in range(self.steps):
            rows.images = _from_tanh_space(rows.point)
            passed = search.gradient(rows.images, where=rows.falling)
            if not len(search):
                return
            rows.found = rows.found | passed.broken
            delta = rows.images - search.clean
            objective = delta.double().square().flatten(1).sum(1) - rows.const * passed.loss
            rows.lowest = torch.minimum(rows.lowest, objective)
            if (step + 1) % max(self.steps // CHECKS, 1) == 0:
                rows.falling = rows.falling & (rows.lowest <= ENOUGH * rows.before)
                rows.before = rows.lowest
                if not bool(rows.falling.any()):
                    return
            slope = 2 * delta - per_sample(rows.const, delta) * passed.gradient
            slope *= 2 * rows.images * (1 - rows.images)  # the derivative of the image in tanh space
            rows.mean.lerp_(slope, 1 - MEAN_DECAY)
            rows.square.lerp_(slope.square(), 1 - SQUARE_DECAY)
            mean = rows.mean / (1 - MEAN_DECAY ** (step + 1))
            square = rows.square / (1 - SQUARE_DECAY ** (step + 1))
            rows.point -= self.step_size * mean / (square.sqrt() + ADAM_EPS)
        passed = search.forward(_from_tanh_space(rows.point), where=rows.falling)
        rows.found = rows.found | passed.broken


INSIDE = 0.999999
"""Share of the box that has a finite place in tanh space."""
CHECKS = 10
ENOUGH = 0.9999
MEAN_DECAY, SQUARE_DECAY, ADAM_EPS = 0.9, 0.999, 1e-8


@dataclass(frozen=True, kw_only=True)
class DeepFool(Attack):
    """DeepFool: steps to the nearest of the class boundaries, as they look when the logits are linearised.

    steps: at most 50, as in the authors' code; a step of a sample that still stands costs 2 forwards and a backward
        for each class looked at.
    num_classes: the label and the classes that lead the clean logits, 10 as in the authors' code; of those the step
        takes the nearest. A targeted sample knows one boundary, that of the target with the largest other class.
    overshoot: share of its length that is added to the perturbation, 0.02 as in the paper (section 3.2).

    No step is shorter than 1e-4, which the authors' code adds to every step: at a curved boundary they would grow
    ever shorter, and the last image would lie on the boundary itself.

    Pixels at a side of the box do not press on; every image passed is clamped to the box and, where there is a
    budget, projected onto its ball. The logits themselves are linearised: `craft` has no use for another `loss`.

    Moosavi-Dezfooli et al. 2016, arXiv 1511.04599, algorithm 2 and, for L-inf, equations 10 and 11.
    """

    name: ClassVar[str] = "deepfool"
    kind: ClassVar[str] = "white-box"
    norms: ClassVar[tuple[str, ...]] = ("l2", "linf")
    nearest: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 1511.04599"

    norm: str = "l2"
    steps: int = 50
    num_classes: int = 10
    overshoot: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        check_count("num_classes", self.num_classes)
        if self.num_classes < 2:
            raise ValueError(f"num_classes={self.num_classes}: expected the label and at least one class more")
        if not 0 <= self.overshoot < math.inf:
            raise ValueError(f"overshoot={self.overshoot}: expected a share of at least 0")

    def _run(self, search: Search) -> None:
        if search.targets is None:
            gaps, classes = class_gaps, likeliest_wrong_classes(search, self.num_classes - 1)
        else:
            gaps, classes = _gap_to_target, search.targets[:, None]
        rows = search.track(
            images=search.clean,
            travelled=torch.zeros_like(search.clean),
            standing=torch.ones_like(search.eps, dtype=torch.bool),
            classes=classes,
        )
        for _ in range(self.steps):
            passed = search.gradient(rows.images, gaps, aims=rows.classes, where=rows.standing)
            if not len(search):
                return
            rows.standing = rows.standing & ~passed.broken
            if not bool(rows.standing.any()):
                return
            gradients = _inward(passed.gradient, rows.images[:, None])
            slopes = _dual_norm(gradients.flatten(0, 1), self.norm).view_as(passed.loss)
            length, nearest = (passed.loss.double().abs() / slopes).min(1)
            gradient = gradients[torch.arange(len(nearest), device=nearest.device), nearest]
            rows.travelled = rows.travelled + self.ball.steepest_step(
                rows.images, gradient, length.clamp(min=LEAST_STEP)
            )
            images = search.clean + (1 + self.overshoot) * rows.travelled
            budget = (search.eps - torch.finfo(search.clean.dtype).eps / 2).clamp(min=0)  # rounding stays within
            rows.images = self.ball.project(images, search.clean, budget)
            passed = search.forward(rows.images, gaps, aims=rows.classes, where=rows.standing)
            if not len(search):
                return
            rows.standing = rows.standing & ~passed.broken


LEAST_STEP = 1e-4
"""Of DeepFool, in its norm."""


@dataclass(frozen=True, kw_only=True)
class FMN(Attack):
    """Fast minimum-norm attack: gradient steps inside a ball that shrinks where they succeed and grows where not.

    steps: 100; a survivor costs `steps` + 1 forwards and `steps` backwards.
    step_size: Euclidean length of the first step, 1 as in the authors' code; a cosine takes it to a hundredth.
    shrinkage: share by which the ball shrinks or grows at first, 0.05; a cosine takes it to 0.001; both as in the
        authors' code.

    Before anything is found the ball reaches to the boundary of the linearised margin, and past it by the current
    shrinkage: an iterate that lay on the boundary itself would stay there.

    Pintor et al. 2021, arXiv 2102.12827, algorithm 1; from the clean image.
    """

    name: ClassVar[str] = "fmn"
    kind: ClassVar[str] = "white-box"
    nearest: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2102.12827"

    steps: int = 100
    step_size: float = 1.0
    shrinkage: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        _check_positive("step_size", self.step_size)
        if not LAST_SHRINKAGE <= self.shrinkage < 1:
            raise ValueError(f"shrinkage={self.shrinkage}: expected a share from {LAST_SHRINKAGE} to below 1")

    def _objective(self) -> Objective:
        return as_objective(LOSSES["margin"])

    def _run(self, search: Search) -> None:
        nowhere = torch.full_like(search.eps, math.inf)
        rows = search.track(images=search.clean, radius=nowhere, best=nowhere)
        for step in range(self.steps):
            passed = search.gradient(rows.images)
            if not len(search):
                return
            progress = (1 + math.cos(math.pi * step / self.steps)) / 2
            share = LAST_SHRINKAGE + (self.shrinkage - LAST_SHRINKAGE) * progress
            length = self.step_size * (LAST_STEP + (1 - LAST_STEP) * progress)
            distance = search.distance(rows.images)
            boundary = distance + passed.loss.double().abs() / _dual_norm(passed.gradient, self.norm)
            rows.best = torch.where(passed.broken, torch.minimum(distance, rows.best), rows.best)
            shrunk = torch.minimum(rows.radius * (1 - share), rows.best)
            grown = torch.where(rows.best.isfinite(), rows.radius, boundary) * (1 + share)
            rows.radius = torch.where(passed.broken, shrunk, grown)
            images = rows.images + BALLS["l2"].steepest_step(rows.images, passed.gradient, length)
            rows.images = self.ball.project(images, search.clean, rows.radius)
        search.forward(rows.images)


LAST_STEP = 0.01
LAST_SHRINKAGE = 0.001


def _check_positive(key: str, value: object) -> None:
    if not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise ValueError(f"{key}={value}: expected a number above 0")


def _negative_hinge(logits: Tensor, labels: Tensor, aims: Tensor | None) -> Tensor:
    """Return minus what misclassification still lacks, at most 0."""
    return as_objective(margin)(logits, labels, aims).clamp(max=0)


def _gap_to_target(logits: Tensor, labels: Tensor, aims: Tensor | None) -> Tensor:
    """Return the target's logit minus the largest other, for targets [n, 1]."""
    assert aims is not None
    return -margin(logits, aims[:, 0])[:, None]


def _inward(gradient: Tensor, images: Tensor) -> Tensor:
    """Return the gradient without the pixels that it would drive out of the box."""
    return gradient.masked_fill(torch.where(gradient > 0, images >= 1, images <= 0), 0)


def _from_tanh_space(point: Tensor) -> Tensor:
    return (torch.tanh(point) + 1) / 2


def _dual_norm(gradient: Tensor, norm: str) -> Tensor:
    """Return the slope of the loss along its steepest direction in the norm, float64 [n], never 0."""
    size: Tensor = torch.linalg.vector_norm(gradient.flatten(1), DUAL_ORDER[norm], dim=1, dtype=torch.float64)
    return size.clamp(min=FLAT)
