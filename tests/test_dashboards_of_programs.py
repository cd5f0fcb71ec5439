"""What the two programs log: training and evaluation in one run, whatever the number of processes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from dashboards import WandbLog, read_wandb
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from processes import ROOT, SHORT, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from ares_lightning import build
from ares_lightning.launch import CONFIG_DIR, evaluate_main, train_main
from ares_lightning.training.module import MONITORED

OFFLINE = ["logger=wandb", "logger.offline=true"]
ASKED = ["eval=[clean,pgd20]", "subset=first:20"]
LOGGED = {"train/loss", "train/robust_acc", "val/clean_acc", "val/robust_acc", "epoch", "trainer/global_step"}
SHOWN = {"eval/summary", "eval/classes", "eval/report", "eval/accuracies", "eval/clean/clean_accuracy"}
SWEEP = yaml.safe_load((ROOT / "examples" / "sweep.yaml").read_text())
PAGE = (ROOT / "docs" / "dashboards.md").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    periodic = ["callbacks.periodic.every_n_epochs=1", "callbacks.periodic.subset=first:10"]
    done = run("train.py", *SHORT, *ASKED, *periodic, *OFFLINE, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture(scope="module")
def log(trained) -> WandbLog:
    return read_wandb(trained)


def values(log: WandbLog, key: str) -> list[tuple[int, float]]:
    """A metric over the epochs, as `metrics.csv` has it."""
    return [(int(row["epoch"]), row[key]) for row in log.history if key in row]


def test_training_and_final_evaluation_are_one_run(log, trained):
    assert log.ids == {OmegaConf.load(trained / "config.yaml").logger.id}
    assert len(log.folders) == 1
    assert log.job_type == "train"
    assert set(log.keys) >= LOGGED
    assert set(log.summary) >= LOGGED | SHOWN - {"eval/accuracies"}
    assert "eval/accuracies" in log.charts
    assert log.config["model"]["settings"]["width"] == 8
    assert {kind for kind, *_ in log.artifacts} == {"model", "verdicts", "report"}


def test_the_numbers_are_those_of_the_run_folder(log, trained):
    rows = json.loads((trained / "summary.json").read_text())
    for evaluator in ("clean", "pgd20", "worst_case"):
        row = next(row for row in rows if row["evaluator"] == evaluator)
        assert log.summary[f"eval/{evaluator}/{row['metric']}"] == row["value"]
    lines = (trained / "metrics.csv").read_text().splitlines()
    place = lines[0].split(",").index("val/robust_acc")
    accuracies = [float(line.split(",")[place]) for line in lines[1:]]
    assert values(log, "val/robust_acc") == list(enumerate(accuracies))
    assert log.summary["val/robust_acc"] == {"max": max(accuracies)}


def test_the_evaluators_during_the_training_have_their_best_in_the_summary(log):
    name = "periodic/pgd20/raw/robust_accuracy"
    accuracies = values(log, name)
    assert [epoch for epoch, _ in accuracies] == [0, 1]
    assert log.summary[name] == {"max": max(value for _, value in accuracies)}


def test_an_evaluation_that_is_made_again_goes_on_in_its_run(trained, tmp_path, monkeypatch):
    arguments = [f"ckpt={trained}", *ASKED, *OFFLINE, f"run_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    evaluate_main()
    evaluate_main()
    log = read_wandb(tmp_path)
    assert log.ids == {OmegaConf.load(tmp_path / "config.yaml").logger.id}
    assert len(log.folders) == 2
    assert log.job_type == "evaluate"
    assert set(log.summary) >= SHOWN - {"eval/accuracies"}
    assert log.ids.isdisjoint(read_wandb(trained).ids), "that of the training is another one"


def test_tensorboard_shows_an_evaluation_beside_the_training(trained, tmp_path, monkeypatch):
    arguments = [f"ckpt={trained}", *ASKED, "logger=tensorboard", f"run_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    evaluate_main()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rows = json.loads((tmp_path / "summary.json").read_text())
    (shown,) = events.Scalars("eval/pgd20/robust_accuracy")
    assert shown.value == pytest.approx(next(row["value"] for row in rows if row["evaluator"] == "pgd20"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"^error: logger=wandb: .*; logger\.offline=true needs neither account nor network$"),
        (["logger.offline=true", "+logger.speed=3"], r"^error: logger\.speed: no such key"),
        (["logger.offline=true", "logger.group={a: 1}"], r"^error: logger\..*run_group.* valid string"),
        (["logger.offline=true", "logger.id=a b"], r"^error: logger\.id=a b: expected letters"),
        (["logger.name=mlflow"], r"^error: logger\.name=mlflow: expected csv, tensorboard or wandb$"),
    ],
    ids=["no account", "no such key", "another type", "an id that is no name", "no such logger"],
)
def test_a_mistake_is_told_in_one_line_before_the_training(overrides, message, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(
        sys, "argv", ["train.py", *SHORT, "logger=wandb", f"run_dir={tmp_path / 'run'}", *overrides]
    )
    with pytest.raises(SystemExit, match=message) as told:
        train_main()
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run" / "metrics.csv").exists()


@pytest.mark.proof
def test_two_processes_log_one_run(tmp_path):
    done = run("train.py", *SHORT, *ASKED, *OFFLINE, "trainer=ddp_sim", f"run_dir={tmp_path / 'trained'}")
    assert done.returncode == 0, done.stderr
    done = run(
        "evaluate.py",
        f"ckpt={tmp_path / 'trained'}",
        *ASKED,
        *OFFLINE,
        "trainer=ddp_sim",
        f"run_dir={tmp_path / 'evaluated'}",
    )
    assert done.returncode == 0, done.stderr
    for name in ("trained", "evaluated"):
        log = read_wandb(tmp_path / name)
        assert len(log.ids) == len(log.folders) == 1
        assert set(log.summary) >= SHOWN - {"eval/accuracies"}


@pytest.mark.proof
def test_two_processes_write_one_folder_of_events(tmp_path):
    done = run("train.py", *SHORT, *ASKED, "logger=tensorboard", "trainer=ddp_sim", f"run_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    processes = {path.name.split(".")[-2] for path in (tmp_path / "tensorboard").glob("events*")}
    assert len(processes) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = {"train/loss", "val/robust_acc", "eval/clean/clean_accuracy", "eval/worst_case/robust_accuracy"}
    assert set(events.Tags()["scalars"]) >= shown


def test_the_sweeps_metric_is_one_that_a_training_validates_by():
    assert SWEEP["metric"] == {"name": MONITORED[0], "goal": "maximize"}
    assert SWEEP["program"] == "train.py"


def sweep_values() -> list[str]:
    """Every value of the sweep that is listed, and the ends of ranges, as overrides."""
    return [
        f"{name}={value}"
        for name, parameter in SWEEP["parameters"].items()
        for value in parameter.get("values") or (parameter["min"], parameter["max"])
    ]


@pytest.mark.parametrize("override", sweep_values())
def test_a_value_of_the_sweep_builds_a_training(override, tmp_path):
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("train", [*(each for each in SWEEP["command"] if "=" in each and "$" not in each), override])
    build.check_keys(cfg)
    data = build.build_data(cfg, training=True)
    assert build.build_module(cfg, build.build_classifier(cfg, data.num_classes), data)


def test_a_parameter_of_the_sweep_hides_no_group_of_settings():
    """What a sweep sets has precedence in the config of its runs over all of the same name."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("train")
    assert not [name for name in SWEEP["parameters"] if OmegaConf.is_config(OmegaConf.select(cfg, name))]


