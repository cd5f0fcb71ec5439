"""Reading checkpoints: no code is ever run, and nothing is loaded in part."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what is wrong and the remedy."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this project with `weights_only=True`, on the CPU.

    Raises CheckpointError for a file that is missing, truncated, not a checkpoint of this project, or that
    holds anything besides tensors and plain values (such a pickle could run code and is not opened further).
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's advice on the pickle protocol of foreign files
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused: it holds Python objects besides tensors and plain values, which could run code, "
            "or it is damaged; save it anew as a plain state dict"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: cannot be read, it may be truncated; copy or save it anew") from error
    if not isinstance(checkpoint, dict) or not {"config", "state_dict"} <= checkpoint.keys():
        raise CheckpointError(f"{path}: is not a checkpoint of this project (no config and state_dict in it)")
    return checkpoint


def load_network(network: nn.Module, state_dict: dict[str, Tensor], path: Path, prefix: str = "net.") -> None:
    """Load the entries of `state_dict` that start with `prefix` into `network`, all of them or none.

    Files from before PyTorch 0.4.1 lack the batch norms' `num_batches_tracked`, which inference never looks at; the
    network then keeps its own.

    Raises CheckpointError naming `path` and the keys or shapes that do not fit.
    """
    weights = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    own = network.state_dict()
    counters = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
    weights = {**counters, **weights}
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{path}: is of another architecture: {len(missing)} keys missing ({_some(missing)}), "
            f"{len(unexpected)} unexpected ({_some(unexpected)}); give the model it was trained with"
        )
    for key, value in weights.items():
        if value.shape != own[key].shape:
            raise CheckpointError(
                f"{path}: {key} has shape {list(value.shape)}, the model has {list(own[key].shape)}; "
                "give the model and the number of classes it was trained with"
            )
    network.load_state_dict(weights)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:2]) + ", …" * (len(keys) > 2) if keys else "none"
