"""The data of a config."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from torch.utils.data import Dataset

from ares_lightning.build.config import ConfigError, plain, section
from ares_lightning.build.objective import objective_class
from ares_lightning.build.own import TARGET, build_own
from ares_lightning.data import (
    ImageError,
    OwnSets,
    Preprocessing,
    RobustDataModule,
    ares_preprocessing,
)
from ares_lightning.models.preprocessing import own_preprocessing


def build_data(cfg: DictConfig, *, training: bool) -> RobustDataModule:
    """Build the data module of `data`; the data are looked at, not yet decoded.

    training: whether training images are needed.
    """
    preprocessing = _preprocessing(cfg)
    facts = plain(cfg.data)
    settings = {key: value for key, value in facts.items() if key not in _DATA_FACTS}
    if training:
        aug = plain(cfg.aug)
        settings |= {key: aug[key] for key in ("randaugment", "color_jitter", "resolution", "repeats")}
        settings |= {"num_views": objective_class(cfg).num_views, "replays": cfg.adv.get("replays", 1)}
    with section("data"):
        try:
            data = RobustDataModule(
                **settings,
                own=_own_sets(facts, training),
                seed=cfg.seed,
                training=training,
                preprocessing=preprocessing,
                mean=tuple(facts["mean"]),
            )
        except ImageError:
            raise
        except ValueError as error:  # names its key in full
            raise ConfigError(str(error)) from error
    cfg.data.num_classes = data.num_classes  # for the record, where it was null
    return data


_OWN_KEYS = ("train", "test", "augment")
"""Keys of `data` that a user's own data set has."""
_DATA_FACTS = ("mean", "std", "threat", "epochs", "subset_after_training", "preprocess", *_OWN_KEYS)
"""Keys of `data` that the model, the threat model, the trainer, the evaluation and the preprocessing take."""


def _own_sets(facts: dict[str, Any], training: bool) -> OwnSets | None:
    """Build the datasets that `data.train` and `data.test` name, None where there are none."""
    given = {key: facts[key] for key in _OWN_KEYS if key in facts}
    if not given:
        return None
    offered = {} if facts["root"] is None else {"root": facts["root"]}
    made: dict[str, Any] = {}
    for split in ("train", "test") if training else ("test",):
        node = given.get(split)
        if not isinstance(node, dict) or TARGET not in node:
            raise ConfigError(
                f"data.{split}={node}: expected the settings of a dataset, {{{TARGET}: mine.Mine, …}}"
            )
        with section(f"data.{split}"):
            made[split] = build_own(node, Dataset, **offered)
    settings = {split: {**offered, **given[split]} for split in made}
    return OwnSets(
        **made, settings=settings, augment=given.get("augment", "none"), num_classes=facts["num_classes"]
    )


PREPROCESS = ("model", "ares")
ARES_IMG_SIZE = 224


def _preprocessing(cfg: DictConfig) -> Preprocessing | None:
    """Resolve `data.preprocess` and, where it is null, `data.img_size`; None where all images have one size."""
    preprocess = cfg.data.get("preprocess")
    if preprocess is None:
        return None
    if preprocess not in PREPROCESS:
        raise ConfigError(f"data.preprocess={preprocess}: expected one of {', '.join(PREPROCESS)}")
    own = None
    if preprocess == "model":
        with section("data"):
            own = own_preprocessing(cfg.model.name, cfg.model.weights, cfg.model.key, cfg.data.img_size)
    if own is None:
        cfg.data.img_size = ARES_IMG_SIZE if cfg.data.img_size is None else cfg.data.img_size
        return ares_preprocessing(cfg.data.img_size)
    cfg.data.img_size = own.img_size
    return Preprocessing(own.img_size, own.resize, own.interpolation, squash=own.squash)
