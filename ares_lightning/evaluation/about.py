"""What a run folder says of an evaluation besides its numbers: which model, which images, how, and at what cost."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from torch import nn

from ares_lightning.data import subset_hash
from ares_lightning.evaluation.asking import Question

PACKAGES = ("ares-lightning", "torch", "torchvision", "timm", "lightning", "numpy")
"""Packages whose releases may decide a number."""


def about_sets(questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Return, for each set, how many images were asked about, which they were, and how they were prepared."""
    datasets = sorted((question.dataset for question in questions), key=len)  # a part of a set is no set of its own
    sets = {dataset.name: dataset for dataset in datasets}
    hashes: dict[int, str] = {}
    for dataset in sets.values():
        hashes[id(dataset.source)] = hashes.get(id(dataset.source)) or subset_hash(dataset)
    return [
        {
            "set": dataset.name,
            "n": len(dataset),
            "names_hash": hashes[id(dataset.source)],
            "preparation": dataset.preparation,
        }
        for dataset in (sets[name] for name in dict.fromkeys(question.dataset.name for question in questions))
    ]


def about_evaluators(answered: Sequence[tuple[Question, pa.Table]]) -> list[dict[str, Any]]:
    """Return, for each question, its settings and fingerprint, and what it cost in passes."""
    attacks = [getattr(question.evaluator, "attack", None) for question, _ in answered]
    return [
        {
            "name": question.evaluator.name,
            "set": question.dataset.name,
            "fingerprint": question.fingerprint,
            "attack": None if attack is None else attack.name,
            "settings": repr(attack or question.evaluator),
            "n": pc.count_distinct(rows["sample_id"]).as_py(),
            "forwards": pc.sum(rows["forwards"]).as_py() or 0,
            "backwards": pc.sum(rows["backwards"]).as_py() or 0,
        }
        for (question, rows), attack in zip(answered, attacks, strict=True)
    ]


def about_run(net: nn.Module, **facts: Any) -> Mapping[str, Any]:
    """Return what an evaluation ran on and with."""
    return {
        **facts,
        "num_parameters": sum(parameter.numel() for parameter in net.parameters()),
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
    }


def _version(package: str) -> str | None:
    """Return the release of a package; of one that runs from its folder without being installed none is known."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
