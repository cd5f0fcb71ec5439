"""What no attack should fall short of: random noise of the same budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ares_lightning.attacks.attack import Attack, check_count
from ares_lightning.attacks.search import Search


@dataclass(frozen=True, kw_only=True)
class RandomNoise(Attack):
    """Uniform random points of ball ∩ box; a sample is broken if any of them is misclassified.

    draws: points tried for each sample, 10; all but the last, which the verdict judges, cost one forward each.

    A gradient attack that finds less than this points to masked gradients (Carlini et al. 2019,
    arXiv 1902.06705, section 3).
    """

    name: ClassVar[str] = "noise"
    kind: ClassVar[str] = "baseline"
    needs_gradients: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 1902.06705"

    draws: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("draws", self.draws)

    def _run(self, search: Search) -> None:
        for _ in range(self.draws - 1 if search.feedback else 0):
            search.forward(self.ball.uniform(search.clean, search.eps, search.noise))
            if not len(search):
                return
        search.finish(self.ball.uniform(search.clean, search.eps, search.noise))
