"""PGD from starting points whose outputs differ, ODI-PGD (Tashiro et al. 2020, arXiv 2003.06878).

python evaluate.py --config-dir examples/conf ckpt=runs/<name>/<run id> eval=[pgd20,attack] attack=odi_pgd
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ares_lightning.attacks import Attack
from ares_lightning.attacks.search import Search


@dataclass(frozen=True, kw_only=True)
class ODIPGD(Attack):
    """`odi_steps` of length eps up a random mixture of the logits, then `steps` of length eps / 4 up the loss."""

    name: ClassVar[str] = "odi_pgd"

    odi_steps: int = 2
    steps: int = 20

    def _run(self, search: Search) -> None:
        num_classes = search.clean_logits().shape[1]
        images = self.ball.uniform(search.clean, search.eps, search.noise)
        rows = search.track(images=images, mixture=search.noise("uniform", (num_classes,)))
        for step in range(self.odi_steps + self.steps):
            begins = step < self.odi_steps
            raised: dict[str, Any] = {"objective": mixed, "aims": rows.mixture} if begins else {}
            gradient = search.gradient(rows.images, **raised).gradient
            move = self.ball.steepest_step(rows.images, gradient, search.eps / (1 if begins else 4))
            rows.images = self.ball.project(rows.images + move, search.clean, search.eps)
        search.finish(rows.images)


def mixed(logits: Tensor, labels: Tensor, mixture: Tensor) -> Tensor:
    """Return a mixture of the logits, one value a sample."""
    return (logits * mixture).sum(1)
