"""Run folders: what they say of themselves, read whole or refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from math import isclose
from pathlib import Path
from typing import Any

import yaml

from ares_lightning.attacks.threat import parse_budget
from ares_lightning.evaluation.metrics import WORST_CASE
from ares_lightning.evaluation.report.rows import Row
from ares_lightning.evaluation.report.style import Style
from ares_lightning.evaluation.report.worst_case import WorstCase, read_worst_case

VERDICTS = ("fail", "warn", "pass", "not asked")
"""What a sanity check says, worst first."""

_LISTS = {
    "sets": {"set", "n", "names_hash", "preparation"},
    "evaluators": {"name"},
    "failed": {"evaluator", "error"},
}
"""What about.json has lists of, and what every entry of a list must have."""

_AVERAGES = ("ema", "swa")
"""Tricks that the raw weights do not know of."""


@dataclass(frozen=True)
class Check:
    """What a sanity check found; verdict: one of VERDICTS."""

    check: str
    title: str
    verdict: str
    evidence: str = ""
    remedy: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict={self.verdict}: expected one of {', '.join(VERDICTS)}")


@dataclass
class Run:
    """What a run folder says of itself.

    settings: its config as text; about: which images it was asked about, by what, on what; checks: of its sanity,
    worst first; label: is unique in a report.
    """

    folder: Path
    rows: list[Row]
    settings: str
    config: Any
    about: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    label: str = ""
    style: Style = field(default_factory=lambda: Style.of(0))

    def setting(self, key: str) -> Any:
        """Return the value of a dotted key of the config, None where it is missing."""
        return _within(self.config, key)

    def fact(self, key: str) -> Any:
        """Return the value of a dotted key of about.json, None where it is missing."""
        return _within(self.about, key)

    @cached_property
    def threat(self) -> tuple[str, float] | None:
        """Norm and budget of the threat model, where the config has them."""
        norm, eps = self.setting("threat.norm"), self.setting("threat.eps")
        if norm is None or eps is None:
            return None
        return str(norm), parse_budget(eps, f"{self.folder / 'config.yaml'}: threat.eps")

    @property
    def own(self) -> list[Row]:
        """The rows about the run's own model; those of a transfer matrix may be about others."""
        return [row for row in self.rows if row.model is None]

    @cached_property
    def robust(self) -> Row | None:
        """The headline: the worst case over all attacks, else the lowest robust accuracy at the threat model."""
        norm, budget = self.threat or (None, -1.0)
        rows = [row for row in self.own if row.metric == "robust_accuracy" and row.norm and row.eps is not None]
        worst = [row for row in rows if row.evaluator == WORST_CASE]
        at_threat = [row for row in rows if row.norm == norm and isclose(row.eps or 0, budget, rel_tol=1e-6)]
        best = [row for row in worst if row in at_threat] or worst or at_threat
        return min(best, key=lambda row: row.value, default=None)

    @property
    def clean(self) -> Row | None:
        """The clean accuracy, on the set of the headline where there is one, else on the data's own."""
        rows = [row for row in self.own if row.metric == "clean_accuracy"]
        return next((row for row in rows if row.set == self.main), rows[0] if rows else None)

    @property
    def main(self) -> str | None:
        """The name of the set that the headline is about, without one that of the data."""
        if self.robust:
            return self.robust.set
        known = [each["set"] for each in self.about.get("sets", [])] + [self.setting("data.name")]
        known += [row.set for row in self.rows]
        return next((str(name) for name in known if name is not None), None)

    @property
    def question(self) -> tuple[str, str, float] | None:
        """Set, norm and budget of the headline: only numbers that answer the same question compare."""
        row = self.robust
        if row is None or row.norm is None or row.eps is None:
            return None
        return row.set or "", row.norm, float(f"{row.eps:.6g}")

    @cached_property
    def worst_case(self) -> WorstCase | None:
        """What became of each sample within the threat model, where the run has its verdicts."""
        row, evaluators = self.robust, self.about.get("evaluators", [])
        if row is None or row.norm is None or row.eps is None or row.set is None:
            return None
        counting = [str(each["fingerprint"]) for each in evaluators if each.get("fingerprint")]
        return read_worst_case(
            self.folder / "verdicts", self.fact("run.model_fingerprint"), row.set, row.norm, row.eps, counting
        )

    @property
    def name(self) -> str:
        """What the run is called, which others may be, too."""
        return str(self.setting("name") or self.folder.name)

    @property
    def architecture(self) -> str | None:
        """The name of the network."""
        name = self.setting("model.name")
        return None if name is None else str(name)

    @cached_property
    def training(self) -> str | None:
        """How the model was trained: by objective and tricks, or, with weights of the zoo, as these were."""
        name, key = self.setting("adv.name"), self.setting("model.key")
        if name is not None:
            unknown = _AVERAGES if self.setting("weights") == "raw" else ()
            tricks = [trick for trick in self.setting("trick") or {} if trick not in unknown]
            return " + ".join([str(name), *tricks])
        if key is None or self.setting("ckpt"):
            return None
        from ares_lightning.models import ZOO  # costs 3 s and 200 MiB, which few reports need

        return ZOO[str(key)].training if str(key) in ZOO else None

    @property
    def num_parameters(self) -> int | None:
        """How many parameters the model has."""
        count = self.fact("run.num_parameters")
        return count if isinstance(count, int) else None

    def verdicts(self, verdict: str) -> list[Check]:
        """Return the sanity checks with this verdict."""
        return [check for check in self.checks if check.verdict == verdict]

    @property
    def failures(self) -> list[dict[str, Any]]:
        """Evaluators that could not be run, and why."""
        return list(self.about.get("failed", []))

    @property
    def facts(self) -> dict[str, str]:
        """What was run on what, by its name in words."""
        versions = self.fact("run.versions") or {}
        known = {
            "model fingerprint": self.fact("run.model_fingerprint"),
            "evaluation fingerprint": self.fact("run.fingerprint"),
            "parameters": self.num_parameters and f"{self.num_parameters:,}",
            "device": self.fact("run.device"),
            "processes": self.fact("run.world_size"),
            "started": self.fact("run.started"),
            "seconds": self.fact("run.seconds"),
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        }
        return {name: str(value) for name, value in known.items() if value not in (None, "")}

    @property
    def listed(self) -> list[Row]:
        """The rows but those of single corruptions, which `corruptions` has."""
        return [row for row in self.rows if not self.is_cell(row)]

    def is_cell(self, row: Row) -> bool:
        """Whether a row is one of those that a table of corruptions is made of."""
        main = next((each["set"] for each in self.about.get("sets", [])), None)
        return row.cell is not None and row.metric == "clean_accuracy" and row.set != main

    @property
    def asked(self) -> list[dict[str, Any]]:
        """What is known of each set asked about; those of single corruptions are told of once."""
        sets: dict[tuple[str, str], dict[str, Any]] = {}
        for each in self.about.get("sets", []):
            family = each["set"].rsplit("/", 2)[0]
            sets.setdefault((family, each["preparation"]), {**each, "set": family})
        return list(sets.values())


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Return the run folders (those with a summary.json) at or below the paths, sorted.

    Raises ValueError for a path that does not exist, where no run is found, and for a broken summary.json.
    """
    places = [Path(path) for path in paths]
    for place in places:
        if not place.exists():
            raise ValueError(f"{place}: does not exist")
    runs = sorted({file.resolve().parent for place in places for file in place.rglob("summary.json")})
    if not runs:
        raise ValueError(f"{', '.join(map(str, places))}: no run here or below (looked for summary.json)")
    for run in runs:
        _read_summary(run / "summary.json")
    return runs


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, rank them by threat model, robust and clean accuracy, and give each a style and a label.

    Raises ValueError naming the file of a run that cannot be read.
    """

    def rank(run: Run) -> tuple[str, float, float, float]:
        row = run.robust
        clean = run.clean.value if run.clean else 0
        return (row.norm or "", row.eps or 0, -row.value, -clean) if row else ("~", 0, 0, -clean)

    runs = sorted((_read_run(Path(folder).resolve()) for folder in folders), key=rank)
    above = Path(os.path.commonpath([run.folder for run in runs]))
    names = [run.name for run in runs]
    with_id = [f"{name} ({run.folder.name})" for name, run in zip(names, runs, strict=True)]
    for place, run in enumerate(runs):
        run.style = Style.of(place)
        if names.count(names[place]) == 1:
            run.label = names[place]
        elif with_id.count(with_id[place]) == 1:
            run.label = with_id[place]
        else:
            run.label = f"{names[place]} ({run.folder.relative_to(above)})"
    return runs


