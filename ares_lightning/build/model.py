"""The network of a config, its weights and its defence."""

from __future__ import annotations

from typing import Any

import timm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ares_lightning.attacks.autoattack import RANDOM_DRAWS
from ares_lightning.build.config import ConfigError, plain, section
from ares_lightning.build.own import TARGET, build_own
from ares_lightning.models import (
    Classifier,
    load_timm_weights,
    load_weights,
    make_classifier,
    make_defense,
)
from ares_lightning.models.classifier import as_classifier
from ares_lightning.models.defenses import Defense
from ares_lightning.models.weights import no_such_weights, timm_name
from ares_lightning.models.zoo import find_file


def build_classifier(cfg: DictConfig, num_classes: int) -> Classifier:
    """Build the network of `model`, fitted to the data, with random weights."""
    name, facts, model = cfg.model.name, plain(cfg.data), plain(cfg.model)
    with section("model"):
        published = _published(model)
        tag = None if published is None else timm.get_pretrained_cfg(published)
        if tag is not None and facts["in_chans"] == len(tag.mean):
            facts |= {"mean": tag.mean, "std": tag.std}
        shape = {"in_chans": facts["in_chans"], "num_classes": num_classes, "img_size": facts["img_size"]}
        normalisation = {key: model[key] or facts[key] for key in ("mean", "std")}
        settings, activation, defense = model["settings"], model["activation"], _defense(cfg)
        if TARGET not in model:
            return make_classifier(
                name, **shape, **normalisation, activation=activation, defense=defense, **settings
            )
        settings = settings if activation is None else {**settings, "activation": activation}
        network = build_own({TARGET: model[TARGET], **settings}, nn.Module, **shape)
        return as_classifier(name, network, **shape, **normalisation, defense=defense, settings=settings)


def _published(model: dict[str, Any]) -> str | None:
    """Return the name of the weights of timm that `model` asks for; None for others, and for a user's own class."""
    return None if TARGET in model else timm_name(model["name"], model["weights"])


def _defense(cfg: DictConfig) -> Defense | None:
    """Build the defence that `model.defense` asks for, by name or by name and settings."""
    setting: Any = OmegaConf.select(cfg, "model.defense")
    if OmegaConf.is_config(setting):
        setting = OmegaConf.to_container(setting)
    if setting is None:
        return None
    settings = {"name": setting} if isinstance(setting, str) else setting
    if not isinstance(settings, dict) or "name" not in settings:
        raise ConfigError(f"model.defense={setting}: expected a name, or {{name: jpeg, quality: 50}}")
    with section("model.defense"):
        return make_defense(**settings)


def take_weights(cfg: DictConfig, classifier: Classifier) -> str | None:
    """Load the weights that `model` names into the classifier; return one line on them, None for none."""
    model = plain(cfg.model)
    options: dict[str, bool] = {}
    for key in ("resample", "new_head"):
        if type(model[key]) is not bool:
            raise ConfigError(f"model.{key}={model[key]}: expected true or false")
        options[key] = model[key]
    with section("model"):
        published, file = _published(model), None
        if published is None and model["weights"] is not None:
            file = find_file(str(model["weights"]), model["key"])
            if file is None:
                raise ValueError(no_such_weights(model["name"], str(model["weights"])))
    if published is not None:
        print(f"weights: looking for {published} in timm's cache, then at huggingface.co")
        return load_timm_weights(classifier, published, **options)
    return None if file is None else load_weights(classifier, file, weights=cfg.weights, **options)


def average_over_draws(cfg: DictConfig) -> None:
    """Where the model's defence is random, have the attacks of `eval` look at the mean over several draws.

    As many as in AutoAttack's version for randomised models (Croce & Hein 2020, arXiv 2003.01690), where `eot` is
    1.
    """
    if not is_random(cfg):
        return
    for evaluator in (cfg.get("eval") or {}).values():
        attack = evaluator.get("attack", evaluator)
        if attack.get("eot") == 1:
            attack.eot = RANDOM_DRAWS


def is_random(cfg: DictConfig) -> bool:
    """Return whether the model's defence draws random numbers."""
    defense = _defense(cfg)
    return defense is not None and defense.is_random
