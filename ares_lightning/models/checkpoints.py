"""Opening checkpoint files: whatever lies in them, no code is run, and a file that cannot be used says why."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what is wrong and the remedy."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this project, on the CPU.

    Raises CheckpointError as `read_file` does, and for a file that is not a checkpoint of this project.
    """
    checkpoint = read_file(path)
    if not isinstance(checkpoint, dict) or not {"config", "state_dict"} <= checkpoint.keys():
        raise CheckpointError(f"{path}: is not a checkpoint of this project (no config and state_dict in it)")
    return checkpoint


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint at `path`: the file itself, or the best (else the last) of a run folder.

    Raises CheckpointError for a folder without one.
    """
    if not path.is_dir():
        return path
    for name in ("best.ckpt", "last.ckpt"):
        if (path / "checkpoints" / name).is_file():
            return path / "checkpoints" / name
    raise CheckpointError(f"{path}: is a folder without checkpoints/best.ckpt or checkpoints/last.ckpt")


def read_file(path: Path) -> Any:
    """Read what PyTorch or safetensors wrote, on the CPU: tensors, plain values, their containers.

    Always with `weights_only=True`; `argparse.Namespace`, which training scripts put into their checkpoints, is
    plain values too. Raises CheckpointError for anything else, for a file that is missing or damaged, and for an
    archive that says it holds more than it does.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if head.startswith(b"PK\x03\x04"):
        _check_archive(path)
    elif _is_safetensors(head):
        try:
            return safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {DAMAGED} ({_line(error)})") from error
    else:
        _check_head(path, head)
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_refusal(str(error))}") from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {DAMAGED} ({_line(error)})") from error


HEAD = 512
"""Bytes at the beginning of a file by which it is recognised."""
DAMAGED = "cannot be read, it may be truncated or damaged; copy or download it anew"
NO_OTHER = "expected a file of PyTorch or safetensors; convert the weights to one where they come from"
FOREIGN = {b"\x89HDF": "HDF5 (Keras)", b"\x93NUMPY": "a NumPy array", b"GGUF": "GGUF"}
FOREIGN_SUFFIXES = {
    **dict.fromkeys((".onnx", ".pb", ".tflite"), "a graph of another framework"),
    **dict.fromkeys((".msgpack", ".pdparams", ".index", ".ckpt-data"), "a checkpoint of another framework"),
}


def _is_safetensors(head: bytes) -> bool:
    """A length in eight bytes, then the JSON header of that length."""
    return len(head) > 8 and head[8:9] == b"{"


def _check_archive(path: Path) -> None:
    """Raise CheckpointError unless the zip archive is one of torch.save and no larger inside than outside."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: {DAMAGED} ({_line(error)})") from error
    names = [entry.filename for entry in entries]
    inside, outside = sum(entry.file_size for entry in entries), path.stat().st_size
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            f"{path}: is a TorchScript program, not weights; where it comes from, torch.save(model.state_dict(), …)"
        )
    if not any(name.endswith("/data.pkl") for name in names):
        kind = "NumPy archive" if all(name.endswith(".npy") for name in names) else "zip archive"
        raise CheckpointError(f"{path}: is a {kind}; {NO_OTHER}")
    if inside > outside:
        raise CheckpointError(
            f"{path}: refused: says to hold {inside:,} bytes in a file of {outside:,}; torch.save does not compress"
        )


def _check_head(path: Path, head: bytes) -> None:
    """Raise CheckpointError for what is recognisably no pickle."""
    if not head:
        raise CheckpointError(f"{path}: is empty; copy or download it anew")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a Git LFS pointer, not the file it stands for; run git lfs pull")
    for start, kind in FOREIGN.items():
        if head.startswith(start):
            raise CheckpointError(f"{path}: is {kind}; {NO_OTHER}")
    if path.suffix in FOREIGN_SUFFIXES:
        raise CheckpointError(f"{path}: is {FOREIGN_SUFFIXES[path.suffix]}; {NO_OTHER}")
    if head.isascii() and not any(byte < 32 and byte not in b"\t\n\r" for byte in head):
        kind = "a web page, perhaps a refused download" if head.lstrip().startswith(b"<") else "text"
        raise CheckpointError(f"{path}: is {kind}, not weights; copy or download it anew")


def _refusal(message: str) -> str:
    """Return what is said about a pickle that holds more than tensors and plain values."""
    found = re.search(r"GLOBAL ([\w.]+)", message, flags=re.ASCII)
    name = f"holds {found[1]}" if found else "is no plain pickle"
    if found and found[1].startswith("dill."):
        return (
            "refused: was written with dill, which stores code; where it is trusted, save its weights anew: "
            "torch.save(torch.load(<file>, pickle_module=dill, weights_only=False)['model'], <new>)"
        )
    return (
        f"refused: {name}, which could run code, or it is damaged; nothing was run. Where it is trusted, save its "
        "weights anew: torch.save(model.state_dict(), <new>)"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
