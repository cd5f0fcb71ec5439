"""Robustness curves: which budgets a sample withstands, asked in three ways of different price and meaning."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ares_lightning.attacks import Attack, Outcome, make_attack, parse_budget
from ares_lightning.attacks.attack import check_count
from ares_lightning.attacks.autoattack import AutoAttack
from ares_lightning.attacks.passes import Passes
from ares_lightning.evaluation.evaluators import (
    Evaluator,
    Stage,
    Verdicts,
    clean_outcome,
    take_outcome,
    with_found,
)

CURVE_MULTIPLES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Budgets of a robustness curve where none are given: multiples of the threat model's budget."""


def curve_budgets(eps: float, given: Sequence[float] | None) -> tuple[float, ...]:
    """Return the grid of a curve: the given budgets, or the usual multiples of `eps`."""
    return tuple(given) if given else tuple(multiple * eps for multiple in CURVE_MULTIPLES)


@dataclass(frozen=True)
class Curve(Evaluator):
    """Which budgets does the sample withstand?

    attack: what is run, whatever its own budget. eps: rising grid of budgets, units of the [0, 1] scale.

    An adversarial example counts at every larger budget, too, so that no curve rises. Passes stand in the row of
    the budget that they were spent on, those spent on no single one in that of the largest.
    """

    attack: Attack = field(repr=False)
    eps: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.eps or list(self.eps) != sorted(set(self.eps)):
            raise ValueError(f"eps={list(self.eps)}: expected a rising list of budgets")
        if self.attack.needs_targets:
            raise ValueError(f"attack={self.attack.name}: knows a targeted form only, and a curve has no targets")


@dataclass(frozen=True)
class ExactCurve(Curve):
    """Every budget is fully attacked, from the smallest up, on the samples that no smaller one has broken.

    At least as strong as independent runs at each budget; costs one full attack for each budget withstood.
    """

    @property
    def stages(self) -> Sequence[Stage]:
        """The clean images, then each budget; for AutoAttack, each of its members at each."""
        attacks = self.attack.members if isinstance(self.attack, AutoAttack) else (self.attack,)
        places = range(len(self.eps))
        return [_CleanStage(self), *(_BudgetStage(self, k, attack) for k in places for attack in attacks)]

    def verdicts(
        self, net: nn.Module, images: Tensor, labels: Tensor, sample_ids: Tensor, seed: int, passes: Passes
    ) -> Iterator[Verdicts]:
        """Yield budget 0 (the clean images) and then each budget of the grid, once all stages are through."""
        left = torch.arange(len(labels), device=labels.device)
        known: dict[float, Outcome] = {}
        for stage in self.stages:
            ids = sample_ids[left.to(sample_ids.device)]
            answers = list(stage.verdicts(net, images[left], labels[left], ids, seed, passes))
            known = known or dict.fromkeys((0.0, *self.eps), answers[0].outcome)
            for answer in answers:
                places = left if answer.places is None else left[answer.places]
                known[answer.eps] = _taken_in(known[answer.eps], places, answer.outcome)
            left = left[~answers[0].outcome.broken]
        for eps, outcome in known.items():
            yield Verdicts(self.attack.name, self.attack.norm, eps, outcome)


def _taken_in(known: Outcome, places: Tensor, found: Outcome) -> Outcome:
    """Return `known` with its samples at `places` replaced by those found, whose passes are added."""
    spent = {name: getattr(known, name)[places] + getattr(found, name) for name in ("forwards", "backwards")}
    return with_found(known, places, replace(found, **spent), torch.arange(len(places), device=places.device))


@dataclass(frozen=True)
class _CleanStage(Stage):
    """The clean images, as budget 0."""

    curve: ExactCurve

    @property
    def key(self) -> tuple[str, float]:
        return self.curve.attack.name, 0.0

    def verdicts(
        self, net: nn.Module, images: Tensor, labels: Tensor, sample_ids: Tensor, seed: int, passes: Passes
    ) -> Iterator[Verdicts]:
        attack = self.curve.attack
        clean = clean_outcome(net, images, labels, sample_ids, seed, replace(passes, eot=attack.eot))
        yield Verdicts(attack.name, attack.norm, 0.0, clean)
        yield from _inherited(attack, clean, self.curve.eps)


