"""Run folders as an evaluation leaves them, with invented verdicts from which every number in them follows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ares_lightning.evaluation.metrics import wilson_interval
from ares_lightning.evaluation.verdicts import SCHEMA

CHECKS = {
    "black_box_not_stronger": "Black-box attacks are not stronger than white-box ones",
    "large_budget": "A very large budget leaves nothing",
    "monotone": "Accuracy does not rise with the budget",
    "converged": "Twice the steps change nothing",
    "gradients": "Gradients are there",
}
CORRUPTIONS = ("gaussian_noise", "fog", "frost", "jpeg_compression")
OOD = {"imagenet_v2": 0.85, "imagenet_r": 0.5, "imagenet_a": 0.15, "imagenet_sketch": 0.4}


@dataclass
class Invented:
    """A model that withstands budgets up to a radius, of which every sample has its own.

    strength: the median radius in units of `eps`; radii: [N], 0 where the clean image is misclassified.
    """

    name: str
    strength: float = 1.2
    clean: float = 0.9
    n: int = 200
    num_classes: int = 10
    seed: int = 0
    eps: float = 0.1
    norm: str = "linf"
    set: str = "digits"
    fingerprint: str = ""
    training: str | None = "pgd"
    tricks: Sequence[str] = ()
    weights: str | None = None
    key: str | None = None
    num_parameters: int = 1_200_000
    failing: Sequence[str] = ()
    labels: Any = field(init=False)
    radii: Any = field(init=False)
    prediction: Any = field(init=False)
    random: Any = field(init=False)

    def __post_init__(self) -> None:
        self.fingerprint = self.fingerprint or f"{hash_of(self.name):016x}"
        self.random = np.random.default_rng([self.seed, hash_of(self.name) % 2**32])
        images = np.random.default_rng(7)  # the same images for every model: what is hard is hard for all
        self.labels = images.integers(0, self.num_classes, self.n)
        hard = images.normal(size=self.n) - 0.4 * (self.labels % 5)
        noise = 0.6 * self.random.normal(size=self.n)
        self.radii = self.eps * self.strength * np.exp(0.5 * (hard + noise))
        self.radii[self.random.random(self.n) > self.clean] = 0
        others = (self.labels + 1 + self.random.integers(0, 3, self.n)) % self.num_classes
        self.prediction = others

    def rows(self, evaluator: str, attack: str, eps: float, weaker: float = 1.0, **other: Any) -> dict[str, Any]:
        """Return the columns of one evaluator's rows; `weaker` multiplies the radii."""
        broken = (self.radii == 0) | (self.radii * weaker <= eps)
        clean = np.where(self.radii == 0, self.prediction, self.labels)
        shared = {
            "evaluator": evaluator,
            "evaluator_fingerprint": f"e-{evaluator}",
            "model_fingerprint": self.fingerprint,
            "set": self.set,
            "attack": attack,
            "norm": None if attack == "none" else self.norm,
            "eps": eps,
            "seed": 0,
            "precision": "fp32",
            "forwards": 20,
            "backwards": 20,
            "attack_fingerprint": None if attack == "none" else f"a-{attack}",
            "target": None,
            "source_fingerprint": None,
            **other,
        }
        return {name: [value] * self.n for name, value in shared.items()} | {
            "sample_id": np.arange(self.n),
            "sample_name": [f"{number:05d}.png" for number in range(self.n)],
            "label": self.labels,
            "clean_prediction": clean,
            "adversarial_prediction": np.where(broken, self.prediction, self.labels),
            "broken": broken,
            "distance": np.where(broken, np.minimum(self.radii, eps), 0.0),
        }

    def accuracy(self, eps: float, weaker: float = 1.0) -> float:
        """Return what is right at a budget."""
        return float(((self.radii > 0) & (self.radii * weaker > eps)).mean())


