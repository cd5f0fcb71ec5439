"""Auto-PGD: gradient ascent with momentum whose step size looks after itself.

Croce & Hein 2020, arXiv 2003.01690, algorithm 1; for L1 Croce & Hein 2021, arXiv 2103.01208, algorithm 1. What
the papers leave open is settled as in the authors' implementation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ares_lightning.attacks.attack import Attack, check_count
from ares_lightning.attacks.copies import aim_at_each
from ares_lightning.attacks.losses import Objective, dlr
from ares_lightning.attacks.search import Search
from ares_lightning.attacks.threat import BALLS, per_pixel

MOMENTUM = 0.75
"""Weight of the gradient step against the last displacement (arXiv 2003.01690, eq. 3)."""
FIRST_STEP = 2.0
"""Length of the first steps in budgets."""
FIRST_INTERVAL, LEAST_INTERVAL, INTERVAL_DECREASE = 0.22, 0.06, 0.03
"""Shares of the steps: the first interval between checkpoints, the least, and how much each is shorter."""
ENOUGH_RISES = 0.75
"""Share of an interval's steps that must raise the loss, or the step is halved (condition 1)."""

L1_INTERVAL = 0.04
"""Share of the steps between two checkpoints (arXiv 2103.01208, section 3.2 and the implementation)."""
L1_SPARSER = 1.5
"""A step moves this many times fewer pixels than the best point so far has moved in all."""
L1_STABLE_SUPPORT = 0.95
"""Where the best point's support has shrunk below this share since the last checkpoint, the step is reset to the
budget and the run goes on from the best point; elsewhere the step shrinks by L1_SPARSER."""
L1_LEAST_STEP = 0.1
"""The least step in budgets."""
L1_SCHEDULE = ((3, 0.3), (2, 0.3), (1, 0.4))
"""Multiples of the budget that a run searches in turn, and the share of the steps of each (section 3.3)."""


@dataclass(frozen=True, kw_only=True)
class _APGD(Attack):
    kind: ClassVar[str] = "white-box"

    steps: int = 100
    random_start: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        if type(self.random_start) is not bool:
            raise ValueError(f"random_start={self.random_start}: expected true or false")
        if self.norm == "l1" and not self.random_start:
            raise ValueError("random_start=False: the method for l1 begins at random; set true")

    def _climb(self, search: Search, aims: Tensor | None, key: int) -> None:
        """Make one run, towards the classes `aims` [n] if there are any, with the random numbers of `key`."""
        if self.norm == "l1":
            images = _sparse_climb(search, aims, self.steps, key)
        else:
            start = _random_start(search, key) if self.random_start else search.clean
            images = _MomentumAscent(search, start, aims).climb(self.steps)
        if len(search) and not search.feedback:
            search.finish(images)


@dataclass(frozen=True, kw_only=True)
class _UntargetedAPGD(_APGD):
    restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("restarts", self.restarts)
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"restarts={self.restarts}: without random_start every run would be the same")

    def _run(self, search: Search) -> None:
        for restart in range(self.restarts if search.feedback else 1):
            self._climb(search, search.targets, restart)
            if not len(search):
                return


@dataclass(frozen=True, kw_only=True)
class APGDCE(_UntargetedAPGD):
    """APGD on the cross-entropy: (steps + 1) F + steps B a restart, for L1 (steps + 3) F; every iterate counts.

    steps: 100. restarts: runs from new random points for the samples not yet broken, 1 (AutoAttack makes 5 for L1).
    random_start: false begins at the clean image (as in training, Singh et al. 2023, arXiv 2303.01870).

    `craft` makes one run and returns the iterate with the highest loss.
    """

    name: ClassVar[str] = "apgd_ce"
    paper: ClassVar[str] = "arXiv 2003.01690"


@dataclass(frozen=True, kw_only=True)
class APGDDLR(_UntargetedAPGD):
    """APGD on the difference of logits ratio; settings and passes as in `apgd_ce`.

    With two classes, where the ratio has no meaning, the margin is its loss.
    """

    name: ClassVar[str] = "apgd_dlr"
    paper: ClassVar[str] = "arXiv 2003.01690"

    def _objective(self) -> Objective:
        return dlr


@dataclass(frozen=True, kw_only=True)
class APGDT(_APGD):
    """APGD on the targeted difference of logits ratio, once for each of the likeliest wrong classes.

    steps: 100.
    num_targets: classes aimed at in turn, in the order of the clean logits, as many as there are at most; 9
        (section 5; AutoAttack takes 5 for L1). Any wrong prediction counts. Where the call has `targets`, these
        are aimed at, and count, alone.

    Costs (steps + 1) F + steps B a class aimed at, for L1 (steps + 3) F. With up to three classes, where the ratio
    has no meaning, the targeted margin is its loss. `craft` aims at the likeliest class (1 F more).
    """

    name: ClassVar[str] = "apgd_t"
    paper: ClassVar[str] = "arXiv 2003.01690"

    num_targets: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_targets", self.num_targets)

    def _objective(self) -> Objective:
        return dlr

    def _run(self, search: Search) -> None:
        if search.targets is not None:
            self._climb(search, search.targets, 0)
            return
        aims = likeliest_wrong_classes(search, self.num_targets if search.feedback else 1)
        aim_at_each(search, aims, self._climb)


