"""What a run folder has for a dashboard: numbers, curves, tables and images, each with its name."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import yaml

from ares_lightning.attacks.threat import parse_budget
from ares_lightning.evaluation.metrics import WORST_CASE

Row = Mapping[str, Any]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]

_BALLS = {"linf": "L-inf", "l2": "L2", "l1": "L1"}
_LEAST_WIDTH = 96
"""Pixels of an image that is shown; smaller ones are magnified by a whole number."""
_GAP = 4
"""White pixels between the images of a panel."""


@dataclass(frozen=True)
class Chart:
    """Lines of accuracies (fractions) over `x_name`, by label: x and y of each."""

    title: str
    x_name: str
    lines: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)

    def add(self, label: str, x: float, y: float) -> None:
        """Append a point to a line."""
        xs, ys = self.lines.setdefault(label, ([], []))
        xs.append(x)
        ys.append(y)


@dataclass(frozen=True)
class Panel:
    """A clean image, the perturbation, amplified around grey, and the adversarial image, side by side [H, W, 3]."""

    pixels: Pixels
    caption: str


@dataclass(frozen=True)
class Results:
    """What a run folder has to show; `scalars`, `charts` and `tables` by their names on a dashboard.

    settings: the config; about: what the evaluation ran on and with.
    """

    folder: Path
    settings: Mapping[str, Any]
    about: Mapping[str, Any]
    scalars: dict[str, float]
    accuracies: dict[str, float]
    charts: dict[str, Chart]
    tables: dict[str, pd.DataFrame]
    panels: list[Panel]

    @property
    def files(self) -> Mapping[str, list[Path]]:
        """The files to be kept, by kind."""
        checkpoints = [self.folder / "checkpoints" / name for name in ("last.ckpt", "best.ckpt")]
        return {
            "model": [path for path in checkpoints if path.exists()],
            "verdicts": sorted((self.folder / "verdicts").glob("part-*.parquet")),
            "report": [path for path in [self.folder / "report.html"] if path.exists()],
        }


def read_results(folder: Path) -> Results:
    """Read the run folder of an evaluation; raises ValueError naming a file that is not what one writes."""
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    rows: list[Row] = _json(folder / "summary.json", [])
    about: dict[str, Any] = _json(folder / "about.json", {})
    checks: list[Row] = _json(folder / "sanity.json", {}).get("checks", [])
    main = str(settings["data"]["name"])
    examples = _read_examples(folder / "examples.npz")
    tables = {"eval/summary": pd.DataFrame(rows)}
    if checks:
        columns = ("title", "verdict", "evidence", "remedy", "source")
        tables["eval/sanity"] = pd.DataFrame([{key: check.get(key) for key in columns} for check in checks])
    classes = _classes(folder, settings, about, rows, examples.get("classes"))
    if classes is not None:
        tables["eval/classes"] = classes
    named = dict(_named(rows, main))
    scalars = dict(_scalars(named))
    if checks:
        verdicts = [check["verdict"] for check in checks]
        scalars |= {f"eval/sanity/{verdict}": verdicts.count(verdict) for verdict in ("fail", "warn", "pass")}
    accuracies = {
        name.removeprefix("eval/").rsplit("/", 1)[0]: row["value"]
        for name, row in named.items()
        if row["metric"] in ("clean_accuracy", "robust_accuracy")
    }
    return Results(
        folder.resolve(), settings, about, scalars, accuracies, _charts(rows, main), tables, list(_panels(examples))
    )


def _json(file: Path, empty: Any) -> Any:
    """Return the content of a file, `empty` where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else empty
    except ValueError as error:
        raise ValueError(f"{file}: is not readable JSON ({error})") from error
    if not isinstance(content, type(empty)):
        raise ValueError(f"{file}: is not what an evaluation writes")
    return content


