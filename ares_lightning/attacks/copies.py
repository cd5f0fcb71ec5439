"""Several aims of one sample searched side by side, with the result of a search of one after another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ares_lightning.attacks.noise import sample_noise
from ares_lightning.attacks.search import Search


def aim_at_each(search: Search, aims: Tensor, climb: Callable[[Search, Tensor, int], None]) -> None:
    """Call `climb(search, aims[:, k], k)` for every column of `aims` [n, K], on the samples not yet broken.

    `climb` takes all its random numbers by `search.noise(kind, shape, k)`. Where so few samples are left that
    several columns fit one pass of the model, these are searched side by side.
    """
    rows, k = search.track(aims=aims), 0
    while k < aims.shape[1] and len(search):
        num_copies = min(_room(search), aims.shape[1] - k)
        if num_copies == 1:
            climb(search, rows.aims[:, k], k)
        else:
            copied = _Copies(search, num_copies)
            climb(copied, rows.aims[:, k : k + num_copies].flatten(), k)
            copied.hand_over(search)
        k += num_copies


def _room(search: Search) -> int:
    """Return how many copies of the remaining samples one pass takes; 1 where samples stay although broken."""
    size = search.passes.batch_size
    if size is None or not search.feedback or not bool(search.eps.isfinite().all()):
        return 1
    return max(size // len(search), 1)


class _Copies(Search):
    """A working set that holds each sample several times, its copies one after another.

    With a copy that is broken the later copies of its sample leave, while the earlier go on.
    """

    def __init__(self, search: Search, num_copies: int) -> None:
        def copied(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.repeat_interleave(num_copies, 0)

        self.num_copies = num_copies
        rows = search.rows
        super().__init__(
            search.judge,
            rows.clean.repeat_interleave(num_copies, 0),
            rows.labels.repeat_interleave(num_copies, 0),
            copied(rows.targets),
            rows.eps.repeat_interleave(num_copies, 0),
            search.ball,
            [sample_id for sample_id in search.ids() for _ in range(num_copies)],
            search.seed,
            feedback=True,
            passes=search.passes,
            logits=copied(rows.logits),
        )
        self.begin(search.name, search.objective, search.is_nearest)

    def noise(self, kind: str, shape: tuple[int, ...], *key: object) -> Tensor:
        """Draw for each copy what a search of its own aim would have drawn: the key is the first copy's number."""
        (first,) = key
        assert isinstance(first, int)
        ids, copies = self.ids(), (self.rows.index % self.num_copies).tolist()
        draws = self.clean.new_empty(len(self), *shape)
        for copy in range(self.num_copies):
            places = [place for place, own in enumerate(copies) if own == copy]
            own_key = (self.seed, self.name, first + copy)
            draws[places] = sample_noise(kind, own_key, [ids[place] for place in places], shape, self.clean)
        return draws

    def done_with(self, broken: Tensor) -> Tensor:
        """Return bool [n]: the broken copies and those of the same sample that come after one."""
        sample, copy = self.rows.index // self.num_copies, self.rows.index % self.num_copies
        first = torch.full((len(self.images) // self.num_copies,), self.num_copies, device=sample.device)
        first.scatter_reduce_(0, sample, torch.where(broken, copy, self.num_copies), "amin")
        superseded: Tensor = copy > first[sample]
        return broken | superseded

    def hand_over(self, search: Search) -> None:
        """Let the samples leave `search` that a copy broke, at the expense of the copies up to that one."""
        self.close()
        found = self.found.view(-1, self.num_copies)
        images = self.images.view(*found.shape, *self.images.shape[1:])
        broken, first = found.any(1), found.int().argmax(1)
        last = torch.where(broken, first, self.num_copies - 1)
        needed = torch.arange(self.num_copies, device=last.device) <= last[:, None]
        search.rows.forwards += (self.forwards.view_as(found) * needed).sum(1)
        search.rows.backwards += (self.backwards.view_as(found) * needed).sum(1)
        num_broken = int(broken.sum())
        if num_broken:
            search.leave(images[torch.arange(len(first), device=first.device), first], broken, num_broken)
