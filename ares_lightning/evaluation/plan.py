"""What an evaluation will cost, told before it begins."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ares_lightning.attacks.guard import full_precision, guarded
from ares_lightning.attacks.passes import FORWARD_ROWS, Passes
from ares_lightning.counting import AsOnCUDA, Trace, num_bytes, without_memory
from ares_lightning.evaluation.asking import PRECISIONS
from ares_lightning.evaluation.curves import BisectedCurve
from ares_lightning.evaluation.evaluators import Evaluator, Stage
from ares_lightning.evaluation.run import Evaluation
from ares_lightning.evaluation.transfer import OtherModel, TransferEvaluator
from ares_lightning.hardware import REACHED, Hardware
from ares_lightning.models.folding import fold_batchnorm

SURVIVING = 0.5
"""Share of the samples that is taken to withstand every attack; the others are taken to cost an attack nothing."""
MOST_SIDE = 32
"""The dry run's images are no larger: how often an attack calls a network does not follow from the size."""
MARGIN = 10.0
"""By how much the dry run's network prefers the right class, where all else moves its logits by 2 at most."""
TRIALS = 3


@dataclass(frozen=True)
class PlannedRow:
    """One evaluator: how many samples of which sets, and the passes that each takes at most.

    seconds: expected, and where every sample withstands every attack.
    """

    evaluator: str
    sets: str
    samples: int
    forwards: int
    backwards: int
    seconds: float
    most_seconds: float


@dataclass(frozen=True)
class Plan:
    """What an evaluation costs. memory: bytes of the accelerator that its passes take, None on the CPU."""

    rows: tuple[PlannedRow, ...]
    device: str
    world_size: int
    memory: int | None

    @property
    def seconds(self) -> tuple[float, float]:
        """Of all evaluators: expected, and at most."""
        return sum(row.seconds for row in self.rows), sum(row.most_seconds for row in self.rows)

    @property
    def text(self) -> str:
        """The plan as a table, with its total and what was assumed."""
        lines = [("evaluator", "set", "samples", "forwards", "backwards", "expected", "at most")]
        for row in self.rows:
            counts = (f"{row.samples:,}", f"{row.forwards:,}", f"{row.backwards:,}")
            lines.append((row.evaluator, row.sets, *counts, duration(row.seconds), duration(row.most_seconds)))
        expected, most = self.seconds
        lines.append(("total", "", "", "", "", duration(expected), duration(most)))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(cell.ljust(width) if k < 2 else cell.rjust(width) for k, (cell, width) in enumerate(cells))
            for cells in (zip(line, widths, strict=True) for line in lines)
        ]
        where = f"{self.world_size} x {self.device}" if self.world_size > 1 else self.device
        memory = "" if self.memory is None else f", {self.memory / 2**30:.1f} GiB of its memory"
        return "\n".join(
            [
                *(line.rstrip() for line in table),
                f"forwards and backwards: of one sample, at most; times: of such passes on {where}{memory}",
                f"expected: {SURVIVING:.0%} of the samples withstand every attack and the others cost nothing; "
                "at most: all withstand",
            ]
        )


def plan(evaluation: Evaluation, net: nn.Module, on: torch.device | Hardware, world_size: int = 1) -> Plan:
    """Return what an evaluation of `net` costs on so many devices of this kind; nothing is written.

    on: a device at hand, on which passes are timed, or hardware, for which their operations are counted.

    The passes are counted by putting one sample to every stage with a network that nothing breaks; their time is
    that of passes of `net` on full batches, the attacks' own arithmetic and the loading of images left out. Models
    of a transfer matrix are taken to be as fast as `net`.

    Raises ValueError as the evaluation would.
    """
    evaluation.check()
    seconds: _Seconds
    memory: int | None
    if isinstance(on, Hardware):
        seconds, memory = _counted(evaluation, net, on)
    else:
        seconds, memory = _timed(evaluation, net, on)
    groups: dict[str, list[Evaluator]] = {}
    for evaluator in evaluation.asked_of("").evaluators:
        groups.setdefault(evaluator.name, []).append(evaluator)
    rows = [_planned(evaluation, name, group, seconds, world_size) for name, group in groups.items()]
    return Plan(tuple(rows), device_name(on), world_size, memory)


def device_name(on: torch.device | Hardware) -> str:
    """Return what a device is called."""
    if isinstance(on, Hardware):
        return on.name
    return torch.cuda.get_device_name(on) if on.type == "cuda" else on.type


def _planned(
    evaluation: Evaluation, name: str, evaluators: Sequence[Evaluator], seconds: _Seconds, world_size: int
) -> PlannedRow:
    sets = {dataset.name: len(dataset) for dataset in evaluators[0].own_sets or (evaluation.dataset,)}
    samples = sum(sets.values())
    counts = [survivors_passes(evaluator, evaluation) for evaluator in evaluators]
    forwards, backwards = (sum(count) for count in zip(*counts, strict=True))
    most = samples * seconds.of(forwards, backwards) / world_size
    is_attack = backwards > 0 or any(getattr(evaluator, "attack", None) is not None for evaluator in evaluators)
    described = next(iter(sets)) if len(sets) == 1 else f"{len(sets)} sets"
    share = SURVIVING if is_attack else 1.0
    return PlannedRow(name, described, samples, forwards, backwards, share * most, most)


