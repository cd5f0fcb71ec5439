"""The per-sample worst case, from the verdict rows: which images withstood every attack."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ares_lightning.evaluation.metrics import SAME_BUDGET

Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]

_WORDS = ["evaluator", "evaluator_fingerprint", "model_fingerprint", "set", "attack", "norm"]
_NUMBERS = ["sample_id", "label", "clean_prediction", "adversarial_prediction", "eps", "target", "broken"]
_NUM_ROWS = 65_536
_KEPT = ["sample_id", "label", "clean_prediction", "adversarial_prediction", "eps", "broken", "is_whole"]


@dataclass(frozen=True)
class WorstCase:
    """What became of each sample within a threat model, over all that was run.

    samples, labels, clean, prediction: int64 [N], sorted by sample; `clean` and `prediction` are the classes before
    and under attack, the latter at the least budget that broke the sample. broken: bool [N]. evaluators: whose
    attacks these were, sorted.
    """

    samples: Ints
    labels: Ints
    clean: Ints
    prediction: Ints
    broken: Bools
    evaluators: tuple[str, ...]

    @cached_property
    def right(self) -> Bools:
        """Which samples are classified rightly without an attack."""
        right: Bools = self.clean == self.labels
        return right


def read_worst_case(
    folder: Path,
    model: str | None,
    of_set: str,
    norm: str,
    eps: float,
    evaluators: Collection[str] = (),
) -> WorstCase | None:
    """Return the worst case of the threat model (`norm`, `eps`) from the verdict parts in `folder`.

    model: the fingerprint of the judged model, None where the parts know a single one. evaluators: fingerprints of
    those that count, all where empty. A sample that stands in the parts twice counts once; one that no attack
    without a target was given the whole budget for does not count.
    Returns None where no sample was attacked, or no model was named and there are several.
    Raises ValueError naming a part that cannot be read.
    """
    tables, names, models = [], set(), set()
    for table in _batches(folder):
        known = set(pc.unique(table["model_fingerprint"]).to_pylist())
        models |= known
        if model is None and len(models) > 1:
            return None
        wanted = pc.and_(pc.equal(table["set"], of_set), pc.equal(table["norm"], norm))
        wanted = pc.and_(wanted, pc.less_equal(table["eps"], eps * (1 + SAME_BUDGET)))
        if model is not None:
            wanted = pc.and_(wanted, pc.equal(table["model_fingerprint"], model))
        if evaluators:
            of_these = pc.is_in(table["evaluator_fingerprint"], pa.array(sorted(evaluators)))
            wanted = pc.and_(wanted, of_these)
        rows = table.filter(wanted)
        names |= set(pc.unique(rows.filter(pc.greater(rows["eps"], 0))["evaluator"]).to_pylist())
        is_whole = pc.and_(pc.is_null(rows["target"]), pc.greater_equal(rows["eps"], eps * (1 - SAME_BUDGET)))
        tables.append(rows.append_column("is_whole", is_whole).select(_KEPT))
    columns = pa.concat_tables(tables) if tables else None
    if columns is None or not pc.any(columns["is_whole"]).as_py():
        return None
    columns = columns.filter(pc.is_in(columns["sample_id"], _attacked(columns)))
    return _per_sample({name: columns[name].to_numpy() for name in _KEPT[:-1]}, tuple(sorted(names)))


def _attacked(rows: pa.Table) -> pa.Array:
    """Return the ids of the samples that an attack without a target was given the whole budget for."""
    return pc.unique(rows.filter(rows["is_whole"])["sample_id"])


def _per_sample(rows: dict[str, np.ndarray[Any, Any]], evaluators: tuple[str, ...]) -> WorstCase:
    samples, first, place = np.unique(rows["sample_id"], return_index=True, return_inverse=True)
    clean = rows["clean_prediction"][first]
    breaking = np.flatnonzero(rows["broken"])
    from_large_to_small = breaking[np.argsort(rows["eps"][breaking], kind="stable")][::-1]
    prediction, broken = clean.copy(), np.zeros(len(samples), bool)
    prediction[place[from_large_to_small]] = rows["adversarial_prediction"][from_large_to_small]
    broken[place[breaking]] = True
    return WorstCase(samples, rows["label"][first], clean, prediction, broken, evaluators)


def _batches(folder: Path) -> Iterator[pa.Table]:
    """Yield the needed columns of all parts, some rows at a time."""
    for part in sorted(folder.glob("*.parquet")):
        if part.name.startswith("_"):
            continue
        try:
            with pq.ParquetFile(part, read_dictionary=_WORDS) as file:
                for batch in file.iter_batches(_NUM_ROWS, columns=_WORDS + _NUMBERS):
                    yield pa.Table.from_batches([batch]).select(_WORDS + _NUMBERS)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise ValueError(f"{part}: is not a readable verdict table ({error})") from error