def likeliest_wrong_classes(search: Search, count: int) -> Tensor:
    """Return the classes with the largest clean logits but the label, int64 [n, at most `count`].

    Raises ValueError for soft labels.
    """
    logits = search.clean_logits()
    if search.labels.ndim != 1:
        raise ValueError("targets taken from the clean logits need class labels [N], not soft labels [N, C]")
    others = logits.scatter(1, search.labels[:, None], -torch.inf)
    return others.argsort(dim=1, descending=True, stable=True)[:, : min(count, logits.shape[1] - 1)]


class _Ascent(ABC):
    """One run: where it is, the best point so far with its gradient, and what its step sizes follow from."""

    first_interval: ClassVar[float]

    def __init__(self, search: Search, images: Tensor, aims: Tensor | None, multiple: int = 1) -> None:
        self.search, self.multiple, self.judge = search, multiple, multiple == 1
        self.rows = search.track(images=images, previous=images, aims=aims)

    @property
    def eps(self) -> Tensor:
        """Budgets of this run, float64 [n]."""
        return self.multiple * self.search.eps

    def climb(self, steps: int) -> Tensor:
        """Take the steps and return the iterates with the highest loss, [n, C, H, W]."""
        search, rows = self.search, self.rows
        passed = search.gradient(rows.images, aims=rows.aims, judge=self.judge)
        if not len(search):
            return passed.gradient
        rows.loss = rows.best_loss = passed.loss
        rows.gradient = rows.best_gradient = passed.gradient
        rows.best = rows.images
        self._begin()
        interval, since = max(int(self.first_interval * steps), 1), 0
        for step in range(steps):
            images = self._stepped(with_momentum=step > 0)
            rows.previous, rows.images = rows.images, images
            last = step + 1 == steps
            spend = search.forward if last else search.gradient
            passed = spend(rows.images, aims=rows.aims, judge=self.judge)
            if not len(search):
                break
            rows.rises = rows.rises + (passed.loss > rows.loss)
            rows.loss, better = passed.loss, passed.loss > rows.best_loss
            rows.best_loss = torch.where(better, passed.loss, rows.best_loss)
            rows.best = torch.where(per_pixel(better), rows.images, rows.best)
            if last:
                break
            rows.gradient = passed.gradient
            rows.best_gradient = torch.where(per_pixel(better), passed.gradient, rows.best_gradient)
            since += 1
            if since == interval:
                self._go_back(self._checkpoint(interval))
                rows.rises = torch.zeros_like(rows.rises)
                interval, since = self._next_interval(interval, steps), 0
        best: Tensor = rows.best
        return best

    def _go_back(self, where: Tensor) -> None:
        """Let the samples of `where` go on from their best points."""
        rows = self.rows
        rows.images = torch.where(per_pixel(where), rows.best, rows.images)
        rows.gradient = torch.where(per_pixel(where), rows.best_gradient, rows.gradient)

    @abstractmethod
    def _begin(self) -> None:
        """Set the step sizes after the first pass."""

    @abstractmethod
    def _stepped(self, with_momentum: bool) -> Tensor:
        """Return the next iterates."""

    @abstractmethod
    def _checkpoint(self, interval: int) -> Tensor:
        """Adapt the step sizes; return bool [n]: which samples go back to their best points."""

    @abstractmethod
    def _next_interval(self, interval: int, steps: int) -> int:
        """Return the number of steps up to the next checkpoint."""


