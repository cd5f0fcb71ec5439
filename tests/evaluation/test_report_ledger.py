"""What a report takes from the verdicts: the worst case by sample, by class and in pairs of models; its price."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_folders import Invented, write_parts, write_run
from scipy.stats import binomtest

from ares_lightning.evaluation.metrics import wilson_interval
from ares_lightning.evaluation.report.classes import class_rows, comparable, confusion_chart, confusions
from ares_lightning.evaluation.report.page import write_report
from ares_lightning.evaluation.report.pairs import mcnemar, pairs
from ares_lightning.evaluation.report.run import Run, read_runs
from ares_lightning.evaluation.report.sets import members
from ares_lightning.evaluation.report.worst_case import WorstCase, read_worst_case
from ares_lightning.evaluation.verdicts import SCHEMA

EPS = 0.1


def small(n: int = 6, **other: Any) -> Invented:
    """Return a model of which sample k withstands budgets below 0.03 · k, and misclassifies sample 0."""
    model = Invented("small", n=n, num_classes=3, **other)
    model.labels, model.radii = np.arange(n) % 3, 0.03 * np.arange(n)
    model.prediction = (model.labels + 1) % 3
    return model


def worst(folder: Path, *tables: dict[str, Any], **question: Any) -> WorstCase | None:
    write_parts(folder, tables)
    asked = {"model": None, "of_set": "digits", "norm": "linf", "eps": EPS, **question}
    return read_worst_case(folder, **asked)


def test_a_sample_is_broken_if_any_attack_within_the_budget_breaks_it(tmp_path: Path) -> None:
    model = small()
    weak, strong = model.rows("pgd20", "pgd", EPS, 1.5), model.rows("square", "square", EPS)
    found = worst(tmp_path / "v", model.rows("clean", "none", 0.0), weak, strong)
    assert found is not None
    assert found.broken.tolist() == [True, True, True, True, False, False]
    assert found.right.tolist() == [False, True, True, True, True, True]
    assert found.evaluators == ("pgd20", "square")
    np.testing.assert_array_equal(found.prediction, np.where(found.broken, model.prediction, model.labels))


def test_a_sample_counts_once_however_often_it_stands_in_the_parts(tmp_path: Path) -> None:
    model = small()
    rows = model.rows("pgd20", "pgd", EPS)
    once, twice = worst(tmp_path / "a", rows), worst(tmp_path / "b", rows, rows)
    assert once is not None
    assert twice is not None
    assert once.samples.tolist() == twice.samples.tolist() == list(range(6))
    np.testing.assert_array_equal(once.broken, twice.broken)


@pytest.mark.parametrize(
    "other",
    [
        {"set": "imagenet_a"},
        {"norm": "l2"},
        {"eps": 2 * EPS},
        {"model_fingerprint": "another"},
        {"evaluator_fingerprint": "of another evaluation"},
    ],
)
def test_rows_that_answer_another_question_do_not_count(tmp_path: Path, other: dict[str, Any]) -> None:
    model = small()
    mine, stray = model.rows("pgd20", "pgd", EPS, 1.5), model.rows("pgd20", "pgd", EPS, 0.01)
    stray |= {name: [value] * model.n for name, value in other.items()}
    question = {"model": model.fingerprint, "evaluators": ["e-pgd20"]}
    alone, beside = worst(tmp_path / "a", mine, **question), worst(tmp_path / "b", mine, stray, **question)
    assert alone is not None
    assert beside is not None
    np.testing.assert_array_equal(alone.broken, beside.broken)


def test_without_an_attack_or_a_known_model_there_is_no_worst_case(tmp_path: Path) -> None:
    model, other = small(), small(fingerprint="another")
    assert worst(tmp_path / "a", model.rows("clean", "none", 0.0)) is None
    assert worst(tmp_path / "b", model.rows("curve", "pgd", 0.0)) is None
    assert worst(tmp_path / "c", model.rows("pgd", "pgd", EPS), other.rows("pgd", "pgd", EPS)) is None
    assert read_worst_case(tmp_path / "none", None, "digits", "linf", EPS) is None


@pytest.mark.parametrize("changes", [{"eps": EPS / 2}, {"target": 1}])
def test_what_a_weaker_question_breaks_counts_while_what_it_does_not_break_says_nothing(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = small()
    whole, weaker = model.rows("pgd", "pgd", EPS, 1.5), model.rows("weak", "pgd", EPS, 0.5)
    weaker |= {name: [value] * model.n for name, value in changes.items()}
    assert worst(tmp_path / "alone", weaker) is None
    part = {name: list(values[:4]) for name, values in whole.items()}
    found = worst(tmp_path / "both", part, weaker)
    assert found is not None
    assert found.samples.tolist() == list(whole["sample_id"][:4])
    assert (found.broken == (np.asarray(whole["broken"]) | np.asarray(weaker["broken"]))[:4]).all()


def test_the_prediction_is_that_at_the_least_budget_that_broke_the_sample(tmp_path: Path) -> None:
    model = small()
    near, far = model.rows("curve", "pgd", EPS / 2), model.rows("curve", "pgd", EPS)
    far["adversarial_prediction"] = np.where(far["broken"], -1, far["adversarial_prediction"])
    found = worst(tmp_path / "v", far, near)
    assert found is not None
    np.testing.assert_array_equal(found.prediction[near["broken"]], near["adversarial_prediction"][near["broken"]])
    assert (found.prediction[far["broken"] & ~near["broken"]] == -1).all()


def run_of(folder: Path, model: Invented) -> Run:
    (run,) = read_runs([write_run(folder, model)])
    return run


def test_accuracy_by_class_adds_up_to_the_headline(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", Invented("mine"))
    assert run.worst_case is not None
    assert run.robust is not None
    rows = class_rows(run.worst_case, {0: "zero"})
    assert sum(row.robust.n for row in rows) == run.robust.n == 200
    right = sum(row.robust.value * row.robust.n for row in rows)
    assert right / 200 == pytest.approx(run.robust.value)
    assert [row.robust.value for row in rows] == sorted(row.robust.value for row in rows)
    for row in rows:
        interval = wilson_interval(round(row.robust.value * row.robust.n), row.robust.n)
        assert (row.robust.low, row.robust.high) == interval
        assert row.name == ("zero" if row.label == 0 else str(row.label))


def test_confusions_name_label_and_prediction_and_how_often() -> None:
    labels = np.array([0, 0, 0, 1, 1])
    prediction = np.array([1, 1, 0, -1, 1])
    broken = np.array([True, True, False, True, False])
    case = WorstCase(np.arange(5), labels, labels, prediction, broken, ("pgd",))
    first, second = confusions(case, {0: "cat", 1: "dog"})
    assert (first.label, first.prediction, first.count, first.n) == ("cat", "dog", 2, 3)
    assert (second.label, second.prediction, second.count, second.n) == ("dog", "no class (not finite)", 1, 2)


def test_the_confusion_map_has_the_shares_of_each_label(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", Invented("mine"))
    assert run.worst_case is not None
    chart = confusion_chart([run], {})
    assert chart is not None
    shares = np.array(chart.data[0]["z"])
    np.testing.assert_allclose(shares.sum(1), 100)
    robust = {row.label: 100 * row.robust.value for row in class_rows(run.worst_case, {})}
    np.testing.assert_allclose(np.diag(shares), [robust[label] for label in sorted(robust)])
    many = run_of(tmp_path / "many", Invented("many", num_classes=100))
    assert confusion_chart([many], {}) is None


@pytest.mark.parametrize(("one", "other"), [(0, 0), (3, 0), (1, 9), (25, 24), (400, 470), (20_000, 20_300)])
def test_mcnemar_is_the_exact_binomial_test(one: int, other: int) -> None:
    expected = binomtest(one, one + other).pvalue if one + other else 1.0
    assert mcnemar(one, other) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(other, one) == mcnemar(one, other)


def test_two_models_are_compared_image_by_image(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, Invented(name, strength=s)) for name, s in (("a", 0.9), ("b", 1.3))]
    runs = read_runs(folders)
    (pair,) = pairs(runs)
    one, other = pair.first.worst_case, pair.second.worst_case
    assert one is not None
    assert other is not None
    assert pair.first.label == "b", "the more robust one comes first"
    assert pair.only_first == int((~one.broken & other.broken).sum()) > 0
    assert pair.only_second == int((one.broken & ~other.broken).sum())
    assert pair.first.robust is not None
    assert pair.second.robust is not None
    assert pair.difference == pytest.approx(pair.first.robust.value - pair.second.robust.value)
    assert pair.alike


def test_only_the_images_that_both_were_asked_about_are_compared(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, Invented(name)) for name in ("a", "b")]
    part = pq.read_table(folders[1] / "verdicts")
    for file in (folders[1] / "verdicts").iterdir():
        file.unlink()
    kept = part.filter(pa.compute.less(part["sample_id"], 50))
    pq.write_table(kept, folders[1] / "verdicts" / "part-00000.parquet")
    (pair,) = pairs(read_runs(folders))
    assert pair.n == 50


@pytest.mark.parametrize("other", [{"eps": 0.2}, {"norm": "l2"}, {"set": "mnist"}, {"num_classes": 7}])
def test_answers_to_different_questions_are_not_compared(tmp_path: Path, other: dict[str, Any]) -> None:
    runs = read_runs([write_run(tmp_path / "a", Invented("a")), write_run(tmp_path / "b", Invented("b", **other))])
    assert pairs(runs) == []
    assert len(comparable(runs)) == 1


def test_each_attack_of_an_ensemble_has_what_it_took_away(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", Invented("mine"))
    found = members([run])
    assert [member.row.attack for member in found] == ["apgd_ce", "apgd_t", "fab_t", "square"]
    assert run.clean is not None
    assert sum(member.broke or 0 for member in found) == pytest.approx(run.clean.value - found[-1].row.value)


def test_a_folder_without_verdicts_about_and_sanity_has_no_chapters_on_them(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", Invented("mine"), verdicts=False)
    for file in ("about.json", "sanity.json"):
        (folder / file).unlink()
    page = write_report([folder], tmp_path / "page.html").read_text()
    assert "<h2>Ensemble of attacks</h2>" in page
    for chapter in ("Sanity", "By class", "Confusion under attack", "Images"):
        assert f"<h2>{chapter}</h2>" not in page


@pytest.mark.parametrize("num_parts", [1, 400])
def test_a_ledger_of_imagenet_is_read_in_seconds_and_little_memory(tmp_path: Path, num_parts: int) -> None:
    """50,000 samples at 9 budgets, in one part or in as many as interruptions and processes leave."""
    model = Invented("large", n=50_000, num_classes=1000, set="imagenet", eps=4 / 255)
    folder = write_run(tmp_path / "run", model, verdicts=False)
    budgets = [k / 255 for k in range(9)]
    rows = [pa.table(model.rows("curve_threat", "apgd_ce", eps), schema=SCHEMA) for eps in budgets]
    table = pa.concat_tables(rows)
    (folder / "verdicts").mkdir()
    size = -(-table.num_rows // num_parts)
    for number in range(num_parts):
        part = folder / "verdicts" / f"part-{number:05d}.parquet"
        pq.write_table(table.slice(number * size, size), part)
    program = (
        "import sys\n"
        "from ares_lightning.evaluation.report.__main__ import main\n"
        "assert main([sys.argv[1]]) == 0\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 20
    peak = int(done.stdout.split("VmHWM:")[1].split()[0])
    assert peak < 1024**2, f"{peak / 1024:.0f} MiB"
    assert "<h2>By class</h2>" in (folder / "report.html").read_text()
