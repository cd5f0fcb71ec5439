"""Adversarial training: the LightningModule, the objectives it optimises, and the optimizers."""

from ares_lightning.training.module import RobustTraining
from ares_lightning.training.objectives import AdversarialTraining, Objective, StandardTraining

__all__ = ["AdversarialTraining", "Objective", "RobustTraining", "StandardTraining"]
