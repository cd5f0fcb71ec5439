"""The attacks by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ares_lightning.attacks.apgd import APGDCE, APGDDLR, APGDT
from ares_lightning.attacks.attack import Attack
from ares_lightning.attacks.autoattack import AutoAttack
from ares_lightning.attacks.baseline import RandomNoise
from ares_lightning.attacks.decision import Boundary, Evolutionary
from ares_lightning.attacks.fab import FAB, FABT
from ares_lightning.attacks.generator import CDA
from ares_lightning.attacks.minimal import CW, FMN, DeepFool
from ares_lightning.attacks.pgd import BIM, FGSM, PGD
from ares_lightning.attacks.query import NES, SPSA, NAttack
from ares_lightning.attacks.sgm import SGM
from ares_lightning.attacks.square import Square
from ares_lightning.attacks.transfer import DIM, MIM, SINIFGSM, TIM, TTA, VMIFGSM

_ATTACKS: dict[str, type[Attack]] = {
    attack.name: attack
    for attack in (
        *(FGSM, BIM, PGD, MIM, APGDCE, APGDDLR, APGDT),
        *(FAB, FABT, CW, DeepFool, FMN),
        *(DIM, TIM, SINIFGSM, VMIFGSM, SGM, TTA, CDA),
        *(Square, NES, SPSA, NAttack),
        *(Boundary, Evolutionary),
        *(AutoAttack, RandomNoise),
    )
}


@dataclass(frozen=True)
class AttackInfo:
    """A row of the catalogue: what the attack called `name` can do, and where it was published."""

    name: str
    kind: str
    norms: tuple[str, ...]
    targeted: bool
    needs_gradients: bool
    paper: str


def list_attacks() -> list[AttackInfo]:
    """Return the catalogue, one row an attack."""
    return [AttackInfo(a.name, a.kind, a.norms, a.targeted, a.needs_gradients, a.paper) for a in _ATTACKS.values()]


def make_attack(name: str, **settings: Any) -> Attack:
    """Build an attack by name; what `settings` leave out has the default of its paper.

    Raises ValueError for an unknown name or setting, naming the nearest known ones, and for a bad value.
    """
    if name not in _ATTACKS:
        raise ValueError(f"attack={name}: {_suggest(name, list(_ATTACKS))}")
    attack = _ATTACKS[name]
    known = [field.name for field in dataclasses.fields(attack)]
    for key in settings:
        if key not in known:
            raise ValueError(f"{key}={settings[key]}: not a setting of {name}; {_suggest(key, known)}")
    return attack(**settings)


def _suggest(word: str, known: list[str]) -> str:
    near = get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