def _read_run(folder: Path) -> Run:
    file = folder / "config.yaml"
    try:
        settings = file.read_text(encoding="utf-8") if file.exists() else ""
        config = yaml.load(settings, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: is not readable YAML") from error
    return Run(
        folder,
        _read_summary(folder / "summary.json"),
        settings,
        config,
        _read_about(folder / "about.json"),
        _read_checks(folder / "sanity.json"),
    )


def _read_about(file: Path) -> dict[str, Any]:
    """Read `about.json`; a run folder that was put together by hand may lack it."""
    try:
        about = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        for key, needed in _LISTS.items():
            if any(needed - each.keys() for each in about.get(key, [])):
                raise KeyError(key)
        dict(dict(about.get("run", {})).get("versions", {}))
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{file}: is not what an evaluation writes ({error})") from error
    return about if isinstance(about, dict) else {}


def _read_checks(file: Path) -> list[Check]:
    """Read `sanity.json`, worst first; a run folder may lack it."""
    known = {column.name for column in fields(Check)}
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"checks": []}
        checks = [Check(**{k: v for k, v in each.items() if k in known}) for each in content["checks"]]
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{file}: is not what an evaluation writes ({error})") from error
    return sorted(checks, key=lambda check: VERDICTS.index(check.verdict))


def _read_summary(file: Path) -> list[Row]:
    known = {column.name for column in fields(Row)}
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        return [Row(**{key: value for key, value in row.items() if key in known}) for row in rows]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: is not a summary, a JSON list of rows ({error})") from error


def _within(node: Any, key: str) -> Any:
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node
