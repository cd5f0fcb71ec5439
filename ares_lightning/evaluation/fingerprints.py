"""Hashes that tell models and sets from others."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ares_lightning.attacks.authorship import foreign_code
from ares_lightning.data import DatasetSource, ImageError, ImageSet, subset_hash
from ares_lightning.data.datasets import Unreadable


def model_fingerprint(net: nn.Module) -> str:
    """Return a hash of a network's weights, structure and, of a user's own classes, code, on whatever device."""
    digest = hashlib.blake2b(repr(net).encode(), digest_size=8)
    for code in foreign_code(*dict.fromkeys(map(type, net.modules()))):
        digest.update(code.encode())
    for name, value in net.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def set_fingerprint(dataset: ImageSet) -> str:
    """Return a hash of which images are in a set, and of the first of them as the network sees it."""
    ids = dataset.sample_ids.tolist()
    names = [dataset.sample_name(sample_id) for sample_id in ids]
    digest = hashlib.blake2b(repr((dataset.name, ids, names)).encode(), digest_size=8)
    digest.update(dataset.labels.numpy().tobytes())
    digest.update(dataset.example().numpy().tobytes())
    digest.update(_own(dataset.source))
    return digest.hexdigest()


def source_fingerprint(dataset: ImageSet) -> str:
    """Return a hash of the whole set that samples are taken from: names, labels, first image as prepared."""
    if dataset.source not in _KNOWN:
        labels = dataset.source.labels.labels
        whole = replace(dataset, sample_ids=torch.arange(len(labels)), corruption=None)
        digest = hashlib.blake2b(f"{subset_hash(whole)} {whole.preparation}".encode(), digest_size=8)
        digest.update(labels.numpy().tobytes())
        digest.update(_first_image(whole))
        digest.update(_own(dataset.source))
        _KNOWN[dataset.source] = digest.hexdigest()
    return _KNOWN[dataset.source]


_KNOWN: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def _own(source: Any) -> bytes:
    """Return what tells a user's own dataset from others: its settings and its code; nothing for ours."""
    if not isinstance(source, DatasetSource):
        return b""
    kind: type = type(source.dataset)
    return repr((source.identity, foreign_code(kind))).encode()


def _first_image(dataset: ImageSet) -> bytes:
    """Return the pixels of the first image, nothing where it cannot be read: whoever asks about it will be told."""
    try:
        sample = dataset[0]
    except ImageError:
        return b""
    return b"" if isinstance(sample, Unreadable) else sample[0].numpy().tobytes()