@dataclass(frozen=True)
class _BudgetStage(Stage):
    """An attack at one budget of the grid."""

    curve: ExactCurve
    place: int
    attack: Attack

    @property
    def key(self) -> tuple[str, float]:
        return self.attack.name, self.curve.eps[self.place]

    def verdicts(
        self, net: nn.Module, images: Tensor, labels: Tensor, sample_ids: Tensor, seed: int, passes: Passes
    ) -> Iterator[Verdicts]:
        eps = self.curve.eps[self.place]
        outcome = self.attack(
            net,
            images,
            labels,
            sample_ids=sample_ids,
            seed=seed,
            eps=[eps] * len(labels),
            batch_size=passes.batch_size,
            precision=passes.precision,
            search_on=passes.search_on,
        )
        yield Verdicts(self.attack.name, self.attack.norm, eps, outcome)
        yield from _inherited(self.attack, outcome, self.curve.eps[self.place + 1 :])


def _inherited(attack: Attack, outcome: Outcome, budgets: Sequence[float]) -> Iterator[Verdicts]:
    """Yield the verdicts at larger budgets on the samples that are broken, which cost nothing."""
    places = outcome.broken.nonzero().squeeze(1)
    free = torch.zeros_like(outcome.forwards)
    found = take_outcome(replace(outcome, forwards=free, backwards=free), places)
    for eps in budgets:
        yield Verdicts(attack.name, attack.norm, eps, found, places=places)


@dataclass(frozen=True)
class _SearchedCurve(Curve):
    """What is known of a sample is the smallest budget found to break it."""

    def verdicts(
        self, net: nn.Module, images: Tensor, labels: Tensor, sample_ids: Tensor, seed: int, passes: Passes
    ) -> Iterator[Verdicts]:
        """Yield budget 0 (the clean images) and then each budget of the grid."""
        clean = clean_outcome(net, images, labels, sample_ids, seed, replace(passes, eot=self.attack.eot))
        yield Verdicts(self.attack.name, self.attack.norm, 0.0, clean)
        bounds = _Bounds(self.attack, clean, len(self.eps), net, images, labels, sample_ids, seed, passes)
        self._search(bounds)
        for k, eps in enumerate(self.eps):
            within = (bounds.radius <= eps).nonzero().squeeze(1)
            outcome = replace(
                with_found(clean, within, bounds.nearest, within),
                forwards=bounds.forwards[k],
                backwards=bounds.backwards[k],
            )
            yield Verdicts(self.attack.name, self.attack.norm, eps, outcome)

    @abstractmethod
    def _search(self, bounds: _Bounds) -> None:
        """Lower the radius of every sample as far as the budgets of the grid make it worth while."""


@dataclass(frozen=True)
class BracketedCurve(_SearchedCurve):
    """A minimum-distance attack (FMN) bounds the budget that breaks a sample from above; then the attack tries the
    next smaller budget of the grid, again while it succeeds. What it fails at counts as withstood below, too.

    About one full attack a sample, however many budgets. That smaller budgets are withstood is inferred, not tried:
    true of robustness, not of every heuristic attack, so that the curve may lie above the exact one.
    """

    def _search(self, bounds: _Bounds) -> None:
        last = len(self.eps) - 1
        bounds.find_nearest(make_attack("fmn", norm=self.attack.norm, eps=None, eot=self.attack.eot), last)
        grid = torch.tensor(self.eps, dtype=torch.float64, device=bounds.radius.device)
        withstood = torch.zeros_like(bounds.radius, dtype=torch.bool)
        while True:
            level = (grid < bounds.radius[:, None]).sum(1) - 1
            tried = (level >= 0) & ~withstood
            if not bool(tried.any()):
                return
            before = bounds.radius
            bounds.attack_at(tried, grid[level.clamp(min=0)], level)
            withstood |= tried & (bounds.radius == before)


