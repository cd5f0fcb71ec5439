"""The whole of ARES-Bench on a laptop: four models, their reports and the leaderboard, with what it all cost.

    python benchmarks/ares_bench.py cifar10 --data cifar --weights resnet20-cifar10-linf.pt resnet20-cifar10.th \
        --output benchmarks/results/ares-bench-cifar10-cpu.json
    python benchmarks/ares_bench.py imagenet --data imagenet-100 --output …/ares-bench-imagenet-cpu.json

cifar10: two given ResNet-20, trained adversarially and on clean images, and two small networks trained here.
imagenet: backbones of the zoo with random weights under a head fitted to the images (ares_bench_paths.py), which
are made small, and out-of-distribution sets that are these very images again, laid out as published. Such
accuracies say nothing about a model, only that the path is sound.

Every run is `python evaluate.py … eval=[ares_bench,sanity]`, with few images, steps and queries, which stand under
`settings` in the result. The last run has the transfer matrix of all four models. The result holds the command,
hardware and versions, and for each run its wall time, passes, accuracies, sanity verdicts and the chapters of its
report, none of which may be empty. A run that is in --runs already is not asked again, and keeps its time.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from ares_bench_paths import make_model
from provenance import device_name, revision, version

from ares_lightning.data.imagenet import NUM_CLASSES, classes_of, places

ROOT = Path(__file__).parents[1]
PACKAGES = ("ares-lightning", "torch", "torchvision", "timm", "lightning", "numpy")
BLACK_BOX = ("square", "nes", "spsa", "nattack", "boundary", "evolutionary")
SAMPLING = ("nes", "spsa", "nattack")
"""Those that estimate a gradient from many queries."""
BACKBONES = {
    "vit": ("vits_normal",),
    "swin": ("swins_normal",),
    "convnext": ("convs_normal",),
    "resnet": ("resnet50_normal", "+model.settings.zero_init_last=false"),
}
"""Keys of the zoo, of four families of ARES-Bench. The residual branches of timm's ResNets begin at zero: without
training they would hardly count, and nothing would break the network."""
IMG_SIZE = 64
"""Side of the images in pixels, in place of 224: a twelfth of the pixels."""
OOD_FOLDERS = {"imagenet-a": "a", "imagenet-r": "r"} | dict.fromkeys(
    ("sketch", "stylized-imagenet/val", "imagenet-c/fog/3")
)
"""Of the published sets whose images lie in folders of classes, with the letter of those that have 200 of these."""
TRAINING = ("trainer.max_epochs=1", "trainer.limit_train_batches=150", "trainer.limit_val_batches=1")
CHAPTERS = frozenset(
    {"Sanity", "Robustness curve", "Accuracy over queries", "Low frequencies alone", "Ensemble of attacks"}
    | {"All results", "By class", "Confusion under attack", "Examples", "Corruptions", "Images", "Settings"}
)
"""Of every report of this suite, by the first words."""
CHAPTERS_OF_MATRIX = {"Transfer"}
CHAPTERS_OF_COMPARISON = {"Two models on the same images", "Robust accuracy against …", "Transfer"}
CHAPTERS_OF_IMAGENET = {"Other sets"}


@dataclass(frozen=True)
class Subject:
    """A model: its name, the settings of evaluate.py that load it, and how a transfer matrix names it."""

    name: str
    settings: tuple[str, ...]
    in_matrix: str


def given(weights: Path) -> Subject:
    """Return a published ResNet-20 of CIFAR-10."""
    model = f"{{name:resnet20,weights:{weights},mean:[0.485,0.456,0.406],std:[0.229,0.224,0.225]}}"
    name = "resnet20-at" if "linf" in weights.stem else "resnet20-clean"
    return Subject(name, ("model=resnet20", f"model.weights={weights}"), model)


def trained(adv: str, data: Path, runs: Path) -> Subject:
    """Train a small network for about a minute, unless it is there."""
    folder = runs / "trainings" / f"cnn-{adv}"
    if not (folder / "summary.json").exists():
        model = ["model=cnn", "model.settings.width=16", f"adv={adv}", f"name=cnn-{adv}"]
        here = ["data=cifar10", f"data.root={data}", "data.num_workers=0", "trainer=cpu", f"run_dir={folder}"]
        run(["train.py", *model, *here, *TRAINING, "eval=[clean]", "subset=first:64"])
    return Subject(f"cnn-{adv}", (f"ckpt={folder}",), str(folder))


def fitted(name: str, root: Path, folder: Path) -> Subject:
    """Make a random network that knows the images, unless it is there."""
    key, *random = BACKBONES[name]
    weights = folder / f"{name}.pth"
    if not weights.exists():
        folder.mkdir(parents=True, exist_ok=True)
        classifier, _ = make_model(key, root, f"data.img_size={IMG_SIZE}", *random)
        torch.save(classifier.backbone.state_dict(), weights)
    settings = (f"model=zoo/{key}", f"model.weights={weights}", f"data.img_size={IMG_SIZE}")
    return Subject(name, settings, f"{{zoo:{key},weights:{weights}}}")


def lay_out(images: Path, root: Path) -> Path:
    """Write each image of val/<wnid>/ below the folders of published sets; return their root."""
    for folder, letter in OOD_FOLDERS.items():
        chosen = range(NUM_CLASSES) if letter is None else classes_of(letter)
        for image in sorted((images / "val").glob("*/*")):
            if places()[image.parent.name] not in chosen:
                continue
            place = root / folder / image.parent.name
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, place / image.name)
    return root


def reductions(arguments: argparse.Namespace) -> list[str]:
    """Return the settings that make the suite small enough."""
    small = arguments.kind == "cifar10"
    budgets = {
        "linf": "2/255,4/255,8/255" if small else "1/255,2/255,4/255",
        "l2": "0.1,0.3,0.6" if small else "0.5,1,2",
        "l1": "3,11,22" if small else "20,40,75",
    }
    settings = [f"subset=random:{arguments.images}@0"]
    for norm, listed in budgets.items():
        settings += [f"eval.curve_{norm}.eps=[{listed}]", f"eval.curve_{norm}.attack.steps={arguments.curve_steps}"]
    settings += ["eval.curve_ares.bisections=2", f"eval.curve_ares.attack.steps={arguments.ares_steps}"]
    settings += [f"eval.{name}.attack.queries={arguments.queries}" for name in BLACK_BOX]
    if arguments.samples is not None:
        settings += [f"eval.{name}.attack.samples={arguments.samples}" for name in SAMPLING]
    settings += ["eval.corruptions.severities=[3]", f"eval.sanity.queries={arguments.queries}"]
    settings += [f"eval.sanity.steps=[{','.join(map(str, arguments.sanity_steps))}]"]
    settings += [f"eval.sanity.strong_steps={arguments.sanity_steps[-1]}"]
    if not small:
        settings += ["eval.frequency.radii=[32,16,8,4]", "eval.ood.severities=[3]"]
        settings += [f"eval.ood.subset=random:{arguments.images}@0"]
    return settings


def run(command: Sequence[str]) -> float:
    """Run a program of the checkout; return its wall time in seconds.

    Raises CalledProcessError where it fails, what it printed having been printed.
    """
    print("python", shlex.join(command), flush=True)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-4000:], file=sys.stderr)
        done.check_returncode()
    return time.perf_counter() - start


def chapters(page: Path) -> dict[str, bool]:
    """Return the chapters of a report, and whether each holds something: a drawn series, a picture or a cell."""
    parts = re.split(r"<h2>(.*?)</h2>", page.read_text())[1:]
    return {title: _filled(text) for title, text in zip(parts[::2], parts[1::2], strict=True)}


def _filled(text: str) -> bool:
    charts = re.findall(r'<script type="application/json" data-chart="[^"]*">(.*?)</script>', text, re.DOTALL)
    if charts:
        return all(any(_numbers(json.loads(chart)["data"])) for chart in charts)
    return "<td" in text or "<img" in text or 'class="checks"' in text


def _numbers(node: Any) -> Iterator[bool]:
    """Yield True for each list of numbers that a chart draws."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("x", "y", "z") and isinstance(value, list | dict) and value:
                yield True
            yield from _numbers(value)
    elif isinstance(node, list):
        for each in node:
            yield from _numbers(each)


