"""The per-sample verdict table: append-only Parquet parts, from which every reported number is derived."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        ("evaluator", pa.string()),
        ("evaluator_fingerprint", pa.string()),
        ("model_fingerprint", pa.string()),
        ("set", pa.string()),
        ("sample_id", pa.int64()),
        ("sample_name", pa.string()),
        ("label", pa.int64()),
        ("clean_prediction", pa.int64()),
        ("adversarial_prediction", pa.int64()),
        ("attack", pa.string()),
        ("attack_fingerprint", pa.string()),
        ("target", pa.int64()),
        ("norm", pa.string()),
        ("eps", pa.float64()),
        ("seed", pa.int64()),
        ("precision", pa.string()),
        ("broken", pa.bool_()),
        ("distance", pa.float64()),
        ("forwards", pa.int64()),
        ("backwards", pa.int64()),
        ("source_fingerprint", pa.string()),
    ]
)
"""One row: one sample, one attack, one budget. `eps` and `distance` are in the norm, units of the [0, 1] scale;
without a budget `eps` is infinite. `target` is the class that a targeted attack aimed at, null for others; `norm`
and `attack_fingerprint` are null for the clean images."""


class Ledger:
    """The verdict rows of a run folder, `verdicts/part-NNNNN.parquet`; pandas reads the folder in one line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        numbers = [int(part.stem.removeprefix("part-")) for part in self._parts()]
        self._next = max(numbers, default=-1) + 1

    def append(self, rows: pd.DataFrame) -> None:
        """Write rows as a new part; the part is there as a whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"part-{self._next:05d}.parquet"
        unfinished = part.with_suffix(".tmp")
        pq.write_table(pa.Table.from_pandas(rows, schema=SCHEMA, preserve_index=False), unfinished)
        os.replace(unfinished, part)
        self._next += 1

    def read(self) -> pd.DataFrame:
        """Return all rows in the order in which they were written.

        Raises ValueError naming a part that cannot be read or has other columns.
        """
        parts = [SCHEMA.empty_table()]
        for part in self._parts():
            try:
                rows = pq.read_table(part)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{part}: is not a readable verdict table; remove it and run again") from error
            if not rows.schema.equals(SCHEMA):
                raise ValueError(f"{part}: has other columns than this version writes; give another run_dir")
            parts.append(rows)
        table: pd.DataFrame = pa.concat_tables(parts).to_pandas()
        return table

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))
