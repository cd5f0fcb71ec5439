"""The objective of a config, with its attack and its teacher."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ares_lightning.attacks import Threat, parse_budget
from ares_lightning.build.budgets import build_attack
from ares_lightning.build.config import HOW_TO_LIST_KEYS, ConfigError, plain, section
from ares_lightning.build.model import build_classifier, take_weights
from ares_lightning.build.own import TARGET, build_own, check_trusted, own_class
from ares_lightning.models import (
    Classifier,
    load_network,
    read_checkpoint,
)
from ares_lightning.models.checkpoints import CheckpointError, find_checkpoint
from ares_lightning.models.weights import trained_weights
from ares_lightning.training.objectives import OBJECTIVES, AuxiliaryNorms, InnerAttack, Objective


def build_objective(cfg: DictConfig, net: Classifier, num_classes: int) -> Objective:
    """Build the training objective of `adv` for a network."""
    settings = {key: value for key, value in plain(cfg.adv).items() if key not in _NOT_OF_THE_OBJECTIVE}
    objective = objective_class(cfg)
    takes = inspect.signature(objective).parameters
    arguments: dict[str, Any] = {key: settings.pop(key) for key in takes if key in settings}
    with section("adv"):
        if "norms" in takes:
            split = settings.pop("split_bn")
            if type(split) is not bool:
                raise ValueError(f"split_bn={split}: expected true or false")
            arguments["norms"] = AuxiliaryNorms(net) if split else None
        if "teacher" in takes:
            try:
                arguments["teacher"] = _teacher(cfg, num_classes)
            except (ConfigError, CheckpointError) as error:
                raise ValueError(f"teacher={cfg.adv.teacher}: {error}") from error
        if "threat" in takes:
            arguments["threat"] = Threat(settings.pop("norm"), parse_budget(settings.pop("eps")))
        if "inner" in takes:
            arguments["inner"] = _inner_attack(settings, cfg.seed)
        elif settings:
            raise ValueError(f"{next(iter(settings))}: no such key; {HOW_TO_LIST_KEYS}")
        if TARGET not in cfg.adv:
            return objective(**arguments)
        own: Objective = build_own({TARGET: cfg.adv[TARGET], **arguments}, Objective)
        return own


_NOT_OF_THE_OBJECTIVE = ("name", "val_steps", "monitor", TARGET)


def objective_class(cfg: DictConfig) -> type[Objective]:
    """Return the class that `adv.name` names, or a user's own."""
    if TARGET in cfg.adv:
        with section("adv"):
            return own_class(cfg.adv[TARGET], Objective)
    if cfg.adv.name not in OBJECTIVES:
        raise ConfigError(f"adv.name={cfg.adv.name}: expected one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[cfg.adv.name]


def _inner_attack(settings: dict[str, Any], seed: int) -> InnerAttack:
    own = {key: settings.pop(key) for key in ("eps_warmup_epochs", "step_warmup_epochs") if key in settings}
    mode, attack = settings.pop("attack_mode", "eval"), settings.pop("attack")
    named = attack if isinstance(attack, dict) else {"name": attack}
    return InnerAttack(attack=build_attack({**settings, **named}), seed=seed, mode=mode, **own)


def _teacher(cfg: DictConfig, num_classes: int) -> Classifier:
    """Build the network of `adv.teacher`: a checkpoint or run folder of this project, or settings as in `model`."""
    teacher = plain(cfg.adv)["teacher"]
    if teacher is None:
        raise ValueError("teacher=null: give a checkpoint or a run folder, or {name: …, weights: …} as in model")
    own = cfg.copy()
    if isinstance(teacher, dict):
        fresh: dict[str, Any] = {"settings": {}, "activation": None, "defense": None, "key": teacher.get("name")}
        students = {key: value for key, value in plain(cfg.model).items() if key != TARGET}
        own.model = {**students, **fresh, **teacher}
        net = build_classifier(own, num_classes)
        if take_weights(own, net) is None:
            raise ValueError(f"teacher={teacher}: has no weights; give weights: <file or tag>")
        return net
    path = find_checkpoint(Path(str(teacher)))
    checkpoint = read_checkpoint(path)
    saved = OmegaConf.create(checkpoint["config"])
    if saved.data.num_classes != num_classes or saved.data.img_size != cfg.data.img_size:
        raise ValueError(
            f"teacher={teacher}: knows {saved.data.num_classes} classes of {saved.data.img_size} pixels, the "
            f"student {num_classes} of {cfg.data.img_size}"
        )
    check_trusted(saved.model, cfg.trust, "its checkpoint")
    net = build_classifier(saved, num_classes)
    load_network(net, trained_weights(checkpoint, path, None), path)
    return net
