"""The evaluators during a training."""

from __future__ import annotations

import copy
import math
from pathlib import Path

from omegaconf import DictConfig, open_dict

from ares_lightning.build.config import ConfigError, plain, section
from ares_lightning.build.evaluation import build_evaluation
from ares_lightning.data import RobustDataModule, select_subset
from ares_lightning.evaluation.callback import PeriodicEvaluation
from ares_lightning.models.weights import WHICH
from ares_lightning.training.tricks.averaging import networks

AVERAGING = {"ema", "swa"}
"""The tricks that average weights."""


def build_periodic(cfg: DictConfig, data: RobustDataModule, run_dir: Path) -> PeriodicEvaluation | None:
    """Build the callback that `callbacks.periodic` asks for, None where it asks for none."""
    settings, asked = plain(cfg.callbacks.periodic), plain(cfg.get("eval"))
    if settings["every_n_epochs"] is None:
        return None
    names = list(asked) if settings["eval"] is None else settings["eval"]
    unknown = [name for name in names if name not in asked]
    if unknown or not names:
        raise ConfigError(
            f"callbacks.periodic.eval={settings['eval']}: expected null, or a list of some of {', '.join(asked)}"
        )
    weights = settings["weights"]
    if not isinstance(weights, list) or not weights or not set(weights) <= set(WHICH):
        raise ConfigError(f"callbacks.periodic.weights={weights}: expected a list of some of {', '.join(WHICH)}")
    if not AVERAGING.intersection(plain(cfg.get("trick"))):
        weights = [which for which in weights if which != "ema"]
    if not weights:
        raise ConfigError(
            "callbacks.periodic.weights=['ema']: no trick averages the weights; give trick=[ema], or ask raw"
        )
    with section("callbacks.periodic"):
        select_subset(data.val_set, settings["subset"])  # so that the key is named
    own = copy.deepcopy(cfg)
    with open_dict(own):
        own.eval = {name: own.eval[name] for name in names}
        own.subset = settings["subset"]
    evaluation = build_evaluation(own, data, data.val_set)
    every, validated, last = settings["every_n_epochs"], cfg.trainer.check_val_every_n_epoch, cfg.trainer.max_epochs
    with section("callbacks.periodic"):
        periodic = PeriodicEvaluation(
            evaluation, run_dir / "periodic", every_n_epochs=every, networks=networks, weights=weights
        )
    if math.lcm(every, validated) > last:
        raise ConfigError(
            f"callbacks.periodic.every_n_epochs={every}: never comes in trainer.max_epochs={last} with "
            f"trainer.check_val_every_n_epoch={validated}; give a smaller one, or null"
        )
    return periodic
