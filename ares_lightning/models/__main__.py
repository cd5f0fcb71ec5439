"""The command line of the models: `python -m ares_lightning.models [list | show <key> | export <run> --to …]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from ares_lightning.models.weights import WHICH
from ares_lightning.models.zoo import NORMALISATIONS, TRAININGS, ZOO, ZooModel, find_model

FORMATS = ("timm", "robustbench", "safetensors")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake becomes one line on stderr and exit code 1."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] not in (*_COMMANDS, "-h", "--help"):
        words.insert(0, "list")
    given = _parser().parse_args(words)
    try:
        _COMMANDS[given.command](given)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ares_lightning.models",
        description="The 55 models of ARES-Bench, for train.py and evaluate.py as model=zoo/<key>. "
        "Without a command: list.",
    )
    commands = parser.add_subparsers(dest="command", metavar="list | show | export")
    listing = commands.add_parser("list", help="the models, one a line")
    listing.add_argument("words", nargs="*", help="show only models whose key contains each of these")
    listing.add_argument("--family", choices=sorted({model.family for model in ZOO.values()}))
    listing.add_argument("--training", choices=sorted(TRAININGS))
    listing.add_argument("--weights", choices=("timm", "file"), help="where they come from")
    showing = commands.add_parser("show", help="everything about one model")
    showing.add_argument("key")
    for command in (listing, showing):
        command.add_argument("--json", action="store_true", help="print JSON")
    exporting = commands.add_parser("export", help="a trained model as files for others")
    exporting.add_argument("run", type=Path, help="run folder or checkpoint")
    exporting.add_argument("--to", choices=FORMATS, required=True)
    exporting.add_argument("--output", type=Path, help="folder to write; default: <run>/export/<format>")
    exporting.add_argument("--weights", choices=WHICH, help="of a checkpoint with both; default: ema")
    exporting.add_argument(
        "--trust", action="append", default=[], help="a class of yours that the checkpoint names"
    )
    exporting.add_argument("--license", default="unknown", help="for the model card, such as mit")
    exporting.add_argument(
        "--evaluation", type=Path, action="append", default=[], help="run folder whose numbers go onto the card"
    )
    return parser


def _list(given: argparse.Namespace) -> None:
    models = [model for model in ZOO.values() if _is_asked_for(model, given)]
    if not models:
        asked = " ".join([*given.words, *filter(None, (given.family, given.training, given.weights))])
        raise ValueError(f"no model is like that: {asked}; without filters all are listed")
    if given.json:
        print(json.dumps([model.facts() for model in models], indent=1))
        return
    table = Table("key", "family", "training", "weights", "clean", "AutoAttack", box=box.SIMPLE_HEAD)
    for model in models:
        table.add_row(
            model.key,
            model.family,
            model.training,
            "timm" if model.in_timm else "file",
            *(_first(model, metric) for metric in ("clean", "autoattack")),
        )
    table.caption = (
        f"{len(models)} of {len(ZOO)} models; published accuracy in %, AutoAttack at L-inf 4/255,\n"
        "not all on the same images; `show <key>` tells more"
    )
    Console(highlight=False).print(table)


def _is_asked_for(model: ZooModel, given: argparse.Namespace) -> bool:
    return (
        all(word in model.key for word in given.words)
        and given.family in (None, model.family)
        and given.training in (None, model.training)
        and given.weights in (None, "timm" if model.in_timm else "file")
    )


def _first(model: ZooModel, metric: str) -> str:
    return next((f"{board.percent[metric]:.1f}" for board in model.published if metric in board.percent), "")


def _show(given: argparse.Namespace) -> None:
    model = find_model(given.key)
    if given.json:
        print(json.dumps(model.facts(), indent=1))
        return
    mean, std = NORMALISATIONS[model.normalisation]
    lines = [
        ("key", model.key),
        ("family", model.family),
        ("architecture", " ".join([model.architecture, *(f"{k}={v}" for k, v in model.settings.items())])),
        ("activation", model.activation),
        ("training", f"{model.training}: {TRAININGS[model.training]}"),
        ("normalisation", f"{model.normalisation}: mean {list(mean)}, std {list(std)}"),
        ("weights", model.source),
    ]
    for board in model.published:
        numbers = ", ".join(f"{metric} {value} %" for metric, value in board.percent.items())
        lines.append(("published", f"{numbers} ({board.source}, {board.num_images:,} images)"))
    if model.note:
        lines.append(("note", model.note))
    folder = "" if model.in_timm else f" model.weights=<folder of {model.weights}>"
    lines.append(("use", f"python evaluate.py model=zoo/{model.key}{folder} data=… data.root=…"))
    for name, value in lines:
        print(f"{name:<15}{value}")


def _export(given: argparse.Namespace) -> None:
    from ares_lightning.export import (
        export,
    )  # and with it all of training and evaluation, which the list can do without

    folder = export(
        given.run,
        given.to,
        output=given.output,
        weights=given.weights,
        license=given.license,
        evaluations=given.evaluation,
        trust=given.trust,
    )
    print(f"exported: {folder}")


_COMMANDS = {"list": _list, "show": _show, "export": _export}

if __name__ == "__main__":
    main()
