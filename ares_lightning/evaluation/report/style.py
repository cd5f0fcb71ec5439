"""How the lines of a run look, on the page and in the picture."""

from __future__ import annotations

from dataclasses import dataclass

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#808080")
"""Colours that everybody can tell apart (Okabe & Ito 2008), on white and on black; grey stands for their black."""
DASHES = {"solid": "solid", "dashed": "dash", "dotted": "dot"}
"""As CSS and matplotlib say: as plotly says."""


@dataclass(frozen=True)
class Style:
    """Colour and dash of a line; `dash` as CSS and matplotlib name it."""

    colour: str
    dash: str

    @classmethod
    def of(cls, place: int) -> Style:
        """Return the style of the run at this place: 21 of them, then they recur."""
        return cls(PALETTE[place % len(PALETTE)], list(DASHES)[place // len(PALETTE) % len(DASHES)])
