"""Image sets of one shape: some samples of a source, prepared, corrupted or augmented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ares_lightning.data.corruptions import Corruption
from ares_lightning.data.images import Augmentation, ImageError, Preprocessing, to_tensor
from ares_lightning.data.keyed import keyed_random
from ares_lightning.data.sources import Source


class Unreadable(NamedTuple):
    """A sample whose image cannot be used, and why."""

    sample_id: int
    message: str


class Drawn(NamedTuple):
    """A position in a set as it is trained on: one draw of its augmentation, at `side` pixels where that is given.

    All of it travels with the position because persistent workers never see `set_epoch`.
    """

    position: int
    draw: int
    side: int | None = None


Sample = tuple[Tensor, int, int]


@dataclass(frozen=True, eq=False)
class ImageSet(Dataset[Sample | Unreadable]):
    """Some samples of a source, in canonical order: `[i]` is (image uint8 [C, H, W], label, sample id).

    `[i]` with a plain position is the image as it is evaluated: prepared, then corrupted. `[Drawn(i, draw, side)]`
    is the image as it is trained on, augmented by randomness that belongs to (seed, draw, sample id) and nothing
    else; a draw is an epoch, or one of several in it. A sample id is the position in the source, whatever subset
    this is.

    prepare: what is done to an evaluated image, None where all images are as the network wants them.
    skip_unreadable: `[i]` of an image that cannot be used is an `Unreadable`, where it else raises ImageError.
    """

    source: Source
    sample_ids: Tensor  # int64 [N], ascending
    in_chans: int
    prepare: Preprocessing | None = None
    augment: Augmentation | None = None
    seed: int = 0
    corruption: Corruption | None = None
    skip_unreadable: bool = False

    @property
    def name(self) -> str:
        """Name of the set, e.g. `digits`, or `cifar10/fog/3` of a corrupted one."""
        if self.corruption is None:
            return self.source.name
        return f"{self.source.name}/{self.corruption.label}/{self.corruption.severity}"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels."""
        return self.source.labels.classes

    @property
    def labels(self) -> Tensor:
        """Labels of the samples, int64 [N], known without decoding an image."""
        return self.source.labels.labels[self.sample_ids]

    @property
    def outputs(self) -> Tensor | None:
        """The class that each output of the network stands for, as `Labels.outputs` has it."""
        return self.source.labels.outputs

    @property
    def has_several_labels(self) -> bool:
        """Whether samples have more than one right class."""
        return self.source.labels.accepted is not None

    @property
    def preparation(self) -> str:
        """What is done to each image before it is evaluated, in words."""
        return "as stored" if self.prepare is None else str(self.prepare)

    def is_right(self, predictions: Tensor, sample_ids: Tensor) -> Tensor:
        """Return whether each prediction, int64 [N], is a right class of its sample, bool [N]."""
        accepted = self.source.labels.accepted
        if accepted is None:
            return predictions == self.source.labels.labels[sample_ids].to(predictions.device)
        pairs = zip(predictions.tolist(), sample_ids.tolist(), strict=True)
        right = [prediction in accepted[sample_id] for prediction, sample_id in pairs]
        return torch.tensor(right, dtype=torch.bool, device=predictions.device)

    def sample_name(self, sample_id: int) -> str:
        """Return the path of a sample below the root, or a name like `digits/00042`."""
        return self.source.sample_name(sample_id)

    def take(self, positions: Tensor | Sequence[int]) -> ImageSet:
        """Return the set of the samples at `positions` (int [M]), with the sample ids they have here."""
        return replace(self, sample_ids=self.sample_ids[torch.as_tensor(positions, dtype=torch.int64)])

    def corrupted(self, corruption: Corruption) -> ImageSet:
        """Return the same samples under a corruption."""
        return replace(self, corruption=corruption)

    def example(self) -> Tensor:
        """Return the first image that can be read, uint8 [C, H, W].

        Raises ImageError where it cannot be and such images are not skipped, or where none can be read.
        """
        for position in range(len(self)):
            sample = self[position]
            if not isinstance(sample, Unreadable):
                return sample[0]
        raise ImageError(f"data.on_error=skip: not one image of {self.name} can be read")

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, key: int | Drawn) -> Sample | Unreadable:
        drawn = key if isinstance(key, Drawn) else None
        sample_id = int(self.sample_ids[key.position if isinstance(key, Drawn) else key])
        try:
            return self._read(sample_id, drawn), int(self.source.labels.labels[sample_id]), sample_id
        except ImageError as error:
            if not self.skip_unreadable:
                raise
            return Unreadable(sample_id, str(error))

    def _read(self, sample_id: int, drawn: Drawn | None) -> Tensor:
        image = self.source.read(sample_id, self.in_chans)
        if self.augment and drawn:
            rng = keyed_random("augment", self.seed, drawn.draw, sample_id)
            return to_tensor(self.augment(image, rng, drawn.side))
        if self.prepare:
            try:
                image = self.prepare(image)
            except (ValueError, ZeroDivisionError) as error:
                raise ImageError(
                    f"{self.sample_name(sample_id)}: is too small ({image.size}) to be prepared"
                ) from error
        if self.corruption:
            image = self.corruption(image, sample_id)
        return to_tensor(image)


class ImageSets(NamedTuple):
    """The sets of a data set. `val` is held out from the training images; only `train` is augmented.

    `train` and `val` are None where a set has no training images, or they were not asked for.
    """

    train: ImageSet | None
    val: ImageSet | None
    test: ImageSet
