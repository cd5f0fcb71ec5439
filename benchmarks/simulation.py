"""The time of an evaluation on 1 to 1,024 processes, from the passes of each sample and member of an ensemble.

Survivors are dealt out anew between the members, as ares_lightning/evaluation does with the same code, or each
sample stays with its process. More samples than there are in the ledger are drawn from it. `python
benchmarks/scaling.py processes` runs it.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ares_lightning.evaluation.asking import NUM_PACKED
from ares_lightning.evaluation.workers import Workers

PROCESSES = tuple(2**k for k in range(11))
SAMPLES = (1_000, 10_000, 50_000)
LEAST_ROWS = (1, 64)
"""Rows that a pass takes as long as if it had them: one of a CPU, and what leaves a small GPU network idle."""
BATCH_SIZE = 256
"""Of CIFAR-10 in an evaluation."""
CHECKS = 1
"""The clean forward of each attack, which is not among the passes of a verdict row."""
SEED = 0


@dataclass(frozen=True)
class Samples:
    """What was spent: passes int [samples, stages], and the stages a sample was put to, bool alike."""

    passes: np.ndarray[Any, Any]
    asked: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.passes)

    @property
    def work(self) -> int:
        """Passes of all samples."""
        return int(self.passes[self.asked].sum())

    def drawn(self, number: int, seed: int) -> Samples:
        """Return so many samples: the first ones, or more than there are, drawn with replacement."""
        of = np.arange(number)
        if number > len(self):
            of = np.random.default_rng(seed).integers(len(self), size=number)
        return Samples(self.passes[of], self.asked[of])


def samples_of(rows: pd.DataFrame) -> Samples:
    """Read rows of an ensemble, with sample_id, attack, forwards and backwards, in the order of the stages."""
    stages = list(dict.fromkeys(rows["attack"]))
    rows = rows.assign(passes=rows["forwards"] + rows["backwards"] + CHECKS)
    cells = rows.pivot(index="sample_id", columns="attack", values="passes")[stages].sort_index()
    return Samples(cells.fillna(0).to_numpy(dtype=np.int64), cells.notna().to_numpy())


def read_ledger(path: Path, evaluator: str) -> pd.DataFrame:
    """Return the columns that count of an evaluator's rows, members in the order in which they were asked."""
    if path.suffix == ".csv":
        return pd.read_csv(path)
    rows = pd.read_parquet(path)
    rows = rows[rows["evaluator"] == evaluator].drop_duplicates(["sample_id", "attack"])
    asked = rows.groupby("attack")["sample_id"].transform("size")  # fewer with each member
    rows = rows.assign(asked=asked).sort_values(["asked", "attack", "sample_id"], ascending=[False, True, True])
    return rows[["sample_id", "attack", "forwards", "backwards", "broken"]]


def pack_time(passes: np.ndarray[Any, Any], least_rows: int) -> int:
    """Return the time of an attack on samples at once, in passes of one row: each call has the samples still at it.

    A call of fewer rows than `least_rows` takes as long as one of so many.
    """
    longest = np.sort(passes)[::-1]
    ends = longest - np.append(longest[1:], 0)  # how long exactly 1, 2, … samples are at it
    return int((ends * np.maximum(np.arange(1, len(longest) + 1), least_rows)).sum())


def share_time(passes: np.ndarray[Any, Any], least_rows: int) -> int:
    """Return the time of one process with the samples of its share of a stage, pack after pack."""
    size = NUM_PACKED * BATCH_SIZE
    return sum(pack_time(passes[k : k + size], least_rows) for k in range(0, len(passes), size))