class _MomentumAscent(_Ascent):
    """L-inf and L2: steps with momentum, halved where the loss does not rise often enough (arXiv 2003.01690)."""

    first_interval = FIRST_INTERVAL

    def _begin(self) -> None:
        rows = self.rows
        rows.step = FIRST_STEP * self.eps
        rows.rises = torch.zeros_like(rows.loss)
        rows.loss = torch.zeros_like(rows.loss)  # the implementation holds the first step's loss against 0
        rows.halved = torch.ones_like(rows.loss, dtype=torch.bool)
        rows.best_loss_before = rows.best_loss

    def _stepped(self, with_momentum: bool) -> Tensor:
        rows, ball = self.rows, self.search.ball
        stepped = self._project(rows.images + ball.steepest_step(rows.images, rows.gradient, rows.step))
        if not with_momentum:
            return stepped
        displacement = (rows.images - rows.previous) * (1 - MOMENTUM)
        moved: Tensor = rows.images + (stepped - rows.images) * MOMENTUM + displacement
        return self._project(moved)

    def _project(self, images: Tensor) -> Tensor:
        """Scale into the ball and clamp to the box: for L2 not the nearest point, but the implementation's."""
        search = self.search
        if search.ball is BALLS["linf"]:
            return search.ball.project(images, search.clean, self.eps)
        delta = images - search.clean
        norm = torch.linalg.vector_norm(delta.flatten(1), dim=1)
        scale = torch.where(norm > self.eps, self.eps / norm, 1)
        scaled = (search.clean + delta * per_pixel(scale.to(delta.dtype))).clamp_(0, 1)
        return search.ball.take_back(scaled, search.clean, self.eps)

    def _checkpoint(self, interval: int) -> Tensor:
        rows = self.rows
        stalls = rows.best_loss <= rows.best_loss_before
        halve: Tensor = (rows.rises <= ENOUGH_RISES * interval) | (~rows.halved & stalls)
        rows.step = torch.where(halve, rows.step / 2, rows.step)
        rows.halved, rows.best_loss_before = halve, rows.best_loss
        return halve

    def _next_interval(self, interval: int, steps: int) -> int:
        return max(interval - max(int(INTERVAL_DECREASE * steps), 1), max(int(LEAST_INTERVAL * steps), 1))


class _SparseAscent(_Ascent):
    """L1: sparse sign steps, whose support follows that of the best point (arXiv 2103.01208)."""

    first_interval = L1_INTERVAL

    def _begin(self) -> None:
        rows = self.rows
        rows.step = self.eps
        rows.rises = torch.zeros_like(rows.loss)
        rows.support = self._support(rows.images)
        rows.share = self._sparser_share(rows.support)

    @property
    def _numel(self) -> int:
        return self.search.clean.shape[1:].numel()

    def _support(self, images: Tensor) -> Tensor:
        """Return how many values of each image differ from the clean one, [n]."""
        return (images != self.search.clean).flatten(1).sum(1).to(images.dtype)

    def _sparser_share(self, support: Tensor) -> Tensor:
        """Return the share of the pixels that steps move; by tensors, since CUDA divides inexactly by numbers."""
        numel, sparser = (torch.full_like(support, value) for value in (self._numel, L1_SPARSER))
        return support / numel / sparser

    def _stepped(self, with_momentum: bool) -> Tensor:
        rows, search = self.rows, self.search
        slope = rows.gradient.flatten(1).abs()
        place = ((1 - rows.share) * self._numel).clamp(0, self._numel - 1).long()
        least = slope.sort(dim=1).values.gather(1, place[:, None])
        direction = rows.gradient.sign() * (slope >= least).view_as(rows.gradient)
        length = rows.step / direction.flatten(1).abs().sum(1).clamp_(min=1)
        images: Tensor = rows.images + direction * per_pixel(length.to(direction.dtype))
        return search.ball.project(images, search.clean, self.eps)

    def _checkpoint(self, interval: int) -> Tensor:
        rows = self.rows
        support = self._support(rows.best)
        reset: Tensor = support / rows.support < L1_STABLE_SUPPORT
        rows.step = torch.where(reset, self.eps, (rows.step / L1_SPARSER).clamp(min=L1_LEAST_STEP * self.eps))
        rows.support, rows.share = support, self._sparser_share(support)
        return reset

    def _next_interval(self, interval: int, steps: int) -> int:
        return interval


def _sparse_climb(search: Search, aims: Tensor | None, steps: int, key: int) -> Tensor:
    """Search budgets that shrink to the threat model's, each from the best point of the last (section 3.3)."""
    clean = search.clean
    images = clean + search.noise("normal", tuple(clean.shape[1:]), key)
    images = search.ball.project(images, clean, L1_SCHEDULE[0][0] * search.eps)
    left = steps
    for multiple, share in L1_SCHEDULE:
        taken = left if multiple == 1 else min(math.ceil(share * steps), left)
        left -= taken
        start = search.ball.project(images, clean, multiple * search.eps)
        images = _SparseAscent(search, start, aims, multiple).climb(taken)
    return images


def _random_start(search: Search, key: int) -> Tensor:
    """Return points on the sphere of the budget in a random direction, clamped to the box (the implementation)."""
    if search.ball is BALLS["linf"]:
        direction = search.noise("uniform", tuple(search.clean.shape[1:]), key)
        length = direction.flatten(1).abs().amax(1)
    else:
        direction = search.noise("normal", tuple(search.clean.shape[1:]), key)
        length = torch.linalg.vector_norm(direction.flatten(1), dim=1)
    images = (search.clean + direction * per_pixel((search.eps / length).to(direction.dtype))).clamp_(0, 1)
    return search.ball.take_back(images, search.clean, search.eps)
