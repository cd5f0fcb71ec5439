"""ImageNet (ILSVRC 2012): its thousand classes, its published layouts, and the label lists made for it."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from scipy.io import loadmat
from torch import Tensor

from ares_lightning.data.images import EXTENSIONS
from ares_lightning.data.sources import (
    FileSource,
    Labels,
    abridged,
    class_folders,
    first_entries,
    image_names,
    source_of_folders,
    visible,
)

NUM_CLASSES = 1000
SPLITS = {
    "train": ("train", "ILSVRC2012_img_train"),
    "val": ("val", "validation", "ILSVRC2012_img_val"),
}
"""Names under which the two splits are kept; the second ones are those of the archives."""
PARENTS = ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
"""Where below the root they lie: in it, or where Kaggle's archive has them."""
DEVKITS = ("ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12.tar.gz")
VAL_NAME = re.compile(r"ILSVRC2012_val_0*(\d+)\.")
GROUND_TRUTH, META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
KAGGLE_LABELS = "LOC_val_solution.csv"
LAYOUT = (
    "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, the latter also flat beside ILSVRC2012_devkit_t12 or "
    f"{KAGGLE_LABELS}"
)


@cache
def wnids() -> tuple[str, ...]:
    """Return the WordNet ids of the 1000 classes in the order of their labels, which is the alphabet's."""
    return tuple(_read("imagenet_synsets.txt").split())


@cache
def _synonyms() -> tuple[str, ...]:
    """Return all names of each class in WordNet, joined by commas, in the order of the labels."""
    names = dict(line.split("\t", 1) for line in _read("imagenet_synset_to_lemma.txt").splitlines())
    return tuple(names[wnid] for wnid in wnids())


@cache
def lemmas() -> dict[str, int]:
    """Return the label of each class by all its names, joined by commas, but of those that share them."""
    names = _synonyms()
    return {name: place for place, name in enumerate(names) if names.count(name) == 1}


@cache
def class_names() -> tuple[str, ...]:
    """Return the names of the 1000 classes, the first word for each, in the order of their labels."""
    return tuple(names.split(",")[0] for names in _synonyms())


@cache
def places() -> dict[str, int]:
    """Return the label of each WordNet id."""
    return {wnid: place for place, wnid in enumerate(wnids())}


@cache
def classes_of(variant: str) -> tuple[int, ...]:
    """Return the 200 labels of ImageNet-A (`a`) or ImageNet-R (`r`), ascending."""
    return tuple(sorted(map(int, _read(f"imagenet_{variant}_indices.txt").split())))


def among(chosen: Sequence[int]) -> Tensor:
    """Return the `outputs` of a set whose classes are the labels `chosen`: the others do not count."""
    outputs = torch.full((NUM_CLASSES,), -1, dtype=torch.int64)
    outputs[list(chosen)] = torch.arange(len(chosen))
    return outputs


def read_imagenet(root: Path, split: str) -> FileSource:
    """Find the images of `train` or `val` below `root`, whose labels are places among the 1000 classes.

    `root` may be the folder of the split's own class folders. Fewer classes than 1000 are a part of ImageNet; the
    labels are what they are in the whole.

    Raises ValueError naming `data.root` for a layout that is none of the published, and for folders that are no
    classes of ImageNet.
    """
    folder = find_split(root, split)
    if folder is None:
        raise ValueError(f"data.root={root}: imagenet needs {LAYOUT} there; it holds {first_entries(root)}")
    if any(entry.is_dir() for entry in visible(root / folder)):
        return read_wnid_folders("imagenet", root, folder)
    return _read_flat(root, folder)


def find_split(root: Path, split: str) -> str | None:
    """Return the folder of a split below `root`, empty where it is `root`, None where there is none."""
    if split == "val" and any(entry.name in places() for entry in visible(root)):
        return ""
    candidates = [f"{parent}/{name}".lstrip("/") for parent in PARENTS for name in SPLITS[split]]
    return next((folder for folder in candidates if (root / folder).is_dir()), None)


def read_wnid_folders(name: str, root: Path, folder: str, chosen: Sequence[int] | None = None) -> FileSource:
    """Read class folders named by WordNet ids.

    chosen: the labels of the set's classes, where the network is to answer among these alone.

    Raises ValueError naming `data.root` for folders that are none of the classes.
    """
    folders = class_folders(root, folder)
    unknown = [found.name for found in folders if found.name not in places()]
    if unknown:
        raise ValueError(
            f"data.root={root}: {len(unknown)} of {len(folders)} folders{f' in {folder}/' if folder else ''} "
            f"are no class of ImageNet: {abridged(unknown)}; remove them, or use data=imagefolder"
        )
    if chosen is None:
        return source_of_folders(name, root, folders, class_names(), places())
    label_of = {wnids()[place]: label for label, place in enumerate(chosen)}
    others = [found.name for found in folders if found.name not in label_of]
    if others:
        raise ValueError(
            f"data.root={root}: {len(others)} of {len(folders)} folders are none of the {len(chosen)} classes of "
            f"{name}: {abridged(others)}; it is another set"
        )
    classes = [class_names()[place] for place in chosen]
    return source_of_folders(name, root, folders, classes, label_of, outputs=among(chosen))


