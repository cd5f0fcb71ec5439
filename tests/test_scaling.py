"""The simulation of an evaluation on many processes is right; the page shows what was predicted and measured."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ares_lightning.hardware import REACHED

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "scaling.md"


def imported(name: str):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def scaling():
    return imported("scaling")


@pytest.fixture(scope="module")
def simulation():
    return imported("simulation")


def ledger(seed: int, num_samples: int, num_stages: int) -> pd.DataFrame:
    """Rows as an ensemble leaves them: each stage is put to those that the ones before have not broken."""
    draw, rows, left = np.random.default_rng(seed), [], list(range(num_samples))
    for stage in range(num_stages):
        for sample in left:
            spent, broken = int(draw.integers(1, 100)), bool(draw.random() < 0.4)
            rows.append((10 * sample, f"stage{stage}", spent, spent // 2, broken))
        left = [row[0] // 10 for row in rows if row[1] == f"stage{stage}" and not row[4]]
    return pd.DataFrame(rows, columns=["sample_id", "attack", "forwards", "backwards", "broken"])


def step_by_step(simulation, rows: pd.DataFrame, processes: int, anew: bool, least_rows: int) -> int:
    """When the last process is done, one call of the network after the other."""
    clocks = [0] * processes
    ids = sorted(rows["sample_id"].unique())
    for attack in dict.fromkeys(rows["attack"]):
        put = rows[rows["attack"] == attack].set_index("sample_id")
        spent = (put["forwards"] + put["backwards"] + simulation.CHECKS).to_dict()
        left = [i for i in ids if i in spent] if anew else ids
        for rank in range(processes):
            share = [i for i in left[rank::processes] if i in spent]
            size = simulation.NUM_PACKED * simulation.BATCH_SIZE
            for begin in range(0, len(share), size):
                calls = [spent[i] for i in share[begin : begin + size]]
                while calls:
                    clocks[rank] += max(len(calls), least_rows)
                    calls = [number - 1 for number in calls if number > 1]
        if anew:
            clocks = [max(clocks)] * processes
    return max(clocks)


@pytest.mark.parametrize("anew", [True, False])
@pytest.mark.parametrize("least_rows", [1, 5])
@pytest.mark.parametrize("processes", [1, 3, 8, 64])
def test_the_simulation_is_what_happens_call_by_call(simulation, monkeypatch, anew, least_rows, processes):
    monkeypatch.setattr(simulation, "BATCH_SIZE", 2)  # packs of 8
    rows = ledger(processes, 40, 3)
    samples = simulation.samples_of(rows)
    found = simulation.makespan(samples, processes, anew=anew, least_rows=least_rows)
    assert found == step_by_step(simulation, rows, processes, anew, least_rows)


def test_what_is_known_in_closed_form(simulation):
    samples = simulation.samples_of(ledger(1, 50, 4))
    for anew in True, False:
        assert simulation.makespan(samples, 1, anew=anew) == samples.work, "one process does all of it"
    longest = samples.passes.max(0).sum()
    assert simulation.makespan(samples, 1024, anew=True) == longest, "each waits for the longest of each stage"
    assert simulation.makespan(samples, 1024, anew=False) == samples.passes.sum(1).max() <= longest
    alike = simulation.Samples(np.full((64, 2), 7), np.full((64, 2), True))
    for processes in 2, 16, 64:
        assert simulation.makespan(alike, processes, anew=True) * processes == alike.work
    assert simulation.pack_time(np.array([10, 4]), 1) == 14
    assert simulation.pack_time(np.array([10, 4]), 8) == 80, "two rows cost what eight do"
    drawn = samples.drawn(500, seed=0)
    assert len(drawn) == 500
    assert drawn.work / 500 == pytest.approx(samples.work / 50, rel=0.15)
    assert drawn.work == samples.drawn(500, seed=0).work


def test_the_simulated_ledger_is_one_of_autoattack(simulation):
    rows = simulation.read_ledger(RESULTS / "scaling-ledger.csv", "autoattack")
    stages = list(dict.fromkeys(rows["attack"]))
    assert stages == ["apgd_ce", "apgd_t", "fab_t", "square"][: len(stages)]
    left = set(rows["sample_id"])
    for attack in dict.fromkeys(rows["attack"]):
        put = rows[rows["attack"] == attack]
        assert set(put["sample_id"]) == left
        assert put["sample_id"].is_unique
        left = set(put.loc[put["broken"] == 0, "sample_id"])
    report = json.loads((RESULTS / "scaling-processes.json").read_text())
    assert report["robust"] == pytest.approx(len(left) / rows["sample_id"].nunique())
    known = simulation.samples_of(rows)
    for row in report["rows"]:
        if row["samples"] == min(simulation.SAMPLES) and row["processes"] in (1, 64, 1024):
            samples = known.drawn(row["samples"], report["seed"])
            for name, anew in (("anew", True), ("static", False)):
                count, least = row["processes"], row["least_rows"]
                assert row["makespan"][name] == simulation.makespan(samples, count, anew=anew, least_rows=least)


@pytest.mark.parametrize("part", ["hardware", "steps", "suites", "processes"])
def test_the_page_shows_the_results_as_they_are(scaling, part):
    report = json.loads((RESULTS / f"scaling-{part}.json").read_text())
    shown = re.search(rf"<!-- python benchmarks/scaling.py {part} -->\n(.*?)\n<!-- /", PAGE.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] == scaling.PARTS[part][1](report), f"put in what `python benchmarks/scaling.py {part}` prints"
    assert report["command"].startswith(f"python benchmarks/scaling.py {part}")
    assert report["versions"]["torch"]


def test_the_page_says_how_far_a_prediction_was_off():
    report = json.loads((RESULTS / "scaling-steps.json").read_text())
    ratios = [ratio for row in report["rows"] for ratio in row["ratios"]]
    said = " ".join(PAGE.read_text().split())
    assert f"the time foreseen was {min(ratios):.2f} to {max(ratios):.2f} of the real one" in said


def test_plans_reckon_with_what_was_reached_and_memory_was_within_a_fiftieth():
    report = json.loads((RESULTS / "scaling-hardware.json").read_text())
    assert report["reached"] == pytest.approx(REACHED)
    assert len(report["rows"]) == 6
    for row in report["rows"]:
        assert row["predicted_mib"] == pytest.approx(row["measured_mib"], rel=0.02)
        assert 0.6 < row["predicted_seconds"] / row["measured_seconds"] < 1.5


def test_a_suite_costs_what_the_page_says(scaling):
    report = json.loads((RESULTS / "scaling-suites.json").read_text())
    again = scaling.suites(type("Options", (), {"suites": ["quick", "autoattack"]}))
    told = {row["suite"]: row for row in report["rows"]}
    assert set(told) == set(scaling.SUITES)
    for row in again["rows"]:
        assert told[row["suite"]] == row
