"""The figures of a report: robustness curves (interactive and as PNG) and training curves."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go
from matplotlib.figure import Figure
from plotly.subplots import make_subplots

NORMS = {"linf": "L-inf", "l2": "L2", "l1": "L1"}
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#808080")  # Okabe & Ito 2008
_DASHES = {"solid": "solid", "dashed": "dash", "dotted": "dot"}  # as CSS and matplotlib say: as plotly says


@dataclass(frozen=True)
class Style:
    """How the lines of a run look; `dash` as CSS and matplotlib name it."""

    colour: str
    dash: str

    @classmethod
    def of(cls, place: int) -> Style:
        """Return the style of the run at this place: 21 of them, then they recur."""
        return cls(_PALETTE[place % 7], list(_DASHES)[place // 7 % 3])


@dataclass(frozen=True)
class Line:
    """What a run adds to a panel: accuracies (fractions) with their interval over x; `notes` show on hover."""

    label: str
    style: Style
    x: list[float]
    value: list[float]
    notes: list[str]
    low: list[float] | None = None
    high: list[float] | None = None


def eps_text(norm: str | None, eps: float) -> str:
    """Return a budget as the field writes it: `8/255` for L-inf where exact and shorter, else a decimal."""
    steps, decimal = round(eps * 255), f"{eps:.4g}"
    whole = norm == "linf" and steps > 0 and abs(eps - steps / 255) <= 1e-6
    return min(f"{steps}/255", decimal, key=len) if whole else decimal


def curves_html(norm: str, lines: Sequence[Line]) -> str:
    """Return the interactive robustness curves of one norm (x: eps), for a page that has plotly.js on it."""
    unit = _unit(norm, lines)
    title = f"eps ({escape(NORMS.get(norm, norm))})"
    figure = _figure({"robust accuracy": lines}, title, height=440, unit=unit)
    figure.update_xaxes(ticksuffix="/255" if unit > 1 else "")
    return _html(figure, "curve-" + "".join(filter(str.isalnum, norm)))


def training_html(panels: Mapping[str, Sequence[Line]]) -> str:
    """Return the interactive training curves (x: epoch), for a page that has plotly.js on it."""
    return _html(_figure(panels, "epoch", height=110 + 230 * len(panels)), "training")


def curves_png(curves: Mapping[str, Sequence[Line]]) -> bytes:
    """Return the robustness curves as a PNG, one panel a norm, each line with its band.

    Raises ValueError where there is no curve.
    """
    if not curves:
        raise ValueError("no run has a robustness curve; evaluate with eval=curve")
    figure = Figure(figsize=(6.4 * len(curves), 4.4), dpi=150, layout="constrained")
    for axes, (norm, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        unit = _unit(norm, lines)
        for line in lines:
            x, label = [eps * unit for eps in line.x], line.label.replace("$", r"\$")  # no mathematics in a name
            look = {"color": line.style.colour, "linestyle": line.style.dash}
            axes.plot(x, _percent(line.value), marker="o", markersize=3.5, label=label, **look)
            if line.low and line.high:
                axes.fill_between(
                    x, _percent(line.low), _percent(line.high), color=line.style.colour, alpha=0.15, lw=0
                )
        axes.set(xlabel=f"eps ({NORMS.get(norm, norm)})", ylabel="robust accuracy (%)", ylim=(0, 101))
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if unit > 1:
            axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}/255" if tick else "0")
        if len(lines) < 9:
            axes.legend(frameon=False, fontsize="small")
        else:
            axes.legend(frameon=False, fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _unit(norm: str, lines: Sequence[Line]) -> int:
    """Return 255 where budgets are given in 255ths, else 1."""
    return 255 if any("/" in eps_text(norm, eps) for line in lines for eps in line.x) else 1


def _percent(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


def _figure(panels: Mapping[str, Sequence[Line]], x_title: str, height: int, unit: int = 1) -> go.Figure:
    """Return panels one above the other; a run keeps its look and its place in the legend in all of them."""
    figure = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.06)
    known: set[str] = set()
    for row, (title, lines) in enumerate(panels.items(), 1):
        figure.update_yaxes(title=f"{title} (%)", row=row)
        for line in lines:
            name, x, colour = escape(line.label), [x * unit for x in line.x], line.style.colour
            shared = {"row": row, "col": 1, "legendgroup": name, "name": name}
            if line.low and line.high:
                y = _percent(line.high + line.low[::-1])
                band = {"fill": "toself", "fillcolor": colour, "opacity": 0.15, "hoverinfo": "skip"}
                figure.add_scatter(x=x + x[::-1], y=y, mode="none", showlegend=False, **band, **shared)
            figure.add_scatter(
                x=x,
                y=_percent(line.value),
                mode="lines+markers" if len(x) < 20 else "lines",
                line={"color": colour, "dash": _DASHES[line.style.dash], "width": 2},
                showlegend=name not in known,
                text=[f"<b>{name}</b><br>{escape(note)}" for note in line.notes],
                hovertemplate="%{text}<extra></extra>",
                **shared,
            )
            known.add(name)
    figure.update_xaxes(title=x_title, row=len(panels))
    return figure.update_layout(height=height + 12 * len(known))


def _html(figure: go.Figure, name: str) -> str:
    """Return the figure as an element of a page; all colours but those of the lines come from the page."""
    grey, clear = "rgba(128, 128, 128, 0.25)", "rgba(0, 0, 0, 0)"
    figure.update_layout(
        template="none",
        margin={"l": 56, "r": 8, "t": 12, "b": 48},
        font={"family": "system-ui, sans-serif", "size": 13},
        paper_bgcolor=clear,
        plot_bgcolor=clear,
        hovermode="closest",
        hoverlabel={"align": "left"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        showlegend=True,
    )
    figure.update_xaxes(gridcolor=grey, zerolinecolor=grey, rangemode="tozero", automargin=True, title_standoff=12)
    figure.update_yaxes(gridcolor=grey, zerolinecolor=grey, range=[0, 101], ticklabelstandoff=6)
    config = {"displayModeBar": False, "responsive": True}
    html: str = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)
    return html