@pytest.mark.proof
def test_a_run_of_the_sweep_is_the_agents(tmp_path):
    """The command as `wandb agent` makes it of the file."""
    firsts = {name: (each.get("values") or [each["min"]])[0] for name, each in SWEEP["parameters"].items()}
    drawn = {name: {"value": value} for name, value in firsts.items()}
    arguments = create_sweep_command_args({"args": drawn})["args_no_hyphens"]
    command = [str(part) for part in create_sweep_command(list(SWEEP["command"]))]
    assert command[:3] == ["${env}", "${interpreter}", "${program}"]
    command = [SWEEP["program"], *command[3:-1], *arguments]
    settings = tmp_path / "drawn.yaml"
    settings.write_text(yaml.safe_dump({"wandb_version": 1, **drawn}))
    agents = {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "r1", "WANDB_SWEEP_PARAM_PATH": str(settings)}
    done = run(
        str(ROOT / command[0]), *command[1:], *SHORT, "logger.offline=true", env=agents, cwd=tmp_path, timeout=600
    )
    assert done.returncode == 0, done.stderr
    log = read_wandb(tmp_path / "runs" / "sweep" / "r1")
    assert log.ids == {"r1"}
    assert log.config["adv"]["eps"] == log.config["adv.eps"] == 0.05
    assert log.summary["val/robust_acc"]["max"] >= 0
    assert log.artifacts == []


def test_the_page_names_what_is_logged(log):
    groups = ("train", "val", "periodic", "eval")
    named = {key for key in log.keys | set(log.summary) if key.split("/")[0] in groups}
    cells = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    rules = [re.sub(r"<[^>]*>", "[^/]+", name) for cell in cells for name in re.findall("`(.*?)`", cell)]
    rules = [f"{rule}(_low|_high|_n)?" for rule in rules if not rule.endswith("*")]
    assert {"train/loss", "eval/pgd20/robust_accuracy_low"} <= named
    assert not [key for key in named if not any(re.fullmatch(rule, key) for rule in rules)]
