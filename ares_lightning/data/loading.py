"""Which samples, in which order, on which rank, and how they become a batch."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, get_worker_info

from ares_lightning.data.datasets import Drawn, ImageSet, Sample, Unreadable
from ares_lightning.data.images import ImageError
from ares_lightning.data.keyed import keyed_permutation
from ares_lightning.data.phases import Phases

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


class ShardedSampler(DistributedSampler[int | Drawn]):
    """One rank's share of the positions 0…size−1.

    Shuffled (training): the order depends on (seed, epoch) only. A step takes the next world_size · batch_size
    places of it, each rank a run of neighbours: what an update sees does not depend on how many ranks share it. The
    places that do not fill a step are left out; a set that is smaller than one is shared out in one step of equal
    shares.
    Not shuffled (evaluation): each position exactly once over all ranks, whose shares may differ by one.

    It is a DistributedSampler because Lightning replaces any other one.

    sides: side of the training images by epoch; None leaves it to the set.
    repeats: repeated augmentation (Hoffer et al. 2020, arXiv 1901.09335; Touvron et al. 2021, arXiv 2012.12877):
        each image stands at that many places, one after the other, in different draws; an epoch has as many places
        as it had and shows that many times fewer images.
    num_views: each place comes that often, one after the other, in different draws, beside the batch_size.
    start: places of the epoch, counted over all ranks, that are done already; set to go on in mid-epoch.
    """

    def __init__(
        self,
        size: int,
        *,
        shuffle: bool,
        seed: int,
        rank: int,
        world_size: int,
        batch_size: int = 1,
        repeats: int = 1,
        num_views: int = 1,
        sides: Phases | None = None,
    ) -> None:
        super().__init__(range(size), world_size, rank, shuffle, seed, drop_last=shuffle)  # type: ignore[arg-type]
        self.size, self.batch_size, self.repeats, self.num_views = size, batch_size, repeats, num_views
        self.sides, self.start = sides, 0

    @property
    def step_size(self) -> int:
        """Places that a training step takes over all ranks."""
        return self.batch_size * self.num_replicas

    def __len__(self) -> int:
        if not self.shuffle:
            return len(range(self.rank, self.size, self.num_replicas))
        return self._share * self._num_steps * self.num_views

    def __iter__(self) -> Iterator[int | Drawn]:
        if not self.shuffle:
            return iter(range(self.rank, self.size, self.num_replicas))
        order = keyed_permutation(self.size, "shuffle", self.seed, self.epoch).tolist()
        side = None if self.sides is None else self.sides.at(self.epoch)
        first, step = self.rank * self._share, self._share * self.num_replicas
        return (
            Drawn(
                position=order[place // self.repeats],
                draw=(self.epoch * self.repeats + place % self.repeats) * self.num_views + view,
                side=side,
            )
            for begin in range(self.start + first, step * self._num_steps, step or 1)
            for place in range(begin, begin + self._share)
            for view in range(self.num_views)
        )

    @property
    def _num_steps(self) -> int:
        return max(self.size // self.step_size, 1)

    @property
    def _share(self) -> int:
        """This rank's places in a training step."""
        return min(self.batch_size, self.size // self.num_replicas)


class ImageLoader(DataLoader[Any]):
    """Batches of an image set, which knows how far it is and goes on from there.

    batch_size: that of the ShardedSampler in training, whose views come on top.
    replays: each batch is given out that often in a row.
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
        replays: int = 1,
        skipped: dict[str, str] | None = None,
    ) -> None:
        shards = sampler if isinstance(sampler, ShardedSampler) and sampler.shuffle else None
        assert shards is None or shards.batch_size == batch_size
        super().__init__(
            dataset,
            batch_size * (shards.num_views if shards else 1),
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=_collate_readable,
            pin_memory=num_workers > 0 and torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            worker_init_fn=_leave_signals_to_the_main_process,
            generator=torch.Generator(),  # else each new iterator would draw from the global random state
        )
        self.replays = replays
        self.skipped = {} if skipped is None else skipped
        self._image_set, self._shards = dataset, shards
        self._epoch = self._done = 0
        self._goes_on = False

    def __len__(self) -> int:
        return super().__len__() * self.replays

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if self._shards:
            if not self._goes_on or self._shards.epoch != self._epoch:
                self._done = 0
            self._epoch, self._goes_on = self._shards.epoch, False
            self._shards.start = self._done // self.replays * self._step_size
        for batch, unreadable in super().__iter__():
            for sample_id, message in unreadable:
                self.skipped[self._image_set.sample_name(sample_id)] = message
            if batch is None and self._shards:
                raise ImageError(
                    f"data.on_error=skip: not one image of a batch can be read; {unreadable[0].message}"
                )
            for _ in range(self._done % self.replays, self.replays):
                self._done += 1
                if batch is not None:
                    yield batch

    @property
    def _step_size(self) -> int:
        return self._shards.step_size if self._shards else int(self.batch_size or 1)

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the batches of it that were given out, replays counted, and what these consist of."""
        return {"epoch": self._epoch, "batches": self._done, "step_size": self._step_size, "replays": self.replays}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches that a loader had given out when it returned `state`.

        Raises ValueError where a step of this one takes another number of images, or comes in other replays.
        """
        if state["step_size"] != self._step_size:
            batch_size = self._shards.batch_size if self._shards else self.batch_size
            raise ValueError(
                f"data.batch_size={batch_size}: the checkpoint was made in mid-epoch with "
                f"{state['step_size']} images a step over all processes, now it is {self._step_size}; keep "
                "their number to go on from there"
            )
        if state["replays"] != self.replays:
            raise ValueError(
                f"adv.replays={self.replays}: the checkpoint was made in mid-epoch with {state['replays']}; keep "
                "their number to go on from there"
            )
        self._epoch, self._done, self._goes_on = state["epoch"], state["batches"], True
        if self._shards:
            self._shards.set_epoch(self._epoch)


def _leave_signals_to_the_main_process(worker_id: int) -> None:
    """Ignore what schedulers send to every process of a job: the main one still needs its batches to end well."""
    for signum in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    if sys.platform == "linux":  # others have no sigwaitinfo, and there SIGTERM ends a loading process
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for, args=(os.getppid(),), daemon=True).start()


def _end_for(parent: int) -> None:
    """End this process on SIGTERM of its parent, which has no use for it any more, and of nobody else."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _collate_readable(samples: list[Sample | Unreadable]) -> tuple[Batch | None, list[Unreadable]]:
    unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
    readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
    return collate(readable) if readable else None, unreadable
