"""The leaderboard as a table for other programs and for papers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ares_lightning.evaluation.report.leaderboard import Entry, ranking
from ares_lightning.evaluation.report.page import write

NONE = "--"
"""What stands for a number or word that is not known."""

_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def write_export(runs: Sequence[Path], output: Path) -> Path:
    """Write the leaderboard of these run folders in the format of the suffix of `output`, and return `output`.

    `.csv` and `.json` hold every column as it is, accuracies as fractions; `.tex` (needs booktabs) and `.md` what
    one prints, in percent. Raises ValueError for another suffix, and as `write_leaderboard` does.
    """
    if output.suffix not in _FORMATS:
        raise ValueError(f"export={output}: is of no known format; expected {', '.join(_FORMATS)}")
    return write(output, _FORMATS[output.suffix](ranking(runs)).encode())


def _record(entry: Entry) -> dict[str, Any]:
    clean = entry.clean
    return {
        "set": entry.set,
        "norm": entry.norm,
        "eps": entry.eps,
        "model": entry.model,
        "architecture": entry.architecture,
        "training": entry.training,
        "num_parameters": entry.num_parameters,
        "robust_accuracy": entry.robust,
        "robust_low": entry.low,
        "robust_high": entry.high,
        "n": entry.n,
        "clean_accuracy": clean and clean.value,
        "clean_low": clean and clean.low,
        "clean_high": clean and clean.high,
        "clean_n": clean and clean.n,
        "attacks": list(entry.attacks),
        "sanity_failed": list(entry.failed) if entry.checked else None,
        "sanity_warned": list(entry.warned) if entry.checked else None,
        "sanity_passed": list(entry.passed) if entry.checked else None,
        "runs": list(entry.runs),
        "model_fingerprint": entry.fingerprint,
    }


def _csv(entries: Sequence[Entry]) -> str:
    """Return one line an entry; lists are joined by semicolons."""
    records = [_record(entry) for entry in entries]
    text = io.StringIO()
    table = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    table.writeheader()
    for record in records:
        table.writerow({k: ";".join(v) if isinstance(v, list) else v for k, v in record.items()})
    return text.getvalue()


def _json(entries: Sequence[Entry]) -> str:
    return json.dumps([_record(entry) for entry in entries], indent=1) + "\n"


def _tex(entries: Sequence[Entry]) -> str:
    """Return one table a group."""
    tables = []
    for group, own in _groups(entries):
        rows = [
            f"{_escaped(entry.model)} & {_escaped(entry.training or NONE)} & {_clean(entry)} & "
            f"{100 * entry.robust:.1f} & [{100 * entry.low:.1f}, {100 * entry.high:.1f}] & {entry.n} \\\\"
            for entry in own
        ]
        tables.append(
            "\n".join(
                [
                    f"% {_escaped(group)}; robust: lowest known, with its 95\\,\\% interval",
                    r"\begin{tabular}{llrrcr}",
                    r"\toprule",
                    r"Model & Training & Clean (\%) & Robust (\%) & Interval & $n$ \\",
                    r"\midrule",
                    *rows,
                    r"\bottomrule",
                    r"\end{tabular}",
                ]
            )
        )
    return "\n\n".join(tables) + "\n"


def _markdown(entries: Sequence[Entry]) -> str:
    """Return one table a group."""
    tables = []
    for group, own in _groups(entries):
        rows = []
        for entry in own:
            model, training = _cell(entry.model), _cell(entry.training or NONE)
            interval = f"{100 * entry.low:.1f} to {100 * entry.high:.1f}"
            numbers = f"{_clean(entry)} | {100 * entry.robust:.1f} | {interval} | {entry.n}"
            rows.append(f"| {model} | {training} | {numbers} | {_cell(_sanity(entry))} |")
        head = "| model | training | clean (%) | robust (%) | 95 % interval | n | sanity |"
        tables.append("\n".join([f"### {_cell(group)}", "", head, "|---|---|--:|--:|--:|--:|---|", *rows]))
    return "\n\n".join(tables) + "\n"


def _groups(entries: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    return [(group, list(own)) for group, own in groupby(entries, key=lambda entry: entry.group)]


def _clean(entry: Entry) -> str:
    return f"{100 * entry.clean.value:.1f}" if entry.clean else NONE


def _sanity(entry: Entry) -> str:
    if not entry.checked:
        return "not checked"
    doubts = [f"failed: {title}" for title in entry.failed] + [f"in doubt: {title}" for title in entry.warned]
    return "; ".join(doubts) or "passed"


def _escaped(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in " ".join(text.split()))


def _cell(text: str) -> str:
    plain = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return plain.replace("&", "&amp;").replace("<", "&lt;")


_FORMATS: dict[str, Callable[[Sequence[Entry]], str]] = {
    ".csv": _csv,
    ".json": _json,
    ".tex": _tex,
    ".md": _markdown,
}
