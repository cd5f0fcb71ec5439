"""The two programs as a user runs them: the real configs, the real Trainer, real files."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from photos import save
from PIL import Image
from processes import ROOT, assert_one_line, here, last_weights, run
from sklearn.datasets import load_digits

from ares_lightning import build
from ares_lightning.data import VARIANTS
from ares_lightning.launch import CONFIG_DIR, evaluate_main, train_main

QUICK = ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "subset=first:6"]
QUICK += ["data.batch_size=16", "data.eval_batch_size=16"]
GROUPS = ("adv", "trick", "aug", "optim", "trainer", "eval", "attack", "logger", "callbacks", "launch", "debug")


def choices(group: str) -> list[str]:
    return sorted(
        str(path.relative_to(CONFIG_DIR / group).with_suffix("")) for path in (CONFIG_DIR / group).rglob("*.yaml")
    )


def composed(config: str, *overrides: str):
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(config, list(overrides))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A short real training run of the default command: half the epochs, the whole evaluation."""
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    done = here("train.py", f"run_dir={run_dir}", "trainer.max_epochs=6")
    assert done.returncode == 0, done.stderr
    return run_dir


def accuracy(run_dir: Path, evaluator: str) -> float:
    rows = json.loads((run_dir / "summary.json").read_text())
    return next(row["value"] for row in rows if row["evaluator"] == evaluator)


def test_adversarial_training_gains_robustness(trained, tmp_path):
    done = here("train.py", "adv=none", f"run_dir={tmp_path}", "trainer.max_epochs=6")
    assert done.returncode == 0, done.stderr
    assert accuracy(trained, "clean") > 0.9
    assert accuracy(trained, "pgd20") > accuracy(tmp_path, "pgd20") + 0.15


