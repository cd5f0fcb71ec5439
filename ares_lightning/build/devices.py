"""The processes and devices of an evaluation."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from ares_lightning.attacks.attack import check_count
from ares_lightning.build.config import ConfigError, one_line, plain, section
from ares_lightning.hardware import HARDWARE, Hardware
from ares_lightning.training.devices import PRECISIONS, device_settings, process_settings

DEVICE_KEYS = ("accelerator", "devices", "num_nodes", "strategy", "precision", "sync_batchnorm")
"""Keys of `trainer` that say where a training runs."""


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
    with section("trainer"):
        check_count("num_nodes", trainer["num_nodes"])
    return HARDWARE[cfg.plan], devices * trainer["num_nodes"]


def planned_precision(cfg: DictConfig) -> str:
    """Return the precision of a training on the hardware that `plan` names; `auto` is bf16-mixed on all of it."""
    precision = cfg.trainer.precision
    if precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision={precision}: expected one of {', '.join(PRECISIONS)}")
    return "bf16-mixed" if precision == "auto" else str(precision)


def trainer_devices(cfg: DictConfig) -> dict[str, Any]:
    """Return the arguments of the Trainer that say where it runs, once they have been looked at.

    Where `plan` names hardware, which need not be there, a process of the CPU stands in for each node of it.
    """
    settings = {key: plain(cfg.trainer)[key] for key in DEVICE_KEYS}
    if cfg.plan in HARDWARE:
        planned_precision(cfg)
        settings |= {"accelerator": "cpu", "devices": 1, "precision": "32-true"}
        if settings["sync_batchnorm"] is True:
            settings["sync_batchnorm"] = False
    with section("trainer"):
        return device_settings(**settings)


def _fabric(trainer: dict[str, Any]) -> L.Fabric:
    with section("trainer"):
        settings = process_settings(**trainer)
    try:
        return L.Fabric(**settings, precision="32-true")
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"trainer: {one_line(error)}") from error
