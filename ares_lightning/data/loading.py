"""Which samples, in which order, on which rank, and how they become a batch."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, get_worker_info

from ares_lightning.data.datasets import ImageSet, Sample, Unreadable
from ares_lightning.data.images import ImageError
from ares_lightning.data.keyed import keyed_permutation

# images uint8 [N, C, H, W], labels int64 [N], sample_ids int64 [N]
Batch = tuple[Tensor, Tensor, Tensor]


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into (images uint8 [N, C, H, W] with channels last, labels int64 [N], sample ids int64 [N])."""
    images, labels, sample_ids = zip(*samples, strict=True)
    rows = [image.permute(1, 2, 0) for image in images]
    shared = None
    if get_worker_info() is not None:  # straight into the memory that the main process reads
        size = len(rows) * rows[0].numel()
        storage = rows[0].untyped_storage()._new_shared(size, device="cpu")
        shared = rows[0].new(storage).resize_(len(rows), *rows[0].shape)
    stacked = torch.stack(rows, out=shared).permute(0, 3, 1, 2)
    return stacked, torch.tensor(labels), torch.tensor(sample_ids)


class ShardedSampler(DistributedSampler[tuple[int, int]]):
    """One rank's share of the positions 0…size−1, each as (position, draw).

    Shuffled (training): the order depends on (seed, epoch) only, every rank gets size // world_size samples,
    and the tail that does not divide is left out. Not shuffled (evaluation): each sample exactly once over
    all ranks, whose shares may differ by one. The draw, the epoch where nothing is repeated, travels with the
    position because persistent workers never see `set_epoch`. It is a DistributedSampler because Lightning replaces
    any other one.

    repeats: repeated augmentation (Hoffer et al. 2020, arXiv 1901.09335; Touvron et al. 2021, arXiv 2012.12877):
    each
        image comes that often one after the other, so on different ranks, in different draws; an epoch stays as
        long as it was and shows that many times fewer images.
    start: samples of the epoch, counted over all ranks, that are done already; set to go on in mid-epoch.
    """

    def __init__(
        self, size: int, *, shuffle: bool, seed: int, rank: int, world_size: int, repeats: int = 1
    ) -> None:
        super().__init__(range(size), world_size, rank, shuffle, seed, drop_last=shuffle)  # type: ignore[arg-type]
        self.size, self.repeats, self.start = size, repeats, 0

    @property
    def _kept(self) -> int:
        return self.size - self.size % self.num_replicas if self.shuffle else self.size

    def __len__(self) -> int:
        return len(range(self.rank, self._kept, self.num_replicas))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        places = range(self.start + self.rank, self._kept, self.num_replicas)
        if not self.shuffle:
            return ((place, self.epoch) for place in places)
        order = keyed_permutation(self.size, "shuffle", self.seed, self.epoch)
        positions = order[[place // self.repeats for place in places]].tolist()
        draws = [self.epoch * self.repeats + place % self.repeats for place in places]
        return iter(zip(positions, draws, strict=True))


class ImageLoader(DataLoader[Any]):
    """Batches of an image set, which knows how far it is and goes on from there.

    skipped: where the messages about images that cannot be used are put, by the names of their samples.
    With a ShardedSampler, `state_dict` after any batch, given to `load_state_dict` of a new loader before it is
    iterated, gives exactly the batches that were still to come, if a step takes as many images over all ranks.

    Raises ImageError where not one image of a training batch can be read, since ranks must stay in step.
    """

    def __init__(
        self,
        dataset: ImageSet,
        batch_size: int,
        *,
        sampler: Iterable[Any],
        num_workers: int = 0,
        drop_last: bool = False,
        skipped: dict[str, str] | None = None,
    ) -> None:
        super().__init__(
            dataset,
            batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=_collate_readable,
            drop_last=drop_last,
            pin_memory=num_workers > 0 and torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            worker_init_fn=_leave_signals_to_the_main_process,
            generator=torch.Generator(),  # else each new iterator would draw from the global random state
        )
        self.skipped = {} if skipped is None else skipped
        self._image_set = dataset
        self._epoch = self._done = 0
        self._goes_on = False

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        trains = False
        if isinstance(self.sampler, ShardedSampler):
            trains = self.sampler.shuffle
            if not self._goes_on or self.sampler.epoch != self._epoch:
                self._done = 0
            self._epoch, self._goes_on = self.sampler.epoch, False
            self.sampler.start = self._done * self._step_size
        for batch, unreadable in super().__iter__():
            self._done += 1
            for sample_id, message in unreadable:
                self.skipped[self._image_set.sample_name(sample_id)] = message
            if batch is not None:
                yield batch
            elif trains:
                raise ImageError(
                    f"data.on_error=skip: not one image of a batch can be read; {unreadable[0].message}"
                )

    @property
    def _step_size(self) -> int:
        """Images of one step over all ranks."""
        ranks = self.sampler.num_replicas if isinstance(self.sampler, ShardedSampler) else 1
        return int(self.batch_size or 1) * ranks

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the batches of it that were given out, and the images that each took over all ranks."""
        return {"epoch": self._epoch, "batches": self._done, "step_size": self._step_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches that a loader had given out when it returned `state`.

        Raises ValueError where a step of this one takes another number of images.
        """
        if state["step_size"] != self._step_size:
            raise ValueError(
                f"data.batch_size={self.batch_size}: the checkpoint was made in mid-epoch with "
                f"{state['step_size']} images a step over all processes, now it is {self._step_size}; keep "
                "their number to go on from there"
            )
        self._epoch, self._done, self._goes_on = state["epoch"], state["batches"], True
        if isinstance(self.sampler, ShardedSampler):
            self.sampler.set_epoch(self._epoch)


def _leave_signals_to_the_main_process(worker_id: int) -> None:
    """Ignore what schedulers send to every process of a job: the main one still needs its batches to end well."""
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)


def _collate_readable(samples: list[Sample | Unreadable]) -> tuple[Batch | None, list[Unreadable]]:
    unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
    readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
    return collate(readable) if readable else None, unreadable
