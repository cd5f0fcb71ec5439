"""The data sets by name: where their images lie, and how they are split."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from ares_lightning.data import imagenet
from ares_lightning.data.datasets import ImageSet, ImageSets
from ares_lightning.data.images import (
    Augmentation,
    Crop,
    Preprocessing,
    ares_preprocessing,
    resized_crop_and_flip,
    shift_and_flip,
    unchanged,
)
from ares_lightning.data.keyed import stratified_split
from ares_lightning.data.own import AUGMENTS, OwnSets
from ares_lightning.data.sources import (
    ArraySource,
    Labels,
    Source,
    abridged,
    class_folders,
    first_entries,
    source_of_folders,
)
from ares_lightning.data.variants import VARIANTS, Cell, Variant, find_variant, open_variant

NUM_DIGITS_TEST = 360
CIFARS = {"cifar10": CIFAR10, "cifar100": CIFAR100}
WANTED = {
    **{
        name: f"train/<class>/*.jpg and test/<class>/*.jpg, or torchvision's {reader.base_folder}/"
        for name, reader in CIFARS.items()
    },
    "imagefolder": "train/<class>/*.jpg, val/<class>/*.jpg (or validation/) and, if wanted, test/<class>/*.jpg",
    "imagenet": imagenet.LAYOUT,
    **{key: variant.words for key, variant in VARIANTS.items()},
}
"""What each data set that is read from a folder needs there."""
OF_ANY_SIZE = ("imagefolder", "imagenet")
"""The data sets whose training images are cut out and resized, so that they can have any side."""
ON_ERROR = ("raise", "skip")


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What is asked of a data set besides its name and place.

    img_size, in_chans: of the images. num_val: images, stratified by class and drawn by `split_seed`, that are held
    out from the training images; for digits, 360 test images are drawn likewise before them. seed: keys the
    augmentation. training: whether training images are looked for at all.
    preprocessing: of evaluated images where they are not stored at one size; None is that of ARES-Bench.
    randaugment, color_jitter, mean: as `Augmentation` has them.
    corruption, severity: which part of a set of corruptions. on_error: `raise` or `skip` images that cannot be
    used.
    """

    img_size: int
    in_chans: int
    num_val: int = 0
    split_seed: int = 0
    seed: int = 0
    training: bool = True
    preprocessing: Preprocessing | None = None
    randaugment: str | None = None
    color_jitter: float = 0.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    corruption: str | None = None
    severity: int | None = None
    on_error: str = "raise"

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            raise ValueError(f"data.on_error={self.on_error}: expected one of {', '.join(ON_ERROR)}")

    @property
    def of_any_size(self) -> Preprocessing:
        """What is done to an evaluated image of any size."""
        return self.preprocessing or ares_preprocessing(self.img_size)

    def make(self, source: Source, sample_ids: Tensor, prepare: Preprocessing | None) -> ImageSet:
        """Return the set of these samples as they are evaluated."""
        return ImageSet(source, sample_ids, self.in_chans, prepare, skip_unreadable=self.on_error == "skip")

    def augment(self, crop: Crop) -> Augmentation:
        """Return what is done to a training image of a data set that is cropped and flipped so."""
        return Augmentation(crop, self.img_size, self.randaugment, self.color_jitter, self.mean)


def load_image_sets(name: str, root: str | Path | None, wishes: Wishes, own: OwnSets | None = None) -> ImageSets:
    """Find the images of a data set and split them.

    name: `digits`, a key of WANTED, or any for a user's `own` sets. root: its folder, None for digits.
    Raises ValueError naming the key, its value and the remedy.
    """
    if own is not None:
        return _own_sets(name, own, wishes)
    if name != "digits" and name not in WANTED:
        raise ValueError(f"data.name={name}: is not a known data set; known: digits, {', '.join(WANTED)}")
    if wishes.corruption is not None and not (name in VARIANTS and VARIANTS[name].corruptions):
        raise ValueError(
            f"data.corruption={wishes.corruption}: {name} is no published set of corruptions; "
            "eval=corruptions makes them"
        )
    if name == "digits":
        source = _read_digits(wishes.img_size)
        test_ids, pool = stratified_split(source.labels.labels, NUM_DIGITS_TEST, "test", wishes.split_seed)
        return _split(wishes, source, pool, wishes.make(source, test_ids, None), None, unchanged)
    folder = _checked_root(name, root)
    if name in VARIANTS:
        test_set = load_variant(VARIANTS[name], folder, wishes)
        if not len(test_set):
            raise ValueError(f"data.root={root}: none of the images there is of a class of {name}")
        return ImageSets(None, None, test_set)
    if name in CIFARS:
        train, test = _read_cifar(name, folder, wishes)
        return _all(wishes, train, test, None, shift_and_flip)
    prepare = wishes.of_any_size
    if name == "imagefolder":
        train, test = _read_class_folders(name, folder, ("test", "val", "validation"), wishes)
    else:
        test = imagenet.read_imagenet(folder, "val")
        train = imagenet.read_imagenet(folder, "train") if wishes.training else None
    return _all(wishes, train, test, prepare, resized_crop_and_flip)


