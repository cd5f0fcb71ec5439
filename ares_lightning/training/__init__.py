"""Adversarial training: the LightningModule, the objectives it optimises, the tricks, and the optimizers."""

from ares_lightning.training.module import RobustTraining

__all__ = ["RobustTraining"]
