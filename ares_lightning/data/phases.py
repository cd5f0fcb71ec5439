"""A whole number that may change with the epoch: the size of a batch, the side of the images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Phases:
    """The values of a setting by the epoch from which each holds.

    key: the setting's name, for errors. values: one whole number of 1 or more for all epochs, or a mapping
    {epoch: number} whose epochs begin with 0 and rise.

    Raises ValueError naming the key, its value and the remedy.
    """

    key: str
    values: int | Mapping[int, int]

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            if not _is_whole(self.values, 1):
                raise ValueError(f"{self}: must be a whole number, 1 or more, or a mapping {{epoch: number}}")
            return
        epochs = list(self.values)
        if not all(_is_whole(epoch, 0) for epoch in epochs) or epochs[:1] != [0] or epochs != sorted(set(epochs)):
            raise ValueError(f"{self}: its epochs must be whole numbers that begin with 0 and rise")
        if not all(_is_whole(value, 1) for value in self.values.values()):
            raise ValueError(f"{self}: each epoch must be given a whole number, 1 or more")

    def __str__(self) -> str:
        return f"{self.key}={self.values}"

    def at(self, epoch: int) -> int:
        """Return the value in this epoch."""
        if not isinstance(self.values, Mapping):
            return self.values
        return self.values[max(start for start in self.values if start <= epoch)]

    @property
    def all(self) -> tuple[int, ...]:
        """The values, in the order of their epochs."""
        return tuple(self.values.values()) if isinstance(self.values, Mapping) else (self.values,)


def _is_whole(value: object, minimum: int) -> bool:
    return type(value) is int and value >= minimum
