"""The processes that share an evaluation: what each of them does, knows of the others, and tells them."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from typing import Any

import torch.distributed as dist

POLL_SECONDS = 0.02
"""How often a process looks whether the others have arrived."""
GIVEN_UP = "given up"


class Workers:
    """This process among those of torch.distributed, or alone.

    rank: 0 leads. store: what all processes can read and write at any time; None for a process that is alone.
    num_meetings: of all processes so far, the same in each of them.

    A share of the work may take longer than a collective operation waits, so the processes meet by way of the store
    first, where they wait for as long as it takes.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, store: Any = None) -> None:
        self.rank, self.world_size, self._store = rank, world_size, store
        self.num_meetings = 0
        self._counts: Counter[str] = Counter()

    @classmethod
    def current(cls) -> Workers:
        """Return this process; all of a process group that is initialised must call this together."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        rank, host, box = dist.get_rank(), os.environ["MASTER_ADDR"], [0]
        store, tcp_store = None, dist.TCPStore  # type: ignore[attr-defined]
        if rank == 0:
            store = tcp_store(host, 0, is_master=True, wait_for_workers=False)
            box = [store.port]
        dist.broadcast_object_list(box, src=0)
        store = store or tcp_store(host, box[0], wait_for_workers=False)
        return cls(rank, dist.get_world_size(), store)

    @property
    def leads(self) -> bool:
        """Whether this process is the one that decides, writes what there is one of, and speaks to the user."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """Return the leader's `value`, in every process."""
        self._meet()
        if self._store is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank, to the leader; an empty list to the others."""
        self._meet()
        if self._store is None:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.leads else None
        dist.gather_object(value, values, dst=0)
        return values or []

    def mine(self, values: list[int]) -> list[int]:
        """Return this process' share of values that all of them know; shares differ by one at most."""
        return values[self.rank :: self.world_size]

    def add(self, counter: str, number: int) -> int:
        """Add to a counter of all processes and return what they have counted together.

        Ends this process where the leader has ended, who has said why.
        """
        if self._store is not None:
            try:
                return int(self._store.add(counter, number))
            except dist.DistNetworkError:
                sys.exit(1)
        self._counts[counter] += number
        return self._counts[counter]

    def give_up(self) -> None:
        """Have the others end as well, which would wait for this process."""
        self.add(GIVEN_UP, 1)

    def _meet(self) -> None:
        self.num_meetings += 1
        place = f"meeting {self.num_meetings}"
        self.add(place, 1)
        while self.add(place, 0) < self.world_size:
            if self.add(GIVEN_UP, 0):
                sys.exit(1)
            time.sleep(POLL_SECONDS)
