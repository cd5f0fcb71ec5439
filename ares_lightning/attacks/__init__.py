"""Adversarial attacks in plain PyTorch: one call, one outcome, nothing else imported.

>>> from ares_lightning.attacks import make_attack
>>> outcome = make_attack("pgd", norm="linf", eps="8/255", steps=20)(model, images, labels)  # doctest: +SKIP
"""

from ares_lightning.attacks.attack import Attack
from ares_lightning.attacks.catalogue import AttackInfo, list_attacks, make_attack
from ares_lightning.attacks.query import accuracy_over_queries
from ares_lightning.attacks.threat import Threat, parse_budget
from ares_lightning.attacks.verdict import Outcome

__all__ = [
    "Attack",
    "AttackInfo",
    "Outcome",
    "Threat",
    "accuracy_over_queries",
    "list_attacks",
    "make_attack",
    "parse_budget",
]
