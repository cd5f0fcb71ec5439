"""The common corruptions of ImageNet-C and CIFAR-10-C, made on the fly on NumPy, SciPy and Pillow.

Hendrycks & Dietterich 2019, arXiv 1903.12261; settings and order of operations are those of
ImageNet-C/create_c/make_imagenet_c.py and make_cifar_c.py in github.com/hendrycks/robustness. What differs from the
published images: frost is drawn, not pasted from photographs, and is called `frost_procedural` in results; the
images are not compressed as JPEG afterwards; the random numbers are others.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.signal import oaconvolve
from scipy.sparse import csr_array

from ares_lightning.data.textures import canny, equalised, frost_texture, plasma

SEVERITIES = (1, 2, 3, 4, 5)
SMALL_IMAGE = math.sqrt(32 * 224)
"""Images whose shorter side is below this, in pixels, take the settings for 32 pixels, others those for 224."""
TINY_IMAGE = 16
"""Below this side, in pixels, blurs, weather, warps and JPEG blocks no longer mean what they are called."""
ON_TINY_IMAGES = ("gaussian_noise", "shot_noise", "impulse_noise", "brightness", "contrast", "pixelate")
GREY = np.array([0.299, 0.587, 0.114])
"""Weights of the channels in the grey value (ITU-R BT.601)."""
EDGE_LEVELS, FARTHEST = (50, 150), 20
"""Thresholds of the edges of splashed water, and the distance in pixels up to which its relief looks."""
FFT_ERROR = 1e-9
"""Added after a transform, so that whole levels are not cut off to the one below."""
THINNEST_MUD = 0.8
WATER, MUD = np.array([175, 238, 238]) / 255, np.array([63, 42, 20]) / 255

Pixels = NDArray[Any]  # float64 [H, W, C] in [0, 1]
Corrupt = Callable[[Pixels, Any, RandomState], Pixels]


def gaussian_noise(x: Pixels, std: float, rng: RandomState) -> Pixels:
    """Add normal noise."""
    return x + rng.normal(scale=std, size=x.shape)


def shot_noise(x: Pixels, photons: float, rng: RandomState) -> Pixels:
    """Count Poisson-distributed photons, `photons` of them where the image is white."""
    return rng.poisson(x * photons) / photons


def impulse_noise(x: Pixels, share: float, rng: RandomState) -> Pixels:
    """Set a share of all channel values to 0 or 1, at even odds."""
    hit, salt = rng.random_sample(x.shape) < share, rng.random_sample(x.shape) < 0.5
    return np.where(hit, salt.astype(np.float64), x)


def speckle_noise(x: Pixels, std: float, rng: RandomState) -> Pixels:
    """Add normal noise in proportion to the value."""
    return x + x * rng.normal(scale=std, size=x.shape)


def gaussian_blur(x: Pixels, sigma: float, rng: RandomState) -> Pixels:
    """Blur by a Gaussian of `sigma` pixels."""
    return _blurred(x, sigma)


def defocus_blur(x: Pixels, setting: tuple[float, float], rng: RandomState) -> Pixels:
    """Blur by a disk of a radius in pixels, whose rim is softened by a Gaussian of the second number."""
    radius, softening = setting
    reach = max(8, math.ceil(radius))
    taps = 1 if radius <= 8 else 2
    offsets = np.arange(-reach, reach + 1)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.float64)
    disk /= disk.sum()
    soft = np.exp(-(np.arange(-taps, taps + 1) ** 2) / (2 * softening**2))
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, soft / soft.sum(), axis, mode="mirror")
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="reflect" if min(x.shape[:2]) > 1 else "edge")
    blurred: Pixels = oaconvolve(padded, disk[..., None], mode="valid", axes=(0, 1))
    return blurred + FFT_ERROR


def glass_blur(x: Pixels, setting: tuple[float, int, int], rng: RandomState) -> Pixels:
    """Blur, let pixels take the place of neighbours up to `reach` away, several times, and blur again.

    The published code means to swap the two, but copies one onto the other; so does this.
    """
    sigma, reach, times = setting
    height, width = x.shape[:2]
    blurred = np.floor(_blurred(x, sigma) * 255) / 255
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    places = (rows[:, None] * width + columns).ravel()
    came_from = list(range(height * width))
    for _ in range(times):
        dx, dy = rng.randint(-reach, reach, size=(len(places), 2)).T
        for place, neighbour in zip(places.tolist(), (places + dy * width + dx).tolist(), strict=True):
            came_from[place] = came_from[neighbour]
    return _blurred(blurred.reshape(-1, x.shape[2])[came_from].reshape(x.shape), sigma)


def motion_blur(x: Pixels, setting: tuple[int, float], rng: RandomState) -> Pixels:
    """Smear in a direction up to 45 degrees off the horizontal; radius and sigma in pixels."""
    return _smeared(x, *setting, angle=rng.uniform(-45, 45))


def zoom_blur(x: Pixels, setting: tuple[float, float], rng: RandomState) -> Pixels:
    """Average over zooms from 1 to below the first number, in steps of the second, and once more over the image."""
    factors = np.arange(1, *setting)
    total = x + sum(_zoomed(x, float(factor)) for factor in factors)
    return total / (len(factors) + 1)


def snow(x: Pixels, setting: tuple[float, ...], rng: RandomState) -> Pixels:
    """Whiten, and add two layers of smeared flakes: mean, std, zoom, threshold, radius, sigma, share of the
    image."""
    mean, std, zoom, threshold, radius, sigma, share = setting
    layer = _zoomed(rng.normal(mean, std, size=(*x.shape[:2], 1)), zoom)
    layer[layer < threshold] = 0
    layer = np.floor(layer.clip(0, 1) * 255) / 255
    layer = _smeared(layer, int(radius), sigma, angle=rng.uniform(-135, -45))
    whitened = np.maximum(x, _grey(x) * 1.5 + 0.5)
    return share * x + (1 - share) * whitened + layer + np.rot90(layer, 2)


def frost(x: Pixels, setting: tuple[float, float], rng: RandomState) -> Pixels:
    """Lay a drawn texture of ice over the image; weights of the image and of the ice."""
    ice = frost_texture(x.shape[0], x.shape[1], rng)
    return setting[0] * x + setting[1] * _coloured(ice, x)


def fog(x: Pixels, setting: tuple[float, float], rng: RandomState) -> Pixels:
    """Add fractal fog of a thickness, whose roughness falls by the second number from scale to scale."""
    thickness, decay = setting
    height, width = x.shape[:2]
    size = 2 ** max(1, math.ceil(math.log2(max(height, width))))
    highest = x.max()
    foggy = x + thickness * plasma(size, decay, rng)[:height, :width, None]
    thinned: Pixels = foggy * highest / (highest + thickness)
    return thinned


def spatter(x: Pixels, setting: tuple[float, float, float, float, float, bool], rng: RandomState) -> Pixels:
    """Splash water, or mud, over the image: mean, std, sigma, threshold, strength (of mud: its sigma), is it
    mud."""
    mean, std, sigma, threshold, strength, is_mud = setting
    liquid = ndimage.gaussian_filter(rng.normal(mean, std, size=x.shape[:2]), sigma, mode="nearest")
    liquid[liquid < threshold] = 0
    if is_mud:
        cover = ndimage.gaussian_filter((liquid > threshold).astype(np.float64), strength, mode="nearest")[
            ..., None
        ]
        cover[cover < THINNEST_MUD] = 0
        muddy: Pixels = x * (1 - cover) + cover * _coloured(MUD, x)
        return muddy
    levels = np.floor(liquid.clip(0, 1) * 255)
    edges = canny(levels, *EDGE_LEVELS)
    away = ndimage.distance_transform_edt(~edges) if edges.any() else np.full(levels.shape, np.inf)
    relief = equalised(np.floor(_box(np.minimum(away, FARTHEST))))
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], dtype=np.float64)
    relief = np.round(_box(ndimage.correlate(relief, emboss, mode="mirror").clip(0, 255)))
    drops = levels * relief
    drops *= strength / max(drops.max(), 1.0)
    wet: Pixels = x + drops[..., None] * _coloured(WATER, x)
    return wet


def brightness(x: Pixels, added: float, rng: RandomState) -> Pixels:
    """Add to the value of HSV."""
    value = x.max(axis=2, keepdims=True)
    brighter: Pixels = (value + added).clip(0, 1)
    result: Pixels = np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter)
    return result


def saturate(x: Pixels, setting: tuple[float, float], rng: RandomState) -> Pixels:
    """Multiply the saturation of HSV by the first number and add the second; grey counts as red, as hue 0 does."""
    factor, added = setting
    value: Pixels = x.max(axis=2, keepdims=True)
    below = value - x
    span = below.max(axis=2, keepdims=True)
    saturation = span / np.where(value > 0, value, 1)
    red = np.broadcast_to((np.arange(x.shape[2]) > 0).astype(np.float64), x.shape)
    direction = np.where(span > 0, below / np.where(span > 0, span, 1), red)
    result: Pixels = value - value * (saturation * factor + added).clip(0, 1) * direction
    return result


def contrast(x: Pixels, factor: float, rng: RandomState) -> Pixels:
    """Draw each channel towards its mean."""
    mean: Pixels = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * factor + mean


def elastic_transform(x: Pixels, setting: tuple[float, float, float], rng: RandomState) -> Pixels:
    """Warp: an affine map that moves three points by up to the third number, then a smooth displacement field.

    The field has an amplitude of the first number before it is smoothed by a Gaussian of the second, all in pixels.
    """
    amplitude, sigma, shift = setting
    height, width = x.shape[:2]
    centre, reach = np.array([height, width]) // 2, min(height, width) // 3
    if reach:
        points = np.array(
            [centre + reach, [centre[0] + reach, centre[1] - reach], centre - reach], dtype=np.float64
        )
        moved = points + rng.uniform(-shift, shift, size=points.shape)
        # Points are (x, y) as in OpenCV; the map from the result back to the image is affine.
        back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), points)
        grid_y, grid_x = np.mgrid[:height, :width]
        source = np.stack([grid_x, grid_y, np.ones_like(grid_x)], axis=-1) @ back
        x = _sampled(x, source[..., 1], source[..., 0], mode="mirror")
    fields = [rng.uniform(-1, 1, size=(height, width)) for _ in range(2)]
    dx, dy = (ndimage.gaussian_filter(field, sigma, mode="reflect", truncate=3) * amplitude for field in fields)
    grid_y, grid_x = np.mgrid[:height, :width]
    return _sampled(x, grid_y + dy, grid_x + dx, mode="reflect")


def pixelate(x: Pixels, factor: float, rng: RandomState) -> Pixels:
    """Shrink to this share of the size and enlarge again, both by boxes."""
    height, width = x.shape[:2]
    small = (max(1, int(width * factor)), max(1, int(height * factor)))
    image = _image(x).resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.BOX)
    return _pixels(image)


def jpeg_compression(x: Pixels, quality: int, rng: RandomState) -> Pixels:
    """Compress as JPEG."""
    file = io.BytesIO()
    _image(x).save(file, "JPEG", quality=quality)
    return _pixels(Image.open(file))


class _Kind(NamedTuple):
    corrupt: Corrupt
    large: tuple[Any, ...]
    small: tuple[Any, ...]


_ELASTIC_LARGE, _ELASTIC_SMALL = 244, 32
"""The sides that the published settings of the elastic transform are multiples of; the first is meant to be 224."""

_KINDS = {
    "gaussian_noise": _Kind(gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": _Kind(shot_noise, (60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    "impulse_noise": _Kind(impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": _Kind(
        defocus_blur,
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    "glass_blur": _Kind(
        glass_blur,
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ),
    "motion_blur": _Kind(
        motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)), ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))
    ),
    "zoom_blur": _Kind(
        zoom_blur,
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    ),
    "snow": _Kind(
        snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": _Kind(
        frost,
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    ),
    "fog": _Kind(
        fog,
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    ),
    "brightness": _Kind(brightness, (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": _Kind(contrast, (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": _Kind(
        elastic_transform,
        tuple(
            tuple(_ELASTIC_LARGE * share for share in shares)
            for shares in (
                (2, 0.7, 0.1),
                (2, 0.08, 0.2),
                (0.05, 0.01, 0.02),
                (0.07, 0.01, 0.02),
                (0.12, 0.01, 0.02),
            )
        ),
        tuple(
            tuple(_ELASTIC_SMALL * share for share in shares)
            for shares in (
                (0, 0, 0.08),
                (0.05, 0.2, 0.07),
                (0.08, 0.06, 0.06),
                (0.1, 0.04, 0.05),
                (0.1, 0.03, 0.03),
            )
        ),
    ),
    "pixelate": _Kind(pixelate, (0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": _Kind(jpeg_compression, (25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
    "speckle_noise": _Kind(speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6), (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": _Kind(gaussian_blur, (1, 2, 3, 4, 6), (0.4, 0.6, 0.7, 0.8, 1)),
    "spatter": _Kind(
        spatter,
        (
            (0.65, 0.3, 4, 0.69, 0.6, False),
            (0.65, 0.3, 3, 0.68, 0.6, False),
            (0.65, 0.3, 2, 0.68, 0.5, False),
            (0.65, 0.3, 1, 0.65, 1.5, True),
            (0.67, 0.4, 1, 0.65, 1.5, True),
        ),
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, False),
            (0.65, 0.1, 0.8, 0.7, 0.5, False),
            (0.65, 0.3, 1, 0.69, 0.5, False),
            (0.65, 0.1, 0.7, 0.69, 0.6, True),
            (0.65, 0.1, 0.5, 0.68, 0.6, True),
        ),
    ),
    "saturate": _Kind(
        saturate,
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    ),
}

COMMON = tuple(_KINDS)[:15]
"""The fifteen that the mean corruption error is over, in the order of the paper."""
EXTRA = tuple(_KINDS)[15:]
"""The four that were published beside them, to choose settings by."""
PROCEDURAL = ("frost",)
"""Those that stand in for published ones and are not these."""


def corruptions_for(img_size: int) -> tuple[str, ...]:
    """Return which of COMMON make sense on images of this side in pixels."""
    return COMMON if img_size >= TINY_IMAGE else ON_TINY_IMAGES


@dataclass(frozen=True)
class Corruption:
    """One corruption at one severity, 1 to 5; seed: of its random numbers, besides the sample's own id.

    Raises ValueError for another name or severity.
    """

    name: str
    severity: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in _KINDS:
            raise ValueError(f"corruption={self.name}: expected one of {', '.join(_KINDS)}")
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity={self.severity}: expected a whole number from 1 to 5")

    @property
    def label(self) -> str:
        """The name in results, which tells what is not the published corruption: `frost_procedural`."""
        return f"{self.name}_procedural" if self.name in PROCEDURAL else self.name

    def __call__(self, image: Image.Image, sample_id: int) -> Image.Image:
        """Return the image, of mode L or RGB, corrupted."""
        pixels = corrupt(np.asarray(image), self.name, self.severity, seed=self.seed, sample_id=sample_id)
        return Image.fromarray(pixels)


def corrupt(
    pixels: NDArray[np.uint8], name: str, severity: int, *, seed: int = 0, sample_id: int = 0
) -> NDArray[np.uint8]:
    """Return an image, uint8 [H, W] or [H, W, 3], under a corruption of severity 1 to 5.

    The result depends on the image and (name, severity, seed, sample id) alone.
    Raises ValueError for another name, severity, type or shape.
    """
    Corruption(name, severity)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (1,), (3,)):
        raise ValueError(f"pixels: expected uint8 [H, W] or [H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
    kind = _KINDS[name]
    setting = (kind.small if min(pixels.shape[:2]) < SMALL_IMAGE else kind.large)[severity - 1]
    key = hashlib.blake2b(f"{name}/{severity}/{seed}/{sample_id}".encode(), digest_size=32).digest()
    rng = RandomState(np.frombuffer(key, np.uint32))  # NumPy keeps its streams frozen
    x = (pixels if pixels.ndim == 3 else pixels[..., None]) / 255.0
    corrupted = kind.corrupt(x, setting, rng).clip(0, 1) * 255
    if name in _EXACT:
        corrupted = np.round(corrupted)
    return corrupted.astype(np.uint8).reshape(pixels.shape)  # cut off, not rounded, as the published ones


_EXACT = ("pixelate", "jpeg_compression", "motion_blur")
"""What comes as whole levels, which must not be cut off by an error of rounding."""


def _blurred(x: Pixels, sigma: float) -> Pixels:
    blurred: Pixels = ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")
    return blurred


def _smeared(x: Pixels, radius: int, sigma: float, angle: float) -> Pixels:
    """Smear one-sidedly along `angle` (degrees), rounded to whole levels: MotionBlurImage of ImageMagick
    (effect.c)."""
    height, width = x.shape[:2]
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    direction = math.radians(angle)
    across = np.ceil(steps * math.cos(direction) - 0.5).astype(int)
    down = np.ceil(steps * math.sin(direction) - 0.5).astype(int)
    padded = np.pad(x, ((len(steps),) * 2, (len(steps),) * 2, (0, 0)), mode="edge")
    smeared = np.zeros_like(x)
    for weight, dx, dy in zip(weights, across + len(steps), down + len(steps), strict=True):
        smeared += weight * padded[dy : dy + height, dx : dx + width]
    return np.round(smeared * 255) / 255


def _zoomed(x: Pixels, factor: float) -> Pixels:
    """Enlarge the middle of the image to the image's own size."""
    height, width, channels = x.shape
    rows = (_zoom_matrix(height, factor) @ x.reshape(height, -1)).reshape(x.shape).swapaxes(0, 1)
    columns: Pixels = (_zoom_matrix(width, factor) @ rows.reshape(width, -1)).reshape(width, height, channels)
    return columns.swapaxes(0, 1)


