"""The chapters of the report: what each figure shows is what the run folders say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from run_folders import CORRUPTIONS, OOD, Invented, write_run

from ares_lightning.evaluation.report import write_report
from ares_lightning.evaluation.report.lines import budget_curves, low_pass_curves, query_curves, step_curves
from ares_lightning.evaluation.report.run import read_runs

CHAPTERS = [
    "Sanity", "Robustness curve, L-inf", "Robustness curve, L2", "Accuracy over steps", "Accuracy over queries",
    "Low frequencies alone", "Ensemble of attacks", "All results", "By class", "Confusion under attack", "Examples",
    "Other sets", "Corruptions of digits", "Training", "Images", "Settings",
]  # fmt: skip


def charts(page: str) -> dict[str, Any]:
    drawn = re.findall(r'data-chart="([\w-]+)">(.*?)</script>', page)
    return {name: json.loads(figure)["data"] for name, figure in drawn}


def summary(folder: Path, **wanted: Any) -> list[dict[str, Any]]:
    rows = json.loads((folder / "summary.json").read_text())
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return write_run(tmp_path / "mine", Invented("mine", failing=["converged"]))


def test_a_full_run_has_every_chapter_in_the_order_in_which_one_asks(mine: Path, tmp_path: Path) -> None:
    page = write_report([mine], tmp_path / "page.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == CHAPTERS


def test_several_runs_are_compared_and_held_against_what_they_have_in_common(tmp_path: Path) -> None:
    names = ("a", "b")
    page = write_report(
        [write_run(tmp_path / name, Invented(name), others=names) for name in names], tmp_path / "page.html"
    ).read_text()
    chapters = re.findall("<h2>(.*?)</h2>", page)
    assert [each for each in chapters if each not in CHAPTERS] == [
        "Two models on the same images",
        "Robust accuracy against …",
        "Transfer",
    ]


def test_steps_are_read_from_the_settings(mine: Path) -> None:
    (line,) = step_curves(read_runs([mine]))
    assert line.x == [5, 20, 100]
    assert line.value == [
        row["value"] for name in ("pgd5", "pgd20", "pgd100") for row in summary(mine, evaluator=name)
    ]


def test_evaluators_that_do_not_tell_their_steps_have_no_such_line(mine: Path) -> None:
    about = json.loads((mine / "about.json").read_text())
    for each in about["evaluators"]:
        del each["settings"]
    (mine / "about.json").write_text(json.dumps(about))
    assert step_curves(read_runs([mine])) == []


def test_queries_and_radii_are_lines_of_their_own(mine: Path) -> None:
    runs = read_runs([mine])
    square, nes = query_curves(runs)
    assert square.label == "square"
    assert nes.label == "nes"
    assert square.x == [10, 100, 1000, 5000], "no query at all has no place on a logarithmic axis"
    assert square.value == [row["value"] for row in summary(mine, evaluator="square") if row["queries"]]
    (line,) = low_pass_curves(runs)
    assert line.x == [1, 2, 4, 8]
    assert line.value == [row["value"] for row in summary(mine, evaluator="frequency")]


def test_of_several_runs_the_curves_of_one_evaluator_show_at_a_time(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, Invented(name)) for name in ("a", "b")]
    rows = json.loads((folders[0] / "summary.json").read_text())
    rows += [row | {"evaluator": "curve_ares"} for row in rows if row["evaluator"] == "curve_threat"]
    (folders[0] / "summary.json").write_text(json.dumps(rows))
    lines = budget_curves(read_runs(folders))["linf"]
    assert [line.choice for line in lines] == ["curve_threat, apgd_ce"] * 2 + ["curve_ares, apgd_ce"]
    (alone,) = [run for run in read_runs(folders) if run.label == "a"]
    labels = [line.label for line in budget_curves([alone])["linf"]]
    assert labels == ["curve_threat, apgd_ce", "curve_ares, apgd_ce"]


def test_curves_on_different_sets_do_not_share_a_figure(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, Invented(name, set=name)) for name in ("digits", "mnist")]
    choices = {line.choice for line in budget_curves(read_runs(folders))["linf"]}
    assert choices == {"curve_threat, apgd_ce on digits", "curve_threat, apgd_ce on mnist"}


def test_other_sets_have_bars_with_intervals_and_the_own_one_comes_first(mine: Path, tmp_path: Path) -> None:
    (bars,) = charts(write_report([mine], tmp_path / "page.html").read_text())["ood"]
    rows = summary(mine, evaluator="clean") + summary(mine, evaluator="ood")
    assert bars["x"] == [100 * row["value"] for row in rows]
    assert bars["error_x"]["array"] == [100 * (row["high"] - row["value"]) for row in rows]
    assert bars["error_x"]["arrayminus"] == [100 * (row["value"] - row["low"]) for row in rows]
    assert ["digits", *OOD] == [text.split("<br>")[1].split(":")[0] for text in bars["text"]]


def test_corruptions_are_a_table_by_severity_and_over_runs_a_map(mine: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", Invented("other"))
    (heat,) = charts(write_report([mine, other], tmp_path / "page.html").read_text())["corruptions-digits"]
    for share, run in zip(heat["z"], read_runs([mine, other]), strict=True):
        for value, corruption in zip(share, CORRUPTIONS, strict=True):
            cells = [row["value"] for row in summary(run.folder) if f"/{corruption}/" in row["set"]]
            assert value == pytest.approx(100 * sum(cells) / 5)
    page = write_report([mine], tmp_path / "page.html").read_text()
    assert "corruptions-digits" not in page
    assert page.count('style="--share: ') == 5 * len(CORRUPTIONS)


def test_the_transfer_matrix_has_sources_by_models(tmp_path: Path) -> None:
    names = ("a", "b")
    folders = [write_run(tmp_path / name, Invented(name), others=names) for name in names]
    heats = charts(write_report(folders, tmp_path / "page.html").read_text())["transfer"]
    assert [heat["meta"] for heat in heats] == ["mim, L-inf, eps 0.1", "vmi_fgsm, L-inf, eps 0.1"]
    models = [run.label for run in read_runs(folders)]
    for i, source in enumerate(models):
        for j, model in enumerate(models):
            wanted = {"evaluator": "transfer", "attack": "mim", "source": source}
            (row,) = summary(tmp_path / model, **wanted)
            assert heats[0]["z"][i][j] == 100 * row["value"]


def test_models_are_points_over_size_clean_and_shifted_accuracy_and_training(tmp_path: Path) -> None:
    trained = Invented("trained", num_parameters=2_000_000, training="trades")
    zoo = Invented("zoo", strength=0.5, training=None, key="resnet50_at", num_parameters=25_000_000)
    folders = [write_run(tmp_path / model.name, model) for model in (trained, zoo)]
    drawn = charts(write_report(folders, tmp_path / "page.html").read_text())
    points = {
        name: {trace["name"]: (trace["x"][0], trace["y"][0]) for trace in drawn[f"analysis-{name}"]}
        for name in ("size", "clean", "shifted", "training")
    }
    for model, group in ((trained, "trades"), (zoo, "at")):
        robust, clean = 100 * model.accuracy(model.eps), 100 * model.accuracy(0)
        assert points["size"][group] == pytest.approx((model.num_parameters / 1e6, robust))
        assert points["clean"][group] == pytest.approx((clean, robust))
        assert points["shifted"][group] == pytest.approx((clean * sum(OOD.values()) / len(OOD), robust))
        assert points["training"][group] == (group, pytest.approx(robust))


@pytest.mark.parametrize(("weights", "training"), [(None, "pgd + awp + ema"), ("raw", "pgd + awp")])
def test_a_training_is_named_with_its_tricks(tmp_path: Path, weights: str | None, training: str) -> None:
    (run,) = read_runs([write_run(tmp_path / "run", Invented("mine", tricks=("awp", "ema"), weights=weights))])
    assert run.training == training


def test_a_checkpoint_of_a_zoo_network_is_not_taken_for_the_published_weights(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", Invented("mine", training=None, key="resnet50_at"))
    config = json.loads((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(json.dumps(config | {"ckpt": "runs/mine"}))
    (run,) = read_runs([folder])
    assert run.training is None


def test_what_comes_from_any_file_is_escaped(tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    folder = write_run(tmp_path / "run", Invented("mine", failing=["converged"]), others=[hostile])
    for name in ("about.json", "sanity.json"):
        text = (folder / name).read_text()
        for word in (
            "as stored",
            "ran out of memory",
            "Twice the steps",
            "square alone",
            "cuda (NVIDIA H100)",
            "0.1.0",
        ):
            text = text.replace(word, hostile)
        (folder / name).write_text(text)
    page = write_report([folder], tmp_path / "page.html").read_text()
    assert hostile not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") > 5


def test_numbers_of_other_models_are_not_taken_for_the_runs_own(mine: Path) -> None:
    rows = json.loads((mine / "summary.json").read_text())
    others = [{**row, "model": "another", "value": 0.0, "low": 0.0} for row in rows]
    (mine / "summary.json").write_text(json.dumps(others + rows))
    (run,) = read_runs([mine])
    assert run.clean is not None
    assert run.robust is not None
    assert (run.clean.value, run.robust.value) == tuple(
        row["value"] for row in rows if row["evaluator"] in ("clean", "worst_case")
    )
    assert [line.value[0] for line in budget_curves([run])["linf"]] == [run.clean.value]
