"""Dashboards show what the files of a run folder say: in Weights & Biases' own log and in TensorBoard's events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import wandb
from dashboards import WandbLog, read_wandb
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ares_lightning import build
from ares_lightning.evaluation.dashboards import log_evaluation
from ares_lightning.evaluation.metrics import wilson_interval

N = 20
SUBSETS = {"subset": None, "seed": 0, "precision": "fp32", "source": None, "model": None, "queries": None}


def row(evaluator: str, metric: str, right: int, **other: Any) -> dict[str, Any]:
    low, high = wilson_interval(right, N)
    known = {"set": "digits", "attack": "pgd", "norm": "linf", "eps": 0.1, "attack_fingerprint": "a1", **SUBSETS}
    return {"evaluator": evaluator, "metric": metric, "value": right / N, "n": N, "low": low, "high": high} | (
        known | other
    )


CLEAN = {"attack": "none", "norm": None, "eps": 0.0}
ROWS = [
    row("clean", "clean_accuracy", 18, **CLEAN),
    row("pgd20", "robust_accuracy", 10),
    row("autoattack", "robust_accuracy", 8, attack="autoattack"),
    row("autoattack", "robust_accuracy_after", 10, attack="apgd_ce"),
    row("autoattack", "robust_accuracy_after", 8, attack="apgd_t"),
    *(row("curve_threat", "robust_accuracy", right, eps=eps) for eps, right in ((0.2, 2), (0.05, 15), (0.1, 9))),
    *(row("curve_l2", "robust_accuracy", right, eps=eps, norm="l2") for eps, right in ((0.5, 12), (1.0, 6))),
    *(row("square", "accuracy_over_queries", right, queries=n) for n, right in ((100, 17), (1000, 12))),
    *(row("frequency", "clean_accuracy", n, set=f"digits/low_pass/{n}", **CLEAN) for n in (1, 2, 4)),
    row("corruptions", "clean_accuracy", 16, set="digits/fog/1", **CLEAN),
    row("corruptions", "clean_accuracy", 11, set="digits/fog/5", **CLEAN),
    row("corruptions", "mce", 10, low=None, high=None, **CLEAN),
    row("ood", "clean_accuracy", 7, set="digits_a", **CLEAN),
    row("transfer", "transfer_accuracy", 13, source="other"),
    row("worst_case", "robust_accuracy", 7, attack=None, attack_fingerprint=None),
]
CHECKS = [
    {
        "check": "one",
        "title": "Steps help",
        "verdict": "pass",
        "evidence": "10 % | 8 %",
        "remedy": None,
        "source": "a",
    },
    {"check": "two", "title": "Box kept", "verdict": "fail", "evidence": "1.2", "remedy": "clamp", "source": "b"},
]


def verdicts() -> pd.DataFrame:
    """Ten samples of class 0, ten of class 1; of class 0 two are misclassified, PGD breaks two more."""
    parts = []
    shared = {"model_fingerprint": "m1", "set": "digits", "source_fingerprint": None, "target": None, "seed": 0}
    samples = {"sample_id": range(N), "label": [0] * 10 + [1] * 10}
    for evaluator, attack, norm, eps, broken in (
        ("clean", "none", None, 0.0, {0, 1}),
        ("pgd20", "pgd", "linf", 0.1, {0, 1, 2, 3}),
        ("autoattack", "apgd_ce", "linf", 0.1, {0, 1, 2}),
        ("autoattack", "apgd_t", "linf", 0.1, {4}),
        ("curve_threat", "pgd", "linf", 0.05, {10}),
        ("curve_threat", "pgd", "linf", 0.2, set(range(N))),
    ):
        own = {
            "evaluator": evaluator,
            "evaluator_fingerprint": evaluator,
            "attack": attack,
            "norm": norm,
            "eps": eps,
        }
        broken_ones = {"broken": [number in broken for number in range(N)]}
        parts.append(pd.DataFrame({**samples, **broken_ones}).assign(**own, **shared))
    other_model = parts[1].assign(model_fingerprint="m0", broken=True)
    other_question = parts[1].assign(evaluator_fingerprint="pgd20 with another seed", broken=True)
    return pd.concat([*parts, other_model, other_question])


def make_run(folder: Path, logger: dict[str, Any]) -> DictConfig:
    folder.mkdir()
    cfg = OmegaConf.create(
        {
            "name": "mine",
            "data": {"name": "digits"},
            "threat": {"norm": "linf", "eps": "0.1"},
            "optim": {"lr": 0.1},
            "logger": logger,
        }
    )
    OmegaConf.save(cfg, folder / "config.yaml")
    names = dict.fromkeys(row["evaluator"] for row in ROWS)
    about = {
        "sets": [{"set": "digits", "n": N, "names_hash": "h", "preparation": "none"}],
        "run": {"model_fingerprint": "m1", "fingerprint": "e1", "num_parameters": 7},
        "evaluators": [{"name": name, "set": "digits", "fingerprint": name} for name in names],
    }
    contents = {"summary": ROWS, "about": about, "sanity": {"model_fingerprint": "m1", "checks": CHECKS}}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "report.html").write_text("<p>the report</p>")
    (folder / "verdicts").mkdir()
    verdicts().to_parquet(folder / "verdicts" / "part-00000.parquet")
    (folder / "verdicts" / "_passes.json").write_text("{}")
    (folder / "checkpoints").mkdir()
    for name in ("best", "last"):
        (folder / "checkpoints" / f"{name}.ckpt").write_bytes(name.encode())
    clean = np.full((2, 1, 8, 8), 0.5, np.float32)
    predictions = {"clean_prediction": np.array([1, 0]), "adversarial_prediction": np.array([0, 1])}
    np.savez(
        folder / "examples.npz",
        clean=clean,
        adversarial=clean + np.float32(0.1),
        label=np.array([1, 0]),
        **predictions,
        sample_name=np.array(["a", "b"]),
        classes=np.array(["zero", "one"]),
        attack="pgd",
        norm="linf",
        eps=0.1,
    )
    return cfg


def logged(folder: Path, **logger: Any) -> DictConfig:
    cfg = make_run(folder, logger)
    build.prepare_logger(cfg, None)
    loggers = build.start_loggers(cfg, folder)
    log_evaluation(loggers, folder)
    build.end_loggers(loggers)
    return cfg


WANDB = {"name": "wandb", "project": "p", "offline": True, "artifacts": True, "id": None}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    logged(folder, **WANDB)
    return folder


@pytest.fixture(scope="module")
def on_wandb(run_dir) -> WandbLog:
    return read_wandb(run_dir)


def test_the_summary_of_the_run_has_a_named_number_for_each_accuracy_that_is_no_point_of_a_curve(on_wandb):
    low, high = wilson_interval(10, N)
    pgd = {key: value for key, value in on_wandb.summary.items() if key.startswith("eval/pgd20/")}
    assert pgd == {
        "eval/pgd20/robust_accuracy": 0.5,
        "eval/pgd20/robust_accuracy_low": pytest.approx(low),
        "eval/pgd20/robust_accuracy_high": pytest.approx(high),
        "eval/pgd20/robust_accuracy_n": N,
    }
    numbers = {key for key, value in on_wandb.summary.items() if isinstance(value, int | float)}
    assert {key for key in numbers if key.startswith("eval/") and key.endswith(("accuracy", "mce"))} == {
        "eval/clean/clean_accuracy",
        "eval/pgd20/robust_accuracy",
        "eval/autoattack/robust_accuracy",
        "eval/corruptions/mce",
        "eval/ood/digits_a/clean_accuracy",
        "eval/transfer/other/pgd/transfer_accuracy",
        "eval/worst_case/robust_accuracy",
    }  # fmt: skip
    assert on_wandb.summary["eval/autoattack/apgd_t/robust_accuracy_after"] == 0.4
    assert "eval/corruptions/mce_low" not in on_wandb.summary
    assert [on_wandb.summary[f"eval/sanity/{verdict}"] for verdict in ("pass", "warn", "fail")] == [1, 0, 1]


def test_curves_are_charts_over_rising_budgets_queries_radii_and_severities(on_wandb):
    assert on_wandb.lines("eval/robust_accuracy/linf") == {"curve_threat": [(0.05, 0.75), (0.1, 0.45), (0.2, 0.1)]}
    assert on_wandb.lines("eval/robust_accuracy/l2") == {"curve_l2": [(0.5, 0.6), (1.0, 0.3)]}
    assert on_wandb.lines("eval/queries") == {"square": [(100, 0.85), (1000, 0.6)]}
    assert on_wandb.lines("eval/frequency") == {"low_pass": [(1, 0.05), (2, 0.1), (4, 0.2)]}
    assert on_wandb.lines("eval/corruptions") == {"fog": [(1, 0.8), (5, 0.55)]}
    texts = on_wandb.charts["eval/robust_accuracy/l2"]["stringSettings"]
    assert texts == {"title": "Robust accuracy, L2", "xname": "eps"}


def test_a_bar_stands_for_each_accuracy(on_wandb):
    assert on_wandb.charts["eval/accuracies"]["panelDefId"] == "wandb/bar/v0"
    bars = {
        bar["evaluation"]: bar["accuracy"] for bar in on_wandb.table("Custom Chart Tables/eval/accuracies_table")
    }
    assert bars == {"clean": 0.9, "pgd20": 0.5, "autoattack": 0.4, "ood/digits_a": 0.35, "worst_case": 0.35}


def test_the_tables_hold_every_row_of_the_summary_and_every_check(on_wandb):
    assert on_wandb.table("eval/summary") == ROWS
    checks = on_wandb.table("eval/sanity")
    assert checks == [{key: value for key, value in check.items() if key != "check"} for check in CHECKS]


def test_the_classes_are_told_apart_by_the_verdicts_of_this_evaluation_on_this_model(on_wandb):
    zero, one = on_wandb.table("eval/classes")
    assert zero == {
        "label": 0, "class": "zero", "n": 10,
        "clean": 0.8, "pgd20": 0.6, "autoattack": pytest.approx(0.6), "worst_case": 0.5,
    }  # fmt: skip
    assert one == {
        "label": 1, "class": "one", "n": 10,
        "clean": 1.0, "pgd20": 1.0, "autoattack": 1.0, "worst_case": pytest.approx(0.9),
    }  # fmt: skip


def test_examples_are_panels_of_clean_image_perturbation_and_adversarial_image(on_wandb):
    (file, caption), (_, other) = on_wandb.images("eval/examples")
    pixels = np.asarray(Image.open(file))
    assert pixels.shape == (96, 3 * 96 + 2 * 4, 3), "8 pixels, magnified 12 times"
    assert pixels[0, [0, 100, 200], 0].tolist() == [128, 255, 153]
    assert (pixels[:, 96:100] == 255).all()
    assert caption == "one: predicted one, attacked zero (pgd, L-inf, eps 0.1; perturbation x 5)"
    assert other.startswith("zero: predicted zero, attacked one")


def test_checkpoints_verdicts_and_report_are_artifacts_where_they_lie(on_wandb, run_dir):
    (run_id,) = on_wandb.ids
    assert on_wandb.artifacts == [
        ("model", f"model-{run_id}", ["last.ckpt"], ["latest", "last"]),
        ("model", f"model-{run_id}", ["best.ckpt"], ["best", "latest"]),
        ("verdicts", f"verdicts-{run_id}", ["part-00000.parquet"], ["latest"]),
        ("report", f"report-{run_id}", ["report.html"], ["latest"]),
    ]
    assert on_wandb.stored["best.ckpt"] == run_dir.resolve() / "checkpoints" / "best.ckpt"
    assert on_wandb.media("eval/report").read_text() == "<p>the report</p>"


def test_the_config_says_what_was_asked_of_which_model(on_wandb):
    assert on_wandb.config["threat"] == {"norm": "linf", "eps": "0.1"}
    assert on_wandb.config["evaluation"]["model_fingerprint"] == "m1"
    assert on_wandb.job_type == "train"


def test_training_metrics_have_the_epoch_for_axis_and_the_best_accuracy_for_summary(on_wandb):
    metrics = on_wandb.metrics
    assert {name: metric.step_metric for name, metric in metrics.items() if metric.step_metric} == dict.fromkeys(
        ("train/*", "val/*", "val/clean_acc", "val/robust_acc", "periodic/*"), "epoch"
    )
    assert {name for name, metric in metrics.items() if metric.summary.max} == {
        "val/clean_acc", "val/robust_acc", "periodic/*",
    }  # fmt: skip


def test_no_two_rules_claim_the_same_metric(on_wandb):
    """Among those, Weights & Biases takes one at random (wandb/wandb, core/internal/runmetric/runmetric.go)."""
    starts = [name.removesuffix("*") for name in on_wandb.metrics if name.endswith("*")]
    assert not [(one, two) for one in starts for two in starts if one != two and one.startswith(two)]


def test_nothing_is_written_outside_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    logged(tmp_path / "run", **WANDB)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_without_artifacts_only_what_is_shown_goes_there(tmp_path):
    logged(tmp_path / "run", **WANDB | {"artifacts": False})
    log = read_wandb(tmp_path / "run")
    assert log.artifacts == []
    assert "eval/summary" in log.keys


@pytest.fixture(scope="module")
def on_tensorboard(tmp_path_factory) -> EventAccumulator:
    folder = tmp_path_factory.mktemp("runs") / "run"
    logged(folder, name="tensorboard")
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    return events.Reload()


def text(events: EventAccumulator, name: str) -> str:
    (event,) = events.Tensors(f"{name}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def test_tensorboard_has_the_numbers(on_tensorboard, on_wandb):
    scalars = {name: on_tensorboard.Scalars(name)[0].value for name in on_tensorboard.Tags()["scalars"]}
    expected = {name: on_wandb.summary[name] for name in scalars}
    assert scalars == pytest.approx(expected, rel=1e-6)
    assert scalars["eval/worst_case/robust_accuracy"] == pytest.approx(0.35)


def test_tensorboard_has_the_curves_and_the_examples_as_images(on_tensorboard):
    images = set(on_tensorboard.Tags()["images"])
    charts = {"robust_accuracy/linf", "robust_accuracy/l2", "queries", "frequency", "corruptions"}
    assert images == {f"eval/{name}" for name in charts | {"examples/0", "examples/1"}}
    (example,) = on_tensorboard.Images("eval/examples/0")
    assert (example.height, example.width) == (96, 296)
    assert "0. one: predicted one, attacked zero" in text(on_tensorboard, "eval/examples")


def test_tensorboard_has_checks_and_tables_as_text(on_tensorboard):
    checks = text(on_tensorboard, "eval/sanity").splitlines()
    assert checks[2:] == [
        "| Steps help | pass | 10 % \\| 8 % |  | a |",
        "| Box kept | fail | 1.2 | clamp | b |",
    ]
    assert len(text(on_tensorboard, "eval/summary").splitlines()) == 2 + len(ROWS)
    assert "| 0 | zero | 10 | 0.8 | 0.6 |" in text(on_tensorboard, "eval/classes")
    assert "    name: mine" in text(on_tensorboard, "config")


def test_an_evaluation_without_examples_checks_or_verdicts_shows_its_numbers(tmp_path):
    cfg = make_run(tmp_path / "run", {"name": "tensorboard"})
    for name in ("examples.npz", "sanity.json", "about.json"):
        (tmp_path / "run" / name).unlink()
    loggers = build.start_loggers(cfg, tmp_path / "run")
    log_evaluation(loggers, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert "eval/pgd20/robust_accuracy" in events.Tags()["scalars"]
    assert not [tag for tag in events.Tags()["images"] if "examples" in tag]


def test_a_broken_file_is_named(tmp_path):
    cfg = make_run(tmp_path / "run", {"name": "tensorboard"})
    loggers = build.start_loggers(cfg, tmp_path / "run")
    for name, content in (("summary.json", "{"), ("sanity.json", "[]"), ("examples.npz", "no")):
        before = (tmp_path / "run" / name).read_bytes()
        (tmp_path / "run" / name).write_text(content)
        with pytest.raises(ValueError, match=name):
            log_evaluation(loggers, tmp_path / "run")
        (tmp_path / "run" / name).write_bytes(before)


def test_a_run_is_continued_under_its_id_and_an_agent_of_a_sweep_gives_one(monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    saved = OmegaConf.create({"logger": WANDB | {"id": "before"}})
    fresh = OmegaConf.create({"logger": WANDB})
    for given, ids in ((None, None), (saved, "before")):
        cfg = fresh.copy()
        build.prepare_logger(cfg, given)
        assert cfg.logger.id == ids or (ids is None and len(cfg.logger.id) == 8)
    monkeypatch.setenv("WANDB_RUN_ID", "of-the-agent")
    cfg = fresh.copy()
    build.prepare_logger(cfg, None)
    assert cfg.logger.id == "of-the-agent"


def test_an_id_that_cannot_name_an_artifact_is_refused_before_anything_is_written():
    cfg = OmegaConf.create({"logger": WANDB | {"id": "a/b"}})
    with pytest.raises(build.ConfigError, match=r"^logger\.id=a/b: expected letters"):
        build.prepare_logger(cfg, None)


def test_the_second_run_of_a_process_is_a_run_of_its_own(tmp_path, capfd):
    first, second = (logged(tmp_path / name, **WANDB) for name in ("one", "two"))
    assert wandb.run is None
    assert first.logger.id != second.logger.id
    for name, cfg in (("one", first), ("two", second)):
        log = read_wandb(tmp_path / name)
        assert log.ids == {cfg.logger.id}
        assert all(path.is_relative_to(tmp_path / name) for path in log.stored.values())
    assert "environment variables will be ignored" not in capfd.readouterr().err
