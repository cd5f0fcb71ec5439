"""Where images lie: in memory, in folders, in a Parquet table; each source is a full set in its canonical order."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ares_lightning.data.images import EXTENSIONS, ImageError, decode, to_channels


@dataclass(frozen=True)
class Labels:
    """The right answers of a set, and among which classes they are looked for.

    classes: names, in the order of the labels.
    labels: int64 [N], the class of each sample, the smallest of them where several are right.
    accepted: sample id to all its right classes, where samples have several; None where each has one.
    outputs: int64 [outputs of the network], the class that each output of the network stands for, −1 for those that
        do not count; None where output i is class i. Of the outputs of one class the largest counts.
    """

    classes: tuple[str, ...]
    labels: Tensor
    accepted: Mapping[int, frozenset[int]] | None = None
    outputs: Tensor | None = None

    @property
    def num_outputs(self) -> int:
        """How many outputs a network needs that is asked about these samples."""
        return len(self.classes) if self.outputs is None else len(self.outputs)


class Source(Protocol):
    """A full set in its canonical order, which is what a sample id counts."""

    @property
    def name(self) -> str:
        """Name of the set, e.g. `digits`."""

    @property
    def labels(self) -> Labels:
        """The right answers."""

    def read(self, sample_id: int, in_chans: int) -> Image.Image:
        """Return one image, converted to `in_chans` channels; raises ImageError where it cannot be used."""

    def sample_name(self, sample_id: int) -> str:
        """Return the path of a sample below the root, or a name like `digits/00042`."""


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images held in memory or mapped from a file, uint8 [N, H, W] or [N, H, W, 3], named `folder/<sample id>`."""

    name: str
    folder: str
    labels: Labels
    images: NDArray[np.uint8]

    def read(self, sample_id: int, in_chans: int) -> Image.Image:
        """Return one image, converted to `in_chans` channels."""
        return to_channels(Image.fromarray(np.asarray(self.images[sample_id])), in_chans)

    def sample_name(self, sample_id: int) -> str:
        """Return e.g. `digits/00042`."""
        return f"{self.folder}/{sample_id:05d}"


class FileSource:
    """Image files below a root, decoded when they are asked for.

    names: paths below the root, in canonical order. exact_size: the side that every image must have.
    `read` raises ImageError for a file that cannot be used.
    """

    def __init__(
        self, name: str, root: Path, names: Iterable[str], labels: Labels, exact_size: int | None = None
    ) -> None:
        self.name, self.root, self.labels, self.exact_size = name, root, labels, exact_size
        # One array of bytes: a list of a million strings would be copied page by page into every worker.
        self._names = np.array([os.fsencode(sample_name) for sample_name in names])

    def sample_name(self, sample_id: int) -> str:
        """Return the path below the root, e.g. `test/airplane/0000.jpg`."""
        return os.fsdecode(bytes(self._names[sample_id]))

    def read(self, sample_id: int, in_chans: int) -> Image.Image:
        """Decode one image, converted to `in_chans` channels."""
        path = self.root / self.sample_name(sample_id)
        image = decode(path, in_chans)
        if self.exact_size and image.size != (self.exact_size, self.exact_size):
            raise ImageError(
                f"{path}: is {image.width}x{image.height} pixels where data.img_size={self.exact_size}; "
                f"resize the images to {self.exact_size}x{self.exact_size} or use data=imagefolder"
            )
        return image


