"""The per-sample verdict table: append-only Parquet parts, from which every reported number is derived."""

from __future__ import annotations

import io
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ares_lightning.atomic import replacing

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
"""One row: one sample, one attack, one budget, one judged model.

`eps` and `distance` are in the norm, units of the [0, 1] scale; without a budget `eps` is infinite. An ensemble has
a row for each member that a sample was put to; a sample is broken where any of its rows says so. `target` is the
class that a targeted attack aimed at, null for others; `norm` and `attack_fingerprint` are null for clean images.
`source_fingerprint` is that of the model which the images were crafted on without feedback of the judged one, else
null. A prediction of -1 is no class: the logits were not finite.
"""

KEY = ["evaluator_fingerprint", "model_fingerprint", "set", "sample_id", "attack", "eps"]
"""The columns that tell a row from all others."""

FLUSH_SECONDS = 1.0
"""Rows are written at once where the last part is older than this, else with those that follow."""


class Ledger:
    """The verdict rows of a run folder, `verdicts/part-….parquet`; pandas reads the folder in one line.

    Every process writes parts of its own, whose names no other process gives, each as a whole or not at all.
    With `images`, the adversarial images are kept in that folder, in an .npz file named as the part.
    """

    def __init__(self, folder: Path, rank: int = 0, images: Path | None = None) -> None:
        self.folder, self._images = folder, images
        self._stem = f"part-{rank:04d}-{secrets.token_hex(4)}"
        self._num_written = 0
        self._rows: list[pa.Table] = []
        self._kept: list[tuple[pa.Table, np.ndarray[Any, Any]]] = []
        self._written_at = time.monotonic()

    def append(self, rows: pa.Table, kept: Sequence[tuple[pa.Table, np.ndarray[Any, Any]]] = ()) -> None:
        """Take rows in, to be written soon; `kept`: some of them with their adversarial images [n, C, H, W].

        Raises WriteError where they cannot be written.
        """
        self._rows.append(rows)
        self._kept += kept
        if time.monotonic() - self._written_at >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits, as a new part; raises WriteError where that is impossible."""
        if not self._rows:
            return
        name = f"{self._stem}-{self._num_written:05d}"
        if self._kept and self._images is not None:
            rows = pa.concat_tables([rows for rows, _ in self._kept]).to_pandas()
            arrays: dict[str, Any] = {key: rows[key].to_numpy() for key in ("sample_id", "eps")}
            arrays |= {key: rows[key].to_numpy(dtype=str) for key in ("evaluator", "set", "attack")}
            with replacing(self._images / f"{name}.npz") as file:
                np.savez_compressed(file, images=np.concatenate([images for _, images in self._kept]), **arrays)
        content = io.BytesIO()
        pq.write_table(pa.concat_tables(self._rows), content)
        with replacing(self.folder / f"{name}.parquet") as file:
            file.write(content.getvalue())
        self._rows, self._kept = [], []
        self._num_written += 1
        self._written_at = time.monotonic()

    def read(self) -> tuple[pa.Table, list[Path]]:
        """Return all rows that lie in the folder, each once, and the new paths of parts that cannot be read.

        Those are renamed, so that nobody takes them for parts. Raises ValueError naming a part with other columns.
        """
        parts, set_aside = [SCHEMA.empty_table()], []
        for part in self._parts():
            try:
                rows = pq.read_table(part)
            except (pa.ArrowException, OSError):
                set_aside.append(part.with_name(f"_corrupt-{part.name}"))
                os.replace(part, set_aside[-1])
                continue
            if not rows.schema.equals(SCHEMA):
                raise ValueError(f"{part}: has other columns than this version writes; give another run_dir")
            parts.append(rows)
        table = pa.concat_tables(parts)
        return table.filter(~table.select(KEY).to_pandas().duplicated().to_numpy()), set_aside

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))
