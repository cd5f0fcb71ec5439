"""The LightningModule of a config, and what does not go together."""

from __future__ import annotations

from contextlib import suppress
from itertools import islice
from typing import Any

import torch
from omegaconf import DictConfig

from ares_lightning.attacks import make_attack
from ares_lightning.build.config import ConfigError, one_line, plain, section
from ares_lightning.build.evaluation import build_threat
from ares_lightning.build.objective import build_objective
from ares_lightning.data import (
    BatchAugmentation,
    RobustDataModule,
    collate,
)
from ares_lightning.data.datasets import Unreadable
from ares_lightning.models import (
    Classifier,
)
from ares_lightning.training import RobustTraining
from ares_lightning.training.cost import StepCost, step_cost
from ares_lightning.training.module import to_pixels
from ares_lightning.training.objectives import Objective
from ares_lightning.training.optim import OptimSettings


def build_module(cfg: DictConfig, net: Classifier, data: RobustDataModule) -> RobustTraining:
    """Build the LightningModule around a network, with objective, optimizer settings and validation attack."""
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise ConfigError(f"model.name={cfg.model.name}: has no parameters to train; take another model")
    with section("optim"):
        optim = OptimSettings(**plain(cfg.optim))
    threat = build_threat(cfg)
    with section("adv"):
        try:
            val_attack = make_attack("pgd", norm=threat.norm, eps=threat.eps, steps=cfg.adv.val_steps)
        except ValueError as error:
            raise ValueError(f"val_{error}") from error
    smoothing = cfg.aug.label_smoothing
    if isinstance(smoothing, bool) or not isinstance(smoothing, int | float) or not 0 <= smoothing < 1:
        raise ConfigError(f"aug.label_smoothing={smoothing}: expected a number from 0 to below 1")
    augmentation = _batch_augmentation(cfg, data)
    objective = build_objective(cfg, net, data.num_classes)
    _check_together(cfg, objective)
    _checkpoint_activations(cfg, net)
    return RobustTraining(
        net,
        num_classes=data.num_classes,
        objective=objective,
        optim=optim,
        val_attack=val_attack,
        label_smoothing=smoothing,
        augmentation=augmentation,
        seed=cfg.seed,
        compile=cfg.trainer.compile,
        config=plain(cfg),
    )


def _checkpoint_activations(cfg: DictConfig, net: Classifier) -> None:
    """Have the network keep less of a forward and compute it again in the backward, where that is wanted."""
    for key in ("compile", "activation_checkpointing"):
        if type(cfg.trainer[key]) is not bool:
            raise ConfigError(f"trainer.{key}={cfg.trainer[key]}: expected true or false")
    if not cfg.trainer.activation_checkpointing:
        return
    backbone: Any = net.backbone
    try:
        backbone.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise ConfigError(
            f"trainer.activation_checkpointing=true: {cfg.model.name} cannot; set it to false"
        ) from error


def _check_together(cfg: DictConfig, objective: Objective) -> None:
    """Raise ConfigError for settings of which each makes sense, but not beside the other."""
    name, tricks, aug = cfg.adv.name, plain(cfg.get("trick")), cfg.aug
    if {"ema", "swa"} <= tricks.keys():
        raise ConfigError("trick=[ema,swa]: both say what the averaged weights are; take one of them")
    probe = tricks.get("overfitting_probe", {})
    if probe.get("action") == "fall_back" and {"ema", "swa"} & tricks.keys():
        raise ConfigError(
            "trick.overfitting_probe.action=fall_back: the average of trick=[ema] or [swa] has no way back; set "
            "stop"
        )
    if probe and name == "none":
        raise ConfigError("trick=[overfitting_probe]: adv=none trains against no attack; leave it out")
    if objective.wants_class_labels and (aug.label_smoothing or aug.mixup or aug.cutmix):
        key = "label_smoothing" if aug.label_smoothing else "mixup" if aug.mixup else "cutmix"
        raise ConfigError(f"aug.{key}={aug[key]}: the loss of adv={name} needs class labels; set it to 0")
    if objective.replays > 1 and cfg.trainer.accumulate_grad_batches > 1:
        raise ConfigError(
            f"trainer.accumulate_grad_batches={cfg.trainer.accumulate_grad_batches}: adv={name} updates in every "
            "replay; set it to 1"
        )
    if name == "free" and "awp" in tricks:
        raise ConfigError(
            "trick=[awp]: adv=free moves its images in the backward of the loss; leave one of them out"
        )
    if objective.differentiates_twice and cfg.trainer.activation_checkpointing:
        raise ConfigError(
            f"trainer.activation_checkpointing=true: adv={name} differentiates twice, which checkpointed networks "
            "cannot; set it false"
        )
    if objective.differentiates_twice and cfg.trainer.compile:
        raise ConfigError(
            f"trainer.compile=true: adv={name} differentiates twice, which compiled networks cannot; set it false"
        )


def _batch_augmentation(cfg: DictConfig, data: RobustDataModule) -> BatchAugmentation:
    settings = {key: cfg.aug[key] for key in ("mixup", "cutmix", "switch_prob", "erasing")}
    with section("aug"):
        augmentation = BatchAugmentation(**settings, copies=data.repeats * data.num_views, seed=cfg.seed)
    group = 2 * data.repeats
    if augmentation.mixes and any(size % group for size in data.batch_size.all):
        raise ConfigError(
            f"{data.batch_size}: must be a multiple of {group} (2 * aug.repeats), since aug.mixup and aug.cutmix "
            "mix an image with its neighbour"
        )
    return augmentation


def rehearse(module: RobustTraining, data: RobustDataModule) -> StepCost | None:
    """Compute the loss on two training images, so that settings that do not go together show before the run.

    Returns what a step costs, None for a network that cannot be followed without computing.
    """
    samples = (data.train_set[place] for place in range(len(data.train_set)))
    readable = (sample for sample in samples if not isinstance(sample, Unreadable))
    images, labels, sample_ids = collate(list(islice(readable, 2)))
    with torch.random.fork_rng([]):
        module.eval()
        with section("adv"):
            module.loss(to_pixels(images), labels, sample_ids)
        with section("aug"), torch.no_grad():
            for side in () if data.resolution is None else data.resolution.all:
                _check_resolution(module.net, images, side)
        module.train()
        pixels, targets = module.augmented(to_pixels(images), labels, sample_ids)
        with suppress(RuntimeError):  # what torch raises where values are looked at
            return step_cost(module.net, module.objective, pixels, targets)
    return None


def _check_resolution(net: torch.nn.Module, images: torch.Tensor, side: int) -> None:
    try:
        net(images.new_zeros(len(images), images.shape[1], side, side, dtype=torch.float32))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"resolution: the network cannot take {side} pixels: {one_line(error)}") from error