def hash_of(name: str) -> int:
    """Return the same number for a name in every process."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")


def row(evaluator: str, value: float, n: int, metric: str = "robust_accuracy", **other: Any) -> dict[str, Any]:
    """Return a row of summary.json."""
    low, high = wilson_interval(value * n, n)
    known = {"set": "digits", "subset": None, "attack": None, "norm": None, "eps": 0.0, "seed": 0}
    more = {"precision": "fp32", "source": None, "model": None, "queries": None}
    return {"evaluator": evaluator, "metric": metric, "value": value, "n": n, "low": low, "high": high} | (
        known | more | other
    )


def write_parts(folder: Path, tables: Sequence[dict[str, Any]]) -> None:
    """Write verdict parts, and beside them one that is none."""
    folder.mkdir(parents=True)
    for number, columns in enumerate(tables):
        pq.write_table(pa.table(columns, schema=SCHEMA), folder / f"part-{number:05d}.parquet")
    (folder / "_part-unfinished.parquet").write_bytes(b"PAR1")


def write_run(folder: Path, model: Invented, others: Sequence[str] = (), verdicts: bool = True) -> Path:
    """Write the folder of an evaluation with everything on it that a report shows.

    others: names of models that images were crafted on for a transfer matrix.
    """
    folder.mkdir(parents=True)
    eps, norm, n, at = model.eps, model.norm, model.n, {"set": model.set, "norm": model.norm}
    clean = model.accuracy(0)
    budgets = [0.0, *(multiple * eps for multiple in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0))]
    summary = [row("clean", clean, n, "clean_accuracy", set=model.set, attack="none")]
    for name, weaker in (("pgd5", 1.3), ("pgd20", 1.08), ("pgd100", 1.05)):
        summary.append(row(name, model.accuracy(eps, weaker), n, attack="pgd", eps=eps, **at))
    for name, scale, kind in (("curve_threat", 1.05, norm), ("curve_l2", 0.12, "l2")):
        for budget in budgets:
            where = {"set": model.set, "norm": kind, "eps": budget / scale if kind == "l2" else budget}
            summary.append(row(name, model.accuracy(budget, 1.05), n, attack="apgd_ce", **where))
    members = (("apgd_ce", 1.04), ("apgd_t", 1.01), ("fab_t", 1.003), ("square", 1.0))
    for attack, weaker in members:
        left = model.accuracy(eps, weaker)
        summary.append(row("autoattack", left, n, "robust_accuracy_after", attack=attack, eps=eps, **at))
    summary.append(row("autoattack", model.accuracy(eps), n, attack="autoattack", eps=eps, **at))
    for name, slow in (("square", 1.0), ("nes", 2.0)):
        for queries in (0, 10, 100, 1000, 5000):
            value = clean - (clean - model.accuracy(eps, 1.2)) * min(1, (queries / 5000) ** (0.2 * slow))
            extra = {"queries": queries, "attack": name, "eps": eps}
            summary.append(row(name, value, n, "accuracy_over_queries", **extra, **at))
    for set_name, share in OOD.items():
        summary.append(row("ood", clean * share, n, "clean_accuracy", set=set_name, attack="none"))
    for number, corruption in enumerate(CORRUPTIONS):
        for severity in range(1, 6):
            where = {"set": f"{model.set}/{corruption}/{severity}", "attack": "none"}
            value = clean * (1 - 0.12 * severity + 0.05 * number)
            summary.append(row("corruptions", max(0.0, min(1.0, value)), n, "clean_accuracy", **where))
    for radius in (1, 2, 4, 8):
        where = {"set": f"{model.set}/low_pass/{radius}", "attack": "none"}
        summary.append(row("frequency", clean * radius / (radius + 1), n, "clean_accuracy", **where))
    for attack, weaker in (("mim", 1.8), ("vmi_fgsm", 1.6)) if others else ():
        for source in others:
            factor = 1.0 if source == model.name else weaker
            value = model.accuracy(eps, factor)
            extra = {"attack": attack, "eps": eps, "source": source}
            summary.append(row("transfer", value, n, "transfer_accuracy", **extra, **at))
    summary.append(row("worst_case", model.accuracy(eps), n, eps=eps, **at))
    (folder / "summary.json").write_text(json.dumps(summary))
    _write_config(folder, model)
    _write_about(folder, model)
    _write_checks(folder, model)
    _write_examples(folder, model)
    history = ["epoch,step,val/clean_acc,val/robust_acc"]
    history += [f"{e},{e * 10},{clean * (1 - 0.5**e):.3f},{clean * (1 - 0.7**e):.3f}" for e in range(1, 11)]
    (folder / "metrics.csv").write_text("\n".join(history) + "\n")
    if verdicts:
        curve = [model.rows("curve_threat", "apgd_ce", budget, 1.05) for budget in budgets]
        auto = [model.rows("autoattack", attack, eps, weaker) for attack, weaker in members]
        clean_rows = model.rows("clean", "none", 0.0)
        write_parts(folder / "verdicts", [clean_rows, model.rows("pgd20", "pgd", eps, 1.08), *auto, *curve])
    return folder


def _write_config(folder: Path, model: Invented) -> None:
    config = {
        "name": model.name,
        "model": {"key": model.key, "name": "cnn"},
        "threat": {"norm": model.norm, "eps": model.eps},
        "data": {"name": model.set},
        "seed": 0,
        "trick": {trick: {} for trick in model.tricks} or None,
        "weights": model.weights,
        **({"adv": {"name": model.training}} if model.training else {}),
    }
    (folder / "config.yaml").write_text(json.dumps(config, indent=1))


def _write_about(folder: Path, model: Invented) -> None:
    names = ("clean", "pgd5", "pgd20", "pgd100", "curve_threat", "autoattack")
    about = {
        "sets": [
            {"set": name, "n": model.n, "names_hash": f"{hash_of(name):016x}", "preparation": "as stored"}
            for name in (model.set, *OOD)
        ],
        "not_found": ["imagenet_hard"],
        "skipped": {"broken.png": "broken.png: is no image"},
        "run": {
            "model_fingerprint": model.fingerprint,
            "fingerprint": f"{hash_of(model.name + 'e'):012x}"[:12],
            "num_parameters": model.num_parameters,
            "versions": {"ares_lightning": "0.1.0", "torch": "2.9.0", "timm": "1.0.19"},
            "device": "cuda (NVIDIA H100)",
            "started": "2026-08-01T10:00:00",
            "seconds": 812.4,
            "world_size": 8,
        },
        "models": {model.fingerprint: model.name},
        "evaluators": [
            {
                "name": name,
                "set": model.set,
                "fingerprint": f"e-{name}",
                "attack": "pgd",
                "settings": f"PGD(norm='{model.norm}', eps={model.eps}, steps={name[3:]})"
                if name.startswith("pgd")
                else f"{name}(norm='{model.norm}', eps={model.eps})",
                "forwards": 21 * model.n,
                "backwards": 20 * model.n,
            }
            for name in names
        ],
        "failed": [{"evaluator": "boundary", "set": model.set, "error": "ran out of memory"}]
        if model.failing
        else [],
    }
    (folder / "about.json").write_text(json.dumps(about))


def _write_checks(folder: Path, model: Invented) -> None:
    verdicts = {"gradients": "not asked", "monotone": "warn" if model.failing else "pass"}
    checks = [
        {
            "check": check,
            "title": title,
            "verdict": "fail" if check in model.failing else verdicts.get(check, "pass"),
            "evidence": f"Of {model.n} images 12 were broken by square alone; 3 would be chance.",
            "remedy": "Attack with BPDA and expectation over transformation." if check in model.failing else None,
            "source": "Carlini et al. 2019, arXiv 1902.06705",
        }
        for check, title in CHECKS.items()
    ]
    content = {"model_fingerprint": model.fingerprint, "checks": checks, "n": model.n}
    (folder / "sanity.json").write_text(json.dumps(content))


def _write_examples(folder: Path, model: Invented) -> None:
    clean = np.random.default_rng(1).random((4, 3, 16, 16)).astype(np.float32)
    np.savez(
        folder / "examples.npz",
        clean=clean,
        adversarial=(clean + np.float32(model.eps) * np.sign(clean - 0.5)).clip(0, 1),
        label=model.labels[:4],
        clean_prediction=model.labels[:4],
        adversarial_prediction=model.prediction[:4],
        sample_name=np.array([f"{number:05d}.png" for number in range(4)]),
        classes=np.array([f"class {number}" for number in range(model.num_classes)]),
        attack="apgd_ce",
        norm=model.norm,
        eps=model.eps,
    )
