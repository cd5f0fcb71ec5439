"""Dashboards show what the files of a run folder say: in Weights & Biases' own log and in TensorBoard's events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from dashboards import WandbLog, read_wandb
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from run_folders import CORRUPTIONS, OOD, Invented, write_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ares_lightning import build
from ares_lightning.evaluation.dashboards import log_evaluation

MODEL = Invented("mine")
BUDGETS = [share * MODEL.eps for share in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)]


def make_run(folder: Path, logger: dict[str, Any]) -> DictConfig:
    """A run folder with everything in it, and the config that it was made by."""
    write_run(folder, MODEL, others=["other"])
    cfg = OmegaConf.load(folder / "config.yaml")
    cfg.optim, cfg.logger = {"lr": 0.1}, logger
    OmegaConf.save(cfg, folder / "config.yaml")
    (folder / "report.html").write_text("<p>the report</p>")
    (folder / "checkpoints").mkdir()
    for name in ("best", "last"):
        (folder / "checkpoints" / f"{name}.ckpt").write_bytes(name.encode())
    return cfg


def summary(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "summary.json").read_text())


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


def test_the_summary_of_the_run_has_a_named_number_for_each_accuracy_that_is_no_point_of_a_line(on_wandb, run_dir):
    row = next(row for row in summary(run_dir) if row["evaluator"] == "pgd20")
    pgd = {key: value for key, value in on_wandb.summary.items() if key.startswith("eval/pgd20/")}
    assert pgd == {
        "eval/pgd20/robust_accuracy": row["value"],
        "eval/pgd20/robust_accuracy_low": row["low"],
        "eval/pgd20/robust_accuracy_high": row["high"],
        "eval/pgd20/robust_accuracy_n": MODEL.n,
    }
    names = {
        key.removeprefix("eval/").removesuffix("_low")
        for key in on_wandb.summary
        if key.startswith("eval/") and key.endswith("_low")
    }
    members, sources = ("apgd_ce", "apgd_t", "fab_t", "square"), ("mim", "vmi_fgsm")
    assert names == {
        "clean/clean_accuracy",
        "pgd5/robust_accuracy",
        "pgd20/robust_accuracy",
        "pgd100/robust_accuracy",
        "autoattack/robust_accuracy",
        *(f"autoattack/{member}/robust_accuracy_after" for member in members),
        *(f"ood/{name}/clean_accuracy" for name in OOD),
        *(f"transfer/other/{attack}/transfer_accuracy" for attack in sources),
        "worst_case/robust_accuracy",
    }
    assert on_wandb.summary["eval/worst_case/robust_accuracy"] == MODEL.accuracy(MODEL.eps)


def test_the_summary_of_the_run_counts_checks_by_verdict(on_wandb):
    assert [on_wandb.summary[f"eval/sanity/{verdict}"] for verdict in ("pass", "warn", "fail")] == [4, 0, 0]


def test_curves_are_charts_over_budgets_queries_steps_radii_and_severities(on_wandb, run_dir):
    curve = [(eps, MODEL.accuracy(eps, 1.05)) for eps in BUDGETS]
    assert on_wandb.lines("eval/robust_accuracy/linf") == {"mine": curve}
    (l2,) = on_wandb.lines("eval/robust_accuracy/l2").values()
    assert l2 == [(eps / 0.12, value) for eps, value in curve]
    assert on_wandb.charts["eval/robust_accuracy/l2"]["stringSettings"] == {
        "title": "Robust accuracy, L2", "xname": "eps",
    }  # fmt: skip
    queries = on_wandb.lines("eval/queries")
    assert {name: [x for x, _ in line] for name, line in queries.items()} == {
        "square": [10, 100, 1000, 5000], "nes": [10, 100, 1000, 5000],
    }  # fmt: skip
    (steps,) = on_wandb.lines("eval/steps").values()
    assert [x for x, _ in steps] == [5, 20, 100]
    (radii,) = on_wandb.lines("eval/frequency").values()
    assert radii == [(radius, MODEL.accuracy(0) * radius / (radius + 1)) for radius in (1, 2, 4, 8)]
    corruptions = on_wandb.lines("eval/corruptions/digits")
    assert set(corruptions) == set(CORRUPTIONS)
    assert corruptions["fog"] == [
        (float(row["set"].rsplit("/")[-1]), row["value"])
        for row in summary(run_dir)
        if row["set"].startswith("digits/fog/")
    ]


def test_a_bar_stands_for_each_accuracy(on_wandb):
    assert on_wandb.charts["eval/accuracies"]["panelDefId"] == "wandb/bar/v0"
    table = on_wandb.table("Custom Chart Tables/eval/accuracies_table")
    bars = {bar["evaluation"]: bar["accuracy"] for bar in table}
    named = ["clean", "pgd5", "pgd20", "pgd100", "autoattack", *(f"ood/{name}" for name in OOD), "worst_case"]
    assert list(bars) == named
    assert bars["clean"] == MODEL.accuracy(0)


def test_the_tables_hold_every_row_of_the_summary_and_every_check(on_wandb, run_dir):
    assert on_wandb.table("eval/summary") == summary(run_dir)
    checks = json.loads((run_dir / "sanity.json").read_text())["checks"]
    shown = on_wandb.table("eval/sanity")
    assert sorted(check["title"] for check in shown) == sorted(check["title"] for check in checks)
    assert [check["verdict"] for check in shown] == ["pass"] * 4 + ["not asked"]


def test_the_classes_stand_in_a_table_the_weakest_first(on_wandb):
    classes = on_wandb.table("eval/classes")
    robust = MODEL.radii > MODEL.eps
    for row in classes:
        own = MODEL.labels == int(row["class"].removeprefix("class "))
        assert row["n"] == own.sum()
        assert row["robust"] == pytest.approx(robust[own].mean())
        assert row["clean"] == pytest.approx((MODEL.radii > 0)[own].mean())
    assert len(classes) == MODEL.num_classes
    assert [row["robust"] for row in classes] == sorted(row["robust"] for row in classes)


def test_examples_are_panels_of_clean_image_perturbation_and_adversarial_image(on_wandb, run_dir):
    panels = on_wandb.images("eval/examples")
    assert len(panels) == 4
    file, caption = panels[0]
    pixels = np.asarray(Image.open(file))
    assert pixels.shape == (96, 3 * 96 + 2 * 4, 3), "16 pixels, magnified 6 times"
    with np.load(run_dir / "examples.npz") as kept:
        clean, adversarial = (np.round(255 * kept[key][0].transpose(1, 2, 0)) for key in ("clean", "adversarial"))
    assert (pixels[::6, :96:6] == clean).all()
    assert (pixels[::6, 200::6] == adversarial).all()
    assert (pixels[:, 96:100] == 255).all()
    label, after = f"class {MODEL.labels[0]}", f"class {MODEL.prediction[0]}"
    assert caption.startswith(f"{label}: predicted {label}, attacked {after} (00000.png; apgd_ce, L-inf, eps 0.1")


def test_checkpoints_verdicts_and_report_are_artifacts_where_they_lie(on_wandb, run_dir):
    (run_id,), parts = on_wandb.ids, sorted((run_dir / "verdicts").glob("part-*.parquet"))
    assert on_wandb.artifacts == [
        ("model", f"model-{run_id}", ["last.ckpt"], ["last", "latest"]),
        ("model", f"model-{run_id}", ["best.ckpt"], ["best", "latest"]),
        ("verdicts", f"verdicts-{run_id}", [path.name for path in parts], ["latest"]),
        ("report", f"report-{run_id}", ["report.html"], ["latest"]),
    ]
    assert on_wandb.stored["best.ckpt"] == run_dir.resolve() / "checkpoints" / "best.ckpt"
    assert on_wandb.media("eval/report").read_text() == "<p>the report</p>"


def test_the_config_says_what_was_asked_of_which_model(on_wandb):
    assert on_wandb.config["threat"] == {"norm": "linf", "eps": 0.1}
    assert on_wandb.config["evaluation"]["model_fingerprint"] == MODEL.fingerprint
    assert on_wandb.config["evaluation"]["versions"]["torch"] == "2.9.0"
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
    assert scalars["eval/worst_case/robust_accuracy"] == pytest.approx(MODEL.accuracy(MODEL.eps))


def test_tensorboard_has_the_curves_and_the_examples_as_images(on_tensorboard):
    images = set(on_tensorboard.Tags()["images"])
    charts = ["robust_accuracy/linf", "robust_accuracy/l2", "queries", "steps", "frequency", "corruptions/digits"]
    assert images == {f"eval/{name}" for name in [*charts, *(f"examples/{place}" for place in range(4))]}
    (example,) = on_tensorboard.Images("eval/examples/0")
    assert (example.height, example.width) == (96, 296)
    label = f"class {MODEL.labels[0]}"
    assert f"0. {label}: predicted {label}, attacked" in text(on_tensorboard, "eval/examples")


def test_tensorboard_has_checks_and_tables_as_text(on_tensorboard):
    checks = text(on_tensorboard, "eval/sanity").splitlines()
    assert checks[0] == "| title | verdict | evidence | remedy | source |"
    assert [check.split(" | ")[1] for check in checks[2:]] == ["pass"] * 4 + ["not asked"]
    assert "| worst_case | robust_accuracy |" in text(on_tensorboard, "eval/summary")
    assert len(text(on_tensorboard, "eval/classes").splitlines()) == 2 + MODEL.num_classes
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
