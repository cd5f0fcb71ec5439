"""The processes and devices of an evaluation."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from ares_lightning.build.config import ConfigError, one_line, plain, section
from ares_lightning.hardware import HARDWARE, Hardware
from ares_lightning.training.devices import PRECISIONS, device_settings, process_settings


def build_fabric(cfg: DictConfig) -> L.Fabric:
    """Build what starts the processes of `trainer` and gives each its device; nothing is started yet."""
    fabric = _fabric(plain(cfg.trainer))
    if cfg.trainer.strategy == "ddp_fork":
        raise ConfigError("trainer.strategy=ddp_fork: an evaluation has loaded its network already; take ddp")
    return fabric


def planned_devices(cfg: DictConfig) -> tuple[torch.device | Hardware, int]:
    """Return what a plan is for, the device here or the hardware that `plan` names, and how many of it."""
    keys = ("accelerator", "devices", "num_nodes", "strategy")
    trainer = {key: plain(cfg.trainer)[key] for key in keys}
    if cfg.plan is True:
        fabric = _fabric(trainer)
        return fabric.device, fabric.world_size
    if cfg.precision == "fp64":
        raise ConfigError(f"precision=fp64: plan={cfg.plan} knows no rate for it; plan=true measures one")
    devices = trainer["devices"]
    devices = len(devices) if isinstance(devices, list) else devices
    if type(devices) is not int or devices < 1:
        raise ConfigError(f"trainer.devices={devices}: plan={cfg.plan} needs their number")
    return HARDWARE[cfg.plan], devices * trainer["num_nodes"]


def planned_precision(cfg: DictConfig) -> str:
    """Return the precision of a training on what its plan is for; `auto` is bf16-mixed on all of that hardware."""
    precision = cfg.trainer.precision
    with section("trainer"):
        if cfg.plan is True:
            keys = ("accelerator", "devices", "num_nodes", "strategy", "precision", "sync_batchnorm")
            return str(device_settings(**{key: plain(cfg.trainer)[key] for key in keys})["precision"])
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision}: expected one of {', '.join(PRECISIONS)}")
    return "bf16-mixed" if precision == "auto" else str(precision)


def _fabric(trainer: dict[str, Any]) -> L.Fabric:
    with section("trainer"):
        settings = process_settings(**trainer)
    try:
        return L.Fabric(**settings, precision="32-true")
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"trainer: {one_line(error)}") from error
