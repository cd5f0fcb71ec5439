"""The leaderboard: the lowest known robust accuracy of every model, in an order to trust, and its exports."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from run_folders import Invented, write_run

from ares_lightning.evaluation.metrics import wilson_interval
from ares_lightning.evaluation.report import write_export, write_leaderboard
from ares_lightning.evaluation.report.__main__ import main
from ares_lightning.evaluation.report.leaderboard import Entry, entries
from ares_lightning.evaluation.report.run import Run, read_runs


def board(*folders: Path) -> list[Entry]:
    return entries(read_runs(folders))


def robust(run: Run) -> float:
    assert run.robust
    return run.robust.value


def test_the_most_robust_model_comes_first(tmp_path: Path) -> None:
    strengths = {"weak": 0.5, "strong": 1.5, "medium": 1.0}
    ranked = board(*(write_run(tmp_path / name, Invented(name, strength=s)) for name, s in strengths.items()))
    assert [entry.model for entry in ranked] == ["strong", "medium", "weak"]
    assert ranked[0].low < ranked[0].robust < ranked[0].high


def test_of_equally_robust_models_the_more_accurate_comes_first(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, Invented(name, clean=clean)) for name, clean in (("a", 0.6), ("b", 0.9))]
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text())
        for row in summary:
            if row["metric"] == "robust_accuracy":
                row["value"] = 0.5
        (folder / "summary.json").write_text(json.dumps(summary))
    assert [entry.model for entry in board(*folders)] == ["b", "a"]
    assert [run.name for run in read_runs(folders)] == ["b", "a"]


def test_two_runs_of_a_model_are_one_entry_of_what_withstood_both(tmp_path: Path) -> None:
    same = {"fingerprint": "f" * 16, "strength": 1.0}
    folders = [write_run(tmp_path / name, Invented(name, **same)) for name in ("first", "second")]
    runs = read_runs(folders)
    (entry,) = entries(runs)
    cases = [run.worst_case for run in runs]
    assert cases[0] is not None
    assert cases[1] is not None
    withstood = int((~cases[0].broken & ~cases[1].broken).sum())
    assert entry.united
    assert entry.robust == pytest.approx(withstood / 200)
    assert entry.robust < min(map(robust, runs)), "each run broke samples that the other did not"
    assert (entry.low, entry.high) == wilson_interval(withstood, 200)
    assert entry.runs == ("first", "second")


def test_without_verdicts_on_the_same_samples_the_lowest_run_counts(tmp_path: Path) -> None:
    same = {"fingerprint": "f" * 16}
    first = write_run(tmp_path / "a", Invented("a", **same))
    bare = write_run(tmp_path / "b", Invented("b", strength=0.8, **same), verdicts=False)
    fewer = write_run(tmp_path / "c", Invented("c", strength=0.7, n=100, **same))
    for folders in ([first, bare], [first, fewer]):
        (entry,) = board(*folders)
        runs = read_runs(folders)
        lowest = min(runs, key=robust)
        assert lowest.robust is not None
        assert (entry.robust, entry.n, entry.united) == (robust(lowest), lowest.robust.n, False)


def test_other_threat_models_and_sets_are_groups_of_their_own(tmp_path: Path) -> None:
    settings = [{}, {"eps": 0.2}, {"norm": "l2"}, {"set": "mnist"}, {"strength": 0.5}]
    models = [Invented(f"m{k}", **{"fingerprint": f"f{k % 4}"} | each) for k, each in enumerate(settings)]
    ranked = board(*(write_run(tmp_path / model.name, model) for model in models))
    groups = [entry.group for entry in ranked]
    assert groups[0] == "digits, L-inf, eps 0.1"
    assert len(set(groups)) == 4
    assert len(ranked) == 4, "the first and the last are one model"


def test_a_failed_check_is_shown_with_the_number(tmp_path: Path) -> None:
    failing = write_run(tmp_path / "a", Invented("a", failing=["converged"]))
    unchecked = write_run(tmp_path / "b", Invented("b"))
    (unchecked / "sanity.json").unlink()
    found = {entry.model: entry for entry in board(failing, unchecked)}
    assert found["a"].failed == ("Twice the steps change nothing",)
    assert found["a"].warned == ("Accuracy does not rise with the budget",)
    assert not found["b"].checked
    page = write_leaderboard([failing, unchecked], tmp_path / "board.html").read_text()
    assert "✗ Twice the steps change nothing" in page
    assert "not checked" in page


def test_exports_hold_the_numbers_of_the_page(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"r{k}", Invented(f"r{k}_x", strength=1 + k)) for k in range(3)]
    ranked = board(*folders)
    files = {suffix: write_export(folders, tmp_path / f"t{suffix}") for suffix in (".csv", ".json", ".tex", ".md")}
    with files[".csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    records = json.loads(files[".json"].read_text())
    for entry, row, record in zip(ranked, rows, records, strict=True):
        assert row["model"] == record["model"] == entry.model
        assert float(row["robust_accuracy"]) == record["robust_accuracy"] == entry.robust
        assert row["attacks"].split(";") == record["attacks"] == list(entry.attacks)
        assert int(row["n"]) == record["n"] == 200
    tex, markdown = files[".tex"].read_text(), files[".md"].read_text()
    assert tex.count(r"\toprule") == tex.count(r"\bottomrule") == 1
    assert r"r2\_x & pgd & " in tex
    for entry in ranked:
        assert f"& {100 * entry.robust:.1f} & [{100 * entry.low:.1f}, {100 * entry.high:.1f}] & 200" in tex
        assert f"| {100 * entry.robust:.1f} | {100 * entry.low:.1f} to {100 * entry.high:.1f} | 200 |" in markdown


def test_hostile_names_do_no_harm(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>|\\input{x}%&_"
    folder = write_run(tmp_path / "run", Invented(name))
    assert "<script>alert" not in write_leaderboard([folder], tmp_path / "page.html").read_text()
    tex = write_export([folder], tmp_path / "t.tex").read_text()
    assert r"\input" not in tex
    assert r"\textbackslash{}input\{x\}\%\&\_" in tex
    (line,) = [
        line for line in write_export([folder], tmp_path / "t.md").read_text().splitlines() if "alert" in line
    ]
    assert "<script" not in line
    assert line.replace("\\|", "").count("|") == 8


def test_the_same_runs_give_the_same_leaderboard(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, Invented(name)) for name in "abc"]
    pages = [write_leaderboard(order, tmp_path / "x.html").read_bytes() for order in (folders, folders[::-1])]
    assert pages[0] == pages[1]
    assert str(tmp_path).encode() not in pages[0]


def test_the_command_line_writes_leaderboard_and_exports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "runs" / "a", Invented("a"))
    exports = [str(tmp_path / name) for name in ("board.csv", "board.tex")]
    arguments = [str(tmp_path / "runs"), "--leaderboard", "--export", exports[0], "--export", exports[1]]
    assert main(arguments) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "runs" / "a" / "leaderboard.html"), *exports]
    assert main([str(tmp_path / "runs"), "--export", str(tmp_path / "board.doc")]) == 2
    error = capsys.readouterr().err
    assert error == f"export={tmp_path / 'board.doc'}: is of no known format; expected .csv, .json, .tex, .md\n"


def test_runs_without_a_headline_have_no_leaderboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "a", Invented("a"))
    rows = [row for row in json.loads((folder / "summary.json").read_text()) if row["evaluator"] == "clean"]
    (folder / "summary.json").write_text(json.dumps(rows))
    assert main([str(folder), "--leaderboard"]) == 2
    assert capsys.readouterr().err.startswith("no run has a robust accuracy")
