"""Attacks of this project beside torchattacks, foolbox and pyautoattack: one network, one setting, one run.

    pip install '.[bench]' && pip install --no-deps torchattacks==3.5.1
    python benchmarks/attacks.py                  # needs no files: a CNN is trained on digits for some seconds
    python benchmarks/attacks.py --weights resnet20.pt --images cifar10/test --n 1000 --attacks pgd autoattack

Contenders take turns in every repetition, in alternating order; "times" is the median, over the repetitions, of a
contender's time to that of the first, which is ours. Whoever is not installed is left out, with a word.
Every adversarial image is judged once more by the same float32 forward of the network as given; it counts within
the budget (+ 1e-6 for rounding), and misclassified clean images count as broken. On CUDA TF32 is off for all.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import platform
import shlex
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from contenders import CONTESTS, Contender, Contest
from memory import PeakMemory
from provenance import device_name, revision, version
from subjects import Subject, make_subject
from torch import Tensor, nn

from ares_lightning.attacks.guard import full_precision
from ares_lightning.attacks.threat import BALLS, parse_budget

SLACK = 1e-6
PACKAGES = ("torch", "ares-lightning", "torchattacks", "foolbox", "pyautoattack", "timm", "numpy")


class PassCounter:
    """Counts the rows of every forward of a network, and of every backward through its logits."""

    def __init__(self, *networks: nn.Module) -> None:
        self.forwards = self.backwards = 0
        for network in networks:
            network.register_forward_hook(self._count)

    def _count(self, network: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
        self.forwards += len(logits)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


def measure(
    contest: Contest, contenders: list[Contender], subject: Subject, counter: PassCounter, repeats: int
) -> list[dict[str, Any]]:
    """Let the contenders take turns `repeats` times; return one row each."""
    device = subject.images.device
    memory = PeakMemory(device)
    samples: list[list[dict[str, Any]]] = [[] for _ in contenders]
    for repeat in range(repeats):
        turns = list(zip(contenders, samples, strict=True))
        for contender, taken in turns if repeat % 2 == 0 else reversed(turns):
            torch.manual_seed(repeat)
            counter.forwards = counter.backwards = 0
            memory.start()
            start = time.perf_counter()
            found = contender.run(subject, repeat)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
            sample = {"seconds": seconds, "forwards": counter.forwards, "backwards": counter.backwards}
            taken.append({**sample, "peak_memory_mib": memory.growth(), **judge(contest, subject, found)})
    first = [sample["seconds"] for sample in samples[0]]
    return [
        row(contest, contender, taken, first, len(subject.images))
        for contender, taken in zip(contenders, samples, strict=True)
    ]


@torch.no_grad()
def judge(contest: Contest, subject: Subject, found: Tensor) -> dict[str, Any]:
    """Return robust accuracy, in percent, at each budget, and the distances of what was found.

    median_distance: over the rightly classified images, to the adversarial one; None where most withstood.
    """
    found = found.float().view(len(contest.budgets), *subject.images.shape)
    labels, accuracy, distances = subject.labels, [], []
    wrong = _predict(subject, subject.images) != labels
    for images, multiple in zip(found, contest.budgets, strict=True):
        distance = BALLS[contest.norm].distance(images, subject.images)
        fooled = _predict(subject, images) != labels
        broken = wrong | (fooled & (distance <= multiple * subject.eps + SLACK))
        accuracy.append(100 * float((~broken).double().mean()))
        distances.append(distance.where(fooled, torch.inf)[~wrong])
    median = float(torch.stack(distances).amin(0).quantile(0.5)) if bool((~wrong).any()) else math.inf
    return {
        "robust_accuracy": accuracy,
        "median_distance": median if math.isfinite(median) else None,
        "largest_distance": float(
            torch.stack([BALLS[contest.norm].distance(i, subject.images) for i in found]).max()
        ),
    }


def _predict(subject: Subject, images: Tensor) -> Tensor:
    return torch.cat([subject.network(part).argmax(1) for part in images.split(subject.batch_size)])


def row(
    contest: Contest, contender: Contender, samples: list[dict[str, Any]], first: list[float], num_images: int
) -> dict[str, Any]:
    """Sum up the repetitions of one contender; `first` are the times of the one that all are compared with."""
    seconds = [sample["seconds"] for sample in samples]

    def median(key: str) -> float | None:
        values = [sample[key] for sample in samples if sample[key] is not None]
        return statistics.median(values) if values else None

    return {
        "contender": contender.label,
        "package": contender.package,
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "times": statistics.median(own / other for own, other in zip(seconds, first, strict=True)),
        "forwards_per_image": (median("forwards") or 0) / num_images,
        "backwards_per_image": (median("backwards") or 0) / num_images,
        "robust_accuracy": [
            statistics.mean(values) for values in zip(*(s["robust_accuracy"] for s in samples), strict=True)
        ],
        "median_distance": median("median_distance"),
        "largest_distance": max(sample["largest_distance"] for sample in samples),
        "peak_memory_mib": median("peak_memory_mib"),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the contests asked for, print a table each, write the JSON; return what was written."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    subject = make_subject(
        options.network,
        options.weights,
        options.images,
        options.eps,
        options.n,
        options.batch_size,
        options.epochs,
        options.seed,
        device,
    )
    report: dict[str, Any] = {
        "command": shlex.join(
            ["python", "benchmarks/attacks.py", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "hardware": {
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "host": platform.platform(),
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "subject": {
            "network": subject.name,
            "images": len(subject.images),
            "shape": list(subject.images.shape[1:]),
            "clean_accuracy": 100 * float((_predict(subject, subject.images) == subject.labels).double().mean()),
            "eps": subject.eps,
            "batch_size": subject.batch_size,
        },
        "ares": {
            "network": subject.folding,
            "channels_last": subject.channels_last,
            "working_set": "all images at once, passes of batch_size",
        },
        "repeats": options.repeats,
        "memory": PeakMemory(device).kind,
        "contests": [],
    }
    print(f"{subject.name}\n{json.dumps(report['subject'])}\n{report['hardware']['device']}; {subject.folding}")
    images = "digits" if options.images is None else "cifar10"
    results = Path(__file__).parent / "results"
    output = options.output or results / f"{options.network}-{images}-{device.type}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    counter = PassCounter(subject.network, subject.evaluated)
    for name in options.attacks:
        contest = CONTESTS[name]
        with full_precision(device):
            rows = measure(contest, _installed(contest.contenders), subject, counter, options.repeats)
        report["contests"].append({"name": name, "setting": contest.setting, "norm": contest.norm, "rows": rows})
        report["contests"][-1]["budgets"] = [multiple * subject.eps for multiple in contest.budgets]
        _print(name, contest, rows)
        output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {output}")
    return report


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--network", choices=("robust", "clean"), default="robust", help="kind of network, see --weights"
    )
    parser.add_argument("--weights", type=Path, help="of a CIFAR-10 ResNet-20; else a CNN is trained on digits")
    parser.add_argument("--images", type=Path, help="folder of class folders of 32x32 images; goes with --weights")
    parser.add_argument(
        "--attacks",
        nargs="+",
        choices=tuple(CONTESTS),
        default=list(CONTESTS),
        metavar="NAME",
        help=", ".join(CONTESTS),
    )
    parser.add_argument("--n", type=int, default=200, help="images, in equal shares of the classes (default 200)")
    parser.add_argument("--eps", type=_budget, help="L-inf budget such as 8/255 (the default; digits: 0.1)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--epochs", type=int, default=10, help="of the training on digits")
    parser.add_argument("--seed", type=int, default=0, help="of the pick of images and of the training")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--output", type=Path, help="JSON file; default benchmarks/results/<network>-<images>-<device>.json"
    )
    options = parser.parse_args(arguments)
    if (options.weights is None) != (options.images is None):
        parser.error("--weights and --images go together")
    return options


def _budget(text: str) -> float:
    try:
        return parse_budget(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _installed(contenders: tuple[Contender, ...]) -> list[Contender]:
    """Return the contenders that can run here; say which cannot."""
    present = {c.package: importlib.util.find_spec(c.package) is not None for c in contenders}
    for package in (package for package, is_there in present.items() if not is_there):
        print(f"{package} is not installed and is left out")
    return [contender for contender in contenders if present[contender.package]]


def _cell(value: float | None, digits: str) -> str:
    return "-" if value is None else format(value, digits)


HEADER = ("seconds", "times", "F/image", "B/image", "robust %", "median dist", "memory MiB")


def _print(name: str, contest: Contest, rows: list[dict[str, Any]]) -> None:
    print(f"\n{name}: {contest.setting}\n{'':28}" + "".join(f"{title:>13}" for title in HEADER))
    for line in rows:
        accuracy = line["robust_accuracy"]
        cells = (
            f"{line['median_seconds']:.3f}",
            f"{line['times']:.2f}",
            f"{line['forwards_per_image']:.1f}",
            f"{line['backwards_per_image']:.1f}",
            f"{statistics.mean(accuracy):.2f}" + ("" if len(accuracy) == 1 else " mean"),
            _cell(line["median_distance"], ".4f"),
            _cell(line["peak_memory_mib"], ".0f"),
        )
        print(f"{line['contender']:28}" + "".join(f"{cell:>13}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
