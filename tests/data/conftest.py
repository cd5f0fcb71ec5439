from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Tree = Callable[..., Path]


@pytest.fixture
def make_tree(tmp_path: Path) -> Tree:
    """Write noise images as `root/<split>/<class>/0000.jpg …`; `splits` maps a split to images per class."""

    def make(splits: dict[str, int], classes: tuple[str, ...] = ("cat", "dog"), size: int = 32) -> Path:
        noise = np.random.default_rng(0)
        for split, count in splits.items():
            for class_name in classes:
                folder = tmp_path / "images" / split / class_name
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = noise.integers(0, 256, (size, size, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i:04d}.jpg")
        return tmp_path / "images"

    return make
