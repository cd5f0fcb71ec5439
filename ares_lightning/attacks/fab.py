"""FAB: walk along the linearised decision boundary while being drawn towards the clean image.

Croce & Hein 2020, arXiv 1907.02044, algorithm 1 without its final search, as in AutoAttack (arXiv 2003.01690).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ares_lightning.attacks.apgd import likeliest_wrong_classes
from ares_lightning.attacks.attack import Attack, check_count
from ares_lightning.attacks.copies import aim_at_each
from ares_lightning.attacks.losses import Objective, class_gaps
from ares_lightning.attacks.search import Rows, Search
from ares_lightning.attacks.threat import DUAL_ORDER, MAX_CLIPPINGS, ORDER, per_pixel, per_sample

START_RADIUS = {"linf": 0.3, "l2": 1.0, "l1": 5.0}
"""Budgets that random starts go by where there is none: the defaults of the authors' implementation."""
MAX_CLASSES = 10
"""Wrong classes that the untargeted attack holds against each other."""
LEAST_LENGTH = 1e-8
"""Steps are taken to be at least this long when they are weighed against each other (the implementation)."""


@dataclass(frozen=True, kw_only=True)
class FAB(Attack):
    """Fast adaptive boundary attack: the nearest adversarial example, along the nearest linearised boundary.

    steps: 100.
    restarts: 1; the first starts from the clean image, others from random points half as far from it as the nearest
        adversarial example found or the budget, whichever is less (in place of no budget: L-inf 0.3, L2 1, L1 5).
    max_bias: the largest weight of the step from the clean image against that from the iterate, 0.1 (α_max).
    extrapolation: length of the steps, in distances to the linearised boundary, 1.05 (η).
    backward_step: share of its displacement that an adversarial iterate keeps, 0.9 (β).

    The boundaries are those between the label's class and the ten others with the largest clean logits: as in the
    implementation all others where there are at most eleven classes. Where the call has `targets`, these are aimed
    at, and count, alone. With a budget, a sample is done at the first adversarial iterate within it; without one,
    all steps are taken and the nearest adversarial iterate is the result.

    With k boundaries a restart costs 2 · steps F + k · steps B where all iterates are adversarial, (steps + 2) F +
    k · steps B where none is. Between these an iterate that is not saves 1 F where that was foreseen, and one that
    is costs k B more where it was not, which happens in one of k + 1 steps at most. `craft` makes one run
    (1 F more, for the classes aimed at); the loss is part of the method.
    """

    name: ClassVar[str] = "fab"
    kind: ClassVar[str] = "white-box"
    nearest: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 1907.02044"

    steps: int = 100
    restarts: int = 1
    max_bias: float = 0.1
    extrapolation: float = 1.05
    backward_step: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        check_count("restarts", self.restarts)
        if not 0 <= self.max_bias <= 1:
            raise ValueError(f"max_bias={self.max_bias}: expected a number from 0 to 1")
        if not self.extrapolation >= 1:
            raise ValueError(f"extrapolation={self.extrapolation}: expected a number of at least 1")
        if not 0 < self.backward_step <= 1:
            raise ValueError(f"backward_step={self.backward_step}: expected a number above 0, at most 1")

    def _objective(self) -> Objective:
        return class_gaps

    def _run(self, search: Search) -> None:
        if search.targets is not None:
            aims = search.targets[:, None]
        else:
            aims = likeliest_wrong_classes(search, MAX_CLASSES)
        self._walk_from_each_start(search, aims, range(self.restarts))

    def _walk_from_each_start(self, search: Search, aims: Tensor, keys: Sequence[int]) -> None:
        """Make the restarts, one for each key of random numbers, with the boundaries to `aims` [n, k]."""
        state = search.track(aims=aims)
        for restart, key in enumerate(keys if search.feedback else keys[:1]):
            self._walk(search, self._random_start(search, key) if restart else search.clean, state.aims)
            if not len(search):
                return

    def _random_start(self, search: Search, key: int) -> Tensor:
        kind = "uniform" if self.norm == "linf" else "normal"
        direction = search.noise(kind, tuple(search.clean.shape[1:]), key)
        length = torch.linalg.vector_norm(direction.flatten(1), ord=ORDER[self.norm], dim=1)
        budget = torch.where(search.eps.isfinite(), search.eps, START_RADIUS[self.norm])
        radius = torch.minimum(search.nearest, budget) / 2
        return (search.clean + direction * per_sample(radius / length, direction)).clamp_(0, 1)

    def _walk(self, search: Search, start: Tensor, aims: Tensor) -> None:
        """Make one run from `start` with the boundaries to the classes `aims` [n, k].

        Where an iterate is not adversarial, the forward that shows it can serve the next gradient too; where it is,
        that is needed elsewhere, and k backwards would be wasted. The iterates so far tell which is likely.
        """
        num_backwards = aims.shape[1]
        rows = search.track(images=start, aims=aims, num_adversarial=torch.zeros_like(search.labels))
        rows.value, rows.normal = torch.zeros_like(search.eps), torch.zeros_like(start.flatten(1))
        self._linearise(search, rows, torch.ones_like(search.labels, dtype=torch.bool))
        for step in range(self.steps):
            if not len(search):
                return
            is_last = step + 1 == self.steps
            rows.images = self._stepped(search, rows)
            rows.fused = (rows.num_adversarial * (1 + num_backwards) < step) & (not is_last)
            rows.adversarial = self._linearise(search, rows, rows.fused)
            adversarial = search.forward(rows.images, class_gaps, aims=rows.aims, where=~rows.fused).broken
            if is_last or not len(search):
                return
            rows.adversarial = rows.adversarial | adversarial
            rows.num_adversarial = rows.num_adversarial + rows.adversarial
            nearer = search.clean + self.backward_step * (rows.images - search.clean)
            rows.images = torch.where(per_pixel(rows.adversarial), nearer, rows.images)
            self._linearise(search, rows, rows.adversarial | ~rows.fused, judge=False)

    def _linearise(self, search: Search, rows: Rows, where: Tensor, judge: bool = True) -> Tensor:
        """Find the nearest boundary, linearised at the images, of the samples in `where`: its logit difference
        `value` [n] and gradient `normal` [n, d]. Return bool [n], which of them are adversarial."""
        rows.where = where
        passed = search.gradient(rows.images, class_gaps, aims=rows.aims, where=where, judge=judge)
        if len(search):
            values = passed.loss.view(len(search), -1).double()
            normals = passed.gradient.reshape(*values.shape, -1)
            lengths = torch.linalg.vector_norm(normals, ord=DUAL_ORDER[self.norm], dim=2, dtype=torch.float64)
            nearest = (values.abs() / lengths).nan_to_num(nan=torch.inf).argmin(1, keepdim=True)
            value = values.gather(1, nearest).squeeze(1).nan_to_num(nan=0, posinf=0, neginf=0)
            normal = normals.take_along_dim(nearest[:, :, None], dim=1).squeeze(1)
            rows.value = torch.where(rows.where, value, rows.value)
            rows.normal = torch.where(rows.where[:, None], normal, rows.normal)
        return passed.broken

    def _stepped(self, search: Search, rows: Rows) -> Tensor:
        """Step to the boundary from the iterate and from the clean image, go past it, and average (algorithm 1)."""
        images, clean = rows.images, search.clean
        rise = (rows.normal * (images - clean).flatten(1)).sum(1, dtype=torch.float64)
        ahead = boundary_step(images, rows.normal, rows.value, self.norm)
        from_clean = boundary_step(clean, rows.normal, rows.value - rise, self.norm)
        length, length_from_clean = (
            torch.linalg.vector_norm(step, ord=ORDER[self.norm], dim=1).clamp_(min=LEAST_LENGTH)
            for step in (ahead, from_clean)
        )
        bias = per_sample((length / (length + length_from_clean)).clamp_(max=self.max_bias), images)
        own = (images + self.extrapolation * ahead.view_as(images)) * (1 - bias)
        averaged: Tensor = own + (clean + self.extrapolation * from_clean.view_as(images)) * bias
        return averaged.clamp_(0, 1)


