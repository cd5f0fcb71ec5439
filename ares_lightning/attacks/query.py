"""Score-based attacks, which see the logits of their queries only: NES, SPSA and N-Attack."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ares_lightning.attacks.attack import Attack, check_count
from ares_lightning.attacks.losses import LOSSES, Objective, as_objective
from ares_lightning.attacks.search import Rows, Search
from ares_lightning.attacks.threat import parse_budget, per_pixel
from ares_lightning.attacks.verdict import Outcome


def accuracy_over_queries(outcome: Outcome, queries: Sequence[int] | Tensor) -> Tensor:
    """Return the share of samples that q queries have not broken, for every q of `queries`, float64 [len(queries)].

    `outcome` is what one run with the largest budget found out: a sample counts as broken from the query on that
    broke it, and from 0 on where it is misclassified in the first place. That holds for an attack that stops a
    sample when it is broken, thus for a minimum-distance attack only if it was given a budget. A query is a
    forward: with `eot` draws, one look at an image is `eot` of them.
    """
    spent = torch.as_tensor(queries, device=outcome.forwards.device)
    broken = outcome.broken & (outcome.forwards <= spent[:, None])
    return 1 - broken.double().mean(1)


@dataclass(frozen=True, kw_only=True)
class _ScoreAttack(Attack):
    """Batches of `samples` queries, each followed by a step, and one last query for the last iterate."""

    kind: ClassVar[str] = "score-based"
    needs_gradients: ClassVar[bool] = False

    loss: str = "margin"
    queries: int = 10_000
    samples: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss}: expected one of {', '.join(LOSSES)}")
        check_count("samples", self.samples)
        check_count("queries", self.queries)
        if self.queries <= self.samples:
            raise ValueError(
                f"queries={self.queries}: expected more than samples={self.samples}, what one step takes"
            )

    def _objective(self) -> Objective:
        return as_objective(LOSSES[self.loss])

    def _run(self, search: Search) -> None:
        state = self._begin(search)
        for step in range((self.queries - 1) // self.samples):
            self._step(search, state, step)
            if not len(search):
                return
        if search.feedback:
            search.forward(state.images)
        else:
            search.finish(state.images)

    @abstractmethod
    def _begin(self, search: Search) -> Rows:
        """Return the state of the search, among it `images`, the iterates."""

    @abstractmethod
    def _step(self, search: Search, state: Rows, step: int) -> None:
        """Spend `samples` queries and move the iterates of the samples that remain."""


def _score(search: Search, images: Tensor) -> Tensor:
    """Query and return the loss; a model that gives NaN or infinity there tells nothing."""
    return search.forward(images).loss.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True, kw_only=True)
class _FiniteDifferences(_ScoreAttack):
    """Ascend a gradient that pairs of queries on both sides of the iterate estimate."""

    probe_size: float | str

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "probe_size", parse_budget(self.probe_size, "probe_size"))
        if not self.probe_size:
            raise ValueError(f"probe_size={self.probe_size}: expected a number above 0")
        if self.samples % 2:
            raise ValueError(f"samples={self.samples}: expected an even number, for queries come in pairs")

    @abstractmethod
    def _direction(self, search: Search) -> Tensor:
        """Draw one direction a sample, [n, C, H, W]."""

    def _estimate(self, search: Search, images: Tensor) -> Tensor:
        """Return the gradient at `images` estimated by `samples` queries, for the samples that remain.

        Both points of a pair are projected on ball ∩ box first, so that every query counts as an attempt. Their
        difference in loss weighs the difference between the projected points, not the direction drawn: to first
        order the estimate is then M g, with g the gradient and M positive semi-definite, and it ascends
        wherever the projection cut the pair; inside ball and box it is the unbiased one.
        """
        rows = search.track(images=images, estimate=torch.zeros_like(images))
        size, num_pairs = float(self.probe_size), self.samples // 2
        for _ in range(num_pairs):
            probe = size * self._direction(search)
            rows.ahead = self.ball.project(rows.images + probe, search.clean, search.eps)
            rows.behind = self.ball.project(rows.images - probe, search.clean, search.eps)
            rows.loss = _score(search, rows.ahead)
            if not len(search):
                break
            loss = _score(search, rows.behind)
            if not len(search):
                break
            rows.estimate += per_pixel(rows.loss - loss) * (rows.ahead - rows.behind)
        estimate: Tensor = rows.estimate / (num_pairs * (2 * size) ** 2)
        return estimate


@dataclass(frozen=True, kw_only=True)
class NES(_FiniteDifferences):
    """Natural evolution strategies: projected ascent on an antithetic Gaussian estimate of the gradient.

    A sample that survives costs ((queries − 1) // samples) · samples + 1 forwards. Every query is a point of
    ball ∩ box and counts. The paper's attack is the L-inf one; for L2 and L1 the steepest step of that norm.

    loss: `ce` as in the paper, or `margin`.
    queries: forwards a sample at most, 10,000 as in the authors' code.
    samples: queries for one estimate, in pairs x ± probe_size · u with u normal; 50 as in the authors' code.
    probe_size: standard deviation of the search distribution, 0.001 as in the authors' code.
    step_size: length of a step in the norm; None takes eps / 5, the authors' 0.01 at their eps of 0.05.
    momentum: share of the former direction in the next, 0.9 as in the authors' code.

    Ilyas et al. 2018, arXiv 1804.08598, algorithm 1; authors' code: github.com/labsix/limited-blackbox-attacks.
    """

    name: ClassVar[str] = "nes"
    paper: ClassVar[str] = "arXiv 1804.08598"

    loss: str = "ce"
    samples: int = 50
    probe_size: float | str = 0.001
    step_size: float | str | None = None
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is not None:
            object.__setattr__(self, "step_size", parse_budget(self.step_size, "step_size"))
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: expected a number from 0 to below 1")

    def _direction(self, search: Search) -> Tensor:
        return search.noise("normal", tuple(search.clean.shape[1:]))

    def _begin(self, search: Search) -> Rows:
        return search.track(images=search.clean, direction=torch.zeros_like(search.clean))

    def _step(self, search: Search, state: Rows, step: int) -> None:
        estimate = self._estimate(search, state.images)
        state.direction = self.momentum * state.direction + (1 - self.momentum) * estimate
        size = search.eps / 5 if self.step_size is None else float(self.step_size)
        move = self.ball.steepest_step(state.images, state.direction, size)
        state.images = self.ball.project(state.images + move, search.clean, search.eps)


@dataclass(frozen=True, kw_only=True)
class SPSA(_FiniteDifferences):
    """Simultaneous perturbation stochastic approximation: projected Adam on differences along ±1 directions.

    A sample that survives costs ((queries − 1) // samples) · samples + 1 forwards. Every query is a point of
    ball ∩ box and counts. The paper's attack is the L-inf one; for L2 the same steps, projected on that ball.

    loss: `margin` as in the paper, or `ce`.
    queries: forwards a sample at most, 10,000, the budget of the other attacks of this kind.
    samples: queries for one estimate, in pairs x ± probe_size · v with v uniform in {−1, 1}; 128 as in CleverHans.
    probe_size: 0.01 as in CleverHans.
    step_size: Adam's learning rate in units of the [0, 1] scale, 0.01 as in CleverHans.

    Uesato et al. 2018, arXiv 1802.05666, algorithm 1.
    """

    name: ClassVar[str] = "spsa"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    paper: ClassVar[str] = "arXiv 1802.05666"

    samples: int = 128
    probe_size: float | str = 0.01
    step_size: float | str = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "step_size", parse_budget(self.step_size, "step_size"))

    def _direction(self, search: Search) -> Tensor:
        draw = search.noise("uniform", tuple(search.clean.shape[1:]))
        return torch.where(draw < 0, -1.0, 1.0).to(draw.dtype)

    def _begin(self, search: Search) -> Rows:
        zeros = torch.zeros_like(search.clean)
        return search.track(images=search.clean, mean=zeros, square=zeros)

    def _step(self, search: Search, state: Rows, step: int) -> None:
        estimate = self._estimate(search, state.images)
        state.mean = state.mean.lerp(estimate, 1 - ADAM_BETAS[0])
        state.square = state.square.lerp(estimate.square(), 1 - ADAM_BETAS[1])
        mean, square = (
            moment / (1 - beta ** (step + 1))
            for moment, beta in zip((state.mean, state.square), ADAM_BETAS, strict=True)
        )
        move = float(self.step_size) * mean / (square.sqrt() + ADAM_SLACK)
        state.images = self.ball.project(state.images + move, search.clean, search.eps)


ADAM_BETAS = (0.9, 0.999)
ADAM_SLACK = 1e-8


@dataclass(frozen=True, kw_only=True)
class NAttack(_ScoreAttack):
    """N-Attack: learn a Gaussian over perturbations whose samples are adversarial.

    The Gaussian lives in the space z of x = (tanh z + 1) / 2 and starts at the clean image; its samples are
    projected on ball ∩ box and their losses, normalised to mean 0 and deviation 1 within a sample's batch of
    queries, move its mean. A sample that survives costs ((queries − 1) // samples) · samples + 1 forwards.

    loss: `margin` as in the paper, or `ce`.
    queries: forwards a sample at most, 10,000, the budget of the other attacks of this kind.
    samples: queries for one step of the mean, 100 as in ARES-Bench.
    deviation: standard deviation of the Gaussian, 0.1 as in ARES-Bench.
    step_size: learning rate of the mean, 0.02 as in ARES-Bench.

    Li et al. 2019, arXiv 1905.00441, algorithm 1.
    """

    name: ClassVar[str] = "nattack"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    paper: ClassVar[str] = "arXiv 1905.00441"

    deviation: float = 0.1
    step_size: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 2:
            raise ValueError(f"samples={self.samples}: expected at least 2, whose losses can be normalised")
        for key in ("deviation", "step_size"):
            if not 0 < getattr(self, key) < float("inf"):
                raise ValueError(f"{key}={getattr(self, key)}: expected a number above 0")

    def _begin(self, search: Search) -> Rows:
        inside = search.clean.clamp(EDGE, 1 - EDGE)
        return search.track(images=search.clean, mean=torch.atanh(2 * inside - 1))

    def _step(self, search: Search, state: Rows, step: int) -> None:
        """Sum up, query by query, what the normalised losses make of the noise, so that no noise is kept."""
        zeros = torch.zeros_like(state.mean)
        rows = search.track(noise_sum=zeros, weighted_sum=zeros, losses=zeros.new_empty(len(search), self.samples))
        for query in range(self.samples):
            rows.noise = search.noise("normal", tuple(search.clean.shape[1:]))
            loss = _score(search, self._images(search, state.mean + self.deviation * rows.noise))
            if not len(search):
                return
            rows.losses[:, query] = loss
            rows.noise_sum = rows.noise_sum + rows.noise
            rows.weighted_sum = rows.weighted_sum + per_pixel(loss - rows.losses[:, 0]) * rows.noise
        losses = rows.losses - rows.losses[:, :1]
        scale, centre = (per_pixel(moment) for moment in torch.std_mean(losses, dim=1, correction=0))
        total = (rows.weighted_sum - centre * rows.noise_sum) / scale.clamp(min=torch.finfo(scale.dtype).tiny)
        state.mean = state.mean + self.step_size / (self.samples * self.deviation) * total
        state.images = self._images(search, state.mean)

    def _images(self, search: Search, points: Tensor) -> Tensor:
        return self.ball.project((torch.tanh(points) + 1) / 2, search.clean, search.eps)


EDGE = 1e-6
"""What keeps black and white at a finite place in tanh space."""
