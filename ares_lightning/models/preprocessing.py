"""The crop and interpolation that a model's own config asks for."""

from __future__ import annotations

import math
from typing import NamedTuple

import timm

from ares_lightning.models.classifier import ARCHITECTURES
from ares_lightning.models.weights import timm_name
from ares_lightning.models.zoo import ZOO

CROP_MODES = ("center", "squash")


class OwnPreprocessing(NamedTuple):
    """What a model's config says: its image size, the size to resize to before the crop, and how.

    squash: both sides are resized, not the shorter one. source: whose config it is.
    """

    img_size: int
    resize: int
    interpolation: str
    squash: bool
    source: str


def own_preprocessing(
    name: str, weights: str | None, key: str, img_size: int | None = None
) -> OwnPreprocessing | None:
    """Return the preprocessing of timm's config of the weights, else of the architecture.

    img_size: instead of the config's own; the share that is cropped stays.

    None where there is no such config, and for models of the zoo whose weights come from the authors of ARES-Bench,
    who have one for all. Raises ValueError for a kind of crop that is neither central nor squashing.
    """
    model = ZOO.get(key)
    if model is not None and not model.in_timm:
        return None
    published = timm_name(name, weights)
    architecture = name.partition(".")[0]
    if published is None and (architecture in ARCHITECTURES or not timm.is_model(architecture)):
        return None
    config = timm.get_pretrained_cfg(published or architecture)
    if config is None:
        return None
    if config.crop_mode not in CROP_MODES:
        raise ValueError(
            f"preprocess=model: {published or name} wants crop_mode={config.crop_mode}; use data.preprocess=ares"
        )
    size = img_size or config.input_size[-1]
    return OwnPreprocessing(
        img_size=size,
        resize=math.floor(size / config.crop_pct),
        interpolation=config.interpolation,
        squash=config.crop_mode == "squash",
        source=published or architecture,
    )
