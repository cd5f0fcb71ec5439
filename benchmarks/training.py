"""A training step of this project beside the published one: one network, the same images, in turns in one run.

    python benchmarks/training.py                     # resnet18 and vit_tiny on the CPU, at 224 pixels
    python benchmarks/training.py --device cuda --output benchmarks/results/training-cuda.json

All take PGD-3 at 4/255 and update with SGD, each on its own copy of the network with channels last, which suits the
published step too (resnet18 on the CPU: 12 % faster than in the layout that ARES leaves it in; ViT: equal).
published: the step of ARES 2.0 (robust_training, arXiv 2302.14301), written out below; float32, its default.
plain: cross-entropy on clean images, float32.
ours: crafting and loss of AdversarialTraining as RobustTraining calls them, in float32, under bf16 autocast and, on
CUDA, compiled under it.
"times" is the median over the rounds, with the range, of the images a second to those of the published step; F is
one forward of one image in eval mode. Rates are held against that of one large matrix product in the same type.
float32 means torch's defaults, which on CUDA are TF32 in convolutions and not in matrix products.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from memory import PeakMemory
from provenance import device_name, revision, version
from torch import Tensor
from torch.optim import SGD, Optimizer

from ares_lightning.attacks import make_attack
from ares_lightning.counting import count_flops
from ares_lightning.models import Classifier, make_classifier
from ares_lightning.training.attention import split_attention
from ares_lightning.training.objectives import AdversarialTraining, InnerAttack, Objective, StandardTraining

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_CLASSES = 1000
EPS, STEPS = 4 / 255, 3
STEP_SIZE = 2.5 * EPS / STEPS
NETWORKS = {
    "cpu": ["resnet18", "vit_tiny_patch16_224"],
    "cuda": ["resnet50", "vit_base_patch16_224", "swin_base_patch4_window7_224", "convnext_base"],
}
BATCH_SIZE = {"cpu": 8, "cuda": 64}
STEPS_A_TURN = {"cpu": 1, "cuda": 5}
"""One step is too short for a device that runs behind its host."""
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
MATRIX_TRIALS = 5
WARM_UP = 2
PACKAGES = ("torch", "timm", "ares-lightning")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Contender:
    """A training step by name; precision: a key of DTYPES; is_compiled: counted as what it is compiled from."""

    name: str
    precision: str
    step: Callable[[], None]
    is_compiled: bool = False


def make_contenders(network: Classifier, images: Tensor, labels: Tensor) -> list[Contender]:
    """Return the steps to be compared on images [N, 3, H, W]; the first is the published one."""

    def ours(objective: Objective, precision: str, is_compiled: bool = False) -> Callable[[], None]:
        net, optimizer = _copy(network)
        if precision == "bf16" and images.device.type == "cpu":
            split_attention(net)
        if is_compiled:
            net.compile()
        autocast = torch.autocast(images.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

        def step() -> None:
            with autocast:
                adversarial = objective.craft(net, images, labels, 0)
                loss, _ = objective.loss(net, images, adversarial, labels, 0)
            _update(loss, optimizer)

        return step

    net, optimizer = _copy(network)
    adversarial = AdversarialTraining(
        InnerAttack(attack=make_attack("pgd", eps=EPS, steps=STEPS, step_size=STEP_SIZE))
    )
    contenders = [
        Contender("published", "float32", lambda: published_step(net, images, labels, optimizer)),
        Contender("plain", "float32", ours(StandardTraining(), "float32")),
        Contender("ours", "float32", ours(adversarial, "float32")),
        Contender("ours", "bf16", ours(adversarial, "bf16")),
    ]
    if images.device.type == "cuda":
        contenders.append(Contender("ours, compiled", "bf16", ours(adversarial, "bf16", True), True))
    return contenders


def published_step(net: Classifier, images: Tensor, labels: Tensor, optimizer: Optimizer) -> None:
    """Take the step of ARES 2.0: the iterate of the largest loss is trained on.

    Its waste is part of it: weight gradients in every step of the attack, a graph for one more forward that only
    picks the iterate (and sees images that are not normalised), a copy a step, constants made anew in each call.
    """
    mean, std = (torch.tensor(value, device=images.device).view(-1, 1, 1) for value in (MEAN, STD))
    net.eval()
    x = (images + torch.empty_like(images).uniform_(-EPS, EPS)).clamp(0, 1)
    best, best_loss = x.clone(), torch.full((len(x),), -torch.inf, device=x.device)

    def keep_best(losses: Tensor) -> None:
        nonlocal best, best_loss
        better = losses.detach() > best_loss
        best = torch.where(better.view(-1, 1, 1, 1), x.detach(), best)
        best_loss = torch.where(better, losses.detach(), best_loss)

    for _ in range(STEPS):
        x = x.clone().detach().requires_grad_(True)
        losses = F.cross_entropy(net.backbone((x - mean) / std), labels, reduction="none")
        keep_best(losses)
        losses.mean().backward()
        assert x.grad is not None
        moved = x.detach() + STEP_SIZE * x.grad.sign()
        x = torch.clamp(images + torch.clamp(moved - images, -EPS, EPS), 0, 1)
    last_losses = F.cross_entropy(net.backbone(x), labels, reduction="none")
    keep_best(last_losses)
    net.train()
    _update(F.cross_entropy(net.backbone((best - mean) / std), labels), optimizer)


def _copy(network: Classifier) -> tuple[Classifier, Optimizer]:
    net = copy.deepcopy(network).train()
    return net, SGD(net.parameters(), lr=1e-3, momentum=0.9)


def _update(loss: Tensor, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def compete(name: str, images: Tensor, labels: Tensor, rounds: int, rates: dict[str, float]) -> dict[str, Any]:
    """Let the contenders take turns on a network of timm; return the network's part of the report."""
    facts = {"in_chans": 3, "num_classes": NUM_CLASSES, "img_size": images.shape[-1], "mean": MEAN, "std": STD}
    torch.manual_seed(0)
    network = make_classifier(name, **facts).to(images.device)
    contenders = make_contenders(network, images, labels)
    num_images, device = len(images), images.device
    with torch.inference_mode():
        forward = count_flops(lambda: copy.deepcopy(network).eval()(images)) / num_images
    flops: dict[tuple[str, str], float] = {}
    memory, peaks = PeakMemory(device), []
    for contender in contenders:
        for _ in range(WARM_UP):
            contender.step()
        if not contender.is_compiled:
            flops[contender.name, contender.precision] = count_flops(contender.step) / num_images
        memory.start()
        contender.step()
        peaks.append(memory.growth())
    seconds: list[list[float]] = [[] for _ in contenders]
    for number in range(rounds):
        turns = list(zip(contenders, seconds, strict=True))
        for contender, taken in turns if number % 2 == 0 else reversed(turns):
            taken.append(time_step(contender.step, device))
    rows = []
    for contender, taken, peak in zip(contenders, seconds, peaks, strict=True):
        count = flops[contender.name.removesuffix(", compiled"), contender.precision]
        rate = num_images / statistics.median(taken)
        rows.append(
            {
                "step": contender.name,
                "precision": contender.precision,
                "seconds": taken,
                "images_per_second": rate,
                "times": [other / own for own, other in zip(taken, seconds[0], strict=True)],
                "forwards": count / forward,
                "share_of_matrix_rate": rate * count / rates[contender.precision],
                "peak_memory_mib": peak,
            }
        )
    return {"network": name, "gflop_of_forward": forward / 1e9, "rows": rows}


