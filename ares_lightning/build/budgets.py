"""The attacks of `eval`, and the budgets of those whose norm is not the threat model's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from ares_lightning.attacks import Attack, Threat, list_attacks, make_attack
from ares_lightning.attacks.attack import DEFAULT_EPS
from ares_lightning.attacks.authorship import foreign_code
from ares_lightning.build.own import TARGET, build_own

IMAGENET_PIXELS = 3 * 224 * 224
"""Dimensions of the images that the usual budgets are meant for."""
USUAL = "usual"
"""The word for the budget that is taken where none is given, for attacks to which null is no budget."""


def usual_budget(norm: str, threat: Threat, num_pixels: int) -> float:
    """Return the budget in a norm: the threat model's where it has this norm, else ImageNet's usual one.

    num_pixels: dimensions of an image, channels included. For L2 and L1 the usual budget is multiplied by the root
    of their ratio to ImageNet's, so that an L2 budget moves a pixel equally far at every size.
    """
    if norm == threat.norm:
        return threat.eps
    return DEFAULT_EPS[norm] * (1.0 if norm == "linf" else math.sqrt(num_pixels / IMAGENET_PIXELS))


def build_attack(settings: Mapping[str, Any], **offered: Any) -> Attack:
    """Build the attack that `settings` name, or a user's own, which takes of `offered` what its settings lack."""
    if TARGET not in settings:
        return make_attack(**settings)
    attack: Attack = build_own(settings, Attack, **offered)
    if foreign_code(type(attack)) and attack.name in {row.name for row in list_attacks()}:
        raise ValueError(
            f"{TARGET}={settings[TARGET]}: is called {attack.name} as one of this project's attacks; set its `name`"
        )
    return attack


def attack_at_budget(settings: Mapping[str, Any], cfg: DictConfig, threat: Threat, **offered: Any) -> Attack:
    """Build an attack; `eps` None is the usual budget, but for minimum-distance attacks, which then have none.

    offered: as `build_attack` has it; a user's own attack is in the threat model's norm where it names none.
    """
    offered = {"norm": threat.norm, **offered}
    eps = settings.get("eps", offered.pop("eps", None))
    attack = build_attack({**settings, "eps": None if eps == USUAL else eps}, **offered)
    if eps == USUAL or (eps is None and not attack.nearest):
        num_pixels = cfg.data.in_chans * cfg.data.img_size**2
        eps = usual_budget(attack.norm, threat, num_pixels)
        attack = build_attack({**settings, "eps": eps}, **offered)
    return attack
