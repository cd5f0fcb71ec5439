"""The out-of-distribution sets of ImageNet and CIFAR: where their authors put what, and what counts as right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ares_lightning.data import imagenet
from ares_lightning.data.corruptions import COMMON, EXTRA, SEVERITIES
from ares_lightning.data.images import Preprocessing
from ares_lightning.data.sources import (
    ArraySource,
    Labels,
    ParquetSource,
    Source,
    abridged,
    class_folders,
    source_of_folders,
    visible,
)

C_BAR = (
    *("blue_noise_sample", "brownish_noise", "caustic_refraction", "checkerboard_cutout", "cocentric_sine_waves"),
    *("inverse_sparkles", "perlin_noise", "plasma_noise", "single_frequency_greyscale", "sparkles"),
)
"""The corruptions of ImageNet-C-bar, spelt as published."""
THREE_D = (
    *("near_focus", "far_focus", "bit_error", "color_quant", "flash", "fog_3d", "h265_abr", "h265_crf"),
    *("iso_noise", "low_light", "xy_motion_blur", "z_motion_blur"),
)
"""The corruptions of ImageNet-3DCC."""
C_ARCHIVES = ("noise", "blur", "weather", "digital", "extra")
"""The archives of ImageNet-C, whose names may stand as folders above the corruptions."""
CIFAR_TEST_SIZE = 10_000
"""Images of one severity in the files of CIFAR-10-C and CIFAR-100-C."""
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
OBJECTNET_BORDER = 2
"""Width in pixels of the red border that marks the images of ObjectNet."""


@dataclass(frozen=True)
class Cell:
    """One corruption at one severity, 1 to 5."""

    corruption: str
    severity: int


@dataclass(frozen=True)
class Variant:
    """One published set.

    key: its name here. title: its name in the literature. network: the data set whose classes a network must know.
    folders: names under which it is published; case, `-`, `_`, `.` and spaces do not matter.
    layout: a key of LAYOUTS. rule: which answers count, a key of RULES.
    transform: `val`, as the validation images; `stored`, as it is where it has the network's size; `objectnet`,
        without the border, its shorter side resized to the size of the crop.
    metric: `accuracy`, or `mce`, the mean corruption error by AlexNet's.
    corruptions: the names of its corruptions, empty where it has none.
    """

    key: str
    title: str
    network: str
    folders: tuple[str, ...]
    layout: str
    rule: str
    transform: str
    metric: str
    source: str
    citation: str
    corruptions: tuple[str, ...] = field(default=(), repr=False)

    @property
    def words(self) -> str:
        """How its files lie, in words."""
        return LAYOUTS[self.layout].words

    @property
    def is_of_validation(self) -> bool:
        """Whether its images are validation images of ImageNet."""
        return self.layout in ("real", "validation")

    def prepare(self, val: Preprocessing) -> Preprocessing:
        """Return what is done to its images, given what is done to validation images."""
        if self.transform == "stored":
            return Preprocessing(val.crop, interpolation=val.interpolation)
        if self.transform == "objectnet":
            return Preprocessing(val.crop, val.crop, val.interpolation, border=OBJECTNET_BORDER)
        return val


RULES = {
    "all": "the largest of all outputs",
    "among_a": "the largest output among the 200 classes of ImageNet-A",
    "among_r": "the largest output among the 200 classes of ImageNet-R",
    "objectnet_all": "the largest of all 1000 outputs, right where it maps to the object; unmapped ones are wrong",
    "objectnet_113": "the largest output among those that map to one of the 113 objects",
    "lists": "the largest of all outputs, right where it is in the image's list",
}
"""What counts as an answer; which of them is right follows from the folder or the list."""

_IMAGENETV2 = ("https://github.com/modestyachts/ImageNetV2", "Recht et al. 2019, arXiv 1902.10811")
_OBJECTNET = ("https://objectnet.dev", "Barbu et al. 2019, NeurIPS")
_IMAGENET_A = ("https://github.com/hendrycks/natural-adv-examples", "Hendrycks et al. 2021, arXiv 1907.07174")
_IMAGENET_R = ("https://github.com/hendrycks/imagenet-r", "Hendrycks et al. 2021, arXiv 2006.16241")
_CORRUPTIONS = "Hendrycks & Dietterich 2019, arXiv 1903.12261"
_OF_IMAGENET = ("imagenet", "ilsvrc2012", "imagenet-1k")
_COMMON = COMMON + EXTRA

VARIANTS = {
    variant.key: variant
    for variant in (
        Variant(
            "imagenet_v2", "ImageNet-V2, matched frequency", "imagenet",
            ("imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency", "imagenet-v2"),
            "numbered", "all", "val", "accuracy", *_IMAGENETV2,
        ),
        Variant(
            "imagenet_v2_threshold", "ImageNet-V2, threshold 0.7", "imagenet",
            ("imagenetv2-threshold0.7-format-val", "imagenetv2-threshold0.7"),
            "numbered", "all", "val", "accuracy", *_IMAGENETV2,
        ),
        Variant(
            "imagenet_v2_top", "ImageNet-V2, top images", "imagenet",
            ("imagenetv2-top-images-format-val", "imagenetv2-top-images"),
            "numbered", "all", "val", "accuracy", *_IMAGENETV2,
        ),
        Variant(
            "imagenet_real", "ImageNet-ReaL", "imagenet", _OF_IMAGENET, "real", "lists", "val", "accuracy",
            "https://github.com/google-research/reassessed-imagenet", "Beyer et al. 2020, arXiv 2006.07159",
        ),
        Variant(
            "imagenet_a", "ImageNet-A", "imagenet", ("imagenet-a",), "wnid", "among_a", "val", "accuracy",
            *_IMAGENET_A,
        ),
        Variant(
            "imagenet_200_a", "ImageNet-200, the validation images of ImageNet-A's classes", "imagenet",
            _OF_IMAGENET, "validation", "among_a", "val", "accuracy", *_IMAGENET_A,
        ),
        Variant(
            "imagenet_r", "ImageNet-R", "imagenet", ("imagenet-r", "imagenet-rendition"), "wnid", "among_r", "val",
            "accuracy", *_IMAGENET_R,
        ),
        Variant(
            "imagenet_200_r", "ImageNet-200, the validation images of ImageNet-R's classes", "imagenet",
            _OF_IMAGENET, "validation", "among_r", "val", "accuracy", *_IMAGENET_R,
        ),
        Variant(
            "imagenet_sketch", "ImageNet-Sketch", "imagenet", ("sketch", "imagenet-sketch"), "wnid", "all", "val",
            "accuracy", "https://github.com/HaohanWang/ImageNet-Sketch", "Wang et al. 2019, arXiv 1905.13549",
        ),
        Variant(
            "imagenet_stylized", "Stylized-ImageNet", "imagenet",
            ("stylized-imagenet", "imagenet-stylized", "imagenet-styletransfer"), "val", "all", "stored",
            "accuracy", "https://github.com/rgeirhos/Stylized-ImageNet", "Geirhos et al. 2019, arXiv 1811.12231",
        ),
        Variant(
            "objectnet", "ObjectNet, answers among all 1000 classes", "imagenet", ("objectnet-1.0", "objectnet"),
            "objectnet", "objectnet_all", "objectnet", "accuracy", *_OBJECTNET,
        ),
        Variant(
            "objectnet_113", "ObjectNet, answers among its 113 classes", "imagenet",
            ("objectnet-1.0", "objectnet"), "objectnet", "objectnet_113", "objectnet", "accuracy", *_OBJECTNET,
        ),
        Variant(
            "imagenet_hard", "ImageNet-Hard", "imagenet", ("imagenet-hard",), "parquet", "lists", "val", "accuracy",
            "https://huggingface.co/datasets/taesiri/imagenet-hard", "Taesiri et al. 2023, arXiv 2304.05538",
        ),
        Variant(
            "imagenet_c", "ImageNet-C", "imagenet", ("imagenet-c",), "corruptions", "all", "stored", "mce",
            "https://zenodo.org/records/2235448", _CORRUPTIONS, _COMMON,
        ),
        Variant(
            "imagenet_c_bar", "ImageNet-C-bar", "imagenet", ("imagenet-c-bar", "inc-bar"), "corruptions", "all",
            "stored", "accuracy", "https://github.com/facebookresearch/augmentation-corruption",
            "Mintun et al. 2021, arXiv 2102.11273", C_BAR,
        ),
        Variant(
            "imagenet_3dcc", "ImageNet-3DCC", "imagenet", ("imagenet-3dcc",), "corruptions", "all", "stored", "mce",
            "https://github.com/EPFL-VILAB/3DCommonCorruptions", "Kar et al. 2022, arXiv 2203.01441", THREE_D,
        ),
        Variant(
            "cifar10_c", "CIFAR-10-C", "cifar10", ("cifar-10-c",), "arrays", "all", "stored", "accuracy",
            "https://zenodo.org/records/2535967", _CORRUPTIONS, _COMMON,
        ),
        Variant(
            "cifar100_c", "CIFAR-100-C", "cifar100", ("cifar-100-c",), "arrays", "all", "stored", "accuracy",
            "https://zenodo.org/records/3555552", _CORRUPTIONS, _COMMON,
        ),
    )
}  # fmt: skip
"""The sets by key, in the order in which they are evaluated."""


def find_variant(variant: Variant, root: Path, *, itself: bool = True) -> Path | None:
    """Return the folder below `root` that bears one of the set's names and has its layout; None where none does.

    itself: whether `root` may be the folder as well, whatever it is called.
    """
    if not root.is_dir():
        return None
    wanted = {_plain(name) for name in variant.folders}
    for entry in sorted(visible(root)):
        if _plain(entry.name) in wanted and entry.is_dir():
            inner = find_variant(variant, entry)  # archives often hold a folder of their own name
            if inner is not None:
                return inner
    return root if itself and LAYOUTS[variant.layout].is_in(variant, root) else None


def cells(variant: Variant, folder: Path) -> list[Cell]:
    """Return the corruptions and severities that a set of corruptions has, in the order of their publication."""
    if variant.layout == "arrays":
        return [
            Cell(name, severity)
            for name in variant.corruptions
            if (folder / f"{name}.npy").is_file()
            for severity in SEVERITIES
        ]
    return [
        Cell(name, severity)
        for name in variant.corruptions
        for severity in SEVERITIES
        if (_corruption_folder(folder, name) / str(severity)).is_dir()
    ]


def open_variant(variant: Variant, folder: Path, cell: Cell | None = None) -> tuple[Source, Tensor]:
    """Read a set, or one cell of a set of corruptions, from its own folder.

    Returns the source and the ids of the samples that count, int64 [N].
    Raises ValueError naming `data.root` for a folder that is not as published, and for a missing cell.
    """
    if variant.corruptions:
        found = cells(variant, folder)
        if cell is None or cell not in found:
            whole = cell is not None and cell.severity
            asked = f"{cell.corruption} at severity {cell.severity} is not there; " if cell and whole else ""
            names = list(dict.fromkeys(known.corruption for known in found))
            raise ValueError(
                f"data.corruption: {asked}{variant.title} in {folder} has {abridged(names) or 'no corruption'}; "
                "give data.corruption and data.severity, or eval=ood for all"
            )
    source, sample_ids = LAYOUTS[variant.layout].read(variant, folder, cell)
    if sample_ids is None:
        sample_ids = torch.arange(len(source.labels.labels))
    return source, sample_ids


@dataclass(frozen=True)
class Layout:
    """How files lie: in words, a test whether they do, and their reader."""

    words: str
    is_in: Callable[[Variant, Path], bool]
    read: Callable[[Variant, Path, Cell | None], tuple[Source, Tensor | None]]


def _read_wnids(variant: Variant, folder: Path, cell: Cell | None) -> tuple[Source, None]:
    return imagenet.read_wnid_folders(variant.key, folder, "", _chosen(variant)), None


def _read_val_or_wnids(variant: Variant, folder: Path, cell: Cell | None) -> tuple[Source, None]:
    below = "val" if _has_wnids(folder / "val") else ""
    return imagenet.read_wnid_folders(variant.key, folder, below), None


def _read_validation(variant: Variant, folder: Path, cell: Cell | None) -> tuple[Source, Tensor]:
    """Read the validation images of some classes; sample ids are those of ImageNet."""
    source = imagenet.read_imagenet(folder, "val")
    chosen = _chosen(variant)
    assert chosen is not None
    outputs = imagenet.among(chosen)
    labels = outputs[source.labels.labels]
    classes = tuple(imagenet.class_names()[place] for place in chosen)
    source.name, source.labels = variant.key, Labels(classes, labels, outputs=outputs)
    return source, (labels >= 0).nonzero().squeeze(1)


def _chosen(variant: Variant) -> tuple[int, ...] | None:
    return imagenet.classes_of(variant.rule.removeprefix("among_")) if variant.rule.startswith("among_") else None


def _read_numbered(variant: Variant, folder: Path, cell: Cell | None) -> tuple[Source, None]:
    """Read folders called by the number of their class, `7` or `0007`, or by its WordNet id."""
    folders = class_folders(folder)
    label_of = {}
    for name, images in folders:
        number = int(name) if name.isdecimal() else imagenet.places().get(name, -1)
        if not 0 <= number < imagenet.NUM_CLASSES:
            raise ValueError(
                f"data.root={folder}: {name}/ is neither a number from 0 to 999 nor a class of ImageNet; remove it"
            )
        label_of[name] = number
        nested = [image for image in images if image.count("/") > 1]
        if nested:
            raise ValueError(f"data.root={folder}: {nested[0]} lies deeper than <class>/<image>; it is another set")
    return source_of_folders(variant.key, folder, folders, imagenet.class_names(), label_of), None


def _read_real(variant: Variant, folder: Path, cell: Cell | None) -> tuple[Source, Tensor]:
    return imagenet.read_real(folder)


def _read_objectnet(variant: Variant, folder: Path, cell: Cell | None) -> tuple[Source, None]:
    """Read the objects that ImageNet knows, with the mapping files of the set itself."""
    mappings = folder / "mappings"
    label_of_folder, imagenet_names = (
        _read_mapping(mappings / name)
        for name in ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json")
    )
    lemmas = imagenet.lemmas()
    objects = {
        name: [lemmas[part] for part in imagenet_names[label].split("; ")]
        for name, label in label_of_folder.items()
        if label in imagenet_names
    }
    classes = sorted(objects)
    other = -1 if variant.rule == "objectnet_113" else len(classes)
    outputs = torch.full((imagenet.NUM_CLASSES,), other, dtype=torch.int64)
    for label, name in enumerate(classes):
        outputs[objects[name]] = label
    known = [found for found in class_folders(folder, "images") if found.name in objects]
    label_of = {name: label for label, name in enumerate(classes)}
    names = classes if other == -1 else [*classes, "none of these"]
    return source_of_folders(variant.key, folder, known, names, label_of, outputs=outputs), None


def _read_mapping(path: Path) -> Mapping[str, str]:
    try:
        mapping: Mapping[str, str] = dict(json.loads(path.read_text(encoding="utf-8")).items())
        return mapping
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"data.root={path.parents[1]}: mappings/{path.name} cannot be read; it comes with ObjectNet"
        ) from error


def _read_corruption(variant: Variant, folder: Path, cell: Cell | None) -> tuple[Source, None]:
    assert cell is not None
    place = _corruption_folder(folder, cell.corruption) / str(cell.severity)
    return imagenet.read_wnid_folders(_name(variant, cell), folder, place.relative_to(folder).as_posix()), None


def _name(variant: Variant, cell: Cell) -> str:
    return f"{variant.key}/{cell.corruption}/{cell.severity}"


def _corruption_folder(folder: Path, name: str) -> Path:
    places = [folder / name, *(folder / archive / name for archive in C_ARCHIVES)]
    return next((place for place in places if place.is_dir()), places[0])


def _read_arrays(variant: Variant, folder: Path, cell: Cell | None) -> tuple[Source, None]:
    """Read one severity of `<corruption>.npy`, five times the 10,000 test images in the order of the severities."""
    assert cell is not None
    path = folder / f"{cell.corruption}.npy"
    try:  # a mapped file: one severity is 30 MB, all of them 2.9 GB
        images, labels = np.load(path, mmap_mode="r"), np.load(folder / "labels.npy")
    except (OSError, ValueError) as error:
        raise ValueError(f"data.root={folder}: {path.name} or labels.npy cannot be read ({error})") from error
    size = len(labels) // len(SEVERITIES)
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(labels) or size * 5 != len(labels):
        raise ValueError(
            f"data.root={folder}: {path.name} is {images.dtype} {list(images.shape)} with {len(labels)} labels; "
            f"expected uint8 [{5 * CIFAR_TEST_SIZE}, 32, 32, 3] and as many labels"
        )
    part = slice((cell.severity - 1) * size, cell.severity * size)
    classes = CIFAR10_CLASSES if variant.network == "cifar10" else tuple(map(str, range(100)))
    right = torch.from_numpy(labels[part].astype(np.int64))
    place = f"{cell.corruption}/{cell.severity}"
    return ArraySource(_name(variant, cell), place, Labels(classes, right), images[part]), None


def _read_parquet(variant: Variant, folder: Path, cell: Cell | None) -> tuple[Source, None]:
    return ParquetSource(variant.key, folder, _parquet_files(folder), imagenet.class_names()), None


def _parquet_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))


def _has_wnids(folder: Path) -> bool:
    known = imagenet.places()
    return folder.is_dir() and any(entry.name in known and entry.is_dir() for entry in visible(folder))


def _has_numbered(variant: Variant, folder: Path) -> bool:
    known = imagenet.places()
    return any(entry.is_dir() and (entry.name.isdecimal() or entry.name in known) for entry in visible(folder))


LAYOUTS = {
    "wnid": Layout("<wnid>/*", lambda _, folder: _has_wnids(folder), _read_wnids),
    "val": Layout(
        "val/<wnid>/* or <wnid>/*",
        lambda _, folder: _has_wnids(folder / "val") or _has_wnids(folder),
        _read_val_or_wnids,
    ),
    "numbered": Layout("<0 … 999>/*, <0000 … 0999>/* or <wnid>/*", _has_numbered, _read_numbered),
    "real": Layout(
        "the validation images of ImageNet under their published names",
        lambda _, folder: imagenet.has_numbered_images(folder),
        _read_real,
    ),
    "validation": Layout(
        "the validation images of ImageNet",
        lambda _, folder: imagenet.find_split(folder, "val") is not None,
        _read_validation,
    ),
    "objectnet": Layout(
        "images/<object>/*.png and mappings/*.json",
        lambda _, folder: (folder / "images").is_dir() and (folder / "mappings").is_dir(),
        _read_objectnet,
    ),
    "corruptions": Layout(
        "<corruption>/<1 … 5>/<wnid>/*", lambda variant, folder: bool(cells(variant, folder)), _read_corruption
    ),
    "arrays": Layout(
        "<corruption>.npy and labels.npy", lambda _, folder: (folder / "labels.npy").is_file(), _read_arrays
    ),
    "parquet": Layout(
        "data/*.parquet with the columns image and label",
        lambda _, folder: bool(_parquet_files(folder)),
        _read_parquet,
    ),
}


def _plain(name: str) -> str:
    return re.sub(r"[-_. ]", "", name.lower())
