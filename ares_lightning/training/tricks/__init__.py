"""Tricks: Lightning callbacks, one file and one documented effect each."""

from ares_lightning.training.tricks.averaging import EMA, SWA, WeightAverage
from ares_lightning.training.tricks.awp import AWP
from ares_lightning.training.tricks.non_finite import NonFiniteError, NonFiniteGuard
from ares_lightning.training.tricks.overfitting_probe import OverfittingProbe

__all__ = ["AWP", "EMA", "SWA", "NonFiniteError", "NonFiniteGuard", "OverfittingProbe", "WeightAverage"]
