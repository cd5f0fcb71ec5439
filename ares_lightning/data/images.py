"""From a file to pixels: decoding, and what is done to a picture before it becomes a uint8 tensor."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import RandAugment, posterize, rand_augment_transform
from torch import Tensor
from torchvision.transforms.v2 import functional as F

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded: Pillow's own threshold for decompression bombs."""
MAX_ASPECT = 16
"""Of longer images only the central part of this aspect is resized; the central square that is kept is the same."""
ARES_RESIZE = 256 / 224
"""ARES-Bench (arXiv 2302.14301) resizes the shorter side to 256 pixels, bicubic, and keeps the central 224."""
TRANSLATION = 0.45
"""Furthest shift of RandAugment as a share of the side (timm, as in the recipes that use it)."""

Crop = Callable[[Image.Image, random.Random, int], Image.Image]


class ImageError(ValueError):
    """An image that cannot be used; the message names its path, what is wrong and the remedy."""

    def __init__(self, message: str) -> None:
        # A DataLoader worker hands an error on as class(text of the traceback): keep the one line that matters.
        super().__init__(message.strip().rpartition("ImageError: ")[2])


def decode(file: Path | BinaryIO, in_chans: int, name: Path | None = None) -> Image.Image:
    """Read one image with `in_chans` channels, 8 bits each; `name` is what errors call it, the path by default.

    A wrong extension does not matter, an orientation in the EXIF data is ignored: so do the published evaluations.

    Raises ImageError for a file that cannot be decoded and for more than MAX_PIXELS pixels.
    """
    try:
        with Image.open(file) as image:
            size = image.size
            if size[0] * size[1] <= MAX_PIXELS:
                return to_channels(image, in_chans)
    except Exception as error:  # each of PIL's decoders fails in its own way
        reason = " ".join(str(error).split())
        raise ImageError(f"{name or file}: cannot be decoded ({reason}); replace or remove the file") from error
    raise ImageError(
        f"{name or file}: has {size[0]}x{size[1]} pixels, more than {MAX_PIXELS}; replace or remove the file"
    )


