"""The catalogue as Markdown: `python -m ares_lightning.attacks` prints the tables of docs/attacks.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from ares_lightning.attacks.catalogue import list_attacks, make_attack

NORMS = {"linf": "L-inf", "l2": "L2", "l1": "L1"}
SHARED = ("norm", "eps", "eot")
"""Settings that every attack has."""

QUERIES = "(queries - 1) // samples * samples + 1"
PASSES: dict[str, tuple[str, str]] = {
    "fgsm": ("1", "1"),
    "bim": ("steps", "steps"),
    "pgd": ("restarts * (steps + 1) - 1", "restarts * steps"),
    "mim": ("steps", "steps"),
    "apgd_ce": ("restarts * (steps + 1)", "restarts * steps"),
    "apgd_dlr": ("restarts * (steps + 1)", "restarts * steps"),
    "apgd_t": ("num_targets * (steps + 1)", "num_targets * steps"),
    "fab": ("≤ 2 * restarts * steps", "≤ 11 * restarts * steps"),
    "fab_t": ("≤ 2 * num_targets * restarts * steps", "≤ 3 * num_targets * restarts * steps // 2"),
    "cw": ("≤ search_steps * (steps + 1)", "≤ search_steps * steps"),
    "deepfool": ("≤ 2 * steps", "≤ (num_classes - 1) * steps"),
    "fmn": ("steps + 1", "steps"),
    "dim": ("steps", "steps"),
    "tim": ("steps", "steps"),
    "si_ni_fgsm": ("scales * steps", "scales * steps"),
    "vmi_fgsm": ("steps + (steps - 1) * num_neighbors", "steps + (steps - 1) * num_neighbors"),
    "sgm": ("steps", "steps"),
    "tta": ("steps", "steps"),
    "cda": ("0", "0"),
    "square": ("restarts * (queries + 1)", "0"),
    "nes": (QUERIES, "0"),
    "spsa": (QUERIES, "0"),
    "nattack": (QUERIES, "0"),
    "boundary": ("queries", "0"),
    "evolutionary": ("queries", "0"),
    "autoattack": ("its members'", "its members'"),
    "noise": ("draws - 1", "0"),
}
"""Forwards and backwards of a sample that withstands the L-inf attack, of a model with enough classes."""


def catalogue() -> str:
    """Return what each attack can do and costs, and its default settings, as two Markdown tables."""
    return f"{_table(_abilities())}\n\n{_table(_settings())}"


def _abilities() -> Iterable[tuple[str, ...]]:
    yield "name", "kind", "norms", "targeted", "gradients", "nearest", "forwards", "backwards", "paper"
    for row in list_attacks():
        attack = make_attack(row.name)
        forwards, backwards = PASSES[row.name]
        number = row.paper.removeprefix("arXiv ")
        yield (
            f"`{row.name}`",
            row.kind,
            ", ".join(NORMS[norm] for norm in row.norms),
            "only" if attack.needs_targets else _mark(row.targeted),
            _mark(row.needs_gradients),
            _mark(attack.nearest),
            forwards,
            backwards,
            f"[{number}](https://arxiv.org/abs/{number})",
        )


def _settings() -> Iterable[tuple[str, ...]]:
    yield "name", "default settings"
    for row in list_attacks():
        own = [field for field in dataclasses.fields(make_attack(row.name)) if field.name not in SHARED]
        yield f"`{row.name}`", ", ".join(f"`{field.name}={field.default}`" for field in own) or "-"


def _mark(is_so: bool) -> str:
    return "yes" if is_so else "-"


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    header, *body = rows
    lines = [header, ("---",) * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(catalogue())
