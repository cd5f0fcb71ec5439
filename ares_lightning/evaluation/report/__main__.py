"""The command line of the report."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ares_lightning.atomic import WriteError
from ares_lightning.evaluation.report import find_runs, write_export, write_figure, write_leaderboard, write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Write what the command line asks for; return the exit code, 2 after a user's mistake."""
    parser = argparse.ArgumentParser(
        "python -m ares_lightning.evaluation.report", description="Show runs on one page."
    )
    parser.add_argument("paths", nargs="+", help="run folders, or folders above them")
    parser.add_argument("--leaderboard", action="store_true", help="rank models instead of showing runs")
    parser.add_argument(
        "--output", type=Path, help="the page (default: report.html or leaderboard.html in the runs' common folder)"
    )
    parser.add_argument("--figure", type=Path, help="also write the robustness curves, as a PNG")
    parser.add_argument(
        "--export",
        type=Path,
        action="append",
        default=[],
        help="also write the leaderboard as .csv, .json, .tex (booktabs) or .md; may be given several times",
    )
    options = parser.parse_args(arguments)
    try:
        runs = find_runs(options.paths)
        write, name = (
            (write_leaderboard, "leaderboard.html") if options.leaderboard else (write_report, "report.html")
        )
        print(write(runs, options.output or Path(os.path.commonpath(runs)) / name))
        if options.figure:
            print(write_figure(runs, options.figure))
        for output in options.export:
            print(write_export(runs, output))
    except (ValueError, OSError, WriteError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
