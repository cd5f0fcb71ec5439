"""A user's own data set: any map-style dataset of PIL images and labels as a source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from ares_lightning.data.images import (
    Crop,
    ImageError,
    resized_crop_and_flip,
    shift_and_flip,
    to_channels,
    unchanged,
)
from ares_lightning.data.sources import Labels

AUGMENTS: dict[str, Crop] = {
    "none": unchanged,
    "shift_and_flip": shift_and_flip,
    "resized_crop_and_flip": resized_crop_and_flip,
}
"""How training images are cut out, by the word that `data.augment` has for it."""
LABEL_ATTRIBUTES = ("targets", "labels")
"""Where torchvision's data sets keep all their labels."""


@dataclass(frozen=True, eq=False, kw_only=True)
class OwnSets:
    """The datasets of a user, with `len()` and `[i]`: (PIL image, label), the same whenever it is asked for.

    train: None where it is not needed. settings: of each of the two, as in a config. augment: a key of AUGMENTS.
    num_classes: None for as many as there are `.classes`, or as the largest label tells.

    Raises ValueError naming the key.
    """

    test: Any
    train: Any = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    augment: str = "none"
    num_classes: int | None = None

    def __post_init__(self) -> None:
        if self.augment not in AUGMENTS:
            raise ValueError(f"data.augment={self.augment}: expected one of {', '.join(AUGMENTS)}")

    def sources(self, name: str, exact_size: int | None) -> tuple[DatasetSource | None, DatasetSource]:
        """Return the training images, if there are any, and the test images, of a data set called `name`.

        Labels are those of `.targets` or `.labels`, without decoding an image, else of every sample.
        """
        datasets = {split: dataset for split in ("train", "test") if (dataset := getattr(self, split)) is not None}
        labels = {split: _labels(split, dataset) for split, dataset in datasets.items()}
        names = {split: _classes(dataset) for split, dataset in datasets.items()}
        classes = names["test"]
        if "train" in names and names["train"] != classes:
            raise ValueError("data.test: its .classes are not those of data.train; the two must have the same")
        if not isinstance(classes, tuple):
            largest = max(int(each.max()) for each in labels.values())
            classes = range(largest + 1 if self.num_classes is None else self.num_classes)
        known = tuple(map(str, classes))
        for split, each in labels.items():
            if int(each.max()) >= len(known):
                raise ValueError(f"data.{split}: has label {int(each.max())}, there are {len(known)} classes")
        made = {
            split: DatasetSource(
                name, split, Labels(known, labels[split]), dataset, exact_size, self.settings.get(split, {})
            )
            for split, dataset in datasets.items()
        }
        return made.get("train"), made["test"]


@dataclass(frozen=True, eq=False)
class DatasetSource:
    """A dataset as a source; sample ids are positions, named `<split>/<position>`.

    exact_size: the side that every image must have, None for any. settings: of the dataset, as in a config.
    """

    name: str
    split: str
    labels: Labels
    dataset: Any
    exact_size: int | None
    settings: Mapping[str, Any]

    @cached_property
    def identity(self) -> str:
        """What tells the dataset from others: its settings, of a `root` that is a file the content.

        Where they lie does not count. The file, of whatever size, is read once.
        """
        settings = {key: value for key, value in self.settings.items() if key != "root"}
        root = Path(str(self.settings.get("root", "")))
        content = None
        if root.is_file():
            with root.open("rb") as file:
                content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
        return json.dumps([settings, content], sort_keys=True)

    def sample_name(self, sample_id: int) -> str:
        """Return e.g. `test/00042`."""
        return f"{self.split}/{sample_id:05d}"

    def read(self, sample_id: int, in_chans: int) -> Image.Image:
        """Return one image, converted to `in_chans` channels.

        Raises ImageError for what the dataset cannot give, and for what is not as its labels and config say.
        """
        where = f"data.{self.split}: sample {sample_id}"
        image, label = _sample(where, self.dataset, sample_id)
        try:
            label = int(np.asarray(label).item())
        except Exception as error:  # each type fails in its own way
            raise ImageError(f"{where} has a label of type {type(label).__name__}; give a whole number") from error
        if not isinstance(image, Image.Image):
            raise ImageError(f"{where} is a {type(image).__name__}; give PIL images, without transform")
        listed = int(self.labels.labels[sample_id])
        if label != listed:
            raise ImageError(f"{where} has label {label}, in the list of all labels {listed}; mend one of them")
        if self.exact_size is not None and image.size != (self.exact_size, self.exact_size):
            raise ImageError(
                f"{where} is {image.width}x{image.height} pixels where data.img_size={self.exact_size}; "
                "data.preprocess=ares resizes images of any size"
            )
        return to_channels(image, in_chans)


def _classes(dataset: Any) -> Any:
    """Return the names of the classes as a tuple of words, anything else for a dataset that has none."""
    classes = getattr(dataset, "classes", None)
    if isinstance(classes, np.ndarray):
        classes = classes.tolist()
    return tuple(map(str, classes)) if isinstance(classes, Sequence) else classes


def _sample(where: str, dataset: Any, sample_id: int) -> tuple[Any, Any]:
    """Return the image and the label of a sample as the dataset gives them."""
    kind = type(dataset).__name__
    try:
        sample = dataset[sample_id]
    except Exception as error:  # of somebody else's code
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ImageError(f"{where} cannot be read ({told}); mend {kind}") from error
    if not isinstance(sample, Sequence) or len(sample) != 2:
        num = f" of {len(sample)}" if isinstance(sample, Sized) else ""
        raise ImageError(f"{where} is a {type(sample).__name__}{num}; have {kind} return (image, label)")
    return sample[0], sample[1]


def _labels(split: str, dataset: Any) -> Tensor:
    """Return the labels of a dataset, int64 [N]."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(f"data.{split}: {type(dataset).__name__} has no length; give a map-style dataset")
    listed = next((getattr(dataset, name) for name in LABEL_ATTRIBUTES if hasattr(dataset, name)), None)
    if listed is None:
        listed = [_sample(f"data.{split}: sample {i}", dataset, i)[1] for i in range(len(dataset))]
    labels = np.asarray(listed)
    labels = labels.reshape(-1) if labels.size == len(dataset) else labels
    is_plain = labels.shape == (len(dataset),) and np.issubdtype(labels.dtype, np.integer)
    if not is_plain or not len(labels) or labels.min() < 0:
        raise ValueError(
            f"data.{split}: has labels of shape {list(labels.shape)} and type {labels.dtype} for {len(dataset)} "
            "images; expected a whole number, 0 or more, for each image"
        )
    return torch.from_numpy(labels.astype(np.int64))
