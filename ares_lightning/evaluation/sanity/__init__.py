"""Can an evaluation be believed? Measurements on the model, attacks that should not win, and the verdict."""

from ares_lightning.evaluation.sanity.attacks import SanityAttack, sanity_evaluators, sanity_subset
from ares_lightning.evaluation.sanity.checks import run_checks, sanity_report
from ares_lightning.evaluation.sanity.probes import Probes, take_probes
from ares_lightning.evaluation.sanity.rule import Check

__all__ = [
    "Check",
    "Probes",
    "SanityAttack",
    "run_checks",
    "sanity_evaluators",
    "sanity_report",
    "sanity_subset",
    "take_probes",
]
