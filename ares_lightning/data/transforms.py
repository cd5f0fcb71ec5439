"""What is done to a PIL image before it becomes a uint8 tensor: the usual crops and flips, keyed by sample."""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image
from torchvision.transforms.v2 import functional as F

BICUBIC = Image.Resampling.BICUBIC


def to_channels(image: Image.Image, in_chans: int) -> Image.Image:
    """Convert an image of any mode to grey (`in_chans=1`) or RGB (3), 8 bits a channel; alpha is dropped."""
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip at 255 instead of scaling it
        image = Image.fromarray(np.round(np.asarray(image, dtype=np.float64) / 257).astype(np.uint8))
    return image.convert("L" if in_chans == 1 else "RGB")


def crop_and_flip(image: Image.Image, rng: random.Random) -> Image.Image:
    """Shift by up to 4 pixels each way, filled with black, and flip every second image left to right."""
    left, top = rng.randint(-4, 4), rng.randint(-4, 4)
    return _maybe_flip(image.crop((left, top, left + image.width, top + image.height)), rng)


def resized_crop_and_flip(image: Image.Image, rng: random.Random, *, img_size: int) -> Image.Image:
    """Cut 8–100 % of the area at an aspect of 3/4–4/3, resize to `img_size`, flip every second image.

    The Inception crop (Szegedy et al. 2015, arXiv 1409.4842, §6) with the constants of torchvision's
    RandomResizedCrop: ten tries, then the largest central part of an allowed aspect.
    """
    for _ in range(10):
        area = image.width * image.height * rng.uniform(0.08, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= image.width and 0 < height <= image.height:
            left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
            break
    else:
        width = min(image.width, round(image.height * 4 / 3))
        height = min(image.height, round(image.width * 4 / 3))
        left, top = (image.width - width) // 2, (image.height - height) // 2
    cut = image.crop((left, top, left + width, top + height))
    return _maybe_flip(cut.resize((img_size, img_size), BICUBIC), rng)


def resize_and_center_crop(image: Image.Image, *, img_size: int) -> Image.Image:
    """Resize the shorter side to `img_size` / 0.875, bicubic, and keep the central square of `img_size`."""
    resized = F.resize(image, [round(img_size / 0.875)], interpolation=F.InterpolationMode.BICUBIC)
    cropped: Image.Image = F.center_crop(resized, [img_size])
    return cropped


def _maybe_flip(image: Image.Image, rng: random.Random) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image
