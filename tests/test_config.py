"""The shipped configs of attacks and evaluators: complete, and with the defaults of the code."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from ares_lightning import build
from ares_lightning.attacks import list_attacks, make_attack
from ares_lightning.attacks.autoattack import AutoAttack
from ares_lightning.data.__main__ import table
from ares_lightning.evaluation.curves import BisectedCurve, BracketedCurve
from ares_lightning.launch import CONFIG_DIR
from ares_lightning.training.objectives import OBJECTIVES

NORMS = {row.name: row.norms for row in list_attacks()}
L2_ONLY = [name for name, norms in NORMS.items() if norms == ("l2",)]
SUITES = ("quick", "curve", "unseen", "blackbox", "ares_bench")
NO_ATTACK = (*SUITES, "attack", "clean", "ood", "corruptions", "frequency", "transfer", "sanity")
OWN_NORMS = {"curve_l1": "l1", "curve_l2": "l2", "autoattack_l1": "l1", "autoattack_l2": "l2"}
OWN_NORMS |= {"boundary": "l2", "evolutionary": "l2"}
GENERATOR = ["attack.generator=weights.pt"]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose("evaluate", list(overrides))


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def only_evaluator(*overrides: str):
    (evaluator,) = build.build_evaluators(composed(*overrides), None, None)
    return evaluator


def test_every_attack_has_a_config_and_every_config_an_attack():
    assert choices("attack") == sorted(NORMS)


@pytest.mark.parametrize("name", NORMS)
def test_an_attacks_config_holds_every_setting_and_the_defaults_of_the_code(name):
    config = OmegaConf.load(CONFIG_DIR / "attack" / f"{name}.yaml")
    fields = [field.name for field in dataclasses.fields(make_attack(name))]
    assert list(config)[:3] == ["name", "norm", "eps"]
    assert set(config) == {"name", *fields}
    first = (CONFIG_DIR / "attack" / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ")
    assert next(row.paper for row in list_attacks() if row.name == name) in first
    extra, settings = (GENERATOR, {"generator": "weights.pt"}) if name == "cda" else ([], {})
    targets = ["eval.attack.targets=random"] if name == "tta" else []
    threat = ["threat.norm=linf", "threat.eps=3/255"]
    attack = only_evaluator("eval=[attack]", f"attack={name}", *threat, *extra, *targets).attack
    if name in L2_ONLY:
        assert attack == make_attack(name, norm="l2", eps=None)
    else:
        assert attack == make_attack(name, norm="linf", eps="3/255", **settings)


def test_attacks_that_know_only_l2_say_what_they_take_for_a_budget():
    assert L2_ONLY == ["cw", "boundary", "evolutionary"]
    threat = ["threat.norm=l2", "threat.eps=0.5"]
    assert only_evaluator("eval=[attack]", "attack=cw", *threat).attack.eps is None
    assert only_evaluator("eval=[attack]", "attack=cw", *threat, "attack.eps=0.5").attack.threat.eps == 0.5


@pytest.mark.parametrize("name", [name for name in choices("eval") if name not in NO_ATTACK])
def test_an_evaluators_config_holds_every_setting_of_its_attack(name):
    config = OmegaConf.load(CONFIG_DIR / "eval" / f"{name}.yaml")
    assert list(config) == [name]
    attack = only_evaluator(f"eval=[{name}]").attack
    assert set(config[name].attack) == {"name"} | {field.name for field in dataclasses.fields(attack)}
    threat = build.build_threat(composed())
    assert (attack.norm == OWN_NORMS[name]) if name in OWN_NORMS else (attack.threat == threat)


def test_autoattack_is_the_standard_version_at_the_threat_model():
    attack = only_evaluator("eval=[autoattack]", "threat.norm=l2", "threat.eps=0.5").attack
    assert attack == AutoAttack(norm="l2", eps=0.5, version="standard")


def test_the_curve_of_ares_bench_doubles_from_half_the_budget_and_bisects_with_steps_of_a_quarter():
    curve = only_evaluator("eval=[curve_ares]", "threat.norm=linf", "threat.eps=4/255")
    assert isinstance(curve, BisectedCurve)
    assert (curve.start, curve.doublings, curve.bisections) == (2 / 255, 5, 10)
    assert curve.attack == make_attack("pgd", eps="4/255", steps=100)
    assert only_evaluator("eval=[curve_ares]", "eval.curve_ares.start=1/255").start == 1 / 255


def test_the_bracketed_curve_runs_autoattack():
    curve = only_evaluator("eval=[curve_bracketed]")
    assert isinstance(curve, BracketedCurve)
    assert curve.attack == make_attack("autoattack", eps=0.1)


def test_augmentations_have_the_same_keys_and_those_that_change_something_say_whence():
    usual = set(OmegaConf.load(CONFIG_DIR / "aug" / "none.yaml"))
    assert {"none", "light", "heavy"} <= set(choices("aug"))
    for choice in choices("aug"):
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            assert set(compose("train", [f"aug={choice}"]).aug) == usual
        title, *lines = (CONFIG_DIR / "aug" / f"{choice}.yaml").read_text().splitlines()
        assert choice == "none" or "arXiv" in title
        assert all("  # " in line or " # " in line for line in lines if not line.startswith("defaults"))


def test_light_and_heavy_augmentation_are_the_published_ones():
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        light, heavy = (compose("train", [f"aug={choice}"]).aug for choice in ("light", "heavy"))
    assert (light.color_jitter, light.label_smoothing) == (0.4, 0.1)
    assert (light.randaugment, light.mixup, light.cutmix, light.erasing) == (None, 0, 0, 0)
    assert (heavy.randaugment, heavy.color_jitter) == ("rand-m9-mstd0.5-inc1", 0)
    assert (heavy.mixup, heavy.cutmix, heavy.switch_prob) == (0.8, 1.0, 0.5)
    assert (heavy.erasing, heavy.label_smoothing) == (0.25, 0.1)


DATA_PAGE = (CONFIG_DIR.parent / "docs" / "data.md").read_text()


TRAINING_PAGE = (CONFIG_DIR.parent / "docs" / "training.md").read_text()


def test_the_training_page_tells_of_every_objective_and_trick():
    assert set(re.findall(r"^\| `(\w+)` \|", TRAINING_PAGE, re.M)) >= set(OBJECTIVES)
    assert {trick for trick in choices("trick") if f"`trick=[{trick}]" in TRAINING_PAGE} == set(choices("trick"))


def test_the_data_page_shows_the_table_of_sets():
    assert table() in DATA_PAGE, "put what `python -m ares_lightning.data` prints into docs/data.md"


MISTAKES = [
    (["eval=[attack]", "attack=tta"], "eval.attack.targets=null: tta knows a targeted form only"),
    (
        ["eval=[attack]", "eval.attack.targets=all"],
        "eval.attack.targets=all: expected null, random, least_likely or a CSV file",
    ),
    (["eval=[autoattack]", "eval.autoattack.targets=random"], "autoattack knows no targeted form"),
    (["eval=[attack]", "attack=spsa", "threat.norm=l1"], "eval.attack.attack.norm=l1: spsa knows linf, l2"),
    (
        ["eval=[curve_threat]", "eval.curve_threat.mode=fast"],
        "eval.curve_threat.mode=fast: expected one of exact, bracketed, bisected",
    ),
    (
        ["eval=[curve_threat]", "+eval.curve_threat.start=0.1"],
        "eval.curve_threat.start=0.1: not a key of mode=exact",
    ),
    (["eval=[curve_ares]", "eval.curve_ares.start=0"], "eval.curve_ares.start=0: expected a budget above 0"),
    (["eval=[curve_ares]", "eval.curve_ares.doublings=0"], "eval.curve_ares.doublings=0: expected a whole number"),
    (
        ["eval=[curve_threat]", "eval.curve_threat.eps=[0.2,0.1]"],
        "eval.curve_threat.eps=.*: expected a rising list",
    ),
    (["eval=[pgd20]", "+eval.pgd20.speed=1"], "eval.pgd20.speed: no such key"),
    (
        ["eval=[pgd20]", "eval.pgd20.type=fast"],
        "eval.pgd20.type=fast: expected one of clean, attack, curve",
    ),
    (["eval=[autoattack]", "eval.autoattack.attack.version=fast"], "eval.autoattack.attack.version=fast"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_setting_that_makes_no_sense_is_named_with_its_key(overrides, message):
    with pytest.raises(build.ConfigError, match=message):
        build.build_evaluators(composed(*overrides), None, None)
