"""What a training will cost, told before it begins: updates, memory, collectives and time."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ares_lightning.counting import AsOnCUDA, Operation, Trace, num_bytes, without_memory
from ares_lightning.data import RobustDataModule
from ares_lightning.hardware import REACHED, Hardware
from ares_lightning.training.attention import split_attention
from ares_lightning.training.cost import networks_of
from ares_lightning.training.module import RobustTraining, limited

FIRST_IMAGES, STEP_SECONDS, TRIALS = 8, 2.0, 3
"""The first step is made on so many images; those that are timed take as many as go into so many seconds."""
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""Bytes of gradients that DDP waits for before it reduces them, at first and then (torch's defaults)."""

_AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What a training computes in besides float32, by its precision."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a training takes on a device, and the most that are held at once.

    images: of a batch. attack, update: the most that is held besides while images are crafted, and by the forward
    and the backward of the loss.
    """

    weights: int
    gradients: int
    optimizer: int
    averaged: int
    images: int
    attack: int
    update: int
    peak: int


@dataclass(frozen=True)
class TrainingPlan:
    """What a training costs; batch: images of a device in a step. images, updates: of the whole training.

    reduced: bytes of gradients that an update reduces over the devices, of which each sends `sent`.
    collectives: how many an update takes. seconds: of all steps, loading and validation left out.
    """

    batch: int
    images: int
    updates: int
    memory: Memory
    reduced: int
    sent: int
    collectives: int
    seconds: float


def plan_training(
    module: RobustTraining,
    data: RobustDataModule,
    *,
    epochs: range,
    taken: int = 0,
    limit: int | float = 1.0,
    accumulated: int = 1,
    precision: str = "32-true",
    world_size: int = 1,
    averages: bool = False,
    sync_batchnorm: bool = False,
    on: torch.device | Hardware,
) -> TrainingPlan:
    """Return what a training costs on so many devices of this kind; nothing is written, but `module` is moved.

    epochs: those to come, one at least, of which so many batches of the first are `taken`. limit, accumulated,
    sync_batchnorm: limit_train_batches, accumulate_grad_batches and sync_batchnorm of the Trainer. averages:
    whether averaged weights are kept. on: a device at hand, on which a few steps are timed, or hardware, for which
    their operations are counted. precision: 16-mixed is counted as bf16-mixed is, for it takes as many bytes and,
    by the data sheets, goes at the same matrix rate.

    Memory is that of CUDA in eager mode, found without taking any: shapes alone go through the step. Where the size
    of the batch or of the images changes with the epoch, it is that of the largest. AWP is left out.

    Raises RuntimeError for a network, objective or optimizer that looks at values.
    """
    autocast = _AUTOCAST[precision]
    batches: Counter[tuple[int, int]] = Counter()
    updates = 0
    side = data.train_set.example().shape[-1]
    for epoch in epochs:
        batch = data.batch_size_at(epoch), side if data.resolution is None else data.resolution.at(epoch)
        steps = limited(data.steps_per_epoch(epoch, world_size), limit) - (taken if epoch == epochs.start else 0)
        batches[batch] += steps
        updates += -(-steps // accumulated)
    memories, seconds = [], 0.0
    for (rows, pixels), number in batches.items():
        images = (rows * data.num_views, data.wishes.in_chans, pixels, pixels)
        operations, memory = trace_step(module, images, bf16=autocast is not None, averages=averages)
        memories.append(memory)
        if isinstance(on, Hardware):
            seconds += number * on.seconds(operations, **REACHED)
        else:
            unit = 2 * data.repeats * data.num_views  # neighbours are mixed
            seconds += number * measured_seconds(module, images, unit=unit, autocast=autocast, device=on)
    trained = [p for p in module.parameters() if p.requires_grad]
    reduced = num_bytes(trained) if world_size > 1 else 0
    sent = round(2 * (world_size - 1) / world_size * reduced)
    if isinstance(on, Hardware):
        seconds += updates * sent / on.link
    return TrainingPlan(
        batch=max(rows for rows, _ in batches),
        images=sum(rows * number for (rows, _), number in batches.items()) * world_size,
        updates=updates,
        memory=max(memories, key=lambda memory: memory.peak),
        reduced=reduced,
        sent=sent,
        collectives=num_collectives(module, sync_batchnorm) if world_size > 1 else 0,
        seconds=seconds,
    )


def trace_step(
    module: RobustTraining, shape: tuple[int, ...], *, bf16: bool, averages: bool = False
) -> tuple[list[Operation], Memory]:
    """Follow a step on images of this shape, on the meta device; return its operations and its memory.

    The gradients of the step before are there until the backward, as Lightning has them.
    """
    net, objective = without_memory((module.net, module.objective), [module.net, *networks_of(module.objective)])
    modules = [net, *networks_of(objective)]
    own = [net] if objective.auxiliary is None else [net, objective.auxiliary]
    held = [tensor for each in modules for tensor in (*each.parameters(), *each.buffers())]
    trained = [p for each in own for p in each.parameters() if p.requires_grad]
    optimizer = module.optim.optimizer(net, objective.auxiliary)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    state = num_bytes(t for each in optimizer.state.values() for t in each.values() if isinstance(t, Tensor))
    images = torch.empty(shape, device="meta", memory_format=torch.channels_last)
    soft = bool(module.label_smoothing) or module.augmentation.mixes
    labels = torch.empty(shape[0], module.num_classes, device="meta")
    labels = labels if soft else torch.empty(shape[0], dtype=torch.int64, device="meta")
    gradients, weights = num_bytes(trained), num_bytes(held)
    net.train()
    with Trace() as trace:
        with AsOnCUDA(bf16) as cuda:
            adversarial = objective.craft(net, images, labels, 0)
            attack, trace.peak = trace.peak, trace.live
            loss, logs = objective.loss(net, images, adversarial, labels, 0)
            cuda.leave_autocast()
            forward, trace.peak = trace.peak, 0
            optimizer.zero_grad()
            loss.backward()
            backward = trace.peak
        del logs
        optimizer.step()
    averaged = num_bytes([*net.parameters(), *net.buffers()]) if averages else 0
    pixels = images.numel() * (images.element_size() + 1)  # as they are loaded, and as numbers in [0, 1]
    update = max(forward, backward - gradients)
    memory = Memory(
        weights=weights,
        gradients=gradients,
        optimizer=state,
        averaged=averaged,
        images=pixels,
        attack=attack,
        update=update,
        peak=weights + gradients + state + averaged + pixels + max(attack, update),
    )
    return trace.operations, memory


def measured_seconds(
    module: RobustTraining,
    shape: tuple[int, ...],
    *,
    unit: int = 1,
    autocast: torch.dtype | None,
    device: torch.device,
) -> float:
    """Return the median time of some steps on images of this shape; they change the weights of `module`.

    Where a step takes long, it is that of a part of the images, a multiple of `unit`, times their number.
    autocast: the type of 16 bits to compute in, if any.
    """
    module.to(device)
    module.setup("fit")
    module.train()
    if autocast is not None and device.type == "cpu":
        split_attention(module.net)
    optimizer = module.optim.optimizer(module.net, module.auxiliary)

    def step(num_images: int) -> float:
        ids = torch.arange(num_images)
        images = torch.rand(num_images, *shape[1:]).to(device, memory_format=torch.channels_last)
        labels = (ids % module.num_classes).to(device)
        start = time.perf_counter()
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            loss, _ = module.loss(images, labels, ids)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    number = min(shape[0], -(-FIRST_IMAGES // unit) * unit)
    step(number)
    fitting = int(number * STEP_SECONDS / step(number)) // unit * unit
    number = min(shape[0], max(number, fitting))
    return statistics.median([step(number) for _ in range(TRIALS + 1)][1:]) * shape[0] / number


def num_collectives(module: nn.Module, sync_batchnorm: bool = False) -> int:
    """Return how many collectives DDP takes an update: of gradients by the bucket, of buffers by their type.

    sync_batchnorm: one more for each batch norm in the forward, and in the backward.
    """
    buckets, filled, limit = 0, 0, FIRST_BUCKET
    for parameter in reversed([p for p in module.parameters() if p.requires_grad]):
        filled += num_bytes([parameter])
        if filled >= limit:
            buckets, filled, limit = buckets + 1, 0, BUCKET
    types = {buffer.dtype for buffer in module.buffers()}
    norms = sum(isinstance(each, _BatchNorm) for each in module.modules()) if sync_batchnorm else 0
    return buckets + bool(filled) + len(types) + 2 * norms