def check_chapters(page: Path, wanted: set[str]) -> list[str]:
    """Return the chapters of a page; raise RuntimeError for an empty one and for one that is wanting."""
    found = chapters(page)
    empty = [title for title, filled in found.items() if not filled]
    missing = [words for words in sorted(wanted) if not any(title.startswith(words) for title in found)]
    if empty or missing:
        raise RuntimeError(f"{page}: empty chapters {empty}, missing {missing}")
    return list(found)


def row_of(subject: Subject, folder: Path, seconds: float, wanted: set[str]) -> dict[str, Any]:
    """Return what the result says of a run."""
    summary = json.loads((folder / "summary.json").read_text())
    about = json.loads((folder / "about.json").read_text())
    checks = json.loads((folder / "sanity.json").read_text())["checks"]
    keys = ("value", "low", "high", "n")
    own = about["sets"][0]["set"]
    headline = next(row for row in summary if row["evaluator"] == "worst_case")
    clean = next(row for row in summary if row["evaluator"] == "clean" and row["set"] == own)
    return {
        "name": subject.name,
        "seconds": round(seconds, 1),
        "forwards": sum(each["forwards"] for each in about["evaluators"]),
        "backwards": sum(each["backwards"] for each in about["evaluators"]),
        "evaluators": len({each["name"] for each in about["evaluators"]}),
        "headline": {key: headline[key] for key in keys},
        "clean": {key: clean[key] for key in keys},
        "sanity": dict(Counter(check["verdict"] for check in checks)),
        "doubted": [check["title"] for check in checks if check["verdict"] in ("fail", "warn")],
        "failed": len(about["failed"]),
        "chapters": check_chapters(folder / "report.html", wanted),
    }


