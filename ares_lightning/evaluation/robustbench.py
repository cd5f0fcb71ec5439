"""RobustBench (Croce et al. 2021, arXiv 2010.09670): its images, and the record of an entry."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ares_lightning.atomic import replacing
from ares_lightning.attacks import parse_budget
from ares_lightning.evaluation.evaluators import AttackEvaluator
from ares_lightning.evaluation.summary import accuracy_row

IMAGES = {"imagenet": "robustbench5k"}
"""The subset that the leaderboard is about, by data set; of the others it is about all test images."""
RECORD = "robustbench.json"


@dataclass(frozen=True)
class RobustBenchEvaluator(AttackEvaluator):
    """How does the model fare on the leaderboard: AutoAttack, and the clean accuracy beside it?"""

    def further_rows(self, verdicts: pd.DataFrame) -> list[dict[str, Any]]:
        """Return the clean accuracy of the same images."""
        first = verdicts.drop_duplicates("sample_id").assign(attack_fingerprint=None, norm=None)
        right = first["clean_prediction"] == first["label"]
        return [accuracy_row(self.name, "clean_accuracy", right, first, self.subset, "none", 0.0)]


def leaderboard_record(
    config: Mapping[str, Any], numbers: Sequence[Mapping[str, Any]], name: str
) -> dict[str, Any]:
    """Return the record of an entry; what only its authors can say is null.

    config: of the run, as in its `config.yaml`; numbers: rows of `summary.json`; name: what the model is called.
    """
    threat = config["threat"]
    eps = parse_budget(threat["eps"])
    under_autoattack = percent(numbers, "robust_accuracy", "autoattack", threat["norm"], eps)
    return {
        "link": None,
        "name": name,
        "authors": None,
        "additional_data": None,
        "number_forward_passes": 1,
        "dataset": config["data"]["name"],
        "venue": None,
        "architecture": config["model"]["name"],
        "eps": str(threat["eps"]),
        "clean_acc": percent(numbers, "clean_accuracy", "none", None, 0.0),
        "reported": under_autoattack,
        "autoattack_acc": under_autoattack,
        "external": None,
        "unreliable": False,
        "footnote": None,
    }


def percent(
    numbers: Sequence[Mapping[str, Any]], metric: str, attack: str, norm: str | None, eps: float
) -> str | None:
    """Return the accuracy under an attack at one budget, in percent, of the summary row with the most images.

    None where no row is about it; accuracy at other budgets, as of a curve, and targeted accuracy are not meant.
    """
    rows = [
        row
        for row in numbers
        if (row["attack"], row["norm"], row["metric"]) == (attack, norm, metric)
        and row["eps"] is not None
        and math.isclose(row["eps"], eps)
    ]
    return f"{100 * max(rows, key=lambda row: row['n'])['value']:.2f}" if rows else None


def write_record(run_dir: Path) -> str:
    """Write the record of what evaluator `robustbench` has found into a run folder; return one line on it.

    Nothing is written where the images are not those of the leaderboard, or where the evaluator has failed.
    """
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    numbers = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    expected = IMAGES.get(config["data"]["name"])
    if config["subset"] != expected:
        return f"{RECORD} is not written: it is about subset={expected or 'null'}, this is {config['subset']}"
    own = [row for row in numbers if row["evaluator"] == "robustbench"]
    if not own:
        return f"{RECORD} is not written: eval.robustbench has no results"
    with replacing(run_dir / RECORD) as file:
        file.write((json.dumps(leaderboard_record(config, own, config["name"]), indent=2) + "\n").encode())
    return f"RobustBench's record: {run_dir / RECORD}"
