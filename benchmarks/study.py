"""A study on CIFAR-10: trainings with the recipes of this project, each evaluated in every way, and what was found.

    python benchmarks/study.py --data cifar10 --output study.json --figure study.png
    python benchmarks/study.py --data cifar10 --recipes speedrun --output speedrun.json

Every training is `python train.py experiment=cifar10_…`, every evaluation `python evaluate.py` on its best
checkpoint on images held out of the training: by robust accuracy, without an adversary by clean accuracy. The last
evaluation has the transfer matrix of all networks. Differences between two networks are paired: on the same images,
with the exact test of McNemar. What is in --runs already is gone on with, not made again. `--training` and
`--evaluation` take further settings of the two programs, such as `--training trainer=gpu trainer.max_epochs=60`
where there is a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from provenance import device_name, revision, version

from ares_lightning.evaluation.report.pairs import mcnemar

ROOT = Path(__file__).parents[1]
PACKAGES = ("ares-lightning", "torch", "torchvision", "timm", "lightning", "numpy")
EVERYTHING = ("clean", "noise", "fgsm", "pgd20", "curve_linf", "autoattack", "blackbox", "corruptions", "sanity")
BY_SCORES = ("square", "nes", "spsa", "nattack")
"""The black-box attacks whose budget is the threat model's."""
BY_QUERIES = (*BY_SCORES, "boundary", "evolutionary")
ASKED = ("clean", "noise", "fgsm", "pgd20", "autoattack", *BY_QUERIES)
"""The evaluators whose accuracy is one number on the test images."""
ANSWERS = ("pass", "warn", "fail")
"""Of a sanity check that was asked."""
Z = 1.96


@dataclass(frozen=True)
class Recipe:
    """A network: the settings of train.py, or another recipe whose training it comes from, and what is asked of it.

    evaluation: settings of evaluate.py.
    """

    settings: tuple[str, ...] = ()
    suites: tuple[str, ...] = EVERYTHING
    training_of: str | None = None
    evaluation: tuple[str, ...] = ()


RECIPES = {
    "clean": Recipe(("experiment=cifar10_study", "adv=none")),
    "fgsm_rs": Recipe(("experiment=cifar10_study", "adv=fgsm_rs")),
    "pgd": Recipe(("experiment=cifar10_study", "adv=pgd")),
    "trades": Recipe(("experiment=cifar10_study", "adv=trades", "adv.steps=3", "adv.step_size=2/3 eps")),
    "pgd_awp_ema": Recipe(("experiment=cifar10_study", "adv=pgd", "trick=[awp,ema]", "trick.awp.gamma=0.005")),
    "pgd_awp": Recipe(
        training_of="pgd_awp_ema", suites=("clean", "pgd20", "autoattack"), evaluation=("weights=raw",)
    ),
    "speedrun": Recipe(("experiment=cifar10_speedrun_cpu",), ("clean", "pgd20", "autoattack")),
}
STUDY = tuple(name for name in RECIPES if name != "speedrun")
COMPARED = (
    *((name, "pgd") for name in ("clean", "fgsm_rs", "trades", "pgd_awp", "pgd_awp_ema")),
    ("pgd_awp_ema", "pgd_awp"),
)


