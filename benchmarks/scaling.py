"""What a plan predicts, held to what was measured, and how evaluations scale: the tables of docs/scaling.md.

    python benchmarks/scaling.py hardware                     # against benchmarks/results/training-cuda.json
    python benchmarks/scaling.py steps                        # against trainings on this device
    python benchmarks/scaling.py suites
    python benchmarks/scaling.py processes                    # from benchmarks/results/scaling-ledger.csv
    python benchmarks/scaling.py processes --ledger runs/…/verdicts --keep benchmarks/results/scaling-ledger.csv

Each prints its table and, with --output, writes the result file from which it can be printed again.

hardware: what training steps reach of an H100's data sheet is fitted to the eager steps that were measured (least
squares of the logarithms over the values in FITTED); each step's time is predicted by a fit to the others.
steps: the time that `train.py plan=true` predicts beside that of the same steps in a training, in turns.
suites: the passes that a survivor of each suite costs, counted as `evaluate.py plan=true` counts them.
processes: the time of an evaluation on 1 to 1,024 processes, as simulation.py finds it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback
from provenance import device_name, revision, version
from simulation import SAMPLES, draw, processes, table_of_processes

from ares_lightning import build
from ares_lightning.attacks import make_attack
from ares_lightning.counting import Operation
from ares_lightning.evaluation.plan import survivors_passes
from ares_lightning.hardware import HARDWARE
from ares_lightning.launch import CONFIG_DIR
from ares_lightning.models import make_classifier
from ares_lightning.training import RobustTraining
from ares_lightning.training.objectives import AdversarialTraining, InnerAttack, Objective, StandardTraining
from ares_lightning.training.optim import OptimSettings
from ares_lightning.training.plan import plan_training, trace_step

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "timm", "lightning", "numpy", "ares-lightning")
MIB = 2**20

MEASURED = {"NVIDIA H100 80GB HBM3": "h100"}
"""Hardware by the name that torch gives it."""
FITTED = {
    "rate": [k / 20 for k in range(10, 19)],
    "bandwidth": [k / 20 for k in range(6, 17)],
    "launch": [k * 1e-6 for k in range(0, 41, 4)],
}
STEPS = (("plain", "float32"), ("ours", "float32"), ("ours", "bf16"))
"""The eager steps of benchmarks/training.py that are this project's."""

TRAININGS = {"cnn": (64, 60), "resnet18": (32, 10), "vit_ti": (16, 10)}
"""Networks on the digits, with the images and the number of the steps."""

SUITES = ("quick", "autoattack", "curve", "blackbox", "unseen", "frequency", "corruptions", "sanity", "ares_bench")


def training_of(network: str, objective: Objective, img_size: int) -> RobustTraining:
    """Return a training of a network of timm with SGD, as benchmarks/training.py measures it."""
    facts = {"in_chans": 3, "num_classes": 1000, "img_size": img_size, "mean": [0.5] * 3, "std": [0.5] * 3}
    sgd = OptimSettings(name="momentum", lr=1e-3, weight_decay=0.0, momentum=0.9)
    return RobustTraining(
        make_classifier(network, **facts),
        num_classes=1000,
        objective=objective,
        optim=sgd,
        val_attack=make_attack("pgd"),
        config={},
    )