def to_channels(image: Image.Image, in_chans: int) -> Image.Image:
    """Convert an image of any mode to grey (`in_chans=1`) or RGB (3), 8 bits a channel; alpha is dropped."""
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip at 255 instead of scaling it
        image = Image.fromarray(np.round(np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
    mode = "L" if in_chans == 1 else "RGB"
    if image.mode == mode:
        image.load()
        return image
    return image.convert(mode)


def to_tensor(image: Image.Image) -> Tensor:
    """Return the pixels, uint8 [C, H, W], with the channels last in memory."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes what the network sees in evaluation: border off, resize, keep the central square.

    crop: side of the result in pixels. resize: length of the shorter side before, or with `squash` of both sides;
    None leaves an image that has the size `crop` as it is, and resizes others to it. interpolation: of torchvision,
    e.g. `bicubic`. border: pixels cut from each side first.
    """

    crop: int
    resize: int | None = None
    interpolation: str = "bicubic"
    squash: bool = False
    border: int = 0

    def __str__(self) -> str:
        border = f"border of {self.border} px off, " if self.border else ""
        if self.resize is None:
            return f"{border}as stored at {self.crop} px, else resized to it ({self.interpolation})"
        how = "squash to" if self.squash else "resize"
        return f"{border}{how} {self.resize} ({self.interpolation}), crop {self.crop}"

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the square of `crop` pixels."""
        if self.border:
            image = image.crop((self.border, self.border, image.width - self.border, image.height - self.border))
        if self.resize is None and image.size == (self.crop, self.crop):
            return image
        resize, squash = (self.crop, True) if self.resize is None else (self.resize, self.squash)
        if not squash:
            image = _of_usual_aspect(image)
        mode = F.InterpolationMode(self.interpolation)
        resized = F.resize(image, [resize, resize] if squash else [resize], interpolation=mode)
        cropped: Image.Image = F.center_crop(resized, [self.crop])
        return cropped


def ares_preprocessing(img_size: int) -> Preprocessing:
    """Return what ARES-Bench does to every image, for images of `img_size` pixels."""
    return Preprocessing(img_size, round(img_size * ARES_RESIZE))


def _of_usual_aspect(image: Image.Image) -> Image.Image:
    longest = MAX_ASPECT * min(image.size)
    if max(image.size) <= longest:
        return image
    left, top = max(image.width - longest, 0) // 2, max(image.height - longest, 0) // 2
    return image.crop((left, top, image.width - left, image.height - top))


def unchanged(image: Image.Image, rng: random.Random, side: int) -> Image.Image:
    """Return the image itself: a digit that is mirrored is no longer one."""
    return image


def shift_and_flip(image: Image.Image, rng: random.Random, side: int) -> Image.Image:
    """Shift by up to 4 pixels each way, filled with black, and flip every second image left to right."""
    left, top = rng.randint(-4, 4), rng.randint(-4, 4)
    return _maybe_flip(image.crop((left, top, left + side, top + side)), rng)


def resized_crop_and_flip(image: Image.Image, rng: random.Random, side: int) -> Image.Image:
    """Cut 8–100 % of the area at an aspect of 3/4–4/3, resize to `side` pixels a side, flip every second image.

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
        width = max(1, min(image.width, round(image.height * 4 / 3)))
        height = max(1, min(image.height, round(image.width * 4 / 3)))
        left, top = (image.width - width) // 2, (image.height - height) // 2
    box = (left, top, left + width, top + height)
    return _maybe_flip(image.resize((side, side), Image.Resampling.BICUBIC, box), rng)


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image, all of it keyed by the sample: crop and flip, RandAugment, colour jitter.

    crop: called as (image, generator, side of the result in pixels); img_size: that side where a call names none.
    randaugment: RandAugment (Cubuk et al. 2020, arXiv 1909.13719) in timm's notation, e.g. `rand-m9-mstd0.5`:
        magnitude 9 of 10 with deviation 0.5, two operations; None for none.
    color_jitter: brightness, contrast and saturation, in random order, times a factor of 1 ± this much, at least 0.
    mean: the colour, in [0, 1], of what RandAugment moves into the image.

    Raises ValueError naming the key, its value and the remedy.
    """

    crop: Crop
    img_size: int
    randaugment: str | None = None
    color_jitter: float = 0.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if isinstance(self.color_jitter, bool | str) or not 0 <= self.color_jitter < math.inf:
            raise ValueError(f"aug.color_jitter={self.color_jitter}: expected a number, 0 or more")
        if self.randaugment is not None:
            try:
                _rand_augment(self.randaugment, self.img_size, self.mean)
            except (AssertionError, ValueError, KeyError, IndexError) as error:
                raise ValueError(
                    f"aug.randaugment={self.randaugment}: is not in timm's notation, such as rand-m9-mstd0.5"
                ) from error

    def __call__(self, image: Image.Image, rng: random.Random, side: int | None = None) -> Image.Image:
        """Return the augmented image, `side` pixels wide and high."""
        side = side or self.img_size
        image = self.crop(image, rng, side)
        if self.randaugment is not None:
            with _global_random(rng):
                image = _rand_augment(self.randaugment, side, self.mean)(image)
        return _jittered(image, self.color_jitter, rng) if self.color_jitter else image


JITTERED = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
"""What colour jitter changes: like timm's, not the hue."""


def _jittered(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    for adjust in rng.sample(JITTERED, len(JITTERED)):
        image = adjust(image, rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return image


@lru_cache
def _rand_augment(settings: str, img_size: int, mean: tuple[float, ...]) -> RandAugment:
    if not settings.startswith("rand"):
        raise ValueError(settings)
    colour = tuple(round(255 * share) for share in mean)
    hparams = {
        "translate_const": int(img_size * TRANSLATION),
        "img_mean": colour if len(colour) == 3 else colour[0],
        "interpolation": Image.Resampling.BILINEAR,
    }
    augment: RandAugment = rand_augment_transform(settings, hparams)
    for operation in augment.ops:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterized
    return augment


def _posterized(image: Image.Image, bits: int, **settings: Any) -> Image.Image:
    """Keep so many bits of each channel; with none the image is black, which Pillow refuses from release 13 on."""
    return ImageOps.posterize(image, min(bits, 8)) if bits > 0 else Image.new(image.mode, image.size)


@contextmanager
def _global_random(rng: random.Random) -> Iterator[None]:
    """Seed the global generators, which timm draws from, by `rng`, and put them back as they were."""
    before = random.getstate(), np.random.get_state()
    random.seed(rng.getrandbits(32))
    np.random.seed(rng.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _maybe_flip(image: Image.Image, rng: random.Random) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image