def read_real(root: Path) -> tuple[FileSource, Tensor]:
    """Find the validation images with the labels of ImageNet-ReaL (Beyer et al. 2020, arXiv 2006.07159).

    Returns the source and the ids, int64 [N], of the images that have a label there; ids are those of ImageNet.
    Raises ValueError as `read_imagenet` does, and for file names without the validation set's number.
    """
    source = read_imagenet(root, "val")
    lists = json.loads(_read("imagenet_real_labels.json"))
    accepted = {}
    for sample_id in range(len(source.labels.labels)):
        right = lists[_val_number(root, source.sample_name(sample_id)) - 1]
        if right:
            accepted[sample_id] = frozenset(right)
    labels = source.labels.labels.clone()
    for sample_id, right in accepted.items():
        labels[sample_id] = min(right)
    source.name, source.labels = "imagenet_real", Labels(source.labels.classes, labels, accepted)
    return source, torch.tensor(list(accepted), dtype=torch.int64)


def has_numbered_images(root: Path) -> bool:
    """Return whether there are validation images below `root`, and under their published names."""
    folder = find_split(root, "val")
    if folder is None:
        return False
    names = (name for _, _, names in os.walk(root / folder) for name in names if name.lower().endswith(EXTENSIONS))
    return VAL_NAME.search(next(names, "")) is not None


def _val_number(root: Path, sample_name: str) -> int:
    number = VAL_NAME.search(sample_name)
    if number is None or not 1 <= int(number[1]) <= 50_000:
        raise ValueError(
            f"data.root={root}: {sample_name} is not called ILSVRC2012_val_<number>, by which its labels are "
            "found; use the validation images under their published names"
        )
    return int(number[1])


def _read_flat(root: Path, folder: str) -> FileSource:
    names = sorted(image_names(root, folder))
    if not names:
        raise ValueError(f"data.root={root}: {folder}/ has no images; unpack ILSVRC2012_img_val.tar there")
    wnid_of = _flat_labels(root, folder)
    labels = []
    for name in names:
        wnid = wnid_of.get(Path(name).stem)
        if wnid is None:
            raise ValueError(
                f"data.root={root}: {name} is not among the {len(wnid_of)} files that the labels are of; remove it"
            )
        labels.append(places()[wnid])
    return FileSource("imagenet", root, names, Labels(class_names(), torch.tensor(labels)))


def _flat_labels(root: Path, folder: str) -> Mapping[str, str]:
    """Return the WordNet id of each validation image by the stem of its name, from whichever list is beside
    them."""
    around = [place for place in (root / folder, *(root / folder).parents) if place.is_relative_to(root)]
    for place in [*around, root.parent]:
        if (place / KAGGLE_LABELS).is_file():
            return _kaggle_labels(place / KAGGLE_LABELS)
        for name in DEVKITS:
            if (place / name).exists():
                return _devkit_labels(place / name)
    raise ValueError(
        f"data.root={root}: {folder}/ is flat, and neither {' nor '.join(DEVKITS)} nor {KAGGLE_LABELS} is "
        "beside it; put one there, or sort the images into <wnid> folders"
    )


def _kaggle_labels(path: Path) -> Mapping[str, str]:
    """Read Kaggle's table: an image, and its class before each of its boxes."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            labels = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    except (KeyError, IndexError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"data.root={path.parent}: {path.name} is not as published; download it again") from error
    unknown = set(labels.values()) - places().keys()
    if unknown:
        raise ValueError(f"data.root={path.parent}: {path.name} has {unknown.pop()}, which is no class of ImageNet")
    return labels


def _devkit_labels(devkit: Path) -> Mapping[str, str]:
    """Read the validation labels of the development kit, whose class numbers are not the usual labels."""
    try:
        ground_truth, meta = (_devkit_file(devkit, name) for name in (GROUND_TRUTH, META))
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        wnid_of = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
        numbers = map(int, ground_truth.decode().split())
        return {f"ILSVRC2012_val_{place:08d}": wnid_of[number] for place, number in enumerate(numbers, 1)}
    except (OSError, KeyError, ValueError, TypeError, tarfile.TarError) as error:
        raise ValueError(
            f"data.root={devkit.parent}: {devkit.name} cannot be read ({' '.join(str(error).split())}); "
            "download it again"
        ) from error


def _devkit_file(devkit: Path, name: str) -> bytes:
    if devkit.is_dir():
        return (devkit / name).read_bytes()
    with tarfile.open(devkit) as archive:
        member = archive.extractfile(f"{DEVKITS[0]}/{name}")
        if member is None:
            raise KeyError(name)
        return member.read()


def _read(name: str) -> str:
    return files("timm.data").joinpath("_info", name).read_text(encoding="utf-8")