class Laboratory:
    """Trains and evaluates each recipe once, in folders under `runs`."""

    def __init__(
        self, runs: Path, data: Path, training: Sequence[str], evaluation: Sequence[str], queries: int | None
    ) -> None:
        self.runs, self.training, self.evaluation, self.queries = runs, training, evaluation, queries
        self.here = f"data.root={data}"

    def train(self, name: str) -> float | None:
        """Train a recipe, or go on with it; return the seconds that it took, None where that was not in one go."""
        name = RECIPES[name].training_of or name
        folder = self.runs / "trainings" / name
        command = ["train.py", *RECIPES[name].settings, *self.training, self.here, f"name={name}", "eval=[]"]
        begun = (folder / "config.yaml").exists()
        goes_on = ["train.py", "resume=last"]
        return self._once([*(goes_on if begun else command), f"run_dir={folder}"], folder)

    def evaluate(self, name: str, matrix: Sequence[str]) -> float | None:
        """Evaluate the network of a recipe, or go on with it; return the seconds as `train` does.

        matrix: names of the other networks of a transfer matrix, none for no matrix.
        """
        suites = [*RECIPES[name].suites, *(["transfer"] if matrix else [])]
        others = ",".join(f"{other}:{self.runs / 'trainings' / other}" for other in matrix)
        trained = self.runs / "trainings" / (RECIPES[name].training_of or name)
        asks_by_queries = self.queries is not None and "blackbox" in suites
        command = [
            *("evaluate.py", f"ckpt={trained}", *RECIPES[name].evaluation, f"name={name}", self.here),
            *(f"eval=[{','.join(suites)}]", *self.evaluation),
            *(f"eval.{attack}.attack.queries={self.queries}" for attack in BY_QUERIES if asks_by_queries),
            *([f"eval.transfer.models={{{others}}}"] if matrix else []),
        ]
        folder = self.runs / "evaluations" / name
        return self._once([*command, f"run_dir={folder}"], folder)

    def _once(self, command: Sequence[str], folder: Path) -> float | None:
        """Run a program of the checkout unless it has ended before; what one took that was killed is not known."""
        done = folder.with_suffix(".seconds.json")
        if not done.exists():
            goes_on = folder.exists()
            folder.parent.mkdir(parents=True, exist_ok=True)
            print("python", shlex.join(command), flush=True)
            start = time.perf_counter()
            ended = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
            if ended.returncode:
                raise SystemExit(f"{command[0]} ended with exit code {ended.returncode}; the same command goes on")
            done.write_text(json.dumps(None if goes_on else round(time.perf_counter() - start, 1)))
        seconds: float | None = json.loads(done.read_text())
        return seconds


def result_of(name: str, folder: Path) -> dict[str, Any]:
    """Return what the result says of an evaluation."""
    rows = json.loads((folder / "summary.json").read_text())
    about = json.loads((folder / "about.json").read_text())
    checks = json.loads((folder / "sanity.json").read_text())["checks"]
    own = about["sets"][0]["set"]
    accuracies = {
        row["evaluator"]: _figures(row)
        for row in rows
        if row["set"] == own and row["metric"] in ("clean_accuracy", "robust_accuracy") and row["model"] is None
    }
    curve = [row for row in rows if row["evaluator"] == "curve_linf" and row["metric"] == "robust_accuracy"]
    corrupted = [row for row in rows if row["evaluator"] == "corruptions" and row["metric"] == "mean_accuracy"]
    asked = {name: row for name, row in accuracies.items() if name in (*ASKED, "worst_case")}
    return {
        "name": name,
        "accuracies": asked,
        "curve": [{"eps": row["eps"], **_figures(row)} for row in curve],
        "corruptions": corrupted[0]["value"] if corrupted else None,
        "transfer": [
            {"source": row["source"], "model": row["model"] or name, "attack": row["attack"], **_figures(row)}
            for row in rows
            if row["metric"] == "transfer_accuracy"
        ],
        "sanity": dict(Counter(check["verdict"] for check in checks)),
        "doubted": [check["title"] for check in checks if check["verdict"] in ("fail", "warn")],
        "failed": about["failed"],
    }


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("value", "low", "high", "n")}


def withstood(folder: Path, evaluator: str) -> pd.Series[bool]:
    """Return which samples nothing of an evaluator broke, by sample id; the run's own model alone."""
    about = json.loads((folder / "about.json").read_text())
    table = pd.read_parquet(folder / "verdicts")
    own = (table["model_fingerprint"] == about["run"]["model_fingerprint"]) & (table["evaluator"] == evaluator)
    broken: pd.Series[bool] = table[own].groupby("sample_id")["broken"].any()
    return ~broken


