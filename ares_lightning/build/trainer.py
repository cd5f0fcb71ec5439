"""The Trainer of a config, with its callbacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback, EarlyStopping
from omegaconf import DictConfig, OmegaConf

from ares_lightning.attacks import make_attack
from ares_lightning.attacks.attack import check_count
from ares_lightning.build.config import ConfigError, one_line, plain, section
from ares_lightning.build.devices import trainer_devices
from ares_lightning.build.evaluation import build_threat
from ares_lightning.build.own import TARGET, build_own
from ares_lightning.evaluation.callback import PeriodicEvaluation
from ares_lightning.hardware import HARDWARE
from ares_lightning.training.checkpointing import AtomicCheckpointIO, Checkpoints
from ares_lightning.training.cost import StepCost
from ares_lightning.training.forecast import Forecast
from ares_lightning.training.metrics_file import MetricsFile
from ares_lightning.training.module import MONITORED
from ares_lightning.training.preemption import StopSignals
from ares_lightning.training.progress import TrainingProgress
from ares_lightning.training.tricks import AWP, EMA, SWA, NonFiniteGuard, OverfittingProbe


def build_trainer(
    cfg: DictConfig,
    run_dir: Path,
    stop: StopSignals | None = None,
    *,
    cost: StepCost | None = None,
    periodic: PeriodicEvaluation | None = None,
) -> L.Trainer:
    """Build the Lightning Trainer with its callbacks; writes nothing yet.

    stop: signals that end the training. cost: of a step, for the forecast. periodic: evaluates during it.
    """
    settings = {key: value for key, value in plain(cfg.trainer).items() if key not in _TRAINER_KEYS}
    for key in ("max_epochs", "accumulate_grad_batches", "check_val_every_n_epoch"):
        with section("trainer"):
            check_count(key, settings[key])
    if not settings["limit_train_batches"]:
        raise ConfigError("trainer.limit_train_batches=0: nothing would be trained; give a number above 0")
    settings |= trainer_devices(cfg)
    plugins: list[Any] = [AtomicCheckpointIO()]
    if cfg.plan in HARDWARE:
        plugins.append(LightningEnvironment())  # the processes of a job here are not those that are planned
    elif SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # `stop` sees to signals
    debugging = bool(settings["fast_dev_run"])
    callbacks = _callbacks(cfg, run_dir, None if debugging else stop, cost, periodic, checkpoints=not debugging)
    try:
        return L.Trainer(
            **settings,
            plugins=plugins,
            callbacks=callbacks,
            logger=False,  # they are given to it once there is a run folder
            enable_checkpointing=not debugging,
            default_root_dir=run_dir,
            gradient_clip_val=cfg.optim.clip_grad_norm,
            inference_mode=False,  # a network may cache tensors in validation that a later attack differentiates
            reload_dataloaders_every_n_epochs=int(OmegaConf.is_config(cfg.data.batch_size)),  # sizes by epoch
            use_distributed_sampler=False,  # the data module shards by itself, without duplicates
            enable_progress_bar=cfg.callbacks.progress,
            enable_model_summary=False,
            log_every_n_steps=1,  # only epoch means are logged
        )
    except (ValueError, TypeError, RuntimeError, L.fabric.utilities.exceptions.MisconfigurationException) as error:
        raise ConfigError(f"trainer: {one_line(error)}") from error


_TRAINER_KEYS = ("compile", "activation_checkpointing")
"""Keys of `trainer` that are no arguments of lightning.Trainer."""


def _callbacks(
    cfg: DictConfig,
    run_dir: Path,
    stop: StopSignals | None,
    cost: StepCost | None,
    periodic: PeriodicEvaluation | None,
    *,
    checkpoints: bool,
) -> list[Callback]:
    callbacks: list[Callback] = [NonFiniteGuard()]  # before the bar, which makes rank 0 reduce metrics earlier
    callbacks += [TrainingProgress()] if cfg.callbacks.progress else []
    callbacks += [Forecast(cost)]
    callbacks += [periodic] if periodic else []
    if checkpoints:
        callbacks += [MetricsFile(run_dir / "metrics.csv"), _checkpoints(cfg, run_dir, stop, periodic)]
    for name, settings in plain(cfg.get("trick")).items():
        is_own = isinstance(settings, dict) and TARGET in settings
        if not is_own and name not in _TRICKS:
            raise ConfigError(f"trick.{name}: expected one of {', '.join(_TRICKS)}, or a {TARGET}")
        with section(f"trick.{name}"):
            callbacks.append(build_own(settings, Callback) if is_own else _TRICKS[name](cfg, settings))
    return callbacks


def _checkpoints(
    cfg: DictConfig, run_dir: Path, stop: StopSignals | None, periodic: PeriodicEvaluation | None
) -> Checkpoints:
    settings = plain(cfg.callbacks.checkpoint)
    known = [*MONITORED, *(periodic.metrics if periodic else ())]
    if settings["monitor"] not in known:
        raise ConfigError(f"callbacks.checkpoint.monitor={settings['monitor']}: expected one of {', '.join(known)}")
    with section("callbacks.checkpoint"):
        if settings["every_n_steps"] is not None:
            check_count("every_n_steps", settings["every_n_steps"])
        return Checkpoints(run_dir / "checkpoints", stop=stop, **settings)


def _early_stopping(cfg: DictConfig, settings: dict[str, Any]) -> Callback:
    checkpoint = cfg.callbacks.checkpoint
    check_count("patience", settings["patience"])
    return EarlyStopping(checkpoint.monitor, mode=checkpoint.mode, **settings)


def _swa(cfg: DictConfig, settings: dict[str, Any]) -> Callback:
    start, epochs = settings["start_epoch"], cfg.trainer.max_epochs
    if start is None:
        start = epochs // 4
    swa = SWA(start)
    if start >= epochs:
        raise ValueError(
            f"start_epoch={start}: trainer.max_epochs={epochs} ends before; give an earlier one, or null"
        )
    return swa


def _overfitting_probe(cfg: DictConfig, settings: dict[str, Any]) -> Callback:
    steps, threat = settings.pop("steps"), build_threat(cfg)
    attack = make_attack("pgd", norm=threat.norm, eps=threat.eps, steps=steps, step_size="1/4 eps")
    return OverfittingProbe(attack, seed=cfg.seed, **settings)


_TRICKS: dict[str, Callable[[DictConfig, dict[str, Any]], Callback]] = {
    "ema": lambda cfg, settings: EMA(**settings),
    "swa": _swa,
    "awp": lambda cfg, settings: AWP(**settings),
    "early_stopping": _early_stopping,
    "overfitting_probe": _overfitting_probe,
}


def check_resumed(cfg: DictConfig, checkpoint: dict[str, Any]) -> None:
    """Raise ConfigError where `optim` is not that of a checkpoint, which goes on, or where that is further."""
    for key, value in plain(cfg.optim).items():
        before = checkpoint["config"]["optim"].get(key)
        if value != before:
            raise ConfigError(
                f"optim.{key}={value}: the checkpoint was made with {before}, and its optimizer goes on as it was; "
                "leave this out, or begin a new training with model.weights=<checkpoint>"
            )
    if checkpoint["epoch"] > cfg.trainer.max_epochs:
        raise ConfigError(
            f"trainer.max_epochs={cfg.trainer.max_epochs}: the checkpoint has {checkpoint['epoch']} epochs behind "
            "it; give at least so many"
        )