def _cell(row: Row) -> tuple[str, str, float] | None:
    """Return set, kind and number of a row on one of several forms of a set, `<set>/<corruption>/<severity>`."""
    family, _, cell = str(row["set"]).partition("/")
    kind, _, number = cell.rpartition("/")
    try:
        return (family, kind, float(number)) if kind and row["metric"] == "clean_accuracy" else None
    except ValueError:
        return None


def _line(row: Row) -> tuple[Any, ...]:
    """Return what the rows of one curve over budgets have in common."""
    return tuple(row.get(key) for key in ("evaluator", "metric", "set", "subset", "attack", "source", "model"))


def _on_curves(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that are points of a curve over budgets, by rising budget."""
    budgets: dict[tuple[Any, ...], set[float]] = {}
    bounded = [row for row in rows if row["metric"] == "robust_accuracy" and row["norm"] and row["eps"] is not None]
    for row in bounded:
        budgets.setdefault(_line(row), set()).add(row["eps"])
    return sorted((row for row in bounded if len(budgets[_line(row)]) > 1), key=lambda row: row["eps"])


def _named(rows: Sequence[Row], main: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows that are single numbers, points of no curve, with their names."""
    curves = {_line(row) for row in _on_curves(rows)}
    for row in rows:
        if _line(row) in curves or row.get("queries") is not None or _cell(row):
            continue
        parts = ["eval", row["evaluator"], None if row["set"] == main else row["set"], row.get("source")]
        if row["metric"] in ("robust_accuracy_after", "transfer_accuracy"):
            parts.append(row["attack"])
        parts += [row.get("model"), row["metric"]]
        yield "/".join(str(part) for part in parts if part), row


def _scalars(named: Mapping[str, Row]) -> Iterator[tuple[str, float]]:
    for name, row in named.items():
        numbers = {"": row["value"], "_low": row["low"], "_high": row["high"], "_n": row["n"]}
        yield from ((f"{name}{ending}", number) for ending, number in numbers.items() if number is not None)


def _charts(rows: Sequence[Row], main: str) -> dict[str, Chart]:
    """Return accuracy over the budget, a chart a norm, over queries, and over radius or severity."""
    charts: dict[str, Chart] = {}
    points = _on_curves(rows)
    attacks = {row["evaluator"]: {point["attack"] for point in points if point["evaluator"] == row["evaluator"]}
               for row in points}  # fmt: skip
    for row in points:
        chart = charts.setdefault(
            f"eval/robust_accuracy/{row['norm']}",
            Chart(f"Robust accuracy, {_BALLS.get(row['norm'], row['norm'])}", "eps"),
        )
        attack = row["attack"] if len(attacks[row["evaluator"]]) > 1 else None
        chart.add(_label(row, main, attack), row["eps"], row["value"])
    asked = [row for row in rows if row.get("queries") is not None]
    for row in sorted(asked, key=lambda row: row["queries"]):
        chart = charts.setdefault("eval/queries", Chart("Accuracy over queries", "queries"))
        chart.add(_label(row, main), row["queries"], row["value"])
    for row in rows:
        if cell := _cell(row):
            family, kind, number = cell
            is_filter = kind.endswith("_pass")
            title, x_name = ("Low-pass images", "radius (pixels)") if is_filter else ("Corruptions", "severity")
            chart = charts.setdefault(f"eval/{row['evaluator']}", Chart(title, x_name))
            chart.add(kind if family == main else f"{family} {kind}", number, row["value"])
    return charts


def _label(row: Row, main: str, attack: str | None = None) -> str:
    parts = (row["evaluator"], attack, None if row["set"] == main else row["set"])
    return " ".join(str(part) for part in parts if part)


def _classes(
    folder: Path, settings: Mapping[str, Any], about: Mapping[str, Any], rows: Sequence[Row], names: Any
) -> pd.DataFrame | None:
    """Return a row a class: clean accuracy, accuracy under each attack at the threat model, worst case.

    None where the run folder does not say which verdicts count, or holds those of images that were not asked about.
    """
    main, norm = settings["data"]["name"], settings["threat"]["norm"]
    limit = parse_budget(settings["threat"]["eps"]) * (1 + 1e-9)  # as the worst case is taken
    parts = sorted((folder / "verdicts").glob("part-*.parquet"))
    model = about.get("run", {}).get("model_fingerprint")
    asked = [each["fingerprint"] for each in about.get("evaluators", []) if each["set"] == main]
    if not parts or not model or not asked:
        return None
    columns = ["evaluator", "sample_id", "label", "attack", "norm", "eps", "broken", "target", "source_fingerprint"]
    counts = (
        (ds.field("model_fingerprint") == model)
        & (ds.field("set") == main)
        & ds.field("evaluator_fingerprint").isin(asked)
        & ((ds.field("attack") == "none") | ((ds.field("norm") == norm) & (ds.field("eps") <= limit)))
    )
    ledger = ds.dataset([str(part) for part in parts], format="parquet")
    verdicts = ledger.to_table(columns, filter=counts).to_pandas()
    labels = verdicts.groupby("sample_id")["label"].first()
    if len(labels) == 0 or len(labels) > sum(each["n"] for each in about["sets"] if each["set"] == main):
        return None
    clean = verdicts["attack"] == "none"
    at_threat = ~clean & (verdicts["eps"] >= limit * (1 - 2e-9))
    own = at_threat & verdicts["source_fingerprint"].isna() & verdicts["target"].isna()
    robust = {"clean": _robust(verdicts[clean])}
    for name in dict.fromkeys(verdicts["evaluator"][own]):
        robust[name] = _robust(verdicts[own & (verdicts["evaluator"] == name)])
    if any(row["evaluator"] == WORST_CASE for row in rows):
        robust[WORST_CASE] = _robust(verdicts[~clean])
    per_class = pd.DataFrame(robust, index=labels.index).astype(float).groupby(labels).mean()
    per_class.insert(0, "n", labels.value_counts())
    if names is not None:
        per_class.insert(0, "class", [str(names[label]) for label in per_class.index])
    return per_class.dropna(axis="columns", how="all").reset_index()


def _robust(verdicts: pd.DataFrame) -> pd.Series[bool]:
    return ~verdicts.groupby("sample_id")["broken"].any()


def _read_examples(file: Path) -> dict[str, Any]:
    """Return the arrays of `examples.npz`, none where there is no such file."""
    if not file.exists():
        return {}
    try:
        with np.load(file, allow_pickle=False) as content:
            return {key: content[key] for key in content.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: is not a readable file of examples ({error})") from error


def _panels(examples: Mapping[str, Any]) -> Iterator[Panel]:
    if not examples:
        return
    names = dict(enumerate(examples["classes"].tolist()))
    clean, adversarial = examples["clean"].astype(float), examples["adversarial"].astype(float)
    change = adversarial - clean
    factor = 0.5 / max(float(abs(change).max(initial=0)), 1e-6)
    norm = str(examples["norm"])
    threat = f"{examples['attack']}, {_BALLS.get(norm, norm)}, eps {float(examples['eps']):.4g}"
    for at in range(len(clean)):
        label, before, after = (
            names.get(int(examples[key][at]), int(examples[key][at]))
            for key in ("label", "clean_prediction", "adversarial_prediction")
        )
        told = f"{label}: predicted {before}, attacked {after} ({threat}; perturbation x {factor:.3g})"
        yield Panel(_side_by_side(clean[at], 0.5 + factor * change[at], adversarial[at]), told)


def _side_by_side(*images: np.ndarray[Any, Any]) -> Pixels:
    """Return images [C, H, W] in [0, 1] as one [H', W', 3], the small ones magnified."""
    times = -(-_LEAST_WIDTH // images[0].shape[-1])
    shown = []
    for image in images:
        levels = (image.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
        levels = levels.repeat(times, axis=0).repeat(times, axis=1)
        gap = np.full((len(levels), _GAP, 3), 255, np.uint8)
        shown += [gap, np.broadcast_to(levels, (*levels.shape[:2], 3))]
    return np.concatenate(shown[1:], axis=1)
