"""The evaluation of a config."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ares_lightning.attacks import Attack, Threat, parse_budget
from ares_lightning.attacks.autoattack import RANDOM_DRAWS
from ares_lightning.attacks.threat import BALLS
from ares_lightning.build.budgets import attack_at_budget
from ares_lightning.build.config import ConfigError, plain, section
from ares_lightning.build.model import is_random
from ares_lightning.build.own import TARGET, build_own
from ares_lightning.build.transfer import build_transfer
from ares_lightning.data import (
    ImageSet,
    RobustDataModule,
    asks_for_more,
    select_subset,
)
from ares_lightning.evaluation.curves import BisectedCurve, BracketedCurve, Curve, ExactCurve, curve_budgets
from ares_lightning.evaluation.evaluators import AttackEvaluator, CleanEvaluator, Evaluator, SetsEvaluator
from ares_lightning.evaluation.frequency import FrequencyEvaluator, low_pass_radii
from ares_lightning.evaluation.queries import KINDS as QUERY_KINDS
from ares_lightning.evaluation.queries import QueryEvaluator
from ares_lightning.evaluation.robustbench import IMAGES as ROBUSTBENCH_IMAGES
from ares_lightning.evaluation.robustbench import RobustBenchEvaluator
from ares_lightning.evaluation.run import Evaluation
from ares_lightning.evaluation.sanity import sanity_evaluators
from ares_lightning.evaluation.sets import FoundSets, NothingFoundError, corrupted_sets, published_sets


def build_threat(cfg: DictConfig) -> Threat:
    """Build the threat model of `threat`."""
    if cfg.threat.norm not in BALLS:
        raise ConfigError(f"threat.norm={cfg.threat.norm}: expected one of {', '.join(BALLS)}")
    with section("threat"):
        return Threat(cfg.threat.norm, parse_budget(cfg.threat.eps))


def take_all_of_few(cfg: DictConfig, data: RobustDataModule) -> str | None:
    """Set `subset` to all where its default asks for more test images than there are; return one line if so."""
    spec = cfg.subset
    if not (OmegaConf.is_interpolation(cfg, "subset") and asks_for_more(data.test_set, spec)):
        return None
    cfg.subset = None
    return f"subset: all {len(data.test_set)} test images, fewer than data.subset_after_training={spec} asks for"


def build_evaluation(cfg: DictConfig, data: RobustDataModule, images: ImageSet | None = None) -> Evaluation:
    """Build what `eval` asks, on those of `images`, by default the test images, that `subset` names.

    RobustBench's own images are the default of `subset` where `eval` has its evaluator.
    """
    try:
        if "robustbench" in plain(cfg.get("eval")) and cfg.subset is None:
            cfg.subset = ROBUSTBENCH_IMAGES.get(data.network)
        dataset = select_subset(data.test_set if images is None else images, cfg.subset)
        evaluators, left_out = _built(cfg, data, dataset)
        return Evaluation(
            evaluators=evaluators,
            left_out=left_out,
            threat=build_threat(cfg),
            dataset=dataset,
            loader=data.evaluation_loader,
            batch_size=data.eval_batch_size,
            subset=cfg.subset,
            precision=cfg.precision,
            seed=cfg.seed,
            name=str(cfg.name),
            compile=cfg.compile,
            eot=RANDOM_DRAWS if is_random(cfg) else 1,
            save_images=_save_images(cfg),
            raises=os.environ.get("HYDRA_FULL_ERROR") == "1",
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _save_images(cfg: DictConfig) -> bool:
    wanted = cfg.verdicts.save_images
    if type(wanted) is not bool:
        raise ConfigError(f"verdicts.save_images={wanted}: expected true or false")
    return wanted


def build_evaluators(cfg: DictConfig, data: RobustDataModule, dataset: ImageSet) -> Sequence[Evaluator]:
    """Build the evaluators of `eval`, in the order in which they are named, for the test images `dataset`."""
    return _built(cfg, data, dataset)[0]


def _built(cfg: DictConfig, data: RobustDataModule, dataset: ImageSet) -> tuple[list[Evaluator], tuple[str, ...]]:
    """Build the evaluators, and name those left out because they are not `needed` and lack what they are about."""
    evaluators: list[Evaluator] = []
    left_out: list[str] = []
    case = _Case(cfg, data, dataset)
    for name, settings in plain(cfg.get("eval")).items():
        kind = TARGET if TARGET in settings else settings.pop("type", None)
        if kind not in _EVALUATORS:
            raise ConfigError(f"eval.{name}.type={kind}: expected one of {', '.join(_EVALUATORS)}")
        needed = settings.pop("needed", True)
        if "attack" in settings:
            with section(f"eval.{name}.attack"):
                settings["attack"] = attack_at_budget(settings["attack"], cfg, build_threat(cfg))
        with section(f"eval.{name}"):
            try:
                evaluators += _EVALUATORS[kind](case, name, **settings)
            except NothingFoundError:
                if needed:
                    raise
                left_out.append(name)
    _check_names_of_attacks(evaluators)
    return evaluators, tuple(left_out)


def _check_names_of_attacks(evaluators: Sequence[Evaluator]) -> None:
    """Raise ConfigError for two classes of attack with one name: the verdicts tell attacks apart by it."""
    known: dict[str, type] = {}
    for evaluator in evaluators:
        attack = getattr(evaluator, "attack", None)
        if attack is not None and known.setdefault(attack.name, type(attack)) is not type(attack):
            one, other = (f"{kind.__module__}.{kind.__qualname__}" for kind in (known[attack.name], type(attack)))
            raise ConfigError(
                f"eval.{evaluator.name}.attack: {one} and {other} are both called {attack.name}; set `name` in one"
            )


@dataclass(frozen=True)
class _Case:
    """What evaluators are built for."""

    cfg: DictConfig
    data: RobustDataModule
    dataset: ImageSet


def _sets(find: Callable[..., FoundSets]) -> Callable[..., list[Evaluator]]:
    def build(case: _Case, name: str, **settings: Any) -> list[Evaluator]:
        found = find(case.data, case.dataset, **settings)
        return [SetsEvaluator(name, *found, subset=settings.get("subset", case.cfg.subset))]

    return build


def _own(case: _Case, name: str, **settings: Any) -> list[Evaluator]:
    return [build_own(settings, Evaluator, name=name, subset=case.cfg.subset)]


def _clean(case: _Case, name: str) -> list[Evaluator]:
    return [CleanEvaluator(name, subset=case.cfg.subset)]


def _attacked(case: _Case, name: str, attack: Attack, **settings: Any) -> list[Evaluator]:
    kind = QueryEvaluator if attack.kind in QUERY_KINDS else AttackEvaluator
    return [kind(name, attack, **settings, subset=case.cfg.subset)]


def _robustbench(case: _Case, name: str, attack: Attack) -> list[Evaluator]:
    return [RobustBenchEvaluator(name, attack, subset=case.cfg.subset)]


def _curve(
    case: _Case, name: str, attack: Attack, eps: Sequence[object] | None, mode: str, **settings: Any
) -> list[Evaluator]:
    curves: dict[str, type[Curve]] = {"exact": ExactCurve, "bracketed": BracketedCurve, "bisected": BisectedCurve}
    if mode not in curves:
        raise ValueError(f"mode={mode}: expected one of {', '.join(curves)}")
    given = None if eps is None else [parse_budget(budget) for budget in eps]
    for key in settings:
        if key not in {field.name for field in fields(curves[mode])}:
            raise ValueError(f"{key}={settings[key]}: not a key of mode={mode}")
    budgets = curve_budgets(attack.threat.eps, given)
    return [curves[mode](name, attack, budgets, **settings, subset=case.cfg.subset)]


def _frequency(case: _Case, name: str, radii: Sequence[int] | None) -> list[Evaluator]:
    radii = low_pass_radii(case.cfg.data.img_size) if radii is None else radii
    return [FrequencyEvaluator(name, case.dataset.name, tuple(radii), subset=case.cfg.subset)]


def _transfer(case: _Case, name: str, **settings: Any) -> Sequence[Evaluator]:
    return build_transfer(name, case.cfg, case.dataset, build_threat(case.cfg), **settings)


def _sanity(case: _Case, name: str, **settings: Any) -> Sequence[Evaluator]:
    eot = RANDOM_DRAWS if is_random(case.cfg) else 1
    return sanity_evaluators(build_threat(case.cfg), case.dataset, eot=eot, **settings)


_EVALUATORS: dict[str, Callable[..., Sequence[Evaluator]]] = {
    "clean": _clean,
    "attack": _attacked,
    "curve": _curve,
    "transfer": _transfer,
    "frequency": _frequency,
    "robustbench": _robustbench,
    "sanity": _sanity,
    "ood": _sets(published_sets),
    "corruptions": _sets(corrupted_sets),
    TARGET: _own,
}
