"""The loggers of a config besides metrics.csv; those that there are, are used by one process only."""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

import wandb
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from omegaconf import DictConfig, OmegaConf, open_dict
from wandb.errors import Error as WandbError

from ares_lightning.build.config import ConfigError, one_line, plain, section
from ares_lightning.evaluation.dashboards import declare_metrics

_OWN_KEYS = ("name", "offline", "artifacts")
"""Keys of `logger` that are no arguments of wandb.init."""


def prepare_logger(cfg: DictConfig, saved: DictConfig | None) -> None:
    """Raise ConfigError where `logger` cannot be used, and put the id of the Weights & Biases run into it.

    saved: the config of a run that goes on, whose id is kept; an agent of a sweep gives an id of its own
    (WANDB_RUN_ID), else a new one is drawn.
    """
    name = cfg.logger.name
    if name == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("logger=tensorboard: TensorBoard is not installed; pip install tensorboard")
    if name not in ("csv", "tensorboard", "wandb"):
        raise ConfigError(f"logger.name={name}: expected csv, tensorboard or wandb")
    if name == "wandb" and not cfg.logger.get("id"):
        before = None if saved is None else OmegaConf.select(saved, "logger.id")
        with open_dict(cfg):
            cfg.logger.id = os.environ.get("WANDB_RUN_ID") or before or secrets.token_hex(4)
    if name == "wandb" and not re.fullmatch(r"[\w.-]+", str(cfg.logger.id)):
        raise ConfigError(f"logger.id={cfg.logger.id}: expected letters, digits, dots, dashes and underscores")


def start_loggers(cfg: DictConfig, run_dir: Path) -> list[Logger]:
    """Start the loggers of a run whose folder exists; to be called in the process of rank 0.

    All that they write lies in the run folder. Raises ConfigError where Weights & Biases refuses.
    """
    if cfg.logger.name == "tensorboard":
        return [TensorBoardLogger(run_dir, name="", version="tensorboard")]
    return [_start_wandb(cfg, run_dir)] if cfg.logger.name == "wandb" else []


def end_loggers(loggers: Sequence[Logger]) -> None:
    """Let loggers write what they still hold; the next job of a sweep has a run of its own."""
    for logger in loggers:
        logger.finalize("success")
        if isinstance(logger, WandbLogger):
            wandb.finish()
            wandb.teardown()  # so that the next one heeds its own settings


def _start_wandb(cfg: DictConfig, run_dir: Path) -> WandbLogger:
    """Start the run ourselves: Lightning would plot all metrics over steps, by a rule that overlaps with ours."""
    settings = {key: value for key, value in plain(cfg.logger).items() if key not in _OWN_KEYS}
    own = run_dir.resolve() / "wandb"
    own.mkdir(exist_ok=True)
    os.environ |= {"WANDB_DATA_DIR": str(own), "WANDB_CACHE_DIR": str(own)}  # of artifacts: else in the home
    try:
        with section("logger"):
            run = wandb.init(
                dir=run_dir,
                name=cfg.name,
                job_type="train" if "optim" in cfg else "evaluate",
                config=plain(cfg),
                resume="allow",
                mode="offline" if cfg.logger.offline else None,
                **settings,
            )
    except WandbError as error:
        remedy = "logger.offline=true needs neither account nor network"
        raise ConfigError(f"logger=wandb: {one_line(error)}; {remedy}") from error
    except ConfigError as error:
        raise ConfigError(one_line(error)) from error
    declare_metrics(run)
    return WandbLogger(save_dir=run_dir, project=cfg.logger.project, experiment=run)
