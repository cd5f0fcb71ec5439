"""A trained model goes out as files and comes back with the same logits."""

from __future__ import annotations

import json
import re
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import timm
import torch
import yaml
from processes import ROOT, here
from safetensors.torch import load_file

from ares_lightning.evaluation.robustbench import percent
from ares_lightning.launch import train_main
from ares_lightning.models import load_network, make_classifier, read_checkpoint
from ares_lightning.models.__main__ import main

IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
BRIEF = ["trainer.max_epochs=1", "trainer.limit_train_batches=3", "trainer.limit_val_batches=1", "subset=first:8"]
SETTINGS = {"patch_size": 4, "depth": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A short real training of a one-layer ViT on the digits."""
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    done = here("train.py", "model=vit_ti", "+model.settings.depth=1", *BRIEF, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture(scope="module")
def logits(trained) -> torch.Tensor:
    checkpoint = read_checkpoint(trained / "checkpoints" / "best.ckpt")
    data = checkpoint["config"]["data"]
    net = make_classifier(
        "vit_tiny_patch16_224",
        in_chans=1,
        num_classes=10,
        img_size=8,
        mean=data["mean"],
        std=data["std"],
        **SETTINGS,
    )
    load_network(net, checkpoint["state_dict"], trained)
    with torch.inference_mode():
        logits = net.eval()(IMAGES)
    assert logits.std(0).max() > 1e-3
    return logits


def exported(trained: Path, tmp_path: Path, to: str, *more: object) -> Path:
    main(["export", str(trained), "--to", to, "--output", str(tmp_path / "out"), *map(str, more)])
    return tmp_path / "out"


def test_plain_timm_gives_the_same_logits(trained, logits, tmp_path):
    folder = exported(trained, tmp_path, "timm")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert model.num_classes == 10
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(-1, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        assert torch.equal(model((IMAGES - mean) / std), logits)


@pytest.mark.parametrize(("to", "suffix"), [("robustbench", "pt"), ("safetensors", "safetensors")])
def test_a_bare_timm_network_takes_the_other_files(to, suffix, trained, logits, tmp_path):
    (file,) = exported(trained, tmp_path, to).glob(f"*.{suffix}")
    state = load_file(file) if suffix == "safetensors" else torch.load(file, weights_only=True)
    config = yaml.safe_load((trained / "config.yaml").read_text())["data"]
    net = timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=10, img_size=8, **SETTINGS).eval()
    net.load_state_dict(state, strict=True)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        assert torch.equal(net((IMAGES - mean) / std), logits)


def test_what_was_exported_is_evaluated_like_the_run_itself(trained, tmp_path):
    (file,) = exported(trained, tmp_path, "safetensors").glob("*.safetensors")
    questions = ["eval=[clean,pgd20]", "subset=first:40"]
    model = ["model=timm", "model.name=vit_tiny_patch16_224", "+model.settings.depth=1", f"model.weights={file}"]
    ours = here("evaluate.py", f"ckpt={trained}", *questions, f"run_dir={tmp_path / 'ours'}")
    theirs = here("evaluate.py", *model, *questions, f"run_dir={tmp_path / 'theirs'}")
    assert ours.returncode == theirs.returncode == 0, ours.stderr + theirs.stderr
    assert re.search(r"^weights: .*\.safetensors: \d+ tensors, 0\.5 M numbers$", theirs.stdout, flags=re.MULTILINE)
    values = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("ours", "theirs")]
    assert [row["value"] for row in values[0]] == [row["value"] for row in values[1]]
    assert len(values[0]) == 3


def test_the_card_says_recipe_data_numbers_and_licence(trained, tmp_path):
    done = here("evaluate.py", f"ckpt={trained}", "eval=[noise]", "subset=first:30", f"run_dir={tmp_path / 'more'}")
    assert done.returncode == 0, done.stderr
    folder = exported(trained, tmp_path, "robustbench", "--license", "mit", "--evaluation", tmp_path / "more")
    card = (folder / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "mit"
    for row in json.loads((trained / "summary.json").read_text()):
        assert f"{row['value']:.1%} | [{row['low']:.1%}, {row['high']:.1%}] | {row['n']} of digits" in body
    assert "30 of digits (first:30)" in body
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", body, flags=re.DOTALL)[1])
    assert recipe["adv"]["steps"] == 3
    assert recipe["optim"]["name"] == "adamw"
    facts = json.loads(next(folder.glob("*.json")).read_text())
    clean = next(row for row in json.loads((trained / "summary.json").read_text()) if row["evaluator"] == "clean")
    assert facts["clean_acc"] == f"{100 * clean['value']:.2f}"
    assert facts["autoattack_acc"] is None


def test_the_leaderboards_number_is_that_of_the_threat_model_on_the_most_images():
    shared = {"metric": "robust_accuracy", "attack": "autoattack", "norm": "linf"}
    rows = [
        {**shared, "eps": 2 / 255, "value": 0.9, "n": 5000},
        {**shared, "eps": 4 / 255, "value": 0.61, "n": 100},
        {**shared, "eps": 4 / 255, "value": 0.5612, "n": 1000},
        {**shared, "eps": 4 / 255, "value": 0.99, "n": 9000, "metric": "targeted_robust_accuracy"},
        {**shared, "eps": 4 / 255, "value": 0.98, "n": 9000, "norm": "l2"},
        {**shared, "eps": None, "value": 0.0, "n": 9000},
    ]
    assert percent(rows, "robust_accuracy", "autoattack", "linf", float(Fraction("4/255"))) == "56.12"
    assert percent(rows, "robust_accuracy", "square", "linf", 4 / 255) is None


def refusal(*words: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    assert "\n" not in str(caught.value.code)
    return str(caught.value.code)


def test_what_cannot_be_exported_is_said_in_one_line(trained, tmp_path, monkeypatch):
    missing = refusal("export", tmp_path / "nowhere", "--to", "timm")
    assert missing == f"error: {tmp_path / 'nowhere'}: no such file"
    assert "is a folder without checkpoints" in refusal("export", tmp_path, "--to", "timm")
    assert "holds no averaged weights" in refusal("export", trained, "--to", "timm", "--weights", "ema")
    assert "has no summary.json" in refusal("export", trained, "--to", "timm", "--evaluation", tmp_path)
    for name, model, reason in (
        ("cnn", ["model=cnn", "model.settings.width=4"], "timm has no cnn"),
        ("resnet", ["model=timm", "model.name=resnet10t"], "was fitted to small images"),
    ):
        monkeypatch.chdir(ROOT)
        run_dir = tmp_path / name
        monkeypatch.setattr(sys, "argv", ["train.py", *model, *BRIEF, "eval=[clean]", f"run_dir={run_dir}"])
        train_main()
        assert reason in refusal("export", run_dir, "--to", "timm")
        assert not (run_dir / "export").exists()
        main(["export", str(run_dir), "--to", "safetensors"])
    about_another = refusal("export", trained, "--to", "timm", "--evaluation", tmp_path / "cnn")
    assert re.search(r"cnn: is about model \w{16}, this one is \w{16}", about_another)