class ParquetSource:
    """Images in Parquet files as Hugging Face publishes them: `image.bytes` and a list of right classes in `label`.

    A row group is read at a time and the last one is kept, since samples are mostly asked for in order.
    """

    def __init__(self, name: str, root: Path, files: Sequence[Path], classes: tuple[str, ...]) -> None:
        self.name, self.root = name, root
        self._groups: list[tuple[Path, int]] = []
        first: list[int] = [0]
        lists: list[frozenset[int]] = []
        for path in files:
            try:
                table = pq.ParquetFile(path)
                rights = [frozenset(right) for right in table.read(columns=["label"])["label"].to_pylist()]
                if not all(rights):
                    raise ValueError("a row without a label")
            except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
                raise ValueError(
                    f"data.root={root}: {path.name} is no readable Parquet file with the columns image and "
                    "label, a list of right classes; download it again"
                ) from error
            lists += rights
            for group in range(table.num_row_groups):
                self._groups.append((path, group))
                first.append(first[-1] + table.metadata.row_group(group).num_rows)
        self._first = np.array(first)
        self._kept: tuple[int, list[bytes]] = (-1, [])
        accepted = dict(enumerate(lists))
        labels = torch.tensor([min(right) for right in lists], dtype=torch.int64)
        self.labels = Labels(classes, labels, accepted)

    def sample_name(self, sample_id: int) -> str:
        """Return the file's name and the row, e.g. `validation-00000-of-00013.parquet/00042`."""
        group, _ = self._place(sample_id)
        path = self._groups[group][0]
        start = next(self._first[other] for other, (file, _) in enumerate(self._groups) if file == path)
        return f"{path.relative_to(self.root).as_posix()}/{sample_id - int(start):05d}"

    def read(self, sample_id: int, in_chans: int) -> Image.Image:
        """Decode one image, converted to `in_chans` channels."""
        group, row = self._place(sample_id)
        if self._kept[0] != group:
            path, number = self._groups[group]
            try:
                images = pq.ParquetFile(path).read_row_group(number, columns=["image"])["image"].to_pylist()
                self._kept = (group, [image["bytes"] for image in images])
            except (OSError, KeyError, TypeError, pa.ArrowException) as error:
                raise ImageError(f"{path}: row group {number} cannot be read; download the file again") from error
        return decode(io.BytesIO(self._kept[1][row]), in_chans, self.root / self.sample_name(sample_id))

    def _place(self, sample_id: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._first, sample_id, side="right")) - 1
        return group, sample_id - int(self._first[group])


class ClassFolder(NamedTuple):
    """The images of one class, named by their paths below the root."""

    name: str
    images: list[str]


def class_folders(root: Path, folder: str = "") -> list[ClassFolder]:
    """Return the class folders of `root/folder`, sorted by name.

    Raises ValueError naming `data.root` where there are none, and for one without images.
    """
    place = root / folder
    names = sorted(entry.name for entry in visible(place) if entry.is_dir())
    if not names:
        raise ValueError(
            f"data.root={root}: {f'{folder}/ ' if folder else ''}has no class folders; it holds "
            f"{first_entries(place)}; sort its images into {f'{folder}/' if folder else ''}<class>/"
        )
    found = []
    for name in names:
        path = f"{folder}/{name}" if folder else name
        images = image_names(root, path)
        if not images:
            raise ValueError(
                f"data.root={root}: {path}/ has no images ({' '.join(EXTENSIONS)}); "
                "add them or remove the folder from every split"
            )
        found.append(ClassFolder(name, images))
    return found


def source_of_folders(
    name: str,
    root: Path,
    folders: Sequence[ClassFolder],
    classes: Sequence[str],
    label_of: Mapping[str, int],
    *,
    outputs: Tensor | None = None,
    exact_size: int | None = None,
) -> FileSource:
    """Make a source of class folders; `label_of` gives the label by the folder's name.

    The canonical order is that of the paths, which is not that of the labels where folders are called 0 … 999.
    """
    files = sorted((path, label_of[folder.name]) for folder in folders for path in folder.images)
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return FileSource(
        name, root, (path for path, _ in files), Labels(tuple(classes), labels, outputs=outputs), exact_size
    )


def image_names(root: Path, folder: str) -> list[str]:
    """Return the paths below `root` of the image files in `root/folder`, at any depth, in no order."""
    names: list[str] = []
    seen: set[str] = set()
    for parent, _, file_names in os.walk(root / folder, followlinks=True, onerror=_unreadable):
        if os.path.realpath(parent) in seen:  # a link back to a folder above
            continue
        seen.add(os.path.realpath(parent))
        below_root = Path(parent).relative_to(root)
        names += [
            (below_root / file_name).as_posix()
            for file_name in file_names
            if file_name.lower().endswith(EXTENSIONS) and not file_name.startswith(".")
        ]
    return names


def _unreadable(error: OSError) -> None:
    raise ValueError(f"data.root: {error.filename}: cannot be looked into ({error.strerror})") from error


def visible(folder: Path) -> list[Path]:
    """Return the entries of a folder but hidden ones, and but what file systems keep at their root."""
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".") and entry.name != "lost+found"]


def first_entries(folder: Path) -> str:
    """Return the names of the first entries of a folder, for a message."""
    return abridged(sorted(entry.name for entry in visible(folder))) or "nothing"


def abridged(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
