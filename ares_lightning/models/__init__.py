"""Classifiers: networks that take pixels in [0, 1] and return logits, and the checkpoints they come from."""

from ares_lightning.models.checkpoints import CheckpointError, read_checkpoint
from ares_lightning.models.classifier import ClassAnswers, Classifier, Normalize, make_classifier
from ares_lightning.models.defenses import make_defense
from ares_lightning.models.weights import load_network, load_timm_weights, load_weights
from ares_lightning.models.zoo import ZOO, ZooModel

__all__ = [
    "ZOO",
    "CheckpointError",
    "ClassAnswers",
    "Classifier",
    "Normalize",
    "ZooModel",
    "load_network",
    "load_timm_weights",
    "load_weights",
    "make_classifier",
    "make_defense",
    "read_checkpoint",
]
