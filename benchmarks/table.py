"""The table of results that docs/attacks.md shows: `python benchmarks/table.py`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def tables() -> str:
    """Return two Markdown tables, of what was measured on CPUs and on GPUs."""
    return "\n".join(table(device) for device in ("cpu", "cuda"))


def table(device: str) -> str:
    """Return a Markdown table with a row for each contest of each file, the times in multiples of ours."""
    lines = [
        "| network | attack | images | ours: robust % | others: time in ours (robust %) |",
        "| --- | --- | --- | --- | --- |",
    ]
    found = [path for kind in ("robust", "clean") for path in RESULTS.glob(f"{kind}-cifar10-{device}*.json")]
    for path in sorted(found, reverse=True):
        report = json.loads(path.read_text())
        subject = report["subject"]
        for contest in report["contests"]:
            ours, *others = contest["rows"]
            theirs = ", ".join(f"{row['contender']} {row['times']:.2f} ({_robust(row)})" for row in others)
            cells = [subject["network"].partition(" (")[0], f"`{contest['name']}`", subject["images"]]
            lines.append(f"| {' | '.join(map(str, cells))} | {_robust(ours)} | {theirs} |")
    return "\n".join(lines) + "\n"


def _robust(row: dict[str, Any]) -> str:
    return f"{statistics.mean(row['robust_accuracy']):.1f}"


if __name__ == "__main__":
    print(tables(), end="")