def _zoom_matrix(size: int, factor: float) -> csr_array:
    """Return the linear map [size, size] that enlarges the middle of an axis: `scipy.ndimage.zoom`, order 1."""
    kept = math.ceil(size / factor)
    enlarged = round(kept * factor)
    places = np.arange(size)
    source = np.minimum((places + (enlarged - size) // 2) * ((kept - 1) / max(enlarged - 1, 1)), kept - 1)
    left = np.floor(source).astype(int)
    right, share = np.minimum(left + 1, kept - 1), source - left
    columns = (size - kept) // 2 + np.concatenate([left, right])
    weights = np.concatenate([1 - share, share])
    return csr_array((weights, (np.concatenate([places, places]), columns)), shape=(size, size))


def _sampled(x: Pixels, rows: NDArray[Any], columns: NDArray[Any], mode: str) -> Pixels:
    channels = [ndimage.map_coordinates(x[..., c], [rows, columns], order=1, mode=mode) for c in range(x.shape[2])]
    return np.stack(channels, axis=2)


def _box(levels: NDArray[np.float64]) -> NDArray[np.float64]:
    # Not uniform_filter, whose running sums leave whole levels a little below themselves, to be cut off.
    smoothed: NDArray[np.float64] = ndimage.correlate(levels, np.ones((3, 3)), mode="mirror") / 9
    return smoothed


def _grey(x: Pixels) -> Pixels:
    return x if x.shape[2] == 1 else (x @ GREY)[..., None]


def _coloured(colour: NDArray[np.float64], x: Pixels) -> Pixels:
    """Return a colour, or an image of colours, in as many channels as `x` has."""
    return colour if x.shape[2] == 3 else (colour @ GREY)[..., None]


def _image(x: Pixels) -> Image.Image:
    levels = np.round(x * 255).astype(np.uint8)
    return Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)


def _pixels(image: Image.Image) -> Pixels:
    levels = np.asarray(image) / 255.0
    return levels if levels.ndim == 3 else levels[..., None]