def survivors_passes(evaluator: Evaluator, evaluation: Evaluation) -> tuple[int, int]:
    """Return the forwards and backwards of a sample that nothing breaks, all models of a matrix together."""
    dataset = (evaluator.own_sets or (evaluation.dataset,))[0]
    label, num_classes = int(dataset.labels[0]), len(dataset.classes)
    image = dataset.example()[:, :MOST_SIDE, :MOST_SIDE]
    net = _Unbreakable(image.shape, num_classes, label).to(PRECISIONS[evaluation.precision])
    images = image[None].to(PRECISIONS[evaluation.precision]) / 255
    stages: Sequence[Stage] = evaluator.stages
    if isinstance(evaluator, TransferEvaluator):
        others = tuple(OtherModel(other.name, net, other.fingerprint) for other in evaluator.others)
        stages = (replace(evaluator, others=others),)
    if isinstance(evaluator, BisectedCurve):  # at most, every budget that it tries is withstood
        stages = (replace(evaluator, doublings=evaluator.doublings + evaluator.bisections),)
    passes = Passes(evaluation.batch_size, eot=evaluation.eot)
    for stage in stages:
        for _ in stage.verdicts(
            net, images, torch.tensor([label]), dataset.sample_ids[:1], evaluation.seed, passes
        ):
            pass
    return net.forwards, net.backwards


class _Unbreakable(nn.Module):
    """A network that answers with one class whatever it sees, and counts the rows of its passes.

    It has a skip connection, for attacks that look for one.
    """

    def __init__(self, shape: Sequence[int], num_classes: int, label: int) -> None:
        super().__init__()
        self.forwards = self.backwards = 0
        self.branch = nn.ReLU()
        self.head = nn.Linear(torch.Size(shape).numel(), num_classes)
        with torch.no_grad():
            self.head.weight /= self.head.weight.abs().sum(1, keepdim=True)
            self.head.bias.zero_()[label] = MARGIN

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += len(images)
        if images.requires_grad:
            images.register_hook(self._count)  # type: ignore[no-untyped-call]
        logits: Tensor = self.head((images + self.branch(images - 0.5)).flatten(1))
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


@dataclass(frozen=True)
class _Seconds:
    """What the passes of a sample take: a forward alone, and a forward with a backward."""

    forward: float
    both: float

    def of(self, forwards: int, backwards: int) -> float:
        """Return the time of so many passes, of which every backward follows a forward."""
        return backwards * self.both + max(forwards - backwards, 0) * self.forward


def _counted(evaluation: Evaluation, net: nn.Module, hardware: Hardware) -> tuple[_Seconds, int]:
    """Count the operations of the passes that searches make of full batches, and the memory they take.

    Searches switch TF32 off, as `full_precision` does, so that float32 convolutions go at the rate of float32.
    """
    hardware = replace(hardware, tf32=hardware.fp32)
    size, (channels, height, width) = evaluation.batch_size, evaluation.dataset.example().shape
    search_on = fold_batchnorm(net.eval(), (channels, height, width)).network
    twin = without_memory(search_on, [search_on]).requires_grad_(False)
    shape = (FORWARD_ROWS * size, channels, height, width)
    images = torch.empty(shape, device="meta", memory_format=torch.channels_last)
    points = torch.empty_like(images[:size]).requires_grad_()

    def counted(work: Callable[[], object], rows: int) -> tuple[float, int]:
        with Trace() as trace, AsOnCUDA(evaluation.precision == "bf16"):
            work()
        return hardware.seconds(trace.operations, **REACHED) / rows, trace.peak

    with torch.no_grad():
        alone, most_alone = counted(lambda: twin(images), len(images))
    both = counted(lambda: torch.autograd.grad(twin(points).float().sum(), points), size)
    weights = num_bytes([*twin.parameters(), *twin.buffers()])
    return _Seconds(alone, both[0]), weights + num_bytes([images]) + max(most_alone, both[1])


def _timed(evaluation: Evaluation, net: nn.Module, device: torch.device) -> tuple[_Seconds, int | None]:
    """Time the passes that searches make of full batches; return besides the accelerator's memory they take."""
    dtype, size = PRECISIONS[evaluation.precision], evaluation.batch_size
    example = evaluation.dataset.example()
    channels, height, width = example.shape
    search_on = fold_batchnorm(net.eval().to(device, dtype), (channels, height, width)).network
    images = (example.to(device, dtype) / 255).expand(FORWARD_ROWS * size, -1, -1, -1).contiguous()
    batch = images[:size].clone()
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)

    def forward() -> None:
        search_on(images)

    def both() -> None:
        points = batch.clone().requires_grad_()
        with torch.enable_grad():
            torch.autograd.grad(search_on(points).float().sum(), points)

    with guarded(search_on, device, ("plan",)), full_precision(device), _autocast(evaluation, device):
        alone = _median_seconds(forward, device) / len(images)
        together = _median_seconds(both, device) / len(batch)
    return _Seconds(alone, together), torch.cuda.max_memory_allocated(device) if on_cuda else None


@contextmanager
def _autocast(evaluation: Evaluation, device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, torch.bfloat16, enabled=evaluation.precision == "bf16"):
        yield


def _median_seconds(work: Callable[[], None], device: torch.device) -> float:
    """Return the median time of some trials after a first one that warms up."""
    seconds = []
    for _ in range(TRIALS + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def duration(seconds: float) -> str:
    """Return a duration in the two units that tell most of it."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
