"""Image sets of one shape, and the published layouts they are read from."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2.functional import pil_to_tensor

from ares_lightning.data.keyed import keyed_random, stratified_split
from ares_lightning.data.transforms import (
    crop_and_flip,
    resize_and_center_crop,
    resized_crop_and_flip,
    to_channels,
)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
NUM_DIGITS_TEST = 360
LAYOUTS = {
    "cifar10": "train/<class>/*.jpg and test/<class>/*.jpg, or torchvision's cifar-10-batches-py/",
    "imagefolder": "train/<class>/*.jpg, val/<class>/*.jpg (or validation/) and, if wanted, test/<class>/*.jpg",
}


class ImageError(ValueError):
    """An image that cannot be used; the message names its path, what is wrong and the remedy."""

    def __init__(self, message: str) -> None:
        # A DataLoader worker hands an error on as class(text of the traceback): keep the one line that matters.
        super().__init__(message.strip().rpartition("ImageError: ")[2])


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images held in memory, uint8 [N, H, W] or [N, H, W, 3], named `folder/<sample id>`."""

    name: str
    folder: str
    classes: tuple[str, ...]
    labels: Tensor  # int64 [N]
    images: NDArray[np.uint8]

    def read(self, sample_id: int, in_chans: int) -> Image.Image:
        """Return one image, converted to `in_chans` channels."""
        return to_channels(Image.fromarray(self.images[sample_id]), in_chans)

    def sample_name(self, sample_id: int) -> str:
        """Return e.g. `digits/00042`."""
        return f"{self.folder}/{sample_id:05d}"


class FolderSource:
    """Images in class folders `root/split/<class>/`, ordered by their path; scanned at once, decoded lazily.

    Raises ValueError naming `data.root` for a split without classes and for a class without images. `read`
    raises ImageError for a file that cannot be decoded and, where `exact_size` is given, for another size.
    """

    def __init__(self, name: str, root: Path, split: str, exact_size: int | None = None) -> None:
        self.name, self.root, self.exact_size = name, root, exact_size
        self.classes = tuple(sorted(entry.name for entry in _visible(root / split) if entry.is_dir()))
        if not self.classes:
            raise ValueError(
                f"data.root={root}: {split}/ has no class folders; it holds {_first_entries(root / split)}; "
                f"sort its images into {split}/<class>/"
            )
        files = []
        for label, class_name in enumerate(self.classes):
            names = _image_names(root, f"{split}/{class_name}")
            if not names:
                raise ValueError(
                    f"data.root={root}: {split}/{class_name}/ has no images ({' '.join(EXTENSIONS)}); "
                    "add them or remove the folder from every split"
                )
            files += [(sample_name, label) for sample_name in names]
        files.sort()
        # One array of bytes: a list of a million strings would be copied page by page into every worker.
        self._names = np.array([os.fsencode(sample_name) for sample_name, _ in files])
        self.labels = torch.tensor([label for _, label in files])

    def sample_name(self, sample_id: int) -> str:
        """Return the path below the root, e.g. `test/airplane/0000.jpg`."""
        return os.fsdecode(bytes(self._names[sample_id]))

    def read(self, sample_id: int, in_chans: int) -> Image.Image:
        """Decode one image, converted to `in_chans` channels."""
        path = self.root / self.sample_name(sample_id)
        try:
            with Image.open(path) as file:
                image = to_channels(file, in_chans)
        except Exception as error:  # each of PIL's decoders fails in its own way
            raise ImageError(f"{path}: cannot be decoded ({error}); replace or remove the file") from error
        if self.exact_size and image.size != (self.exact_size, self.exact_size):
            raise ImageError(
                f"{path}: is {image.width}x{image.height} pixels where data.img_size={self.exact_size}; "
                f"resize the images to {self.exact_size}x{self.exact_size} or use data=imagefolder"
            )
        return image


# A full set in its canonical order, which is what a sample id counts.
Source = ArraySource | FolderSource


@dataclass(frozen=True, eq=False)
class ImageSet(Dataset[tuple[Tensor, int, int]]):
    """Some samples of a source, in canonical order: `[i]` is (image uint8 [C, H, W], label, sample id).

    `[i]` with a plain position is the image as it is evaluated. `[i, epoch]` is the image as it is trained
    on in that epoch, augmented by randomness that belongs to (seed, epoch, sample id) and nothing else.
    A sample id is the position in the source, whatever subset this is.
    """

    source: Source
    sample_ids: Tensor  # int64 [N], ascending
    in_chans: int
    prepare: Callable[[Image.Image], Image.Image] | None = None
    augment: Callable[[Image.Image, random.Random], Image.Image] | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of the data set, e.g. `digits`."""
        return self.source.name

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels."""
        return self.source.classes

    @property
    def labels(self) -> Tensor:
        """Labels of the samples, int64 [N], known without decoding an image."""
        return self.source.labels[self.sample_ids]

    def sample_name(self, sample_id: int) -> str:
        """Return the path of a sample below the root, or a name like `digits/00042`."""
        return self.source.sample_name(sample_id)

    def take(self, positions: Tensor | Sequence[int]) -> ImageSet:
        """Return the set of the samples at `positions` (int [M]), with the sample ids they have here."""
        return replace(self, sample_ids=self.sample_ids[torch.as_tensor(positions, dtype=torch.int64)])

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int, int]:
        position, epoch = key if isinstance(key, tuple) else (key, None)
        sample_id = int(self.sample_ids[position])
        image = self.source.read(sample_id, self.in_chans)
        if self.augment and epoch is not None:
            image = self.augment(image, keyed_random("augment", self.seed, epoch, sample_id))
        elif self.prepare:
            image = self.prepare(image)
        return pil_to_tensor(image), int(self.source.labels[sample_id]), sample_id


