"""Drawn textures and the few steps of image processing that the corruptions need and SciPy lacks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from scipy import ndimage

Levels = NDArray[Any]  # float64 [H, W]

WIBBLE = 100.0
"""Roughness at the largest scale of the plasma; an offset is drawn up to its square."""
ICE = np.array([0.93, 1.0, 1.06])
"""Colour of the ice, bluish, of mean 1."""
FROST_MEAN, FROST_STD = 0.6, 0.12
"""Level of the ice and its deviation, about those of 224-pixel cuts from the photographs of the published code."""
NUM_DIRECTIONS, NEEDLE, PATCHINESS = 6, 14, 1.8
"""Of the crystals: directions, half their length in pixels at a size of 256, decay of the plasma that makes
patches."""


def plasma(size: int, decay: float, rng: RandomState) -> Levels:
    """Return fractal noise in [0, 1], [size, size], by the diamond-square algorithm on a torus; size a power of
    two.

    decay: by how much the roughness falls from each scale to the next, which is half as large.
    """
    field = np.zeros((size, size))
    step, wibble = size, WIBBLE
    while step >= 2:
        half = step // 2
        corners = field[::step, ::step]
        squares = corners + np.roll(corners, -1, axis=0)
        squares = squares + np.roll(squares, -1, axis=1)
        field[half::step, half::step] = _rough_mean(squares, wibble, rng)
        centres, corners = field[half::step, half::step], field[::step, ::step]
        above = centres + np.roll(centres, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        field[::step, half::step] = _rough_mean(above, wibble, rng)
        beside = centres + np.roll(centres, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        field[half::step, ::step] = _rough_mean(beside, wibble, rng)
        step, wibble = half, wibble / decay
    field -= field.min()
    normalised: Levels = field / field.max()
    return normalised


def _rough_mean(sums: Levels, wibble: float, rng: RandomState) -> Levels:
    return sums / 4 + wibble * rng.uniform(-wibble, wibble, size=sums.shape)


def frost_texture(height: int, width: int, rng: RandomState) -> NDArray[np.float64]:
    """Return a drawn pane of frost, [H, W, 3] in [0, 1]: crystals that run in several directions, each in
    patches."""
    size = 2 ** max(1, int(np.ceil(np.log2(max(height, width)))))
    reach = max(1, round(NEEDLE * size / 256))
    ice = np.zeros((size, size))
    for angle in rng.uniform(0, np.pi, size=NUM_DIRECTIONS):
        grains, needles = rng.normal(size=(size, size)), np.zeros((size, size))
        for step in range(-reach, reach + 1):
            shift = round(step * np.sin(angle)), round(step * np.cos(angle))
            needles += (1 - abs(step) / (reach + 1)) * np.roll(grains, shift, axis=(0, 1))
        ice += plasma(size, PATCHINESS, rng) ** 2 * needles
    ice += ice.std() * (plasma(size, PATCHINESS, rng) - 0.5) * 2
    ice = (ice - ice.mean()) / max(float(ice.std()), 1e-9)
    levels: Levels = (FROST_MEAN + FROST_STD * ice)[:height, :width, None]
    pane: Levels = (levels * ICE).clip(0, 1)
    return pane


def canny(levels: Levels, low: float, high: float) -> NDArray[np.bool_]:
    """Return the edges of an image of levels 0 to 255, bool [H, W] (Canny 1986).

    Sobel gradients, their magnitude |dx| + |dy|, thinned along the gradient in four directions; what is above
    `high`, and what is above `low` and connected with it.
    """
    dx, dy = (ndimage.sobel(levels, axis, mode="nearest") for axis in (1, 0))
    magnitude = abs(dx) + abs(dy)
    flat = abs(dy) < np.tan(np.pi / 8) * abs(dx)
    steep = abs(dy) > np.tan(3 * np.pi / 8) * abs(dx)
    padded = np.pad(magnitude, 1)
    height, width = levels.shape

    def at(down: int, right: int) -> Levels:
        return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    across = (magnitude > at(0, -1)) & (magnitude >= at(0, 1))
    along = (magnitude > at(-1, 0)) & (magnitude >= at(1, 0))
    falling = magnitude > np.maximum(at(-1, -1), at(1, 1))
    rising = magnitude > np.maximum(at(-1, 1), at(1, -1))
    thin = np.where(flat, across, np.where(steep, along, np.where(dx * dy < 0, rising, falling)))
    regions, _ = ndimage.label(thin & (magnitude > low), structure=np.ones((3, 3)))
    strong = np.unique(regions[thin & (magnitude > high)])
    return np.isin(regions, strong[strong > 0])


def equalised(levels: Levels) -> Levels:
    """Return whole levels 0 to 255 spread so that each is about as frequent as the others."""
    whole = levels.astype(np.uint8)
    counts = np.bincount(whole.ravel(), minlength=256)
    cumulated = counts.cumsum()
    first = counts[counts > 0][0]
    rest = whole.size - first
    if rest == 0:
        return levels
    table = np.round((cumulated - first) * (255 / rest)).clip(0, 255)
    spread: Levels = table[whole]
    return spread
