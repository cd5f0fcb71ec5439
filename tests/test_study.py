"""The study on CIFAR-10: its comparisons are right, its recipes can be built, and its page shows what was found."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from photos import save

from ares_lightning import build
from ares_lightning.evaluation.plan import duration
from ares_lightning.hardware import HARDWARE, REACHED
from ares_lightning.launch import CONFIG_DIR
from ares_lightning.training.plan import trace_step

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("study")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_two_networks_are_compared_on_the_images_that_both_have_seen(study):
    first = pd.Series([True, True, True, False, True], index=[1, 2, 3, 4, 9])
    second = pd.Series([False, True, False, False, True], index=[1, 2, 3, 4, 8])
    pair = study.paired(first, second)
    assert pair["n"] == 4
    assert pair["difference"] == 0.5
    assert pair["p"] == 0.5, "two of two discordant images on one side: 2 / 4"


def test_the_interval_of_a_difference_covers_it_as_often_as_it_says(study):
    draw, covered, rounds = np.random.default_rng(0), 0, 2000
    for _ in range(rounds):
        common = draw.random(500)
        first, second = (pd.Series(common + 0.3 * draw.random(500) < share) for share in (0.7, 0.6))
        pair = study.paired(first, second)
        covered += pair["low"] <= 0.1 <= pair["high"]
    assert 0.93 < covered / rounds < 0.97


@pytest.fixture
def few(tmp_path) -> list[str]:
    """Settings that name a few images in the layout of CIFAR-10."""
    for i in range(40):
        save(tmp_path / ("train" if i % 2 else "test") / f"class{i // 4}" / f"{i}.png", i, 32, 32)
    return [f"data.root={tmp_path}", "data.num_val=10"]


def test_every_recipe_can_be_built(study, few):
    for name, recipe in study.RECIPES.items():
        settings = [*recipe.settings, *few, f"name={name}", "eval=[]"]
        asked_by = study.BY_QUERIES if "blackbox" in recipe.suites else ()
        queries = [f"eval.{attack}.attack.queries=500" for attack in asked_by]
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            cfg = compose("train", settings)
            asked = compose("evaluate", [f"eval=[{','.join(recipe.suites)}]", *queries])
        build.check_keys(cfg)
        data = build.build_data(cfg, training=True)
        build.build_module(cfg, build.build_classifier(cfg, data.num_classes), data)
        assert build.build_evaluation(asked, build.build_data(asked, training=False)).evaluators


@pytest.mark.parametrize("result", ["study-cifar10-cpu", "speedrun-cifar10-cpu"])
def test_the_page_shows_the_results_as_they_are(study, result):
    report = json.loads((RESULTS / f"{result}.json").read_text())
    tables = [study.table(report)]
    if report["pairs"]:
        tables += [study.table_of_pairs(report), study.table_of_findings(report)]
    page = (ROOT / "docs" / "study.md").read_text()
    for table in tables:
        assert table in page, "put in what benchmarks/study.py prints"
    assert study.table(report) in (ROOT / "README.md").read_text()
    for network in report["networks"]:
        assert not network["failed"]
        assert {row["n"] for row in network["accuracies"].values()} == {1000}


def test_the_recipe_for_a_gpu_says_what_its_plan_foresees(few):
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("train", ["experiment=cifar10_speedrun_gpu", *few])
    data = build.build_data(cfg, training=True)
    module = build.build_module(cfg, build.build_classifier(cfg, data.num_classes), data)
    operations, _ = trace_step(module, (cfg.data.batch_size, 3, 32, 32), bf16=True)
    updates = cfg.trainer.max_epochs * (49_000 // cfg.data.batch_size)
    seconds = updates * HARDWARE["h100"].seconds(operations, **REACHED)
    header = (CONFIG_DIR / "experiment" / "cifar10_speedrun_gpu.yaml").read_text().partition("defaults:")[0]
    assert f"{duration(seconds)} of steps on an H100" in re.sub(r"\n# ", " ", header)


def test_the_recipe_of_the_speedrun_says_what_it_reached():
    (network,) = json.loads((RESULTS / "speedrun-cifar10-cpu.json").read_text())["networks"]
    header = (ROOT / "conf" / "experiment" / "cifar10_speedrun_cpu.yaml").read_text().partition("defaults:")[0]
    minutes = network["training_seconds"] / 60
    assert minutes <= 30
    clean, robust = (100 * network["accuracies"][name]["value"] for name in ("clean", "autoattack"))
    said = re.sub(r"\n# ", " ", header)
    assert f"{minutes:.1f} minutes; clean {clean:.1f} %, under AutoAttack {robust:.1f} %, " in said
    assert "n = 1,000" in said
    assert f"and took {minutes:.1f}." in (ROOT / "docs" / "study.md").read_text()
