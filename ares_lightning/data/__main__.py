"""python -m ares_lightning.data: the out-of-distribution sets, how their files lie, and what counts as right."""

from __future__ import annotations

from ares_lightning.data.variants import RULES, VARIANTS


def table() -> str:
    """Return a Markdown table of all sets."""
    lines = ["| `data=` | set | files | folder | an answer is |", "|---|---|---|---|---|"]
    for variant in VARIANTS.values():
        set_name = f"[{variant.title}]({variant.source}) ({variant.citation})"
        cells = [f"`{variant.key}`", set_name, f"`{variant.words}`", f"`{variant.folders[0]}`", RULES[variant.rule]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
