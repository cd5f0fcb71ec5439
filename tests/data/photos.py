"""Real photographs, which come with scikit-learn, cut into as many different ones as a test wants."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images


@cache
def _sources() -> list[NDArray[np.uint8]]:
    return list(load_sample_images().images)


def photo(number: int, width: int = 224, height: int = 224) -> Image.Image:
    """Return a cut of one of the two photographs, 427x640, that differs from number to number."""
    source = _sources()[number % 2]
    rng = np.random.default_rng(number)
    side = int(rng.integers(200, 400))
    top, left = rng.integers(0, source.shape[0] - side), rng.integers(0, source.shape[1] - side)
    return Image.fromarray(source[top : top + side, left : left + side]).resize((width, height))


def save(path: Path, number: int, width: int = 60, height: int = 50) -> None:
    """Write a photograph as a file of whatever format the name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(number, width, height).save(path)
