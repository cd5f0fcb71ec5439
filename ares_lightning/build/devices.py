"""The processes and devices of an evaluation."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from ares_lightning.build.config import ConfigError, one_line, plain, section
from ares_lightning.training.devices import process_settings


def build_fabric(cfg: DictConfig) -> L.Fabric:
    """Build what starts the processes of `trainer` and gives each its device; nothing is started yet."""
    settings: dict[str, Any] = plain(cfg.trainer)
    with section("trainer"):
        settings = process_settings(**settings)
    if settings["strategy"] == "ddp_fork":
        raise ConfigError("trainer.strategy=ddp_fork: an evaluation has loaded its network already; take ddp")
    try:
        return L.Fabric(**settings, precision="32-true")
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"trainer: {one_line(error)}") from error
