"""The evaluators during a training."""

from __future__ import annotations

import copy
from pathlib import Path

from omegaconf import DictConfig, open_dict

from ares_lightning.build.config import ConfigError, plain, section
from ares_lightning.build.evaluation import build_evaluation
from ares_lightning.data import RobustDataModule
from ares_lightning.evaluation.callback import PeriodicEvaluation
from ares_lightning.models.weights import WHICH
from ares_lightning.training.tricks.averaging import networks


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
    own = copy.deepcopy(cfg)
    with open_dict(own):
        own.eval = {name: own.eval[name] for name in names}
        own.subset = settings["subset"]
    evaluation = build_evaluation(own, data, data.val_set)
    with section("callbacks.periodic"):
        return PeriodicEvaluation(
            evaluation,
            run_dir / "periodic",
            every_n_epochs=settings["every_n_epochs"],
            networks=networks,
            weights=weights,
        )