def hardware(options: argparse.Namespace) -> dict[str, Any]:
    """Fit the shares, and predict what was measured."""
    measured = json.loads(options.measured.read_text())
    setting, on = measured["setting"], HARDWARE[MEASURED[measured["hardware"]["device"]]]
    pgd = make_attack("pgd", eps=setting["eps"], steps=setting["steps"])
    shape = (setting["batch_size"], 3, setting["img_size"], setting["img_size"])
    rows: list[dict[str, Any]] = []
    operations: list[Sequence[Operation]] = []
    for part, (step, precision) in itertools.product(measured["networks"], STEPS):
        objective = StandardTraining() if step == "plain" else AdversarialTraining(InnerAttack(attack=pgd))
        module = training_of(part["network"], objective, setting["img_size"])
        found, memory = trace_step(module, shape, bf16=precision == "bf16")
        operations.append(found)
        row = next(r for r in part["rows"] if (r["step"], r["precision"]) == (step, precision))
        rows.append(
            {
                "network": part["network"],
                "step": step,
                "precision": precision,
                "measured_seconds": statistics.median(row["seconds"]),
                "measured_mib": row["peak_memory_mib"],
                "predicted_mib": max(memory.attack, memory.update) / MIB,
            }
        )
    grid = [dict(zip(FITTED, shares, strict=True)) for shares in itertools.product(*FITTED.values())]
    times = np.array([[on.seconds(found, **shares) for found in operations] for shares in grid])
    errors = np.log(times / [row["measured_seconds"] for row in rows]) ** 2
    for k, row in enumerate(rows):
        row["predicted_seconds"] = times[np.delete(errors, k, axis=1).sum(1).argmin(), k]
    reached = grid[errors.sum(1).argmin()]
    return {"measured": options.measured.name, "hardware": on.name, "reached": reached, "rows": rows}