def makespan(samples: Samples, processes: int, *, anew: bool, least_rows: int = 1) -> int:
    """Return when the last process is done; anew: survivors are dealt out anew between the stages."""
    workers = [Workers(rank, processes) for rank in range(processes)]
    num_stages = samples.passes.shape[1]
    if not anew:
        shares = [worker.mine(list(range(len(samples)))) for worker in workers]
        parts = [
            [samples.passes[share, stage][samples.asked[share, stage]] for stage in range(num_stages)]
            for share in shares
        ]
        return max(sum(share_time(part, least_rows) for part in own) for own in parts)
    total = 0
    for stage in range(num_stages):
        left = np.flatnonzero(samples.asked[:, stage]).tolist()
        total += max(share_time(samples.passes[worker.mine(left), stage], least_rows) for worker in workers)
    return total


def processes(options: argparse.Namespace) -> dict[str, Any]:
    """Simulate an evaluation on more and more processes."""
    ledger = read_ledger(options.ledger, options.evaluator)
    if options.keep:
        ledger.astype({"broken": int}).to_csv(options.keep, index=False)
    known = samples_of(ledger)
    rows = []
    for number, least_rows in itertools.product(options.samples, LEAST_ROWS):
        samples = known.drawn(number, SEED)
        for count in PROCESSES:
            times = {
                name: makespan(samples, count, anew=anew, least_rows=least_rows)
                for name, anew in (("anew", True), ("static", False))
            }
            row = {"samples": number, "least_rows": least_rows, "processes": count, "work": samples.work}
            efficiency = {name: samples.work / (count * taken) for name, taken in times.items()}
            rows.append(row | {"makespan": times, "efficiency": efficiency})
    withstood = ledger.groupby("sample_id")["broken"].max() == 0
    chain = known.passes.max(0).tolist()
    return {
        "ledger": options.ledger.name,
        "samples_of_ledger": len(known),
        "robust": float(withstood.mean()),
        "stages": list(dict.fromkeys(ledger["attack"])),
        "longest_chain": chain,
        "seed": SEED,
        "rows": rows,
    }


def table_of_processes(report: dict[str, Any]) -> str:
    """Return the table of efficiencies."""
    groups = [(n, least) for least in LEAST_ROWS for n in dict.fromkeys(row["samples"] for row in report["rows"])]
    heads = [f"{n:,}{'' if least == 1 else f', {least} rows'}" for n, least in groups]
    lines = [f"| processes | {' | '.join(heads)} |", f"|--:|{'--:|' * len(groups)}"]
    for count in PROCESSES:
        cells = []
        for group in groups:
            row = next(
                r for r in report["rows"] if (r["samples"], r["least_rows"]) == group and r["processes"] == count
            )
            cells.append(" / ".join(f"{row['efficiency'][name]:.0%}" for name in ("anew", "static")))
        lines.append(f"| {count:,} | {' | '.join(cells)} |")
    chain = dict(zip(report["stages"], report["longest_chain"], strict=True))
    told = ", ".join(f"{name} {passes:,}" for name, passes in chain.items())
    lines.append("")
    lines.append(
        f"Ledger: {report['samples_of_ledger']:,} images, of which {report['robust']:.1%} withstand all of it."
    )
    lines.append(f"Longest chain of passes of one image: {sum(chain.values()):,} ({told}).")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the efficiencies as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "scaling", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    colours = dict(
        zip(
            dict.fromkeys(row["samples"] for row in report["rows"]), ("#1f77b4", "#d95f02", "#1b9e77"), strict=False
        )
    )
    for number, colour in colours.items():
        rows = [row for row in report["rows"] if row["samples"] == number and row["least_rows"] == 1]
        counts = [row["processes"] for row in rows]
        for name, style, label in (("anew", "-", "dealt out anew"), ("static", ":", "static")):
            values = [100 * row["efficiency"][name] for row in rows]
            axes.plot(counts, values, style, color=colour, marker=".", label=f"{number:,} images, {label}")
    axes.set(xscale="log", xlabel="processes", ylabel="efficiency, %", ylim=(0, 103))
    axes.set_xscale("log", base=2)
    axes.set_xticks(PROCESSES, [f"{count:,}" for count in PROCESSES])
    axes.legend(fontsize=8, loc="lower left")
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
