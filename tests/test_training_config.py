"""The shipped configs of training: complete, each a real step, and contradictions named in one line."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys

import pytest
import torch
from omegaconf import OmegaConf
from processes import here
from torch import nn
from trainings import SHORT, config, fit

from ares_lightning import build
from ares_lightning.attacks import make_attack
from ares_lightning.evaluation.report.run import read_runs
from ares_lightning.launch import CONFIG_DIR, train_main
from ares_lightning.models.classifier import as_classifier
from ares_lightning.training.objectives import OBJECTIVES
from ares_lightning.training.optim import OptimSettings
from ares_lightning.training.tricks import AWP, EMA, SWA, OverfittingProbe


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


TAUGHT = ("ard", "rslad")
NOT_IN_TRAINING = {"eot", "restarts"}
"""Of an attack: networks are not random in training, and one run is made."""
OWN_LOSS = ("trades", "rslad", "n_fgsm", "gradalign", "free")
OWN_MODE = ("free",)
"""Whose images are made in the pass of the update."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("teacher"), "adv=none", "optim.lr=0.01").end


def test_every_objective_has_a_config():
    assert choices("adv") == sorted(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objectives_config_holds_exactly_what_it_and_its_attack_take(name):
    settings = OmegaConf.load(CONFIG_DIR / "adv" / f"{name}.yaml")
    takes = inspect.signature(OBJECTIVES[name]).parameters
    keys = {"name", "val_steps"} | ({"monitor"} if name == "none" else set())
    for parameter in takes:
        if parameter == "inner":
            attack = make_attack(settings.attack)
            fields = {field.name for field in dataclasses.fields(attack)} - NOT_IN_TRAINING
            keys |= {"attack", "eps_warmup_epochs", *fields} - ({"loss"} if name in OWN_LOSS else set())
            keys |= set() if name in OWN_MODE else {"attack_mode"}
            keys |= {"step_warmup_epochs"} if "step_size" in fields else set()
        else:
            keys |= {"threat": {"norm", "eps"}, "norms": {"split_bn"}}.get(parameter, {parameter})
    assert set(settings) == keys
    for key, parameter in takes.items():
        if parameter.default is not inspect.Parameter.empty and key != "norms":
            assert settings[key] == parameter.default, f"the default of {key} stands in the code"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains(name, teacher, tmp_path):
    extra = [f"adv.teacher={teacher}"] if name in TAUGHT else []
    run = fit(tmp_path, f"adv={name}", *extra, "trainer.limit_train_batches=2")
    assert run.trainer.global_step == 2
    assert torch.isfinite(run.trainer.callback_metrics["train/loss"])
    assert isinstance(run.module.objective, OBJECTIVES[name])


@pytest.mark.parametrize("name", choices("trick"))
def test_every_trick_trains(name, tmp_path):
    settings = OmegaConf.load(CONFIG_DIR / "trick" / f"{name}.yaml")
    assert list(settings) == [name]
    run = fit(tmp_path, f"trick=[{name}]", "trainer.limit_train_batches=2")
    assert run.trainer.global_step == 2


@pytest.mark.parametrize(
    ("name", "trick"), [("ema", EMA), ("swa", SWA), ("awp", AWP), ("overfitting_probe", OverfittingProbe)]
)
def test_a_tricks_config_holds_every_setting_and_the_defaults_of_the_code(name, trick):
    settings = OmegaConf.load(CONFIG_DIR / "trick" / f"{name}.yaml")[name]
    takes = dict(inspect.signature(trick).parameters)
    if name == "overfitting_probe":
        del takes["attack"], takes["seed"]
        assert settings.pop("steps") == 5
    assert set(settings) == set(takes)
    for key, parameter in takes.items():
        assert parameter.default in (inspect.Parameter.empty, settings[key])


def test_the_best_checkpoint_is_that_of_robust_accuracy_but_for_training_on_clean_images():
    chosen = {adv: config(f"adv={adv}").callbacks.checkpoint.monitor for adv in choices("adv") if adv not in TAUGHT}
    assert chosen == dict.fromkeys(chosen, "val/robust_acc") | {"none": "val/clean_acc"}


@pytest.mark.parametrize("name", choices("optim"))
def test_an_optimizers_config_holds_every_setting(name):
    settings = OmegaConf.load(CONFIG_DIR / "optim" / f"{name}.yaml")
    assert set(settings) == {field.name for field in dataclasses.fields(OptimSettings)}
    assert OptimSettings(**OmegaConf.to_container(settings))


CONTRADICTIONS = [
    (["trick=[ema,swa]"], r"trick=\[ema,swa\]: both say what the averaged weights are; take one"),
    (
        ["trick=[ema,overfitting_probe]", "trick.overfitting_probe.action=fall_back"],
        r"trick\.overfitting_probe\.action=fall_back: the average of trick=\[ema\] or \[swa\] has no way back",
    ),
    (
        ["trick=[swa,overfitting_probe]", "trick.overfitting_probe.action=fall_back"],
        r"trick\.overfitting_probe\.action=fall_back: .*set stop",
    ),
    (["adv=none", "trick=[overfitting_probe]"], r"trick=\[overfitting_probe\]: adv=none trains against no attack"),
    (
        ["adv=mart", "aug.label_smoothing=0.1"],
        r"aug\.label_smoothing=0\.1: the loss of adv=mart needs",
    ),
    (["adv=mart", "aug.mixup=0.8"], r"aug\.mixup=0\.8: the loss of adv=mart needs class labels; set it to 0"),
    (["adv=mart", "aug.cutmix=1.0"], r"aug\.cutmix=1\.0: the loss of adv=mart needs class labels"),
    (
        ["adv=free", "trainer.accumulate_grad_batches=2"],
        r"trainer\.accumulate_grad_batches=2: adv=free updates in every replay; set it to 1",
    ),
    (["adv=free", "trick=[awp]"], r"trick=\[awp\]: adv=free moves its images in the backward of the loss"),
    (["adv=gradalign", "trainer.compile=true"], r"trainer\.compile=true: adv=gradalign differentiates twice"),
    (
        ["adv=gradient_norm", "trainer.compile=true"],
        r"trainer\.compile=true: adv=gradient_norm differ",
    ),
    (["adv=n_fgsm", "threat.norm=l2"], r"adv\.norm=l2: n_fgsm knows linf"),
    (["adv=gradalign", "threat.norm=l2"], r"adv\.norm=l2: gradalign knows linf"),
    (["adv=free", "threat.norm=l2"], r"adv\.norm=l2: free knows linf"),
    (["adv=advprop", "model=vit_ti"], r"adv\.split_bn=true: the network has no batch norms to split"),
    (["adv=trades", "adv.split_bn=maybe"], r"adv\.split_bn=maybe: expected true or false"),
    (["adv=ard"], r"adv\.teacher=null: give a checkpoint or a run folder"),
    (["adv=rslad", "adv.teacher={name:cnn}"], r"adv\.teacher=.*: has no weights; give weights"),
    (["adv=pgd", "adv.attack_mode=test"], r"adv\.attack_mode=test: expected one of eval, train"),
    (["adv=pgd", "adv.step_size=2/3eps"], r"adv\.step_size=2/3eps: expected a number"),
    (["adv=pgd", "adv.step_size=x eps"], r"adv\.step_size=x eps: expected a multiple such as 2/3 eps"),
    (["adv=pgd", "adv.random_start=gauss"], r"adv\.random_start=gauss: expected true, false or normal"),
    (["adv=apgd", "threat.norm=l1"], r"adv\.random_start=False: the method for l1 begins at random; set true"),
    (["adv=pgd", "adv.eps_warmup_epochs=-1"], r"adv\.eps_warmup_epochs=-1: expected a number of at least 0"),
    (["adv=none", "+adv.eps=0.1"], r"adv\.eps: no such key"),
    (["adv=gradient_norm", "+adv.steps=3"], r"adv\.steps: no such key"),
    (["optim.agc=0.01", "optim.clip_grad_norm=1"], r"optim\.agc=0\.01: contradicts clip_grad_norm=1"),
    (["optim.schedule=step"], r"optim\.milestones=.*: schedule=step needs the epochs"),
]


@pytest.mark.parametrize(("overrides", "message"), CONTRADICTIONS, ids=lambda value: str(value)[:50])
def test_what_does_not_go_together_is_said_in_one_line(overrides, message):
    cfg = config(*overrides)
    data = build.build_data(cfg, training=True)
    net = build.build_classifier(cfg, data.num_classes)
    with pytest.raises(build.ConfigError, match=f"^{message}") as caught:
        build.build_module(cfg, net, data)
    assert "\n" not in str(caught.value)


def test_a_network_without_parameters_can_be_built_but_not_trained():
    cfg = config("model.name=fixed")
    data = build.build_data(cfg, training=True)
    fixed = nn.Sequential(nn.AdaptiveAvgPool2d((2, 5)), nn.Flatten())
    net = as_classifier("fixed", fixed, 1, data.num_classes, 8, mean=[0], std=[1])
    with pytest.raises(build.ConfigError, match=r"^model\.name=fixed: has no parameters to train; take another"):
        build.build_module(cfg, net, data)


def test_a_teacher_of_other_classes_or_sizes_is_refused(teacher):
    cfg = config("adv=ard", f"adv.teacher={teacher}")
    data = build.build_data(cfg, training=True)
    net = build.build_classifier(cfg, data.num_classes)
    objective = build.build_objective(cfg, net, data.num_classes)
    saved = torch.load(teacher, weights_only=True)["state_dict"]
    assert torch.equal(objective.teacher.backbone.head.weight, saved["net.backbone.head.weight"])
    with pytest.raises(build.ConfigError, match=r"^adv\.teacher=.*: knows 10 classes of 8 pixels, the st"):
        build.build_objective(cfg, net, 7)


def short(arguments: list[str], monkeypatch, *more: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *SHORT, *arguments, *map(str, more)])
    train_main()


def test_the_command_of_the_design_runs(tmp_path, monkeypatch):
    command = "adv=trades trick=[ema,awp] aug=heavy adv.eps=8/255 adv.steps=10"
    short(command.split(), monkeypatch, f"run_dir={tmp_path}", "eval=[clean]", "subset=first:20")
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert {row["evaluator"] for row in rows} == {"clean"}
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert "state_dict_ema" in best
    assert best["config"]["adv"]["steps"] == 10
    raw = tmp_path / "raw"
    done = here(
        "evaluate.py", f"ckpt={tmp_path}", "weights=raw", f"run_dir={raw}", "eval=[clean]", "subset=first:20"
    )
    assert done.returncode == 0, done.stderr
    assert [read_runs([folder])[0].training for folder in (tmp_path, raw)] == ["trades + ema + awp", "trades + awp"]


def test_a_loss_that_is_no_number_ends_the_program_in_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit) as caught:
        short(["optim=sgd", "optim.lr=1e30", "optim.warmup_epochs=0"], monkeypatch, f"run_dir={tmp_path}")
    assert re.fullmatch(r"error: train/loss is not finite at step 2, epoch 0; lower optim\.lr.*", str(caught.value))
