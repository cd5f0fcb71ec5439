"""The rows of summary.json, and how norms and budgets are written."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

NORMS = {"linf": "L-inf", "l2": "L2", "l1": "L1"}
LOW_PASS = "low_pass"
"""What stands in the name of a set in the place of a corruption, where only low frequencies are left."""


@dataclass(frozen=True)
class Row:
    """A row of summary.json: an accuracy (fraction) of `n` samples with its 95 % interval.

    source, model: names of the models crafted on and judged, where a row is about such a pair; queries: asked of a
    sample at most, where a row is about that.
    """

    evaluator: str
    metric: str
    value: float
    n: int
    low: float
    high: float
    set: str | None = None
    subset: str | None = None
    attack: str | None = None
    norm: str | None = None
    eps: float | None = None
    seed: int | None = None
    precision: str | None = None
    source: str | None = None
    model: str | None = None
    queries: int | None = None

    def __post_init__(self) -> None:
        for number in (self.value, self.n, self.low, self.high, self.eps or 0, self.queries or 0):
            if not isinstance(number, int | float) or not isfinite(number):
                raise TypeError(f"{number!r} is not a number")

    @property
    def ball(self) -> str | None:
        """The norm in words."""
        return self.norm and NORMS.get(self.norm, self.norm)

    @property
    def budget(self) -> str | None:
        """The budget in words."""
        return None if self.eps is None else eps_text(self.norm, self.eps)

    @property
    def threat(self) -> str:
        """The threat model in words."""
        return f"{self.ball}, {'any budget' if self.eps is None else f'eps {self.budget}'}"

    @property
    def cell(self) -> tuple[str, str, str] | None:
        """Set, corruption and severity, where the row is about one of them."""
        parts = self._parts
        return parts if parts and parts[1] != LOW_PASS else None

    @property
    def radius(self) -> float | None:
        """The radius in pixels of the low-pass filter, where the row is about one."""
        parts = self._parts
        try:
            return float(parts[2]) if parts and parts[1] == LOW_PASS else None
        except ValueError:
            return None

    @property
    def about(self) -> str:
        """What the metric is about, beyond attack and budget."""
        words = [f"from {self.source}"] if self.source else []
        words += [f"on {self.model}"] if self.model else []
        words += [] if self.queries is None else [f"{self.queries:,} queries"]
        return ", ".join(words)

    @property
    def shown(self) -> str:
        """The accuracy with its interval, in percent."""
        return f"{self.value:.2%} [{self.low:.2%}, {self.high:.2%}], n {self.n}"

    @property
    def _parts(self) -> tuple[str, str, str] | None:
        parts = (self.set or "").rsplit("/", 2)
        return (parts[0], parts[1], parts[2]) if len(parts) == 3 else None


def eps_text(norm: str | None, eps: float) -> str:
    """Return a budget as the field writes it: `8/255` for L-inf where exact and shorter, else a decimal."""
    steps, decimal = round(eps * 255), f"{eps:.4g}"
    whole = norm == "linf" and steps > 0 and abs(eps - steps / 255) <= 1e-6
    return min(f"{steps}/255", decimal, key=len) if whole else decimal
