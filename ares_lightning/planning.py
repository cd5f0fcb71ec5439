"""What a training costs as a whole, in words: its steps, its validation and the evaluation at its end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig
from torch import nn

from ares_lightning.build import ConfigError, one_line, planned_devices, planned_precision
from ares_lightning.data import RobustDataModule, select_subset
from ares_lightning.evaluation.evaluators import AttackEvaluator
from ares_lightning.evaluation.plan import Plan, device_name, duration, plan
from ares_lightning.evaluation.run import Evaluation
from ares_lightning.hardware import Hardware
from ares_lightning.training import RobustTraining
from ares_lightning.training.cost import StepCost
from ares_lightning.training.module import limited
from ares_lightning.training.plan import TrainingPlan, plan_training

NOT_IN_IT = {"awp": "trick=[awp] adds about 3 F a step and a copy of the weights"}
"""Tricks that the plan leaves out, and what they cost."""


def training_plan(
    cfg: DictConfig,
    trainer: L.Trainer,
    module: RobustTraining,
    data: RobustDataModule,
    evaluation: Evaluation,
    cost: StepCost | None,
    checkpoint: dict[str, Any] | None = None,
) -> str:
    """Return what a training will cost on the devices that `plan` names, as lines; nothing is written.

    trainer: that of the training, which knows what trainer.fast_dev_run leaves of it. checkpoint: with which it
    goes on; what is behind it does not count.

    Raises ConfigError where the step cannot be followed, or has no room here.
    """
    if cost is None:
        raise ConfigError(f"{_asked(cfg)}: the network or the objective looks at values; it cannot be followed")
    if cfg.trainer.activation_checkpointing:
        raise ConfigError(
            f"trainer.activation_checkpointing=true: {_asked(cfg)} cannot follow what is computed again; set it "
            "to false for the plan, which then tells more memory and less time"
        )
    on, world_size = planned_devices(cfg)
    precision = planned_precision(cfg) if isinstance(on, Hardware) else str(trainer.precision)
    tricks = cfg.get("trick") or {}
    done, taken = (0, 0) if checkpoint is None else _behind(checkpoint)
    epochs = range(done, trainer.max_epochs or 0)
    if not epochs:
        raise ConfigError(f"{_asked(cfg)}: all {done} epochs are behind the checkpoint; evaluate.py plans the rest")
    try:
        planned = plan_training(
            module,
            data,
            epochs=epochs,
            taken=taken,
            limit=trainer.limit_train_batches,
            accumulated=trainer.accumulate_grad_batches,
            precision=precision,
            world_size=world_size,
            averages=bool({"ema", "swa"}.intersection(tricks)),
            sync_batchnorm=cfg.trainer.sync_batchnorm,
            on=on,
        )
    except RuntimeError as error:
        raise ConfigError(f"{_asked(cfg)}: {one_line(error)}") from error
    every = trainer.check_val_every_n_epoch or 1
    net, times, expected, most = module.net, epochs.stop // every - epochs.start // every, 0.0, 0.0
    images = validated_images(data, trainer.limit_val_batches, world_size)
    if images:
        validation = replace(
            evaluation,
            evaluators=[AttackEvaluator("validation", module.val_attack)],
            dataset=select_subset(data.val_set, f"first:{images}"),
            precision="fp32",  # as its attack is called
        )
        expected, most = evaluation_plan(cfg, validation, net).seconds
    lines = [
        f"training on {world_size} x {device_name(on)}, {precision}",
        *_steps(planned, cost, epochs, goes_on=checkpoint is not None),
        _memory(planned, on),
        _collectives(planned, world_size),
        f"time         {duration(planned.seconds)} of steps, {duration(times * expected)} of validation (at most "
        f"{duration(times * most)}); loading of images left out",
    ]
    total, total_most = planned.seconds + times * expected, planned.seconds + times * most
    if isinstance(on, Hardware):
        lines.append(f"             by the data sheet of {on.name}, see docs/scaling.md")
    lines += [f"not in it    {NOT_IN_IT[name]}" for name in tricks if name in NOT_IN_IT]
    if cfg.callbacks.periodic.every_n_epochs is not None:
        lines.append("not in it    the evaluations of callbacks.periodic")
    if evaluation.evaluators:
        at_end = evaluation_plan(cfg, evaluation, net)
        total, total_most = (one + other for one, other in zip((total, total_most), at_end.seconds, strict=True))
        lines += ["evaluation at the end", *(f"  {line}" for line in at_end.text.splitlines())]
    return "\n".join([*lines, f"in all       {duration(total)}, at most {duration(total_most)}"])


def evaluation_plan(cfg: DictConfig, evaluation: Evaluation, net: nn.Module) -> Plan:
    """Return what an evaluation of `net` will cost on the devices that `plan` names.

    Raises ConfigError where the network cannot be followed, or has no room here.
    """
    try:
        return plan(evaluation, net, *planned_devices(cfg))
    except RuntimeError as error:
        raise ConfigError(f"{_asked(cfg)}: the network cannot be followed: {one_line(error)}") from error


def validated_images(data: RobustDataModule, limit: int | float, world_size: int) -> int:
    """Return how many images a validation takes on all processes, given the Trainer's limit_val_batches."""
    of_each, size = -(-len(data.val_set) // world_size), data.eval_batch_size
    return min(limited(-(-of_each // size), limit) * size * world_size, len(data.val_set))


def _behind(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """Return how many epochs a checkpoint has behind it, and how many batches of the next."""
    fit = checkpoint["loops"]["fit_loop"]
    batches = fit["epoch_loop.batch_progress"]
    taken = 0 if batches["is_last_batch"] else batches["current"]["processed"]
    return fit["epoch_progress"]["current"]["processed"], taken


def _asked(cfg: DictConfig) -> str:
    return f"plan={str(cfg.plan).lower()}"


def _steps(planned: TrainingPlan, cost: StepCost, epochs: range, *, goes_on: bool) -> list[str]:
    images, updates = planned.images / len(epochs), planned.updates / len(epochs)
    told = f"{len(epochs)} epochs of {updates:,.0f}, with {images:,.0f} images each"
    left = f", what is left of {epochs.stop} epochs" if goes_on else ""
    return [
        f"updates      {planned.updates:,}: {told}{left}",
        f"a step       {planned.batch} images on each device, {cost}",
    ]


def _memory(planned: TrainingPlan, on: torch.device | Hardware) -> str:
    memory = planned.memory
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "averaged weights": memory.averaged,
        "images": memory.images,
        "crafting": memory.attack,
        "update": memory.update,
    }
    told = ", ".join(f"{name} {_size(number)}" for name, number in parts.items())
    there = f" of {_size(on.memory)}" if isinstance(on, Hardware) else ""
    fits = " and does not fit" if isinstance(on, Hardware) and memory.peak > on.memory else ""
    return f"memory       {_size(memory.peak)}{there} on each device{fits}: {told}"


def _collectives(planned: TrainingPlan, world_size: int) -> str:
    if world_size == 1:
        return "collectives  none"
    return (
        f"collectives  {planned.collectives} an update, {_size(planned.reduced)} of gradients; each device sends "
        f"{_size(planned.sent)}"
    )


def _size(number: float) -> str:
    """Return bytes in the unit that tells most of them."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
