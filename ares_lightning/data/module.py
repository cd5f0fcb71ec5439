"""The data of a run: three sets and their loaders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch

from ares_lightning.data.datasets import ImageSet
from ares_lightning.data.images import Preprocessing
from ares_lightning.data.loading import Batch, ImageLoader, ShardedSampler
from ares_lightning.data.own import OwnSets
from ares_lightning.data.phases import Phases
from ares_lightning.data.published import OF_ANY_SIZE, Wishes, load_image_sets
from ares_lightning.data.variants import VARIANTS


class RobustDataModule(L.LightningDataModule):
    """Training, validation and test set of one data set, as batches of uint8 images in canonical sample ids.

    `train_set`, `val_set` and `test_set` are there after construction, and so are mistakes: folders are
    scanned and one image is decoded; the rest is decoded when it is asked for. Without `training`, only the test
    images are looked for. `batch_size` and `eval_batch_size` count the images of one rank. `num_val` training
    images are held out as `val_set` to choose checkpoints by; the test set never is. `split_seed` draws the
    splits, `seed` the training order and the augmentation. `num_classes`, the number of outputs that a network
    needs, is taken from the data. `network` is the data set whose classes a network must know. `repeats` is that
    of repeated augmentation. With `on_error="skip"`, images that cannot be used are left out; `skipped` tells why,
    by sample name. `own` are a user's datasets, of which `name` is then the name.

    `resolution` is the side of the training images from an epoch on, as {epoch: pixels}; None is `img_size`
    throughout. `batch_size` may be such a mapping too. Where it `varies`, the loader of the training set is made
    for one epoch: the Trainer needs reload_dataloaders_every_n_epochs=1.

    What an objective asks for: `num_views` rows for each image of a batch, one after the other, in different draws
    of the augmentation, so that a batch has num_views · batch_size rows (consistency regularisation); `replays`,
    how often in a row the training loader gives out each batch (Free adversarial training, Shafahi et al. 2019,
    arXiv 1904.12843). The others are as `Wishes` has them.

    Raises ValueError naming the key, its value and the remedy.
    """

    def __init__(
        self,
        *,
        name: str,
        root: str | Path | None = None,
        img_size: int,
        in_chans: int,
        num_classes: int | None = None,
        batch_size: int | Mapping[int, int],
        eval_batch_size: int,
        num_workers: int,
        num_val: int,
        split_seed: int = 0,
        seed: int = 0,
        training: bool = True,
        preprocessing: Preprocessing | None = None,
        randaugment: str | None = None,
        color_jitter: float = 0.0,
        resolution: Mapping[int, int] | None = None,
        repeats: int = 1,
        num_views: int = 1,
        replays: int = 1,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        corruption: str | None = None,
        severity: int | None = None,
        on_error: str = "raise",
        own: OwnSets | None = None,
    ) -> None:
        super().__init__()
        _check_at_least(1, img_size=img_size, eval_batch_size=eval_batch_size)
        _check_at_least(0, num_workers=num_workers)
        if training:
            _check_at_least(1, num_val=num_val)
        if type(repeats) is not int or repeats < 1:
            raise ValueError(f"aug.repeats={repeats}: must be a whole number, 1 or more")
        self.batch_size = Phases("data.batch_size", batch_size)
        self.resolution = _resolution(name, resolution, own)
        if in_chans not in (1, 3):
            raise ValueError(f"data.in_chans={in_chans}: must be 1 (grey) or 3 (RGB)")
        self.wishes = Wishes(
            img_size=img_size,
            in_chans=in_chans,
            num_val=num_val,
            split_seed=split_seed,
            seed=seed,
            training=training,
            preprocessing=preprocessing,
            randaugment=randaugment,
            color_jitter=color_jitter,
            mean=mean,
            corruption=corruption,
            severity=severity,
            on_error=on_error,
        )
        self._train_set, self._val_set, self.test_set = load_image_sets(name, root, self.wishes, own)
        if training and self._train_set is None:
            raise ValueError(f"data.name={name}: has no training images; evaluate.py takes it")
        self.classes = self.test_set.classes
        self.num_classes = self.test_set.source.labels.num_outputs
        if num_classes not in (None, self.num_classes):
            raise ValueError(
                f"data.num_classes={num_classes}: {name} has {self.num_classes} classes here; "
                f"set data.num_classes={self.num_classes} or null"
            )
        self.eval_batch_size, self.num_workers, self.seed = eval_batch_size, num_workers, seed
        self.repeats, self.num_views, self.replays = repeats, num_views, replays
        self.skipped: dict[str, str] = {}
        self.root = None if root is None else Path(root).expanduser()
        self.network = VARIANTS[name].network if name in VARIANTS else name
        first = self._train_set or self.test_set
        first.example()  # an image of another size than the model's is better found now

    @property
    def train_set(self) -> ImageSet:
        """The training images; there are none where only test images were looked for."""
        assert self._train_set is not None
        return self._train_set

    @property
    def val_set(self) -> ImageSet:
        """The images held out from the training images."""
        assert self._val_set is not None
        return self._val_set

    @property
    def varies(self) -> bool:
        """Whether the size of a training batch changes with the epoch."""
        return len(set(self.batch_size.all)) > 1

    def batch_size_at(self, epoch: int) -> int:
        """Return the training images of one rank in a batch of this epoch, without views."""
        return self.batch_size.at(epoch)

    def steps_per_epoch(self, epoch: int, world_size: int | None = None) -> int:
        """Return how many batches the training loader gives each rank in this epoch, replays counted.

        world_size: of ranks that are to be, by default those of the Trainer.
        """
        return len(self._train_loader(epoch, world_size))

    def train_dataloader(self) -> ImageLoader:
        """Load this rank's share of the training set, augmented, in an order that changes with the epoch."""
        return self._train_loader(self.trainer.current_epoch if self.trainer else 0)

    def _train_loader(self, epoch: int, world_size: int | None = None) -> ImageLoader:
        batch_size = self.batch_size_at(epoch)
        sampler = self._sampler(
            self.train_set,
            shuffle=True,
            world_size=world_size,
            batch_size=batch_size,
            repeats=self.repeats,
            num_views=self.num_views,
            sides=self.resolution,
        )
        return self._loader(self.train_set, sampler, batch_size, replays=self.replays)

    def val_dataloader(self) -> ImageLoader:
        """Load this rank's share of the validation set, each sample on one rank only."""
        ranks = self.trainer.world_size if self.trainer else 1
        if len(self.val_set) < ranks:
            raise ValueError(f"data.num_val={len(self.val_set)}: each of the {ranks} processes needs an image")
        sampler = self._sampler(self.val_set, shuffle=False)
        return self._loader(self.val_set, sampler, self.eval_batch_size)

    def test_dataloader(self) -> ImageLoader:
        """Load this rank's share of the test set, each sample on one rank only."""
        return self._loader(self.test_set, self._sampler(self.test_set, shuffle=False), self.eval_batch_size)

    def evaluation_loader(self, dataset: ImageSet, *, batch_size: int | None = None) -> ImageLoader:
        """Load all of `dataset` on this process, in its order; a single batch takes no other process."""
        batch_size = batch_size or self.eval_batch_size
        num_workers = self.num_workers if len(dataset) > batch_size else 0
        return self._loader(dataset, range(len(dataset)), batch_size, num_workers=num_workers)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move images and labels; sample ids stay on the CPU, where attacks key their noise by them."""
        images, labels, sample_ids = batch
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True), sample_ids

    def _sampler(
        self, dataset: ImageSet, *, shuffle: bool, world_size: int | None = None, **settings: Any
    ) -> ShardedSampler:
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return ShardedSampler(
            len(dataset), shuffle=shuffle, seed=self.seed, rank=rank, world_size=world_size or ranks, **settings
        )

    def _loader(
        self, dataset: ImageSet, sampler: Any, batch_size: int, replays: int = 1, num_workers: int | None = None
    ) -> ImageLoader:
        return ImageLoader(
            dataset,
            batch_size,
            sampler=sampler,
            num_workers=self.num_workers if num_workers is None else num_workers,
            replays=replays,
            skipped=self.skipped,
        )


def _resolution(name: str, sides: Mapping[int, int] | None, own: OwnSets | None) -> Phases | None:
    if sides is None:
        return None
    if not (name in OF_ANY_SIZE if own is None else own.augment == "resized_crop_and_flip"):
        raise ValueError(
            f"aug.resolution={sides}: only training images of {' and '.join(OF_ANY_SIZE)} can have another size "
            f"than their own, those of {name} cannot; set null"
        )
    if not isinstance(sides, Mapping):
        raise ValueError(f"aug.resolution={sides}: must be null or a mapping {{epoch: side}}; see data.img_size")
    return Phases("aug.resolution", sides)


def _check_at_least(minimum: int, **values: int) -> None:
    for key, value in values.items():
        if type(value) is not int or value < minimum:
            raise ValueError(f"data.{key}={value}: must be a whole number, {minimum} or more")
