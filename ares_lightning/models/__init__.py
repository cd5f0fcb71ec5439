"""Classifiers: networks that take pixels in [0, 1] and return logits, and the checkpoints they come from."""

from ares_lightning.models.checkpoints import CheckpointError, load_network, read_checkpoint
from ares_lightning.models.classifier import Classifier, Normalize, make_classifier

__all__ = ["CheckpointError", "Classifier", "Normalize", "load_network", "make_classifier", "read_checkpoint"]
