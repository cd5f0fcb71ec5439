"""What tricks and objectives do to accuracy and robustness: trainings on real CIFAR-10 images, several seeds each.

    python benchmarks/tricks.py --data cifar10                     # folders train/<class>/ and test/<class>/
    python benchmarks/tricks.py --data cifar10 --seeds 3 --output benchmarks/results/tricks-cpu.json

Every training is `python train.py` on the first images of each class, every figure `python evaluate.py` on its last
checkpoint. A row compares two trainings that differ in the trick alone, seed by seed: the mean of the differences
with its 95 % interval by Student's t. These are small networks and short trainings: they show the direction of an
effect here, not its size in a published recipe.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from provenance import device_name, revision, version
from scipy.stats import t as student

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "lightning", "timm", "ares-lightning")
COMMON = (
    *(
        "data=cifar10",
        "data.num_workers=0",
        "data.num_val=100",
        "eval=[]",
        "logger=csv",
        "callbacks.progress=false",
    ),
    *("model=cnn", "model.settings.width=16", "trainer=cpu", "trainer.precision=bf16-mixed"),
    *(
        "optim=sgd",
        "optim.lr=0.2",
        "optim.warmup_epochs=1",
        "optim.momentum=0.9",
        "trainer.check_val_every_n_epoch=1000",
    ),
)
"""Of all trainings: seconds an epoch on two cores."""


@dataclass(frozen=True)
class Comparison:
    """A trick against what it is held to: the overrides of both trainings, the budget, and which weights count."""

    name: str
    eps: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    weights: tuple[str, str] = ("raw", "raw")


COMPARISONS = (
    Comparison(
        "TRADES against PGD-AT", "8/255", ("adv=pgd",), ("adv=trades", "adv.steps=3", "adv.step_size=2/3 eps")
    ),
    Comparison(
        "EMA against raw weights", "8/255", ("adv=pgd", "trick=[ema]"), ("adv=pgd", "trick=[ema]"), ("raw", "ema")
    ),
    Comparison("AWP against none", "8/255", ("adv=pgd",), ("adv=pgd", "trick=[awp]")),
    Comparison("N-FGSM against FGSM-RS", "8/255", ("adv=fgsm_rs",), ("adv=n_fgsm",)),
    Comparison("N-FGSM against FGSM-RS", "16/255", ("adv=fgsm_rs",), ("adv=n_fgsm",)),
)


class Laboratory:
    """Trains and evaluates each setting once, in folders under `place`."""

    def __init__(self, place: Path, images: Path, epochs: int, num_test: int) -> None:
        self.place, self.images, self.epochs, self.num_test = place, images, epochs, num_test

    def accuracies(self, overrides: tuple[str, ...], eps: str, seed: int, weights: str) -> dict[str, float]:
        """Return clean accuracy and accuracy under PGD-20 of the last checkpoint of a training, in percent."""
        run = self.place / re.sub(r"[^\w.-]+", "_", "-".join([*overrides, eps, str(seed)]))
        if not (run / "checkpoints" / "last.ckpt").exists():
            settings = [f"threat.eps={eps}", f"seed={seed}", f"trainer.max_epochs={self.epochs}"]
            self._run("train.py", *COMMON, f"data.root={self.images}", *overrides, *settings, f"run_dir={run}")
        judged = run.with_name(f"{run.name}-{weights}")
        which = [f"weights={weights}"] if any("ema" in override for override in overrides) else []
        subset = f"subset=random:{self.num_test}@0"
        ckpt = f"ckpt={run / 'checkpoints' / 'last.ckpt'}"
        data = f"data.root={self.images}"
        self._run("evaluate.py", ckpt, data, "eval=[clean,pgd20]", subset, *which, f"run_dir={judged}")
        rows = json.loads((judged / "summary.json").read_text())
        return {row["evaluator"]: 100 * row["value"] for row in rows}

    def _run(self, program: str, *arguments: str) -> None:
        command = [sys.executable, str(ROOT / program), *arguments]
        done = subprocess.run(command, cwd=self.place, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)}\n{done.stderr}")


def first_images(data: Path, place: Path, per_class: int) -> Path:
    """Return a folder of links to the first images of each class for training, and to all test images."""
    if place.exists():
        return place
    for folder in sorted((data / "train").iterdir()):
        target = place / "train" / folder.name
        target.mkdir(parents=True)
        for image in sorted(folder.iterdir())[:per_class]:
            (target / image.name).symlink_to(image.resolve())
    (place / "test").symlink_to((data / "test").resolve())
    return place


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Return mean, lower and upper end of the 95 % interval of the mean by Student's t."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return mean, -math.inf, math.inf
    half = (
        float(student.ppf(0.975, len(differences) - 1))
        * statistics.stdev(differences)
        / math.sqrt(len(differences))
    )
    return mean, mean - half, mean + half


def table(rows: list[dict[str, object]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [
        "| comparison | budget | clean | under PGD-20 | clean, difference | under PGD-20, difference |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [str(row["name"]), str(row["eps"])]
        for metric in ("clean", "pgd20"):
            before, after = row["before"][metric], row["after"][metric]  # type: ignore[index]
            cells.append(f"{statistics.mean(before):.1f} → {statistics.mean(after):.1f}")
        for metric in ("clean", "pgd20"):
            mean, low, high = row["difference"][metric]  # type: ignore[index]
            cells.append(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train, evaluate, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as train/<class>/ and test/<class>/")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--per-class", type=int, default=500, help="training images of each class")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--num-test", type=int, default=1000, help="test images of each figure")
    parser.add_argument("--only", nargs="*", type=int, help="places of the comparisons to make, from 0")
    parser.add_argument("--runs", type=Path, help="keep the run folders here, and go on with those that are there")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = (arguments.runs or Path(scratch) / "runs").resolve()
        place.mkdir(parents=True, exist_ok=True)
        images = first_images(arguments.data, place / "images", arguments.per_class)
        laboratory = Laboratory(place, images, arguments.epochs, arguments.num_test)
        rows = []
        for number, comparison in enumerate(COMPARISONS):
            if arguments.only is not None and number not in arguments.only:
                continue
            sides: list[list[dict[str, float]]] = [[], []]
            for seed in range(arguments.seeds):
                for side, overrides in enumerate((comparison.before, comparison.after)):
                    weights = comparison.weights[side]
                    sides[side].append(laboratory.accuracies(overrides, comparison.eps, seed, weights))
            before, after = ({m: [one[m] for one in side] for m in ("clean", "pgd20")} for side in sides)
            differences = {
                metric: interval([b - a for a, b in zip(before[metric], after[metric], strict=True)])
                for metric in ("clean", "pgd20")
            }
            settings = {"before_overrides": comparison.before, "after_overrides": comparison.after}
            row: dict[str, object] = {"name": comparison.name, "eps": comparison.eps, **settings}
            rows.append(row | {"before": before, "after": after, "difference": differences})
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    if arguments.output:
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "revision": revision(),
            "python": platform.python_version(),
            "versions": {package: version(package) for package in PACKAGES},
            "device": device_name(torch.device("cpu")),
            "common": COMMON,
            "per_class": arguments.per_class,
            "epochs": arguments.epochs,
            "num_test": arguments.num_test,
            "seeds": list(range(arguments.seeds)),
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
