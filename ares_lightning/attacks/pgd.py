"""Attacks that follow the input gradient: FGSM, BIM and PGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ares_lightning.attacks.attack import Attack, check_count
from ares_lightning.attacks.losses import LOSSES, Objective, as_objective
from ares_lightning.attacks.search import Search
from ares_lightning.attacks.threat import Budget, parse_budget

OF_BUDGET = " eps"
"""What follows the number where a step is a multiple of the budget."""
START_DEVIATION = 0.001
"""Of the noise around the clean image that TRADES begins with (arXiv 1901.08573, algorithm 1)."""


@dataclass(frozen=True, kw_only=True)
class _GradientAttack(Attack):
    """loss: `ce` (cross-entropy), `margin` (largest other logit minus label's) or `logit` (minus label's)."""

    kind: ClassVar[str] = "white-box"

    loss: str = "ce"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss}: expected one of {', '.join(LOSSES)}")

    def _objective(self) -> Objective:
        return as_objective(LOSSES[self.loss])

    def _climb(self, search: Search, images: Tensor, steps: int) -> Tensor:
        """Take steepest steps and project after each: `steps` forwards and backwards; return the last iterates."""
        rows = search.track(images=images)
        for _ in range(steps):
            gradient = search.gradient(rows.images).gradient
            if not len(search):
                break
            step = self.ball.steepest_step(rows.images, gradient, self._step_size(search.eps))
            rows.images = self.ball.project(rows.images + step, search.clean, search.eps)
        last: Tensor = rows.images
        return last

    def _step_size(self, eps: Tensor) -> Budget:
        """Return the length of a step at budgets [n]."""
        return eps


@dataclass(frozen=True, kw_only=True)
class FGSM(_GradientAttack):
    """Fast gradient sign method: one steepest step of length eps from the clean image (1F + 1B).

    Goodfellow et al. 2015, arXiv 1412.6572, section 4; for L2 and L1 the steepest step of that norm.
    """

    name: ClassVar[str] = "fgsm"
    paper: ClassVar[str] = "arXiv 1412.6572"

    def _run(self, search: Search) -> None:
        search.finish(self._climb(search, search.clean, 1))


@dataclass(frozen=True, kw_only=True)
class BIM(_GradientAttack):
    """Basic iterative method: FGSM in small steps from the clean image (k F + k B); any iterate counts.

    steps: k, 20 as in ARES-Bench.
    step_size: length of a step in the norm, a number, text such as "1/255", or a multiple of the budget such as
        "2/3 eps"; None takes the larger of eps / 4 (ARES-Bench, arXiv 2302.14301: 1/255 at 4/255) and
        2.5 · eps / steps (Madry et al., arXiv 1706.06083, whose few steps can so reach any point of the ball).

    Kurakin et al. 2017, arXiv 1607.02533, section 2.2.
    """

    name: ClassVar[str] = "bim"
    paper: ClassVar[str] = "arXiv 1607.02533"

    steps: int = 20
    step_size: float | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        if self.step_size is not None:
            object.__setattr__(self, "step_size", _parse_step(self.step_size))

    def _step_size(self, eps: Tensor) -> Budget:
        if self.step_size is None:
            return max(1 / 4, 2.5 / self.steps) * eps
        if isinstance(self.step_size, str):
            return parse_budget(self.step_size.removesuffix(OF_BUDGET)) * eps
        return self.step_size

    def scale_step(self, factor: float) -> Self:
        """Return the attack with steps `factor` times as long."""
        if isinstance(self.step_size, float):
            return self.replace(step_size=factor * self.step_size)
        in_budgets = float(self._step_size(torch.ones((), dtype=torch.float64)))
        return self.replace(step_size=f"{factor * in_budgets}{OF_BUDGET}")

    def _climb(self, search: Search, images: Tensor, steps: int) -> Tensor:
        stands_still = self.step_size in (0.0, f"0.0{OF_BUDGET}")
        return images if stands_still else super()._climb(search, images, steps)

    def _run(self, search: Search) -> None:
        search.finish(self._climb(search, search.clean, self.steps))


def _parse_step(step_size: object) -> float | str:
    """Return a length as a number, and a multiple of the budget as the text `<number> eps`."""
    if isinstance(step_size, str) and step_size.endswith(OF_BUDGET):
        try:
            return f"{parse_budget(step_size.removesuffix(OF_BUDGET))}{OF_BUDGET}"
        except ValueError as error:
            raise ValueError(f"step_size={step_size}: expected a multiple such as 2/3{OF_BUDGET}") from error
    return parse_budget(step_size, "step_size")


@dataclass(frozen=True, kw_only=True)
class PGD(BIM):
    """Projected gradient descent: BIM from a random point of the ball (k F + k B a restart).

    random_start: begin at a uniform point of ball ∩ box rather than at the clean image; `normal` begins beside the
        clean image, at normal noise of deviation 0.001 (TRADES, arXiv 1901.08573, algorithm 1), in ball and box.
    restarts: runs from new random points for the samples not yet broken; the last iterates of each run but the
        final one cost one forward more to judge, so that R restarts cost R·k F + (R − 1) F + R·k B.
        `craft` makes one run.

    Madry et al. 2018, arXiv 1706.06083, section 2.1.
    """

    name: ClassVar[str] = "pgd"
    paper: ClassVar[str] = "arXiv 1706.06083"

    random_start: bool | str = True
    restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("restarts", self.restarts)
        if self.random_start not in (True, False, "normal"):
            raise ValueError(f"random_start={self.random_start}: expected true, false or normal")
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"restarts={self.restarts}: without random_start every run would be the same")

    def _run(self, search: Search) -> None:
        restarts = self.restarts if search.feedback else 1
        for restart in range(restarts):
            images = search.clean
            if self.random_start == "normal":
                noise = search.noise("normal", tuple(search.clean.shape[1:])).mul_(START_DEVIATION)
                images = self.ball.project(search.clean + noise, search.clean, search.eps)
            elif self.random_start:
                images = self.ball.uniform(search.clean, search.eps, search.noise)
            images = self._climb(search, images, self.steps)
            if restart + 1 < restarts and len(search):
                search.forward(images)
            if not len(search):
                return
        search.finish(images)
