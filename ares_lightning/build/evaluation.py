"""The evaluation of a config."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig

from ares_lightning.attacks import Attack, Threat, make_attack, parse_budget
from ares_lightning.attacks.autoattack import RANDOM_DRAWS
from ares_lightning.attacks.threat import BALLS
from ares_lightning.build.config import ConfigError, plain, section
from ares_lightning.build.model import is_random
from ares_lightning.data import (
    ImageSet,
    RobustDataModule,
    select_subset,
)
from ares_lightning.evaluation.curves import BisectedCurve, BracketedCurve, Curve, ExactCurve, curve_budgets
from ares_lightning.evaluation.evaluators import AttackEvaluator, CleanEvaluator, Evaluator, SetsEvaluator
from ares_lightning.evaluation.run import Evaluation
from ares_lightning.evaluation.sets import FoundSets, corrupted_sets, published_sets


def build_threat(cfg: DictConfig) -> Threat:
    """Build the threat model of `threat`."""
    if cfg.threat.norm not in BALLS:
        raise ConfigError(f"threat.norm={cfg.threat.norm}: expected one of {', '.join(BALLS)}")
    with section("threat"):
        return Threat(cfg.threat.norm, parse_budget(cfg.threat.eps))


def build_evaluation(cfg: DictConfig, data: RobustDataModule) -> Evaluation:
    """Build what `eval` asks, on the test images that `subset` names."""
    try:
        dataset = select_subset(data.test_set, cfg.subset)
        return Evaluation(
            evaluators=build_evaluators(cfg, data, dataset),
            threat=build_threat(cfg),
            dataset=dataset,
            loader=data.evaluation_loader,
            batch_size=data.eval_batch_size,
            subset=cfg.subset,
            precision=cfg.precision,
            seed=cfg.seed,
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
    evaluators: list[Evaluator] = []
    for name, settings in plain(cfg.get("eval")).items():
        kind = settings.pop("type", None)
        if kind not in _EVALUATORS and kind not in _SETS:
            raise ConfigError(f"eval.{name}.type={kind}: expected one of {', '.join([*_EVALUATORS, *_SETS])}")
        if "attack" in settings:
            settings["attack"] = _attack(f"eval.{name}.attack", settings["attack"])
        with section(f"eval.{name}"):
            if kind in _SETS:
                found = _SETS[kind](data, dataset, **settings)
                evaluators.append(SetsEvaluator(name, *found, subset=settings.get("subset", cfg.subset)))
            else:
                evaluators.append(_EVALUATORS[kind](name, **settings))
    return evaluators


_SETS: dict[str, Callable[..., FoundSets]] = {"ood": published_sets, "corruptions": corrupted_sets}


def _curve(name: str, attack: Attack, eps: Sequence[object] | None, mode: str, **settings: Any) -> Curve:
    curves: dict[str, type[Curve]] = {"exact": ExactCurve, "bracketed": BracketedCurve, "bisected": BisectedCurve}
    if mode not in curves:
        raise ValueError(f"mode={mode}: expected one of {', '.join(curves)}")
    given = None if eps is None else [parse_budget(budget) for budget in eps]
    for key in settings:
        if key not in {field.name for field in fields(curves[mode])}:
            raise ValueError(f"{key}={settings[key]}: not a key of mode={mode}")
    return curves[mode](name, attack, curve_budgets(attack.threat.eps, given), **settings)


_EVALUATORS: dict[str, Callable[..., Evaluator]] = {
    "clean": CleanEvaluator,
    "attack": AttackEvaluator,
    "curve": _curve,
}


def _attack(key: str, settings: dict[str, Any]) -> Attack:
    with section(key):
        return make_attack(**settings)