@dataclass(frozen=True)
class BisectedCurve(_SearchedCurve):
    """The protocol of ARES-Bench (arXiv 2302.14301, its published code): for every sample, double a budget until
    the attack succeeds, then bisect between the largest that failed and the smallest known to break it.

    start: the first budget; None takes half the attack's, 2/255 of ARES-Bench's 4/255. doublings: budgets tried
    before a sample counts as never broken, 5. bisections: 10. Costs up to 15 attacks.
    """

    start: float | str | None = None
    doublings: int = 5
    bisections: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        start = self.attack.threat.eps / 2 if self.start is None else parse_budget(self.start, "start")
        if not 0 < start < math.inf:
            raise ValueError(f"start={self.start}: expected a budget above 0; the attack has {self.attack.eps}")
        object.__setattr__(self, "start", start)
        check_count("doublings", self.doublings)
        check_count("bisections", self.bisections)

    def _search(self, bounds: _Bounds) -> None:
        last = len(self.eps) - 1
        eps = torch.full_like(bounds.radius, self.start)  # type: ignore[arg-type]
        withstood = torch.zeros_like(eps)
        for _ in range(self.doublings):
            tried = bounds.radius.isinf()
            bounds.attack_at(tried, eps, last)
            withstood = torch.where(bounds.radius.isinf(), eps, withstood)
            eps = 2 * eps
        for _ in range(self.bisections):
            tried = bounds.radius.isfinite() & (bounds.radius > 0)
            eps = torch.where(tried, (withstood + bounds.radius) / 2, 0)
            bounds.attack_at(tried, eps, last)
            withstood = torch.where(tried & (bounds.radius > eps), eps, withstood)


class _Bounds:
    """What is known of each sample of a batch: `radius`, the smallest budget known to break it (0 where the clean
    image is misclassified, inf where none is known), with the adversarial example, and the passes spent."""

    def __init__(
        self,
        attack: Attack,
        clean: Outcome,
        num_budgets: int,
        net: nn.Module,
        images: Tensor,
        labels: Tensor,
        sample_ids: Tensor,
        seed: int,
        passes: Passes,
    ) -> None:
        self.attack, self.nearest = attack, clean
        self.radius = torch.where(clean.broken, 0.0, torch.inf).double()
        self.forwards = torch.zeros(num_budgets, len(labels), dtype=torch.int64, device=labels.device)
        self.backwards = torch.zeros_like(self.forwards)
        self._net, self._images, self._labels, self._ids = net, images, labels, sample_ids
        self._seed, self._passes = seed, passes

    def attack_at(self, who: Tensor, eps: Tensor, column: Tensor | int) -> None:
        """Attack the samples of `who` [N], each at its own budget `eps` [N]."""
        self._run(self.attack, who, eps, column)

    def find_nearest(self, attack: Attack, column: int) -> None:
        """Run a minimum-distance attack on the samples that are not misclassified from the start."""
        self._run(attack, self.radius > 0, None, column)

    def _run(self, attack: Attack, who: Tensor, eps: Tensor | None, column: Tensor | int) -> None:
        rows = who.nonzero().squeeze(1)
        if not len(rows):
            return
        found = attack(
            self._net,
            self._images[rows],
            self._labels[rows],
            sample_ids=self._ids[rows.to(self._ids.device)],
            seed=self._seed,
            eps=None if eps is None else eps[rows],
            batch_size=self._passes.batch_size,
            precision=self._passes.precision,
            search_on=self._passes.search_on,
        )
        columns = column[rows] if isinstance(column, Tensor) else torch.full_like(rows, column)
        self.forwards[columns, rows] += found.forwards
        self.backwards[columns, rows] += found.backwards
        broken = found.broken.nonzero().squeeze(1)
        self.nearest = with_found(self.nearest, rows[broken], found, broken)
        radius = found.distance if eps is None else torch.minimum(found.distance, eps[rows])
        self.radius = self.radius.index_copy(0, rows[broken], radius[broken])
