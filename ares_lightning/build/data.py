"""The data of a config."""

from __future__ import annotations

from omegaconf import DictConfig

from ares_lightning.build.config import ConfigError, plain, section
from ares_lightning.build.objective import objective_class
from ares_lightning.data import (
    ImageError,
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


_DATA_FACTS = ("mean", "std", "threat", "epochs", "subset_after_training", "preprocess")
"""Keys of `data` that the model, the threat model, the trainer, the evaluation and the preprocessing take."""

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
