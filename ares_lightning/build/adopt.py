"""What a program takes over from the config in a checkpoint."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from ares_lightning.build.config import ConfigError
from ares_lightning.build.own import check_trusted

MODELS_FACTS = ("in_chans", "img_size", "preprocess", "mean", "std")
"""Keys of `data` that belong to a trained model, whichever images it is asked about."""


def adopt(cfg: DictConfig, saved: Any, overrides: tuple[str, ...], keep: tuple[str, ...] = ()) -> None:
    """Take what a checkpoint's config says over into `cfg`, except `keep` and what the command line sets.

    saved: a config. overrides: what the command line set.

    Raises ConfigError where the checkpoint names a class that is not trusted, and for another norm without its eps.
    """
    given = [override.lstrip("+~").partition("=")[0] for override in overrides]
    if "threat.norm" in given and "threat.eps" not in given:
        raise ConfigError("threat.norm: give threat.eps as well; the checkpoint's was meant for its norm")
    skipped = {*given, *keep, *(("threat",) if "data" in given else ())}
    adopted = [key for key in saved if key not in skipped]
    check_trusted([saved[key] for key in adopted], cfg.trust, "the checkpoint")
    with open_dict(cfg):
        if "data" in given:
            for key in MODELS_FACTS:
                if f"data.{key}" not in given:
                    cfg.data[key] = saved.data[key]
        for key in adopted:
            own = {dotted: OmegaConf.select(cfg, dotted) for dotted in given if dotted.startswith(f"{key}.")}
            cfg[key] = saved[key]
            for dotted, value in own.items():
                OmegaConf.update(cfg, dotted, value)


def adopt_for_evaluation(cfg: DictConfig, config: Any, overrides: tuple[str, ...]) -> None:
    """Take model, data, threat and name over from a checkpoint's config where the command line is silent."""
    if any(override.startswith("model.weights=") for override in overrides):
        raise ConfigError(f"model.weights={cfg.model.weights}: ckpt={cfg.ckpt} has the weights; give one of them")
    saved = OmegaConf.create(config)
    adopt(cfg, OmegaConf.create({key: saved[key] for key in ("model", "data", "threat")}), overrides)
    with open_dict(cfg):
        cfg.name = cfg.name or saved.name
        cfg.adv, cfg.trick = saved.adv, saved.get("trick")  # for the record: how the model was trained