def time_step(step: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of a step, on CUDA the mean of some that follow each other."""
    num_steps = STEPS_A_TURN[device.type]
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(num_steps):
            step()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1000 / num_steps
    began = time.perf_counter()
    for _ in range(num_steps):
        step()
    return (time.perf_counter() - began) / num_steps


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the fastest of some products of two large square matrices."""
    size = MATRIX_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.mm(left, right)
    seconds = min(time_step(lambda: torch.mm(left, right), device) for _ in range(MATRIX_TRIALS))
    return 2 * size**3 / seconds


def table(report: dict[str, Any]) -> str:
    """Return the report as a Markdown table."""
    lines = [
        "| network | step | precision | images/s | times published | F an image | of matrix rate | memory, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for part in report["networks"]:
        for row in part["rows"]:
            times, peak = row["times"], row["peak_memory_mib"]
            cells = [
                part["network"],
                row["step"],
                row["precision"],
                f"{row['images_per_second']:.3g}",
                f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})",
                f"{row['forwards']:.2f}",
                f"{row['share_of_matrix_rate']:.0%}",
                "-" if peak is None else f"{peak:.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the networks one after another, print the table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", metavar="NAME", help="of timm; default " + str(NETWORKS))
    parser.add_argument("--batch-size", type=int, help=f"default {BATCH_SIZE}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    batch_size = options.batch_size or BATCH_SIZE[device.type]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch_size, 3, options.img_size, options.img_size, generator=generator)
    images = images.to(device, memory_format=torch.channels_last)
    labels = torch.randint(NUM_CLASSES, (batch_size,), generator=generator).to(device)
    rates = {precision: matrix_rate(device, dtype) for precision, dtype in DTYPES.items()}
    report: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/training.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "hardware": {
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "host": platform.platform(),
            "gflop_per_second_of_a_matrix_product": {key: rate / 1e9 for key, rate in rates.items()},
        },
        "setting": {"batch_size": batch_size, "img_size": options.img_size, "eps": EPS, "steps": STEPS},
        "memory": PeakMemory(device).kind,
        "networks": [],
    }
    for name in options.networks or NETWORKS[device.type]:
        report["networks"].append(compete(name, images, labels, options.rounds, rates))
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
