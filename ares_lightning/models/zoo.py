"""The 55 models of ARES-Bench (arXiv 2302.14301); zoo.csv beside this file holds one line on each."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent / "zoo.csv"
URL = "https://ml.cs.tsinghua.edu.cn/~xiaoyang/aresbench/ckpt-imagenet/"
"""Where the authors of ARES-Bench publish their checkpoints, by file name."""

NORMALISATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Mean and standard deviation by name."""

TRAININGS = {
    "normal": "ImageNet-1k, clean images",
    "21k": "ImageNet-21k, then 1k, clean images",
    "moco": "self-supervised (MoCo v3), then ImageNet-1k, clean images",
    "mae": "self-supervised (masked autoencoder), then ImageNet-1k, clean images",
    "at": "adversarial, L-inf 4/255, by the authors of ARES-Bench",
    "sota": "adversarial, L-inf 4/255, published by others on RobustBench",
    "fd": "adversarial, with feature denoising",
}
"""The kinds of training, by the word that the table has for them."""


@dataclass(frozen=True)
class Published:
    """What others measured, in percent, by metric: `clean`, and at L-inf 4/255 `fgsm`, `pgd100`, `autoattack`."""

    source: str
    num_images: int
    percent: Mapping[str, float]


@dataclass(frozen=True)
class ZooModel:
    """One model of the benchmark.

    architecture: a name that `make_classifier` knows; settings: of it.
    training: a key of TRAININGS. normalisation: a key of NORMALISATIONS. activation: of the network.
    weights: a tag of timm, pinned since bare names change their meaning between its versions, or the name of the
        published file.
    source: where they come from. published: what others measured. note: what one should know besides.
    """

    key: str
    family: str
    architecture: str
    settings: Mapping[str, str]
    training: str
    weights: str
    normalisation: str
    activation: str
    published: tuple[Published, ...]
    note: str

    @property
    def in_timm(self) -> bool:
        """Whether timm has the weights; else they are a file."""
        return not self.weights.endswith(".pth")

    @property
    def source(self) -> str:
        """Where the weights come from."""
        return f"timm {self.architecture}.{self.weights}" if self.in_timm else f"{URL}{self.weights}"

    def config(self) -> dict[str, Any]:
        """Return what the config group `model` holds for this model."""
        mean, std = NORMALISATIONS[self.normalisation]
        return {
            "key": self.key,
            "name": self.architecture,
            "settings": dict(self.settings),
            "mean": list(mean),
            "std": list(std),
            "weights": self.weights,
        }

    def facts(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {**asdict(self), "source": self.source}


def find_file(weights: str, key: str) -> Path | None:
    """Return the file that `model.weights` means: itself, or the one of model `key` in a folder; None if it is
    neither.

    Raises ValueError for a folder that lacks the file, and for the name of a published file that is not here.
    """
    path, model = Path(weights).expanduser(), ZOO.get(key)
    if path.is_file():
        return path
    if path.is_dir():
        if model is None or model.in_timm:
            raise ValueError(
                f"weights={weights}: is a folder, and no published file is called after {key}; give the file"
            )
        if not (path / model.weights).is_file():
            raise ValueError(f"weights={weights}: has no {model.weights}, which is published at {model.source}")
        return path / model.weights
    if model is not None and not model.in_timm and weights == model.weights:
        raise ValueError(
            f"weights={weights}: is not here; download it from {model.source} and give model.weights=<the file, or "
            "its folder>; model.weights=null begins at random"
        )
    return None


def find_model(key: str) -> ZooModel:
    """Return a model by key; raise ValueError for another key, with the nearest known one."""
    if key not in ZOO:
        near = get_close_matches(key, ZOO, n=1)
        raise ValueError(
            f"{key}: is no model of the zoo; " + (f"did you mean {near[0]}?" if near else "see the list")
        )
    return ZOO[key]


def _read_table() -> dict[str, ZooModel]:
    with open(TABLE, newline="", encoding="utf-8") as file:
        return {row["key"]: _model(row) for row in csv.DictReader(file)}


def _model(row: dict[str, str]) -> ZooModel:
    """Build a model from its line; accuracies are those of, by prefix of the column:

    authors_: arXiv 2101.11986 (T2T-ViT) and 2111.06377 (MAE); timm_: results/results-imagenet.csv of timm, August
    2026; ares_: robust_training/README.md of ARES 2.0; rb_: RobustBench, March 2025.
    """
    boards = (
        Published("the network's authors", 50_000, _percent(row, ("clean",), "authors_")),
        Published("timm, with its own crop", 50_000, _percent(row, ("clean",), "timm_")),
        Published("ARES 2.0", 1_000, _percent(row, ("clean", "fgsm", "pgd100", "autoattack"), "ares_")),
        Published("RobustBench", 5_000, _percent(row, ("clean", "autoattack"), "rb_")),
    )
    words = ("key", "family", "architecture", "training", "weights", "normalisation", "activation", "note")
    settings = dict(setting.split("=") for setting in row["settings"].split(";") if setting)
    published = tuple(board for board in boards if board.percent)
    return ZooModel(settings=settings, published=published, **{word: row[word] for word in words})


def _percent(row: dict[str, str], metrics: tuple[str, ...], prefix: str) -> dict[str, float]:
    return {metric: float(row[prefix + metric]) for metric in metrics if row[prefix + metric]}


ZOO = _read_table()
"""The 55 models by key, in the benchmark's order."""