class ImageSets(NamedTuple):
    """The three sets of a data set. `val` is held out from the training images; only `train` is augmented."""

    train: ImageSet
    val: ImageSet
    test: ImageSet


def load_image_sets(
    name: str, root: str | Path | None, *, img_size: int, in_chans: int, num_val: int, split_seed: int, seed: int
) -> ImageSets:
    """Find the images of a data set (`digits`, `cifar10` or `imagefolder`) and split them.

    `num_val` images, stratified by class and drawn by `split_seed`, are held out from the training images.
    For digits, 360 test images are drawn likewise before them. `seed` keys the augmentation of `train`.
    Raises ValueError naming the key, its value and the remedy.
    """
    prepare = augment = None
    if name == "digits":
        train_source: Source = _read_digits(img_size)
        test_source = train_source
        test_ids, pool = stratified_split(train_source.labels, NUM_DIGITS_TEST, "test", split_seed)
    elif name in LAYOUTS:
        folder = _checked_root(name, root)
        if name == "cifar10":
            train_source, test_source = _read_cifar10(folder, img_size)
            augment = crop_and_flip
        else:
            train_source, test_source = _read_class_folders(name, folder, ("test", "val", "validation"))
            prepare = partial(resize_and_center_crop, img_size=img_size)
            augment = partial(resized_crop_and_flip, img_size=img_size)
        test_ids, pool = torch.arange(len(test_source.labels)), torch.arange(len(train_source.labels))
    else:
        raise ValueError(f"data.name={name}: is not a known data set; known: digits, {', '.join(LAYOUTS)}")
    if not 0 < num_val < len(pool):
        raise ValueError(
            f"data.num_val={num_val}: must lie between 1 and {len(pool) - 1}, as it is held out from the "
            f"{len(pool)} training images"
        )
    val_positions, train_positions = stratified_split(train_source.labels[pool], num_val, "val", split_seed)
    return ImageSets(
        train=ImageSet(train_source, pool[train_positions], in_chans, prepare, augment, seed),
        val=ImageSet(train_source, pool[val_positions], in_chans, prepare),
        test=ImageSet(test_source, test_ids, in_chans, prepare),
    )


def _read_digits(img_size: int) -> ArraySource:
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    classes = tuple(str(digit) for digit in bunch.target_names)
    _check_size("digits", img_size, images)
    return ArraySource("digits", "digits", classes, torch.from_numpy(bunch.target).long(), images)


def _read_cifar10(root: Path, img_size: int) -> tuple[Source, Source]:
    if not (root / CIFAR10.base_folder).is_dir():
        return _read_class_folders("cifar10", root, ("test",), exact_size=img_size)
    try:  # torchvision compares the md5 of every file before it opens a pickle
        train, test = (CIFAR10(root, train=train, download=False) for train in (True, False))
    except RuntimeError as error:
        raise ValueError(
            f"data.root={root}: a file in {CIFAR10.base_folder}/ is missing, or its md5 is not the published one; "
            "download cifar-10-python.tar.gz again"
        ) from error
    _check_size("cifar10", img_size, train.data)
    sources = [
        ArraySource("cifar10", split, tuple(data.classes), torch.tensor(data.targets), data.data)
        for split, data in (("train", train), ("test", test))
    ]
    return sources[0], sources[1]


def _read_class_folders(
    name: str, root: Path, test_splits: Sequence[str], exact_size: int | None = None
) -> tuple[Source, Source]:
    test_split = next((split for split in test_splits if (root / split).is_dir()), None)
    if test_split is None or not (root / "train").is_dir():
        raise ValueError(f"data.root={root}: {name} needs {LAYOUTS[name]} there; it holds {_first_entries(root)}")
    train, test = (FolderSource(name, root, split, exact_size) for split in ("train", test_split))
    differing = sorted(set(train.classes) ^ set(test.classes))
    if differing:
        raise ValueError(
            f"data.root={root}: train/ and {test_split}/ must have the same class folders; {len(differing)} "
            f"are in one only: {_abridged(differing)}"
        )
    return train, test


def _checked_root(name: str, root: str | Path | None) -> Path:
    needed = f"set data.root to the folder that holds {LAYOUTS[name]}"
    if root is None:
        raise ValueError(f"data.root=null: {name} is read from a folder; {needed}")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise ValueError(f"data.root={root}: {'is a file' if folder.exists() else 'does not exist'}; {needed}")
    if not any(folder.iterdir()):
        raise ValueError(f"data.root={root}: is empty; {needed}")
    return folder


def _check_size(name: str, img_size: int, images: NDArray[np.uint8]) -> None:
    if images.shape[1] != img_size:
        raise ValueError(
            f"data.img_size={img_size}: the images of {name} are {images.shape[1]}x{images.shape[2]} pixels; "
            f"set data.img_size={images.shape[1]}"
        )


def _image_names(root: Path, folder: str) -> list[str]:
    names = []
    for parent, _, file_names in os.walk(root / folder, followlinks=True):
        below_root = Path(parent).relative_to(root).as_posix()
        names += [
            f"{below_root}/{file_name}"
            for file_name in file_names
            if file_name.lower().endswith(EXTENSIONS) and not file_name.startswith(".")
        ]
    return names


def _visible(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


def _first_entries(folder: Path) -> str:
    return _abridged(sorted(entry.name for entry in _visible(folder))) or "nothing"


def _abridged(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