def test_a_run_folder_holds_what_the_design_says(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "config.yaml", "checkpoints", "metrics.csv", "verdicts", "summary.json", "about.json", "report.html",
        "examples.npz", "sanity.json",
    }  # fmt: skip
    assert {path.name for path in (trained / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    metrics = pd.read_csv(trained / "metrics.csv")
    assert {"epoch", "train/loss", "train/robust_acc", "val/clean_acc", "val/robust_acc"} <= set(metrics.columns)
    best = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["config"]["adv"]["steps"] == 3
    scores = metrics["val/robust_acc"].dropna()
    assert best["epoch"] == metrics.loc[scores.idxmax(), "epoch"]


def test_the_same_seed_gives_the_same_numbers(trained, tmp_path):
    again = run("train.py", f"run_dir={tmp_path}", "trainer.max_epochs=6")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "summary.json").read_text() == (trained / "summary.json").read_text()
    one, two = last_weights(trained), last_weights(tmp_path)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_evaluating_the_checkpoint_gives_the_numbers_of_the_training(trained, tmp_path):
    done = here("evaluate.py", f"ckpt={trained}", f"run_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "summary.json").read_text() == (trained / "summary.json").read_text()
    parts = sorted((tmp_path / "verdicts").iterdir())
    again = here("evaluate.py", f"ckpt={trained}", f"run_dir={tmp_path}")
    assert again.returncode == 0
    assert sorted((tmp_path / "verdicts").iterdir()) == parts, "nothing is asked twice"


def test_a_plan_is_printed_and_nothing_is_written(trained, tmp_path):
    done = here("evaluate.py", f"ckpt={trained}", f"run_dir={tmp_path / 'run'}", "plan=true", "eval=[clean,pgd20]")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^pgd20 +digits +360 +22 +20 ", done.stdout, re.M)
    assert re.search(r"^total .* s$", done.stdout, re.M)
    assert not (tmp_path / "run").exists()


INTERRUPTED = """
from dataclasses import dataclass
from ares_lightning.evaluation.evaluators import CleanEvaluator

@dataclass(frozen=True)
class Interrupted(CleanEvaluator):
    def verdicts(self, *_):
        raise KeyboardInterrupt  # as Ctrl-C does
"""


def test_an_interrupted_evaluation_says_that_it_goes_on(trained, tmp_path, monkeypatch):
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    monkeypatch.syspath_prepend(str(tmp_path))
    ours = "+eval.mine._target_=interrupted.Interrupted"
    done = here("evaluate.py", f"ckpt={trained}", "eval=[]", ours, f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 130
    assert done.stderr == "interrupted: the same command goes on where it stopped\n"


def test_an_interrupted_training_keeps_its_checkpoint_and_goes_on(trained, tmp_path):
    command = [
        sys.executable,
        "train.py",
        f"run_dir={tmp_path}",
        "trainer.max_epochs=6",
        "trainer.limit_train_batches=19",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"resume=last run_dir={tmp_path} goes on" in err
    refused = here("train.py", f"run_dir={tmp_path}")
    assert refused.returncode == 1
    assert "already holds a run; give resume=last" in refused.stderr
    done = here("train.py", f"run_dir={tmp_path}", "resume=last")
    assert done.returncode == 0, done.stderr
    assert sorted(pd.read_csv(tmp_path / "metrics.csv")["epoch"].unique()) == list(range(6))
    one, two = last_weights(trained), last_weights(tmp_path)
    assert all(torch.equal(one[key], two[key]) for key in one), "resumed and uninterrupted training agree"


def test_a_default_subset_larger_than_the_test_set_is_all_of_it_and_one_that_is_asked_for_an_error(tmp_path):
    short = [*(setting for setting in QUICK if not setting.startswith("subset=")), "eval=[clean]"]
    done = here("train.py", "data.subset_after_training=random:1000@0", *short, f"run_dir={tmp_path / 'all'}")
    assert done.returncode == 0, done.stderr
    line = "subset: all 360 test images, fewer than data.subset_after_training=random:1000@0 asks for"
    assert line in done.stdout.splitlines()
    assert json.loads((tmp_path / "all" / "summary.json").read_text())[0]["n"] == 360
    assert OmegaConf.load(tmp_path / "all" / "config.yaml").subset is None
    done = here("train.py", "subset=random:1000@0", *short, f"run_dir={tmp_path / 'asked'}")
    assert_one_line(done, r"subset=random:1000@0: must be .* with n from 1 to 360")


def test_two_processes_train_and_evaluate(tmp_path):
    done = run("train.py", "trainer=ddp_sim", f"run_dir={tmp_path}", *QUICK, "logger=tensorboard")
    assert done.returncode == 0, done.stderr
    assert accuracy(tmp_path, "clean") >= 0
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.parametrize(("group", "choice"), [(g, c) for g in GROUPS for c in choices(g)])
def test_every_choice_composes_and_builds(group, choice, tmp_path, request):
    listed = group in ("trick", "eval")
    choice = f"[{choice}]" if listed else choice
    extra = {"wandb": ["logger.offline=true"], "cda": ["attack.generator=weights.pt"]}.get(choice, [])
    if choice == "[transfer]":
        extra = [f"eval.transfer.models=[{request.getfixturevalue('trained')}]"]
    if choice in ("ard", "rslad"):
        extra = [f"adv.teacher={request.getfixturevalue('trained')}"]
    cfg = composed("train", f"{group}={choice}", f"run_dir={tmp_path}", *extra)
    data = build.build_data(cfg, training=True)
    build.build_module(cfg, build.build_classifier(cfg, data.num_classes), data)
    if choice == "[ood]":
        with pytest.raises(build.ConfigError, match=r"no out-of-distribution sets are known for data\.name=digits"):
            build.build_evaluation(cfg, data)
    else:
        build.build_evaluation(cfg, data)
    gpu = group == "trainer" and choice in ("gpu", "ddp")
    if not gpu or torch.cuda.is_available():
        build.build_trainer(cfg, tmp_path)


@pytest.mark.parametrize("choice", choices("model"))
def test_every_model_composes_and_builds(choice):
    grey = ["model.mean=null", "model.std=null"]  # the digits', where a config has those of colours
    extra = {"timm": ["model.name=resnet26"], "resnet20": grey}.get(choice, [])
    cfg = composed("train", f"model={choice}", *extra)
    data = build.build_data(cfg, training=True)
    with torch.device("meta"):
        assert build.build_classifier(cfg, data.num_classes)
    assert cfg.trainer.max_epochs >= 1


@pytest.mark.parametrize("choice", [choice for choice in choices("experiment") if "/" not in choice])
def test_every_experiment_composes_and_names_its_command(choice, tmp_path):
    """Published recipes, in folders, are in test_recipes.py."""
    for i in range(40):
        save(tmp_path / ("train" if i % 2 else "test") / f"class{i // 4}" / f"{i}.png", i, 32, 32)
    own = [f"data.root={tmp_path}", "data.num_val=10"] if choice.startswith("cifar10") else []
    cfg = composed("train", f"experiment={choice}", *own)
    data = build.build_data(cfg, training=True)
    build.build_module(cfg, build.build_classifier(cfg, data.num_classes), data)
    assert f"python train.py experiment={choice}" in (CONFIG_DIR / "experiment" / f"{choice}.yaml").read_text()


@pytest.mark.parametrize("choice", choices("data"))
def test_every_data_set_composes_with_both_programs(choice):
    for config in ("train", "evaluate"):
        cfg = composed(config, f"data={choice}")
        assert cfg.threat.eps == cfg.data.threat.eps
        assert set(cfg.data) == set(composed(config).data), "so that data.* of one is a key of all"


def test_augmentations_of_the_batch_and_corruptions_in_one_run(tmp_path, monkeypatch, capsys):
    augmented = ["aug=heavy", "aug.color_jitter=0.4", "aug.repeats=2", "model=cnn"]
    evaluation = ["eval=[clean,corruptions]", "eval.corruptions.severities=[1,5]"]
    monkeypatch.setattr(sys, "argv", ["train.py", *QUICK, *augmented, *evaluation, f"run_dir={tmp_path}"])
    train_main()
    printed = capsys.readouterr().out
    assert "corruptions/digits: mean accuracy" in printed
    rows = json.loads((tmp_path / "summary.json").read_text())
    sets = {row["set"] for row in rows}
    assert {f"digits/{name}/{severity}" for name in ("contrast", "pixelate") for severity in (1, 5)} <= sets
    assert len(sets) == 1 + 6 * 2
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["sets"][0]["preparation"] == "as stored"
    assert "Corruptions of digits" in (tmp_path / "report.html").read_text()


def write_imagenet(root: Path) -> None:
    """Write a part of ImageNet, of noise: two of its classes, labels 0 and 281."""
    for split, number in (("train", 8), ("val", 3)):
        for label, wnid in enumerate(("n01440764", "n02123045")):
            for i in range(number):
                path = root / split / wnid / f"ILSVRC2012_{split}_{label * 100 + i + 2:08d}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(path)


def test_imagenet_trains_and_evaluates_with_its_variants(tmp_path, monkeypatch, capsys):
    root, ood = tmp_path / "imagenet", tmp_path / "ood"
    write_imagenet(root)
    (ood / "imagenet-a").mkdir(parents=True)
    shutil.copytree(root / "val" / "n01440764", ood / "imagenet-a" / "n01498041")
    data = ["data=imagenet", f"data.root={root}", "data.num_val=4", "data.num_workers=0", "data.on_error=skip"]
    model = ["model=timm", "model.name=resnet10t", "data.img_size=64", "adv=none", "aug.randaugment=rand-m9"]
    run_dir = tmp_path / "run"
    small = [*QUICK, "data.batch_size=4", "eval=[clean]", f"run_dir={run_dir}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *data, *model, *small])
    train_main()
    config = OmegaConf.load(run_dir / "config.yaml")
    assert (config.data.num_classes, config.data.img_size) == (1000, 64)
    labels = pd.read_parquet(run_dir / "verdicts")["label"]
    assert set(labels) == {0, 281}
    own = ["evaluate.py", f"ckpt={run_dir}", "data=imagenet_a", f"data.root={ood}", "eval=[clean]"]
    monkeypatch.setattr(sys, "argv", [*own, f"run_dir={tmp_path / 'a'}"])
    evaluate_main()
    config = OmegaConf.load(tmp_path / "a" / "config.yaml")
    assert (config.data.name, config.data.img_size) == ("imagenet_a", 64), "the image size belongs to the model"
    (root / "val" / "n01440764" / "ILSVRC2012_val_00000003.JPEG").write_bytes(b"")
    (ood / "imagenet-a" / "n01498041" / "ILSVRC2012_val_00000002.JPEG").write_bytes(b"nothing")
    sets = ["eval=[clean,ood]", f"eval.ood.root={ood}", f"run_dir={tmp_path / 'ood-run'}"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", f"ckpt={run_dir}", *sets])
    evaluate_main()
    printed = capsys.readouterr().out
    assert re.search(r"^not found: imagenet_v2, .*, objectnet, objectnet_113, ", printed, re.M)
    assert "skipped: 2 images that cannot be used" in printed
    rows = {row["set"]: row for row in json.loads((tmp_path / "ood-run" / "summary.json").read_text())}
    assert {name: row["n"] for name, row in rows.items()} == {
        "imagenet": 5, "imagenet_real": 5, "imagenet_a": 2, "imagenet_200_r": 3
    }  # fmt: skip
    about = json.loads((tmp_path / "ood-run" / "about.json").read_text())
    assert len(about["skipped"]) == 2
    assert "2 images were left out" in (tmp_path / "ood-run" / "report.html").read_text()
    monkeypatch.setattr(sys, "argv", ["train.py", "data=imagenet_a", f"data.root={ood}"])
    with pytest.raises(SystemExit) as error:
        train_main()
    assert str(error.value) == "error: data.name=imagenet_a: has no training images; evaluate.py takes it"


def test_preprocessing_is_the_models_own_where_it_is_asked_for(tmp_path):
    write_imagenet(tmp_path)
    usual = ["data=imagenet", f"data.root={tmp_path}", "model=timm", "model.name=vit_tiny_patch16_384"]
    cfg = composed("evaluate", *usual, "data.preprocess=model")
    data = build.build_data(cfg, training=False)
    assert data.test_set.preparation == "resize 384 (bicubic), crop 384"
    assert cfg.data.img_size == 384
    assert data.test_set[0][0].shape == (3, 384, 384)
    cfg = composed("evaluate", *usual)
    assert build.build_data(cfg, training=False).test_set.preparation == "resize 256 (bicubic), crop 224"
    with pytest.raises(build.ConfigError, match=r"^data\.preprocess=both: expected one of model, ares"):
        build.build_data(composed("evaluate", *usual, "data.preprocess=both"), training=False)


def test_every_variant_composes_and_takes_the_rest_from_its_data_set():
    for key, variant in VARIANTS.items():
        cfg = composed("evaluate", f"data={key}")
        assert cfg.data.name == key
        assert cfg.data.mean == composed("evaluate", f"data={variant.network}").data.mean
    paths = composed("evaluate", "eval=[ood]").eval.ood.paths
    assert list(paths) == list(VARIANTS)


def test_real_image_folders_train_and_evaluate(tmp_path):
    """Both layouts of real JPEG files, made of the digits: cifar10's and an image folder's."""
    digits = load_digits()
    for split, positions in (("train", range(60)), ("test", range(60, 90)), ("val", range(60, 90))):
        for i in positions:
            folder = tmp_path / "data" / split / f"class{digits.target[i]}"
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray((digits.images[i] * 15.9).astype("uint8")).resize((32, 32)).convert("RGB")
            image.save(folder / f"{i:04d}.jpg")
    small = ["data.num_val=20", "data.num_workers=1", f"data.root={tmp_path / 'data'}"]
    for data in (["data=cifar10"], ["data=imagefolder", "data.img_size=24", "threat.norm=l2", "threat.eps=0.5"]):
        run_dir = tmp_path / data[0].removeprefix("data=")
        done = here("train.py", *data, *QUICK, *small, f"run_dir={run_dir}", "eval=[clean,pgd20]", "adv.steps=1")
        assert done.returncode == 0, done.stderr
        rows = pd.read_parquet(run_dir / "verdicts")
        assert rows["sample_name"].str.fullmatch(r"test/class[01]/\d{4}\.jpg").all()
    broken = tmp_path / "data" / "test" / "class0" / "0000.jpg"
    broken.write_bytes(b"\xff\xd8\xff nothing")
    done = here("evaluate.py", f"ckpt={run_dir}", "subset=first:6", "eval=[clean]", f"run_dir={tmp_path / 'again'}")
    assert done.returncode == 1
    assert_one_line(done, "0000.jpg")


ZOO_ON_DIGITS = ["model=zoo/resnet50_at", "model.mean=[0.3]", "model.std=[0.4]"]
MISTAKES = [
    (
        ["train.py", "model=foo"],
        "model=foo: no such choice; expected one of cnn, resnet18, resnet20, resnet50, timm, vit_b",
    ),
    (["train.py", "trainer=4"], "trainer=4: no such choice; expected one of auto, cpu, "),
    (["train.py", "adv=null"], "adv=null: no such choice; .*expected one of .*none, pgd"),
    (["train.py", "eval=[clean,5]"], "eval=5: no such choice; expected one of "),
    (["evaluate.py", "attack=nan"], "attack=nan: no such choice; .*expected one of apgd_ce, "),
    (["train.py", "adv.epz=1"], "adv.epz: no such key"),
    (["train.py", "+adv.epz=1"], "epz=1: not a setting of pgd; did you mean eps"),
    (["train.py", "+speed=1"], "speed: no such key"),
    (["train.py", "adv.eps=-1"], "adv.eps=-1: expected a number of at least 0"),
    (["train.py", "adv.eps=abc"], "adv.eps=abc"),
    (["train.py", "adv.steps=0"], "adv.steps=0"),
    (["train.py", "adv.val_steps=0"], "adv.val_steps=0"),
    (["train.py", "seed=abc"], "seed=abc"),
    (["train.py", "subset=5"], "the config cannot be used"),
    (["train.py", "trainer.max_epochs=0"], "trainer.max_epochs=0"),
    (["train.py", "trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches=0"),
    (["train.py", "aug.label_smoothing=0.1", "adv.loss=margin"], "adv.loss=margin"),
    (["train.py", "aug=heavy", "aug.repeats=3"], r"data\.batch_size=64: must be a multiple of 6"),
    (
        ["train.py", "aug=heavy", "data.batch_size={0: 64, 3: 31}"],
        r"data\.batch_size={0: 64, 3: 31}: must be a mul",
    ),
    (["train.py", "aug.switch_prob=2"], r"aug\.switch_prob=2: expected a number from 0 to 1"),
    (["train.py", "aug.color_jitter=-1"], r"aug\.color_jitter=-1: expected a number, 0 or more"),
    (
        ["train.py", "aug.resolution={0: 8}"],
        r"aug\.resolution={0: 8}: only training images of imagefolder and image",
    ),
    (["train.py", "data.batch_size={2: 64}"], r"data\.batch_size={2: 64}: its epochs must be whole numbers that"),
    (["train.py", "callbacks.checkpoint.monitor=val/foo"], "monitor=val/foo: expected one of val/robust_acc"),
    (
        ["train.py", "model=timm", "model.name=densenet121"],
        "densenet121: cannot take images of 8 pixels",
    ),
    (["train.py", "resume=last"], "resume=last: give run_dir"),
    (["train.py", "subset=last:3"], "subset=last:3"),
    (["train.py", "precision=fp12"], "precision=fp12"),
    (["train.py", "model=timm"], "model.name: must be given"),
    (["train.py", "eval.pgd20.attack.steps=x"], "eval.pgd20.attack.steps=x"),
    (["train.py", "eval=attack", "attack=cda"], "attack.generator: must be given"),
    (["train.py", "eval=attack", "attack=tta"], "eval.attack.targets=null: tta knows a targeted form only"),
    (["train.py", "data=cifar10"], "data.root=null"),
    (["train.py", "data=cifar10", "data.root=/nowhere"], "data.root=/nowhere: does not exist"),
    (["train.py", "weights=both"], "weights=both: expected null or one of ema, raw"),
    (["train.py", "model=zoo/swinb"], "model=zoo/swinb: no such model; did you mean zoo/swinb_at"),
    (["train.py", "model=zoo/resnet50_at"], r"expected 1 values each"),
    (
        ["train.py", *ZOO_ON_DIGITS],
        r"ARES_ResNet50_AT\.pth: is not here; download it from https://.*model\.weights=null",
    ),
    (["train.py", *ZOO_ON_DIGITS, "model.weights=/"], r"weights=/: has no ARES_ResNet50_AT\.pth"),
    (["train.py", *ZOO_ON_DIGITS, "model.weights=/no.pth"], r"weights=/no\.pth: is no file.*has a1_in1k"),
    (
        ["train.py", "model=resnet18", "model.weights=."],
        "is a folder, and no published file is called after resnet18",
    ),
    (["train.py", "model.resample=1"], "model.resample=1: expected true or false"),
    (["train.py", "model=timm", "model.name=resnet18.a1_in1k", "model.weights=x.pth"], "names weights too"),
    (["train.py", "model.defense=jpg"], "model.defense.name=jpg: expected one of bit_depth, jpeg"),
    (["train.py", "model.defense=[jpeg]"], r"model\.defense=\['jpeg'\]: expected a name"),
    (["train.py", "model.defense={bits:3}"], r"model\.defense=\{'bits': 3\}: expected a name"),
    (["train.py", "model.defense={name:jpeg,bits:3}"], "model.defense.bits=3: not a setting of jpeg"),
    (["evaluate.py"], "ckpt=null"),
    (["evaluate.py", "model.weights=README.md"], "README.md: is text, not weights"),
    (["evaluate.py", "model.weights=README.md", "eval=[]"], r"eval=\[\]: asks nothing"),
    (["evaluate.py", "ckpt=/nowhere.ckpt"], "/nowhere.ckpt: no such file"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_gets_one_line_and_writes_nothing(arguments, message, tmp_path, monkeypatch):
    program, *rest = arguments
    monkeypatch.setattr(sys, "argv", [program, *rest, f"launch.root={tmp_path}"])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit) as caught:
        {"train.py": train_main, "evaluate.py": evaluate_main}[program]()
    line = str(caught.value.code)
    assert line.startswith("error: ")
    assert "\n" not in line
    assert re.search(message, line), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", ["debug=fdr", "model=vit_b"])
def test_the_short_trainings_run(setting, tmp_path):
    short = ["+model.settings.depth=1", *QUICK] if setting == "model=vit_b" else ["eval=[clean]", "subset=first:6"]
    done = here("train.py", setting, *short, "callbacks.progress=false", f"run_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").exists()


def test_a_config_file_that_is_no_yaml_is_named_with_the_line(tmp_path):
    folder = tmp_path / "conf" / "optim"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("lr: 0.1\n  momentum: 0.9\n")
    run = here("train.py", "--config-dir", tmp_path / "conf", "optim=mine", f"launch.root={tmp_path / 'runs'}")
    assert_one_line(run, r"mine\.yaml.*line 2")
    assert not (tmp_path / "runs").exists()


def test_the_shell_sees_one_line_and_exit_code_1(tmp_path):
    assert_one_line(run("train.py", "adv.eps=-1", f"launch.root={tmp_path}"), "adv.eps=-1")


@pytest.mark.parametrize("change", ["model=resnet18", "model.settings.width=16"])
def test_a_checkpoint_of_another_architecture_is_refused(trained, change, tmp_path):
    assert_one_line(here("evaluate.py", f"ckpt={trained}", change, f"launch.root={tmp_path}"), "best.ckpt: ")
    assert not list(tmp_path.iterdir())