def table_of_hardware(report: dict[str, Any]) -> str:
    """Return the table of steps on a GPU."""
    lines = [
        "| network | step | precision | measured, ms | predicted, ms | | measured, MiB | predicted, MiB | |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in report["rows"]:
        name = {"plain": "plain", "ours": "PGD-3"}[row["step"]]
        cells = [f"| {row['network']} | {name} | {row['precision']}"]
        for measured, predicted in (
            (1e3 * row["measured_seconds"], 1e3 * row["predicted_seconds"]),
            (row["measured_mib"], row["predicted_mib"]),
        ):
            cells.append(f"{measured:,.0f} | {predicted:,.0f} | {predicted / measured - 1:+.0%}")
        lines.append(f"{' | '.join(cells)} |")
    return "\n".join(lines)


class _Clock(Callback):
    """Times the steps of a training after the first ones."""

    WARM_UP = 3

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        self.starts.append(time.perf_counter())

    def on_train_batch_end(self, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self.starts[-1])


def steps(options: argparse.Namespace) -> dict[str, Any]:
    """Predict and make the same steps, in turns."""
    rows = []
    for network in options.networks:
        batch_size, number = TRAININGS[network]
        predicted, measured = [], []
        for _ in range(options.rounds):
            predicted.append(_predicted_step(network, batch_size))
            measured.append(_trained_step(network, batch_size, number))
        ratios = [one / other for one, other in zip(predicted, measured, strict=True)]
        row = {"network": network, "batch_size": batch_size, "steps": number, "predicted_seconds": predicted}
        rows.append(row | {"measured_seconds": measured, "ratios": ratios})
    return {"rounds": options.rounds, "rows": rows}


def _composed(network: str, batch_size: int, *more: str) -> Any:
    overrides = [f"model={network}", f"data.batch_size={batch_size}", "trainer=cpu", "trainer.max_epochs=1"]
    overrides += ["trainer.limit_val_batches=0", "eval=[]", "callbacks.progress=false", *more]
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose("train", overrides)


def _built(cfg: Any) -> tuple[RobustTraining, Any]:
    torch.manual_seed(0)
    data = build.build_data(cfg, training=True)
    return build.build_module(cfg, build.build_classifier(cfg, data.num_classes), data), data


def _predicted_step(network: str, batch_size: int) -> float:
    module, data = _built(_composed(network, batch_size))
    planned = plan_training(module, data, epochs=range(1), on=torch.device("cpu"))
    return planned.seconds / planned.updates


def _trained_step(network: str, batch_size: int, number: int) -> float:
    cfg = _composed(network, batch_size, f"trainer.limit_train_batches={number + _Clock.WARM_UP}")
    module, data = _built(cfg)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build.build_trainer(cfg, Path(folder))
        clock = _Clock()
        trainer.callbacks.append(clock)  # type: ignore[attr-defined]
        trainer.fit(module, datamodule=data)
    return statistics.median(clock.seconds[_Clock.WARM_UP :])


def table_of_steps(report: dict[str, Any]) -> str:
    """Return the table of steps here."""
    lines = [
        "| network | images a step | trained, ms | predicted, ms | predicted / trained |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in report["rows"]:
        trained, predicted = (
            1e3 * statistics.median(row[key]) for key in ("measured_seconds", "predicted_seconds")
        )
        ratios = row["ratios"]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {row['network']} | {row['batch_size']} | {trained:.0f} | {predicted:.0f} | {ratio} |")
    return "\n".join(lines)


def suites(options: argparse.Namespace) -> dict[str, Any]:
    """Count the passes of a survivor of each suite."""
    rows, known = [], dict[tuple[str, str | None], tuple[int, int]]()  # suites share evaluators
    for suite in options.suites:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            cfg = compose("evaluate", [f"eval=[{suite}]", "name=suite"])
        evaluation = build.build_evaluation(cfg, build.build_data(cfg, training=False))
        counts = []
        for evaluator in evaluation.evaluators:
            key = repr(evaluator), evaluator.attack_fingerprint
            known[key] = known.get(key) or survivors_passes(evaluator, evaluation)
            forwards, backwards = known[key]
            images = len(evaluator.own_sets) or 1
            counts.append(
                {"evaluator": evaluator.name, "forwards": images * forwards, "backwards": images * backwards}
            )
        rows.append({"suite": suite, "evaluators": counts})
    return {"data": "digits", "rows": rows}


def table_of_suites(report: dict[str, Any]) -> str:
    """Return the table of suites."""
    lines = ["| `eval=` | evaluators | forwards | backwards | most by |", "|---|--:|--:|--:|---|"]
    for row in report["rows"]:
        each = row["evaluators"]
        forwards, backwards = (sum(one[key] for one in each) for key in ("forwards", "backwards"))
        most = max(each, key=lambda one: one["forwards"] + one["backwards"])
        share = (most["forwards"] + most["backwards"]) / (forwards + backwards)
        dearest = f"`{most['evaluator']}`, {share:.0%}"
        lines.append(f"| `{row['suite']}` | {len(each)} | {forwards:,} | {backwards:,} | {dearest} |")
    return "\n".join(lines)


PARTS: dict[str, tuple[Callable[[argparse.Namespace], dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    "hardware": (hardware, table_of_hardware),
    "steps": (steps, table_of_steps),
    "suites": (suites, table_of_suites),
    "processes": (processes, table_of_processes),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one part, print its table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument(
        "--measured", type=Path, default=RESULTS / "training-cuda.json", help="of benchmarks/training.py"
    )
    parser.add_argument("--networks", nargs="+", choices=TRAININGS, default=list(TRAININGS), help="of steps")
    parser.add_argument("--rounds", type=int, default=5, help="of steps")
    parser.add_argument("--suites", nargs="+", default=SUITES, metavar="NAME")
    parser.add_argument(
        "--ledger", type=Path, default=RESULTS / "scaling-ledger.csv", help="verdicts/ of a run, or a kept one"
    )
    parser.add_argument("--evaluator", default="autoattack", help="whose rows of the ledger count")
    parser.add_argument("--keep", type=Path, help="write the columns of the ledger that count to this CSV file")
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES)
    parser.add_argument("--figure", type=Path, help="SVG file, of processes")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    work, table = PARTS[options.part]
    report = {
        "command": shlex.join(["python", "benchmarks/scaling.py", *(arguments or sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        **work(options),
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    if options.figure:
        draw(report, options.figure)
    print(table(report))


if __name__ == "__main__":
    main()
