"""The interactive figures: plain descriptions for plotly.js, which the page draws."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from math import ceil, floor, log10
from typing import Any

from markupsafe import Markup

from ares_lightning.evaluation.report.rows import NORMS, eps_text
from ares_lightning.evaluation.report.style import DASHES, PALETTE, Style

MOST_BANDS = 6
"""Lines beyond which intervals show on hover only."""
MOST_NAMED = 10
"""Names beyond which the legend stands beside the figure, and on a narrow page nowhere."""

_GREY, _CLEAR = "rgba(128, 128, 128, 0.25)", "rgba(0, 0, 0, 0)"
_SHARES = [[0, "rgba(47, 127, 209, 0.03)"], [1, "rgba(47, 127, 209, 0.6)"]]


@dataclass(frozen=True)
class Line:
    """What a run adds to a panel: accuracies (fractions) with their interval over x; `notes` show on hover.

    choice: the line is shown where this was chosen above the figure; None: always.
    """

    label: str
    style: Style
    x: list[float]
    value: list[float]
    notes: list[str]
    low: list[float] | None = None
    high: list[float] | None = None
    choice: str | None = None


@dataclass(frozen=True)
class Bar:
    """An accuracy (fraction) of a set with its interval."""

    label: str
    style: Style
    set: str
    value: float
    low: float
    high: float
    note: str


@dataclass(frozen=True)
class Point:
    """A model in a scatter plot: robust accuracy (fraction) over x; `group` has a colour of its own."""

    group: str
    x: float | str
    value: float
    note: str
    choice: str | None = None


@dataclass(frozen=True)
class Heat:
    """Shares (fractions, None where unknown) by row and column, with what shows on hover."""

    rows: list[str]
    columns: list[str]
    shares: list[list[float | None]]
    notes: list[list[str]]
    choice: str | None = None


@dataclass(frozen=True)
class Chart:
    """A figure of the page: traces and layout as plotly.js has them, and what can be chosen above it."""

    name: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    choices: list[str] = field(default_factory=list)

    @property
    def json(self) -> Markup:
        """The description, for a script element of the page."""
        text = json.dumps({"data": self.data, "layout": self.layout}, allow_nan=False, separators=(",", ":"))
        return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def curve_chart(norm: str, lines: Sequence[Line]) -> Chart:
    """Return the robustness curves of one norm (x: eps)."""
    unit = curve_unit(norm, lines)
    title = f"eps ({escape(NORMS.get(norm, norm))})"
    name = "curve-" + "".join(filter(str.isalnum, norm))
    chart = line_chart(name, {"robust accuracy": lines}, title, unit=unit)
    chart.layout["xaxis"]["ticksuffix"] = "/255" if unit > 1 else ""
    return chart


def curve_unit(norm: str, lines: Sequence[Line]) -> int:
    """Return 255 where budgets are given in 255ths, else 1."""
    return 255 if any("/" in eps_text(norm, eps) for line in lines for eps in line.x) else 1


def line_chart(
    name: str, panels: Mapping[str, Sequence[Line]], x_title: str, unit: int = 1, log: bool = False
) -> Chart:
    """Return panels one above the other; a run keeps its look and its place in the legend in all of them."""
    data: list[dict[str, Any]] = []
    known: set[tuple[str, str | None]] = set()
    choices = list(dict.fromkeys(line.choice for lines in panels.values() for line in lines if line.choice))
    for number, lines in enumerate(panels.values(), 1):
        axis = "y" if number == 1 else f"y{number}"
        banded = max((sum(line.choice == choice for line in lines) for choice in choices or (None,)), default=0)
        for line in lines:
            label, x, colour = escape(line.label), [x * unit for x in line.x], line.style.colour
            shared = {"type": "scatter", "yaxis": axis, "legendgroup": label, "name": label, "meta": line.choice}
            if line.low and line.high and banded <= MOST_BANDS:
                y = percent(line.high + line.low[::-1])
                band = {"fill": "toself", "fillcolor": colour, "opacity": 0.15, "hoverinfo": "skip"}
                data.append({**shared, **band, "x": x + x[::-1], "y": y, "mode": "none", "showlegend": False})
            data.append(
                {
                    **shared,
                    "x": x,
                    "y": percent(line.value),
                    "mode": "lines+markers" if len(x) < 20 else "lines",
                    "line": {"color": colour, "dash": DASHES[line.style.dash], "width": 2},
                    "showlegend": (label, line.choice) not in known,
                    "text": [f"<b>{label}</b><br>{escape(note)}" for note in line.notes],
                    "hovertemplate": "%{text}<extra></extra>",
                }
            )
            known.add((label, line.choice))
    num_names = len({label for label, _ in known})
    layout = _layout(110 + (330 if len(panels) == 1 else 230 * len(panels)), num_names)
    layout["showlegend"] = num_names > 1
    ticks = _log_ticks([x for lines in panels.values() for line in lines for x in line.x]) if log else {}
    layout["xaxis"] = _axis(x_title, anchor=axis, **(ticks or {"rangemode": "tozero"}))
    share = 1 / len(panels)
    for number, title in enumerate(panels, 1):
        top = 1 - (number - 1) * share
        domain = [max(0.0, top - share + (0.06 if number < len(panels) else 0)), top]
        layout["yaxis" if number == 1 else f"yaxis{number}"] = _axis(
            f"{escape(title)} (%)", range=[0, 101], domain=domain
        )
    return Chart(name, data, layout, choices)


def bar_chart(name: str, bars: Sequence[Bar]) -> Chart:
    """Return horizontal bars of accuracy, by set and within it by run, the first set and run on top."""
    sets = list(dict.fromkeys(bar.set for bar in bars))
    labels = list(dict.fromkeys(bar.label for bar in bars))
    data = []
    for label in labels:
        own = [bar for bar in bars if bar.label == label]
        spread = {
            "type": "data",
            "array": [100 * (bar.high - bar.value) for bar in own],
            "arrayminus": [100 * (bar.value - bar.low) for bar in own],
            "thickness": 1.2,
            "width": 3,
            "color": "rgba(128, 128, 128, 0.9)",
        }
        notes = [f"<b>{escape(label)}</b><br>{escape(bar.set)}: {escape(bar.note)}" for bar in own]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": escape(label),
                "x": [100 * bar.value for bar in own],
                "y": [sets.index(bar.set) for bar in own],
                "error_x": spread,
                "marker": {"color": own[0].style.colour, "opacity": 0.75},
                "text": notes,
                "textposition": "none",
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    layout = _layout(90 + len(sets) * (16 + 14 * max(len(labels), 1)), len(labels))
    layout |= {"barmode": "group", "bargap": 0.25, "showlegend": len(labels) > 1}
    layout["xaxis"] = _axis("accuracy (%)", range=[0, 101])
    layout["yaxis"] = _named_axis(sets)
    return Chart(name, data, layout)


def interval_chart(name: str, rows: Sequence[tuple[str, Sequence[tuple[float, float, float, str]]]]) -> Chart:
    """Return dots with intervals: for each name, (accuracy, low, high, note) of each of the parts shown."""
    data = []
    parts = (("robust", PALETTE[0]), ("clean", PALETTE[6]))
    for part, (title, colour) in enumerate(parts):
        values = [each[part] for _, each in rows]
        spread = {
            "type": "data",
            "array": [100 * (high - value) for value, _, high, _ in values],
            "arrayminus": [100 * (value - low) for value, low, _, _ in values],
            "thickness": 1.5,
            "width": 0,
        }
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": title,
                "x": [100 * value for value, *_ in values],
                "y": [place + (0.15, -0.15)[part] for place in range(len(rows))],
                "error_x": spread,
                "marker": {"color": colour, "size": 8},
                "cliponaxis": False,
                "text": [f"<b>{escape(label)}</b><br>{escape(each[part][3])}" for label, each in rows],
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    layout = _layout(90 + 22 * len(rows), len(parts))
    layout["xaxis"] = _axis("accuracy (%)", range=[-1, 101])
    layout["yaxis"] = _named_axis([label for label, _ in rows])
    return Chart(name, data, layout)


def heat_chart(name: str, heats: Sequence[Heat], row_title: str, column_title: str) -> Chart:
    """Return heat maps of which one is shown at a time; all have the same rows and columns."""
    rows, columns = heats[0].rows, heats[0].columns
    numbers = len(columns) <= 20
    data: list[dict[str, Any]] = [
        {
            "type": "heatmap",
            "z": [[None if share is None else 100 * share for share in row] for row in heat.shares],
            "text": [["" if share is None else f"{100 * share:.0f}" for share in row] for row in heat.shares],
            "texttemplate": "%{text}" if numbers else "",
            "customdata": [[escape(note) for note in row] for row in heat.notes],
            "hovertemplate": "%{customdata}<extra></extra>",
            "hoverongaps": False,
            "zmin": 0,
            "zmax": 100,
            "colorscale": _SHARES,
            "showscale": not numbers,
            "colorbar": {"title": {"text": "%"}, "thickness": 12, "outlinewidth": 0},
            "xgap": 1,
            "ygap": 1,
            "meta": heat.choice,
        }
        for heat in heats
    ]
    layout = _layout(130 + 26 * len(rows) + 6 * max(map(len, columns), default=0), 0)
    layout["xaxis"] = {**_named_axis(columns, column_title), "autorange": True, "tickangle": -45}
    layout["yaxis"] = _named_axis(rows, row_title)
    return Chart(name, data, layout, [heat.choice for heat in heats if heat.choice] if len(heats) > 1 else [])


def scatter_chart(name: str, points: Sequence[Point], x_title: str, log: bool = False) -> Chart:
    """Return robust accuracy over x, one colour a group; x is a percentage, a logarithm's argument or a name."""
    groups = sorted({point.group for point in points})
    choices = list(dict.fromkeys(point.choice for point in points if point.choice))
    data = []
    for choice in choices or (None,):
        for place, group in enumerate(groups):
            own = [point for point in points if point.group == group and point.choice == choice]
            if own:
                symbol = ("circle", "diamond", "square")[place // len(PALETTE) % 3]
                data.append(
                    {
                        "type": "scatter",
                        "mode": "markers",
                        "cliponaxis": False,
                        "name": escape(group),
                        "x": [escape(point.x) if isinstance(point.x, str) else point.x for point in own],
                        "y": [100 * point.value for point in own],
                        "marker": {
                            "color": PALETTE[place % len(PALETTE)],
                            "symbol": symbol,
                            "size": 10,
                            "opacity": 0.85,
                        },
                        "text": [point.note for point in own],
                        "hovertemplate": "%{text}<extra></extra>",
                        "meta": choice,
                    }
                )
    layout = _layout(380, len(groups))
    layout["xaxis"] = _axis(x_title, **(_log_ticks([float(point.x) for point in points]) if log else {}))
    layout["yaxis"] = _axis("robust accuracy (%)", rangemode="tozero")
    return Chart(name, data, layout, choices if len(choices) > 1 else [])


def percent(values: Sequence[float]) -> list[float]:
    """Return fractions in percent."""
    return [100 * value for value in values]


def _axis(title: str, **more: Any) -> dict[str, Any]:
    look = {"gridcolor": _GREY, "zerolinecolor": _GREY, "automargin": True}
    return {"title": {"text": title, "standoff": 10}, **look, **more}


def _log_ticks(values: Sequence[float]) -> dict[str, Any]:
    """Return a logarithmic axis with plain numbers on it: 1, 2, 5, 10, … or powers of ten alone."""
    least, most = floor(log10(min(values))), ceil(log10(max(values)))
    steps = (1, 2, 5) if most - least <= 2 else (1,)
    ticks = [float(f"{step}e{power}") for power in range(least, most + 1) for step in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,g}" for tick in ticks]}


def _named_axis(names: Sequence[str], title: str = "") -> dict[str, Any]:
    """Return an axis with the names from top to bottom; they stand at 0, 1, … since two may be equal."""
    short = [name if len(name) <= 28 else f"{name[:27]}…" for name in names]
    ticks = {"tickvals": list(range(len(names))), "ticktext": [escape(name) for name in short]}
    return {**_axis(title, **ticks), "autorange": "reversed", "showgrid": False, "zeroline": False}


def _layout(height: int, num_names: int) -> dict[str, Any]:
    """Return what all figures share; all colours but those of the data come from the page."""
    above = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    return {
        "height": height + (12 * num_names if num_names <= MOST_NAMED else 0),
        "margin": {"l": 56, "r": 8, "t": 12, "b": 48},
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "paper_bgcolor": _CLEAR,
        "plot_bgcolor": _CLEAR,
        "hovermode": "closest",
        "hoverlabel": {"align": "left"},
        "legend": above if num_names <= MOST_NAMED else {"font": {"size": 11}},
        "showlegend": num_names > 0,
    }