def _own_sets(name: str, own: OwnSets, wishes: Wishes) -> ImageSets:
    if wishes.corruption is not None:
        raise ValueError(f"data.corruption={wishes.corruption}: {name} has none; eval=corruptions makes them")
    prepare = wishes.preprocessing
    train, test = own.sources(name, wishes.img_size if prepare is None else None)
    crop = AUGMENTS[own.augment]
    if prepare is not None and crop is not resized_crop_and_flip:
        crop = partial(_prepared, prepare, crop)
    return _all(wishes, train, test, prepare, crop)


def _prepared(prepare: Preprocessing, crop: Crop, image: Image.Image, rng: random.Random, side: int) -> Image.Image:
    """Augment an image once it is as it would be evaluated."""
    return crop(prepare(image), rng, side)


def load_variant(variant: Variant, folder: Path, wishes: Wishes) -> ImageSet:
    """Read one of VARIANTS, or the cell of it that `wishes` name, from its folder or one above it.

    Raises ValueError naming `data.root` where it is not as published.
    """
    found = find_variant(variant, folder)
    if found is None:
        raise ValueError(
            f"data.root={folder}: {variant.title} needs {variant.words} there, or in a folder called "
            f"{' or '.join(variant.folders[:2])}; it holds {first_entries(folder)}"
        )
    cell = None if wishes.corruption is None else Cell(wishes.corruption, wishes.severity or 0)
    source, sample_ids = open_variant(variant, found, cell)
    prepare = variant.prepare(wishes.of_any_size)
    return wishes.make(source, sample_ids, prepare)


def _all(
    wishes: Wishes, train: Source | None, test: Source, prepare: Preprocessing | None, crop: Crop
) -> ImageSets:
    test_set = wishes.make(test, torch.arange(len(test.labels.labels)), prepare)
    if train is None:
        return ImageSets(None, None, test_set)
    return _split(wishes, train, torch.arange(len(train.labels.labels)), test_set, prepare, crop)


def _split(
    wishes: Wishes,
    source: Source,
    pool: Tensor,
    test: ImageSet,
    prepare: Preprocessing | None,
    crop: Crop,
) -> ImageSets:
    """Hold images out from those of `source` at `pool`, int64 [N]."""
    if not wishes.training:
        return ImageSets(None, None, test)
    if not 0 < wishes.num_val < len(pool):
        raise ValueError(
            f"data.num_val={wishes.num_val}: must lie between 1 and {len(pool) - 1}, as it is held out from the "
            f"{len(pool)} training images"
        )
    held_out, rest = stratified_split(source.labels.labels[pool], wishes.num_val, "val", wishes.split_seed)
    train = wishes.make(source, pool[rest], prepare)
    return ImageSets(
        train=replace(train, augment=wishes.augment(crop), seed=wishes.seed),
        val=wishes.make(source, pool[held_out], prepare),
        test=test,
    )


def _read_digits(img_size: int) -> ArraySource:
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    _check_size("digits", img_size, images)
    classes = tuple(str(digit) for digit in bunch.target_names)
    return ArraySource("digits", "digits", Labels(classes, torch.from_numpy(bunch.target).long()), images)


def _read_cifar(name: str, root: Path, wishes: Wishes) -> tuple[Source | None, Source]:
    reader: Callable[..., CIFAR10] = CIFARS[name]
    if not (root / CIFARS[name].base_folder).is_dir():
        return _read_class_folders(name, root, ("test",), wishes, exact_size=wishes.img_size)
    sources = []
    for split in ("train", "test"):
        if split == "train" and not wishes.training:
            continue
        try:  # torchvision compares the md5 of every file before it opens a pickle
            data = reader(root, train=split == "train", download=False)
        except RuntimeError as error:
            raise ValueError(
                f"data.root={root}: a file in {CIFARS[name].base_folder}/ is missing, or its md5 is not the "
                f"published one; download {CIFARS[name].filename} again"
            ) from error
        _check_size(name, wishes.img_size, data.data)
        sources.append(ArraySource(name, split, Labels(tuple(data.classes), torch.tensor(data.targets)), data.data))
    return (sources[0] if wishes.training else None), sources[-1]


def _read_class_folders(
    name: str, root: Path, test_splits: Sequence[str], wishes: Wishes, exact_size: int | None = None
) -> tuple[Source | None, Source]:
    test_split = next((split for split in test_splits if (root / split).is_dir()), None)
    if test_split is None or (wishes.training and not (root / "train").is_dir()):
        raise ValueError(f"data.root={root}: {name} needs {WANTED[name]} there; it holds {first_entries(root)}")
    splits = ["train", test_split] if wishes.training else [test_split]
    found = [class_folders(root, split) for split in splits]
    classes = [folder.name for folder in found[-1]]
    differing = sorted({folder.name for folder in found[0]} ^ set(classes))
    if differing:
        raise ValueError(
            f"data.root={root}: train/ and {test_split}/ must have the same class folders; {len(differing)} "
            f"are in one only: {abridged(differing)}"
        )
    label_of = {class_name: label for label, class_name in enumerate(classes)}
    sources = [
        source_of_folders(name, root, folders, classes, label_of, exact_size=exact_size) for folders in found
    ]
    return (sources[0] if wishes.training else None), sources[-1]


def _checked_root(name: str, root: str | Path | None) -> Path:
    needed = f"set data.root to the folder that holds {WANTED[name]}"
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
