"""AutoAttack: the standard ensemble, each attack on what the ones before it have left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ares_lightning.attacks.apgd import APGDCE, APGDDLR, APGDT
from ares_lightning.attacks.attack import Attack
from ares_lightning.attacks.fab import FAB, FABT
from ares_lightning.attacks.search import Search
from ares_lightning.attacks.square import Square

VERSIONS = ("standard", "plus", "rand")
RESTARTS = 5
"""Restarts of APGD and FAB in version plus."""
RANDOM_DRAWS = 20
"""Draws of a randomised model in version rand."""


@dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack):
    """AutoAttack with the settings of its authors (Croce & Hein 2020, arXiv 2003.01690, and their implementation).

    version: `standard` is APGD-CE, APGD-T, FAB-T (9 targets each, or as many as there are) and Square (5,000
        queries); for L1 APGD-CE has 5 restarts and APGD-T 5 targets. `plus` adds APGD-DLR and untargeted FAB, with
        5 restarts each as for APGD-CE. `rand` is APGD-CE and APGD-DLR for randomised models, with `eot` 20 unless
        more than one draw is asked for.

    A sample that withstands version standard costs 8,820 F-equivalents for L-inf and L2 (a forward or a backward
    being one) and what FAB's checks need; a broken one what it took to break it. `craft` makes one run of the first
    attack.
    """

    name: ClassVar[str] = "autoattack"
    kind: ClassVar[str] = "ensemble"
    targeted: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 2003.01690"

    version: str = "standard"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version not in VERSIONS:
            raise ValueError(f"version={self.version}: expected one of {', '.join(VERSIONS)}")
        if self.version == "rand" and self.eot == 1:
            object.__setattr__(self, "eot", RANDOM_DRAWS)

    def replace(self, **changes: Any) -> Self:
        """Return the attack with some settings changed; the 20 draws of version rand stay behind with it."""
        leaves_rand = self.version == "rand" != changes.get("version", "rand")
        if leaves_rand and self.eot == RANDOM_DRAWS:
            changes.setdefault("eot", 1)
        return super().replace(**changes)

    @property
    def members(self) -> tuple[Attack, ...]:
        """The attacks in their order, with every setting spelled out."""
        shared: dict[str, Any] = {"norm": self.norm, "eps": self.eps, "eot": self.eot}
        num_targets = 5 if self.norm == "l1" and self.version == "standard" else 9
        apgd_t = APGDT(**shared, steps=100, num_targets=num_targets)
        fab_t = FABT(**shared, steps=100, num_targets=9)
        square = Square(**shared, queries=5000, restarts=1)
        if self.version == "standard":
            apgd_ce = APGDCE(**shared, steps=100, restarts=RESTARTS if self.norm == "l1" else 1)
            return (apgd_ce, apgd_t, fab_t, square)
        restarts = RESTARTS if self.version == "plus" else 1
        apgd = (
            APGDCE(**shared, steps=100, restarts=restarts),
            APGDDLR(**shared, steps=100, restarts=restarts),
        )
        if self.version == "rand":
            return apgd
        return (*apgd, FAB(**shared, steps=100, restarts=restarts), square, apgd_t, fab_t)

    def _identity(self) -> list[Any]:
        return [*super()._identity(), *(attack._identity() for attack in self.members)]

    def _run(self, search: Search) -> None:
        if not search.feedback:
            self.members[0]._run(search)
            return
        for attack in self.members:
            attack.take_up(search)
            if not len(search):
                return
