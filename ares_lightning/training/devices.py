"""Which processes work on which devices, in which precision, and what cannot be."""

from __future__ import annotations

import os
from typing import Any

import torch

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true", "ddp_fork")

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
"""Weights stay in float32, as images and budgets do."""


def process_settings(
    *, accelerator: str, devices: int | str | list[int], num_nodes: int, strategy: str
) -> dict[str, Any]:
    """Return these arguments of Lightning's Trainer and Fabric, once they have been looked at.

    devices: of this machine; a number, a list of GPUs, or auto.

    Raises ValueError naming the key for more devices than there are, for several devices where `accelerator=auto`
    finds no GPU, and for a strategy that splits parameters.
    """
    if strategy not in STRATEGIES:
        raise ValueError(
            f"strategy={strategy}: attacks differentiate whole parameters on the bare network in the process that "
            f"trains it, which of the strategies only DDP leaves there; expected one of {', '.join(STRATEGIES)}"
        )
    kind = _kind(accelerator)
    if kind == "gpu":
        raise ValueError(f"accelerator=gpu: {_NO_GPU}")
    if isinstance(devices, str) and devices.isdecimal():
        devices = int(devices)
    if isinstance(devices, int):
        _check_number(devices, kind, accelerator)
    elif isinstance(devices, list) and kind == "cuda":
        beyond = [place for place in devices if not 0 <= place < torch.cuda.device_count()]
        if beyond:
            raise ValueError(f"devices={devices}: {_number_of_gpus()}, numbered from 0; there is no {beyond[0]}")
    if num_nodes != 1 and accelerator == "auto" and kind == "cpu":
        raise ValueError(f"num_nodes={num_nodes}: {_NO_GPU}")
    return {"accelerator": accelerator, "devices": devices, "num_nodes": num_nodes, "strategy": strategy}


def device_settings(*, precision: str, sync_batchnorm: bool, accelerator: str, **processes: Any) -> dict[str, Any]:
    """Return these arguments of lightning.Trainer with `precision=auto` decided: bf16-mixed on CUDA, else 32-true.

    processes: as in `process_settings`.

    Raises ValueError as that does, and for `sync_batchnorm` without a GPU.
    """
    settings = process_settings(accelerator=accelerator, **processes)
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision}: expected one of {', '.join(PRECISIONS)}")
    if type(sync_batchnorm) is not bool:
        raise ValueError(f"sync_batchnorm={sync_batchnorm}: expected true or false")
    kind = _kind(accelerator)
    if sync_batchnorm and kind == "cpu":
        raise ValueError("sync_batchnorm=true: CPU processes cannot share batch statistics; set it to false")
    if precision == "auto":
        precision = "bf16-mixed" if kind == "cuda" else "32-true"
    return {**settings, "precision": precision, "sync_batchnorm": sync_batchnorm}


_NO_GPU = "there is no GPU here; trainer=ddp_sim takes CPU processes"


def _kind(accelerator: str) -> str:
    if accelerator not in ("auto", "gpu"):
        return accelerator
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu" if accelerator == "auto" else "gpu"


def _check_number(devices: int, kind: str, accelerator: str) -> None:
    if devices < 1 and devices != -1:
        raise ValueError(f"devices={devices}: expected auto or a whole number of at least 1")
    if kind == "cuda" and devices > torch.cuda.device_count():
        raise ValueError(f"devices={devices}: {_number_of_gpus()} on this machine; trainer.devices=auto takes all")
    if kind == "cpu" and accelerator == "auto" and devices > 1:
        raise ValueError(f"devices={devices}: {_NO_GPU}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if kind == "cpu" and devices > cores:
        raise ValueError(f"devices={devices}: more CPU processes than the {cores} cores there are; at most {cores}")


def _number_of_gpus() -> str:
    count = torch.cuda.device_count()
    return "there is 1 GPU" if count == 1 else f"there are {count} GPUs"