def paired(first: pd.Series[bool], second: pd.Series[bool]) -> dict[str, float]:
    """Compare two networks on the same images: the difference of their accuracies, first less second.

    low, high: its 95 % interval, normal approximation for paired shares; p: of McNemar's exact test.
    """
    both = pd.concat([first, second], axis=1, join="inner", keys=["first", "second"])
    only_first = int((both["first"] & ~both["second"]).sum())
    only_second = int((both["second"] & ~both["first"]).sum())
    n = len(both)
    difference = (only_first - only_second) / n
    half = Z * math.sqrt(only_first + only_second - (only_first - only_second) ** 2 / n) / n
    p = mcnemar(only_first, only_second)
    return {"difference": difference, "low": difference - half, "high": difference + half, "p": p, "n": n}


def compare(names: Sequence[str], evaluations: Path) -> list[dict[str, Any]]:
    """Compare networks two by two, on clean images and under AutoAttack."""
    found = []
    for name, beside in COMPARED:
        if {name, beside} <= set(names):
            for evaluator in ("clean", "autoattack"):
                sides = [withstood(evaluations / side, evaluator) for side in (name, beside)]
                found.append({"name": name, "beside": beside, "evaluator": evaluator, **paired(*sides)})
    return found


def findings(networks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what ARES-Bench (arXiv 2302.14301) and common experience say, whether it is seen here, and by what."""
    value = {one["name"]: {key: row["value"] for key, row in one["accuracies"].items()} for one in networks}
    corrupted = {one["name"]: one["corruptions"] for one in networks if one["corruptions"] is not None}
    robust = [name for name in value if name != "clean"]
    found = []

    def state(finding: str, holds: bool, evidence: str) -> None:
        found.append({"finding": finding, "holds": holds, "evidence": evidence})

    if "clean" in value and robust:
        clean, best = value["clean"], max(value[name]["clean"] for name in robust)
        least = min(value[name]["autoattack"] for name in robust)
        state(
            "Adversarial training pays for robust accuracy with clean accuracy",
            best < clean["clean"] and least > clean["autoattack"],
            f"clean: {_percent(clean['clean'])} without it, at most {_percent(best)} with it; under AutoAttack: "
            f"{_percent(clean['autoattack'])} and at least {_percent(least)}",
        )
        if len(corrupted) > 1 and "clean" in corrupted:
            most = max(share for name, share in corrupted.items() if name != "clean")
            state(
                "and with accuracy on corrupted images",
                most < corrupted["clean"],
                f"{_percent(corrupted['clean'])} without it, at most {_percent(most)} with it",
            )
    weaker = {
        f"{attack} on {name}": row[attack] - row["autoattack"]
        for name, row in value.items()
        for attack in ("noise", "fgsm", "pgd20", *BY_SCORES)
        if attack in row
    }
    if weaker:
        nearest = min(weaker, key=lambda case: weaker[case])
        state(
            "No single attack, white-box or by queries, breaks more images than AutoAttack",
            min(weaker.values()) >= 0,
            f"nearest: {nearest}, {100 * weaker[nearest]:+.1f} points",
        )
    crossed = [
        (row, value[row["model"]]["autoattack"])
        for one in networks
        for row in one["transfer"]
        if row["source"] != row["model"]
    ]
    if crossed:
        row, own = min(crossed, key=lambda case: case[0]["value"] - case[1])
        state(
            "nor do examples crafted on another network",
            row["value"] >= own,
            f"nearest: {row['attack']} from {row['source']} to {row['model']}, "
            f"{100 * (row['value'] - own):+.1f} points",
        )
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def table(result: dict[str, Any]) -> str:
    """Return the networks as a table in Markdown, in the order of their accuracy under AutoAttack."""
    columns = ("clean", "fgsm", "pgd20", "autoattack", "square")
    head = ["training", "clean", "FGSM", "PGD-20", "AutoAttack [95 %]", "Square alone", "corruptions", "sanity"]
    lines = [f"| {' | '.join(head)} |", "|---|--:|--:|--:|--:|--:|--:|---|"]
    for one in result["networks"]:
        cells = [f"`{one['name']}`"]
        for column in columns:
            row = one["accuracies"].get(column)
            cell = "" if row is None else f"{100 * row['value']:.1f}"
            if row is not None and column == "autoattack":
                cell += f" [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
            cells.append(cell)
        cells.append("" if one["corruptions"] is None else f"{100 * one['corruptions']:.1f}")
        answered = {verdict: count for verdict, count in one["sanity"].items() if verdict in ANSWERS}
        cells.append(", ".join(f"{count} {verdict}" for verdict, count in answered.items()))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_pairs(result: dict[str, Any]) -> str:
    """Return the differences between two networks as a table in Markdown, in points."""
    lines = ["| training | beside | clean | p | AutoAttack | p |", "|---|---|---|---|---|---|"]
    for name, beside in dict.fromkeys((pair["name"], pair["beside"]) for pair in result["pairs"]):
        cells = [f"`{name}`", f"`{beside}`"]
        for pair in (pair for pair in result["pairs"] if (pair["name"], pair["beside"]) == (name, beside)):
            difference, low, high = (100 * pair[key] for key in ("difference", "low", "high"))
            p = "< 0.0001" if pair["p"] < 0.0001 else f"{pair['p']:.2g}"
            cells += [f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]", p]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_findings(result: dict[str, Any]) -> str:
    """Return what was found as a table in Markdown."""
    lines = ["| said | seen here | figures |", "|---|---|---|"]
    lines += [
        f"| {one['finding']} | {'yes' if one['holds'] else 'no'} | {one['evidence']} |"
        for one in result["findings"]
    ]
    return "\n".join(lines)


def main() -> None:
    """Train, evaluate, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as train/<class>/ and test/<class>/")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=STUDY)
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--images", type=int, default=1000, help="of the test set")
    parser.add_argument("--queries", type=int, help="of the black-box attacks; by default as published")
    parser.add_argument("--training", nargs="+", default=(), help="further settings of train.py")
    parser.add_argument("--evaluation", nargs="+", default=(), help="further settings of evaluate.py")
    parser.add_argument("--figure", type=Path, help="the robustness curves")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    evaluation = [f"subset=random:{arguments.images}@0", *arguments.evaluation]
    laboratory = Laboratory(arguments.runs, arguments.data, arguments.training, evaluation, arguments.queries)
    evaluations = arguments.runs / "evaluations"
    networks = []
    trained_here = [name for name in arguments.recipes if RECIPES[name].training_of is None]
    for name in arguments.recipes:
        trained = laboratory.train(name)
        evaluated = laboratory.evaluate(name, trained_here[:-1] if name == trained_here[-1] else ())
        seconds = {"training_seconds": trained, "evaluation_seconds": evaluated}
        networks.append(result_of(name, evaluations / name) | seconds)
        print(table({"networks": networks[-1:]}).splitlines()[-1], flush=True)
    networks.sort(key=lambda one: one["accuracies"]["autoattack"]["value"], reverse=True)
    pairs = compare(arguments.recipes, evaluations)
    command = [sys.executable, "-m", "ares_lightning.evaluation.report", str(evaluations)]
    command += ["--output", str(arguments.runs / "comparison.html")]
    if arguments.figure:
        command += ["--figure", str(arguments.figure)]
    subprocess.run(command, check=True)
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "hardware": {"device": device_name(torch.device("cpu")), "threads": torch.get_num_threads()},
        "versions": {package: version(package) for package in PACKAGES} | {"python": platform.python_version()},
        "recipes": {name: RECIPES[name].settings for name in arguments.recipes},
        "evaluation": evaluation,
        "queries": arguments.queries,
        "networks": networks,
        "pairs": pairs,
        "findings": findings(networks),
    }
    print(table(result), table_of_pairs(result), table_of_findings(result), sep="\n\n")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