def table(result: dict[str, Any]) -> str:
    """Return the runs as a table in Markdown."""
    lines = [
        "| model | wall time (s) | forwards | backwards | clean (%) | worst case (%) |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in result["runs"]:
        cells = [row["name"], f"{row['seconds']:.0f}", f"{row['forwards']:,}", f"{row['backwards']:,}"]
        for each in (row["clean"], row["headline"]):
            cells.append(f"{100 * each['value']:.1f} ({100 * each['low']:.0f} to {100 * each['high']:.0f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Make the models, ask, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("cifar10", "imagenet"))
    parser.add_argument("--data", type=Path, required=True, help="train/<class>/ and test/<class>/, or val/<wnid>/")
    parser.add_argument("--weights", type=Path, nargs=2, help="of ResNet-20: adversarially trained, and clean")
    parser.add_argument("--images", type=int, default=16, help="of the test set, and of each other set")
    parser.add_argument("--curve-steps", type=int, default=10, help="of the three curves")
    parser.add_argument("--ares-steps", type=int, default=100, help="of the curve of ARES-Bench")
    parser.add_argument("--transfer-steps", type=int, default=20)
    parser.add_argument("--sanity-steps", type=int, nargs=3, default=[20, 40, 80])
    parser.add_argument("--queries", type=int, default=200, help="of the black-box attacks")
    parser.add_argument("--samples", type=int, help="queries of a step of NES, SPSA and N-Attack")
    parser.add_argument("--runs", type=Path, help="keep the run folders here, and go on with those that are there")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.kind == "cifar10" and arguments.weights is None:
        parser.error("--weights: needed for cifar10, the two files of ResNet-20")
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(arguments, (arguments.runs or Path(scratch)).resolve())
    print(table(result))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def measure(arguments: argparse.Namespace, runs: Path) -> dict[str, Any]:
    """Evaluate the four models; return the result."""
    start = time.perf_counter()
    images = arguments.data.resolve()
    common = [f"data={arguments.kind}", f"data.root={images}", "data.num_workers=0", "trainer=cpu"]
    wanted = set(CHAPTERS)
    if arguments.kind == "cifar10":
        robust, clean = (given(path.resolve()) for path in arguments.weights)
        subjects = [trained("none", images, runs), trained("pgd", images, runs), clean, robust]
    else:
        subjects = [fitted(name, images, runs / "heads") for name in BACKBONES]
        common.append(f"eval.ood.root={lay_out(images, runs / 'ood')}")
        wanted |= CHAPTERS_OF_IMAGENET
    reduced = reductions(arguments)
    rows = []
    for subject in subjects:
        folder = runs / "evaluations" / subject.name
        matrix = []
        if subject is subjects[-1]:
            others = ",".join(f"{other.name}:{other.in_matrix}" for other in subjects[:-1])
            matrix = [f"eval.transfer.models={{{others}}}", f"eval.transfer.steps={arguments.transfer_steps}"]
        own = [*subject.settings, f"name={subject.name}"]
        command = ["evaluate.py", *own, *common, "eval=[ares_bench,sanity]", *reduced, *matrix]
        timing = folder.with_suffix(".seconds.json")
        if not timing.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            timing.write_text(json.dumps(run([*command, f"run_dir={folder}"])))
        seconds = json.loads(timing.read_text())
        rows.append(row_of(subject, folder, seconds, wanted | (CHAPTERS_OF_MATRIX if matrix else set())))
        print(f"{subject.name}: {seconds:.0f} s", flush=True)
    evaluations = str(runs / "evaluations")
    module = ["-m", "ares_lightning.evaluation.report", evaluations]
    run([*module, "--output", str(runs / "comparison.html")])
    exports = [part for kind in ("csv", "tex", "md", "json") for part in ("--export", str(runs / f"board.{kind}"))]
    run([*module, "--leaderboard", "--output", str(runs / "leaderboard.html"), *exports])
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "hardware": {"device": device_name(torch.device("cpu")), "threads": torch.get_num_threads()},
        "versions": {package: version(package) for package in PACKAGES} | {"python": platform.python_version()},
        "settings": [*reduced, f"eval.transfer.steps={arguments.transfer_steps}"],
        "seconds": round(time.perf_counter() - start, 1),
        "runs": rows,
        "comparison": check_chapters(runs / "comparison.html", wanted | CHAPTERS_OF_COMPARISON),
        "leaderboard": [
            {key: entry[key] for key in ("model", "robust_accuracy", "clean_accuracy", "n") if key in entry}
            for entry in json.loads((runs / "board.json").read_text())
        ],
    }


if __name__ == "__main__":
    main()
