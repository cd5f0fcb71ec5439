"""The robustness curves as a picture, for a README or a paper."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from ares_lightning.evaluation.report.figures import Line, curve_unit, percent
from ares_lightning.evaluation.report.rows import NORMS


def curves_png(curves: Mapping[str, Sequence[Line]]) -> bytes:
    """Return the robustness curves as a PNG, one panel a norm, each line with its band.

    Raises ValueError where there is no curve.
    """
    if not curves:
        raise ValueError("no run has a robustness curve; evaluate with eval=curve")
    figure = Figure(figsize=(6.4 * len(curves), 4.4), dpi=150, layout="constrained")
    for axes, (norm, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        unit = curve_unit(norm, lines)
        for line in lines:
            x, label = [eps * unit for eps in line.x], line.label.replace("$", r"\$")  # no mathematics in a name
            look = {"color": line.style.colour, "linestyle": line.style.dash}
            axes.plot(x, percent(line.value), marker="o", markersize=3.5, label=label, **look)
            if line.low and line.high:
                axes.fill_between(
                    x, percent(line.low), percent(line.high), color=line.style.colour, alpha=0.15, lw=0
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