@dataclass(frozen=True, kw_only=True)
class FABT(FAB):
    """FAB towards the boundary to one class at a time.

    num_targets: 9, classes aimed at in turn, in the order of the clean logits, as many as there are at most. Any
        wrong prediction counts; with a budget, a sample that one target breaks does not meet the next.

    Settings and passes, k = 1 a target, otherwise as in `fab`; `craft` aims at the likeliest class.
    """

    name: ClassVar[str] = "fab_t"
    paper: ClassVar[str] = "arXiv 2003.01690"

    num_targets: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_targets", self.num_targets)

    def _run(self, search: Search) -> None:
        if search.targets is not None:
            super()._run(search)
            return
        num_keys = self.num_targets * self.restarts

        def walk(search: Search, aims: Tensor, k: int) -> None:
            self._walk_from_each_start(search, aims[:, None], range(k, num_keys, self.num_targets))

        aim_at_each(search, likeliest_wrong_classes(search, self.num_targets if search.feedback else 1), walk)


def boundary_step(points: Tensor, normal: Tensor, value: Tensor, norm: str) -> Tensor:
    """Return the shortest steps in `norm` that make a linear function 0 without leaving the box, [n, d].

    points: [n, …] in [0, 1], d values each; the function is `value` + `normal` · step, value float64 [n], normal
    [n, d]. Where no point of the box makes it 0, the step goes to the point that comes nearest to it.

    By how much each pixel moves in the direction that helps follows from the KKT conditions: min(scale, room) for
    L-inf, min(scale · |normal|, room) for L2, and for L1 all of its room in the order of |normal|, till the value
    is spent.
    """
    slope = normal.abs()
    largest = slope.amax(1, keepdim=True).clamp(min=torch.finfo(slope.dtype).tiny)
    slope, need = slope / largest, value.abs()[:, None] / largest  # squares of tiny gradients would vanish
    direction = torch.where(value[:, None] > 0, -normal, normal).sign()
    flat = points.flatten(1)
    room = torch.where(direction > 0, 1 - flat, flat)
    if norm == "l1":
        slope, order = slope.sort(dim=1, descending=True, stable=True)
        room = room.gather(1, order)
        gain = (slope * room).double()
        spent = torch.minimum((need - (gain.cumsum(1) - gain)).clamp_(min=0) / slope, room)
        size = torch.zeros_like(room).scatter_(1, order, torch.where(slope > 0, spent, 0).to(room.dtype))
    else:
        size = _clipped(torch.ones_like(slope) if norm == "linf" else slope, room, slope, need)
    return direction * size


def _clipped(speed: Tensor, room: Tensor, slope: Tensor, need: Tensor) -> Tensor:
    """Return min(scale · speed, room) for the scale at which it times slope sums to `need`, or all the room.

    The sum is concave in the scale: Newton's steps from below never pass the answer, and reach it once they know
    which pixels the box clips.
    """
    rate, gain = slope * speed, slope * room
    scale = torch.zeros_like(need)
    for _ in range(MAX_CLIPPINGS):
        clipped = scale.to(speed.dtype) * speed >= room
        left = need - torch.where(clipped, gain, 0).sum(1, keepdim=True, dtype=torch.float64)
        free = torch.where(clipped, 0, rate).sum(1, keepdim=True, dtype=torch.float64)
        larger = torch.where(free > 0, left / free, torch.inf).maximum(scale)
        if torch.equal(larger, scale):
            break
        scale = larger
    return torch.where(slope > 0, torch.minimum(scale.to(speed.dtype) * speed, room), 0)
