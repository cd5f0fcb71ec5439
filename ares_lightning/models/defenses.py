"""Defences that transform the image in front of a classifier: bit depth, JPEG, random resizing and padding."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn


class Defense(nn.Module):
    """Maps images [N, C, H, W], of a floating-point type and in [0, 1], to images of the same shape and type.

    It has neither weights nor buffers, so that checkpoints fit with and without it; its settings are attributes of
    the same names and stand in its `repr`. name: in DEFENSES. is_random: whether it draws from torch's generators.
    """

    name: ClassVar[str]
    is_random: ClassVar[bool] = False

    def extra_repr(self) -> str:
        """Show every setting."""
        return ", ".join(f"{key}={getattr(self, key)}" for key in _settings(type(self)))


class BitDepth(Defense):
    """Round every pixel to the nearest of 2^bits evenly spaced levels (Xu et al. 2018, arXiv 1704.01155).

    ARES 2.0 cuts downwards instead, to multiples of 2^-bits, which darkens all images by half a level; white is
    there a level of its own. Backward it is the identity: rounding has no useful gradient, and an attack that
    knows of the defence takes this one (BPDA, Athalye et al. 2018, arXiv 1802.00420).

    Raises ValueError unless bits is a whole number from 1 to 8.
    """

    name = "bit_depth"

    def __init__(self, bits: int = 4) -> None:
        super().__init__()
        self.bits = _whole("bits", bits, 8)

    def forward(self, images: Tensor) -> Tensor:
        """Round the images."""
        return _straight_through(images, self._rounded)

    def _rounded(self, images: Tensor) -> Tensor:
        steps = 2**self.bits - 1
        rounded: Tensor = (images * steps).round() / steps
        return rounded


class JPEG(Defense):
    """Compress and decompress every image, as one of 8 bits a channel (Guo et al. 2018, arXiv 1711.00117).

    quality: of the file, from 1 to 100; colour is subsampled by two. Pillow does it on the CPU, wherever the images
    are. They are clamped to [0, 1] and rounded to 8 bits first, where ARES 2.0 cuts downwards, so that what an
    8-bit image file held is what is compressed. Backward it is the identity, as of `BitDepth`.

    Raises ValueError unless quality is a whole number from 1 to 100, and for images of other than 1 or 3 channels.
    """

    name = "jpeg"

    def __init__(self, quality: int = 75) -> None:
        super().__init__()
        self.quality = _whole("quality", quality, 100)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, images: Tensor) -> Tensor:
        """Compress and decompress the images."""
        if images.shape[1] not in (1, 3):
            raise ValueError(f"images have {images.shape[1]} channels; JPEG takes 1 or 3")
        return _straight_through(images, self._decompressed)

    def _decompressed(self, images: Tensor) -> Tensor:
        pixels = images.clamp(0, 1).mul(255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
        decompressed = np.empty_like(pixels)
        for image, place in zip(pixels, decompressed, strict=True):
            file = io.BytesIO()
            picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
            picture.save(file, "JPEG", quality=self.quality)
            place[:] = np.asarray(Image.open(file)).reshape(place.shape)
        return torch.from_numpy(decompressed).permute(0, 3, 1, 2).to(images.device).to(images.dtype) / 255


class RandomResizePad(Defense):
    """Shrink an image a little, at random, and pad it with black (Xie et al. 2018, arXiv 1711.01991).

    As in ARES 2.0: with probability `prob` an image is shrunk, bicubically, to int((1 - crop) * size) pixels in
    height and width, `crop` being one of `crops` with equal chances, and put at the top, in the middle or at the
    bottom, and at the left, in the middle or at the right, of a black image. The paper enlarges instead, to a
    random size and place, for networks that take images of any size.

    Unlike in ARES 2.0, bicubic values are clamped to [0, 1], and every image has a draw of its own instead of one
    for the batch, so that a batch is as many independent trials as it has images. The draws come from torch's CPU
    generator on every device. Gradients are those of the resampling.

    Raises ValueError unless prob lies in [0, 1] and crops are shares from 0 to below 1, one at least.
    """

    name = "random_resize_pad"
    is_random = True

    def __init__(self, prob: float = 0.8, crops: Sequence[float] = (0.1, 0.08, 0.06, 0.04, 0.02)) -> None:
        super().__init__()
        if not _is_number(prob) or not 0 <= prob <= 1:
            raise ValueError(f"prob={prob}: expected a number from 0 to 1")
        if not isinstance(crops, Sequence) or not crops or not all(_is_number(c) and 0 <= c < 1 for c in crops):
            raise ValueError(f"crops={crops}: expected shares from 0 to below 1, one at least")
        self.prob = float(prob)
        self.crops = tuple(float(crop) for crop in crops)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, images: Tensor) -> Tensor:
        """Resize and pad the images, each by a draw of its own."""
        num_images = len(images)
        is_shrunk = torch.rand(num_images) < self.prob
        crop = torch.randint(len(self.crops), (num_images,)).where(is_shrunk, len(self.crops))
        place = torch.randint(3, (2, num_images))
        down, across = (3 * crop + place).to(images.device, non_blocking=True)
        with torch.autocast("cpu" if images.is_meta else images.device.type, enabled=False):
            rows = self._resamplings(images.shape[2], images)[down]
            columns = self._resamplings(images.shape[3], images)[across]
            resized: Tensor = rows[:, None] @ images @ columns.mT[:, None]
        return resized.clamp(0, 1)

    def _resamplings(self, size: int, images: Tensor) -> Tensor:
        """Return what each draw does to an axis of `size` pixels, as matrices [3 (crops + 1), size, size].

        Resizing is linear and does the same to every row and every column, so that two products of matrices resize
        a batch in which each image has a draw of its own. Three places a crop; those of no crop come last.
        """
        unit = torch.eye(size, dtype=images.dtype, device=images.device)
        matrices = unit.new_zeros(len(self.crops) + 1, 3, size, size)
        for of_crop, crop in zip(matrices, (*self.crops, 0.0), strict=True):
            smaller = max(1, int((1 - crop) * size))
            resize = F.interpolate(unit[None, None], (smaller, size), mode="bicubic", align_corners=False)[0, 0]
            for place, matrix in enumerate(of_crop):
                start = place * (size - smaller) // 2
                matrix[start : start + smaller] = resize
        return matrices.flatten(0, 1)


DEFENSES: dict[str, type[Defense]] = {kind.name: kind for kind in (BitDepth, JPEG, RandomResizePad)}


def make_defense(name: str, **settings: Any) -> Defense:
    """Build a defence by its name in DEFENSES.

    Raises ValueError for an unknown name or setting, naming those there are, and for a value out of range.
    """
    if name not in DEFENSES:
        raise ValueError(f"name={name}: expected one of {', '.join(DEFENSES)}")
    known = _settings(DEFENSES[name])
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"{key}={value}: not a setting of {name}; expected {', '.join(known)}")
    return DEFENSES[name](**settings)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(images: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(images)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing for the backward."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _straight_through(images: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return function(images), with the gradient of the identity."""
    changed: Tensor = _StraightThrough.apply(images, function)
    return changed


def _settings(kind: type[Defense]) -> list[str]:
    return list(inspect.signature(kind).parameters)


def _whole(key: str, value: object, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{key}={value}: expected a whole number from 1 to {most}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
