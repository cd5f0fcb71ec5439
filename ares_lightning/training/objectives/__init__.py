"""What training minimises, by the name that `adv` has for it."""

from ares_lightning.training.objectives.adversarial import AdversarialTraining, StandardTraining
from ares_lightning.training.objectives.advprop import AdvProp
from ares_lightning.training.objectives.auxiliary import AuxiliaryNorms
from ares_lightning.training.objectives.consistency import Consistency
from ares_lightning.training.objectives.distillation import ARD, RSLAD, Distillation
from ares_lightning.training.objectives.fast import NFGSM, GradAlign
from ares_lightning.training.objectives.free import FreeTraining
from ares_lightning.training.objectives.gradient_norm import GradientNorm
from ares_lightning.training.objectives.objective import InnerAttack, Logs, Objective
from ares_lightning.training.objectives.trades import MART, TRADES

OBJECTIVES: dict[str, type[Objective]] = {
    "none": StandardTraining,
    **dict.fromkeys(("pgd", "fgsm", "apgd", "fgsm_rs"), AdversarialTraining),
    "trades": TRADES,
    "mart": MART,
    "n_fgsm": NFGSM,
    "gradalign": GradAlign,
    "free": FreeTraining,
    "advprop": AdvProp,
    "consistency": Consistency,
    "gradient_norm": GradientNorm,
    "ard": ARD,
    "rslad": RSLAD,
}

__all__ = [
    "ARD",
    "MART",
    "NFGSM",
    "OBJECTIVES",
    "RSLAD",
    "TRADES",
    "AdvProp",
    "AdversarialTraining",
    "AuxiliaryNorms",
    "Consistency",
    "Distillation",
    "FreeTraining",
    "GradAlign",
    "GradientNorm",
    "InnerAttack",
    "Logs",
    "Objective",
    "StandardTraining",
]
