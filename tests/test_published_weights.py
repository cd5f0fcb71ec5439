"""Published weights in both programs: from a folder of the benchmark's files, and from the cache of timm's hub."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from networks import zoo_model
from PIL import Image
from processes import here, run
from safetensors.torch import save_file

from ares_lightning.launch import evaluate_main
from ares_lightning.models import read_checkpoint

TAG = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def write_folders(root: Path, num_classes: int, num_images: int) -> list[str]:
    """An image folder of random JPEG files; return the arguments that name it."""
    torch.manual_seed(0)
    for split in ("train", "val"):
        for label in range(num_classes):
            folder = root / split / f"n{label:04d}"
            folder.mkdir(parents=True)
            for i in range(num_images):
                file = io.BytesIO()
                Image.fromarray(torch.randint(256, (8, 8, 3), dtype=torch.uint8).numpy()).save(file, "JPEG")
                (folder / f"{i}.jpg").write_bytes(file.getvalue())
    return [
        "data=imagefolder",
        f"data.root={root}",
        "data.num_workers=0",
        "data.num_val=2",
        "data.eval_batch_size=8",
    ]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache of Hugging Face's hub, and no network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "hub"


def test_a_zoo_model_is_evaluated_with_its_published_file(tmp_path):
    data = write_folders(tmp_path / "images", num_classes=1000, num_images=1)
    net = zoo_model("resnet50_at")
    (tmp_path / "files").mkdir()
    torch.save(net.backbone.state_dict(), tmp_path / "files" / "ARES_ResNet50_AT.pth")
    question = ["data.img_size=72", "subset=first:8", "eval=[clean]", f"launch.root={tmp_path / 'runs'}"]
    done = here("evaluate.py", "model=zoo/resnet50_at", f"model.weights={tmp_path / 'files'}", *data, *question)
    assert done.returncode == 0, done.stderr
    assert "weights: ARES_ResNet50_AT.pth: 267 tensors, 25.6 M numbers" in done.stdout
    (run_dir,) = (tmp_path / "runs" / "resnet50_at-imagefolder").iterdir()
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["data"]["num_classes"] == 1000
    assert config["model"]["mean"] == [0.485, 0.456, 0.406]
    assert json.loads((run_dir / "summary.json").read_text())[0]["n"] == 8


def test_a_cached_tag_is_fine_tuned_with_its_own_normalisation_and_then_stands_by_itself(hub, tmp_path):
    folder = hub / "hub" / f"models--timm--{TAG}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    torch.manual_seed(1)
    published = timm.create_model("vit_tiny_patch16_224").state_dict()
    save_file(published, folder / "snapshots" / ("0" * 40) / "model.safetensors")
    data = [*write_folders(tmp_path / "images", num_classes=2, num_images=8), "data.img_size=96"]
    model = ["model=timm", f"model.name={TAG}", "model.new_head=true", "model.resample=true"]
    brief = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "optim.lr=1e-9", "optim.warmup_lr=0"]
    brief += ["eval=[clean]"]
    run_dir = tmp_path / "run"
    done = run("train.py", *model, *data, *brief, "adv=none", "data.batch_size=4", f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    assert re.search(rf"weights: {TAG}: .*pos_embed resampled; head\.bias is new; head\.weight is new", done.stdout)
    state = read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["state_dict"]
    assert "subset: all 16 test images, fewer than data.subset_after_training=random:1000@0" in done.stdout
    kept = state["net.backbone.blocks.3.mlp.fc1.weight"]
    torch.testing.assert_close(kept, published["blocks.3.mlp.fc1.weight"], rtol=0, atol=1e-6)
    assert state["net.backbone.head.weight"].shape == (2, 192)
    (folder / "refs" / "main").unlink()
    done = run("evaluate.py", f"ckpt={run_dir}", "eval=[clean]", f"run_dir={tmp_path / 'evaluated'}")
    assert done.returncode == 0, done.stderr
    values = [json.loads((place / "summary.json").read_text())[0] for place in (run_dir, tmp_path / "evaluated")]
    assert values[0]["value"] == values[1]["value"]
    card = run("-m", "ares_lightning.models", "export", run_dir, "--to", "timm")
    assert card.returncode == 0, card.stderr
    described = json.loads((run_dir / "export" / "timm" / "config.json").read_text())
    assert described["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]


def test_without_network_and_cache_one_line_says_what_to_do(hub, tmp_path):
    data = write_folders(tmp_path / "images", num_classes=2, num_images=2)
    done = run("evaluate.py", "model=zoo/resnet50_normal", "model.new_head=true", *data, "data.img_size=72")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert re.search(
        r"error: model\.weights=resnet50\.tv_in1k: timm cannot get them .*model\.weights=<file>", done.stderr
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A short training of the small network."""
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    done = here("train.py", "debug=limit", "model.settings.width=4", f"run_dir={run_dir}", "eval=[clean]")
    assert done.returncode == 0, done.stderr
    return run_dir


def evaluated(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    evaluate_main()


def test_a_checkpoint_brings_its_own_weights(trained, monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as caught:
        evaluated(monkeypatch, f"ckpt={trained}", "model.weights=other.pth", f"launch.root={tmp_path}")
    assert str(caught.value.code).startswith("error: model.weights=other.pth: ckpt=")


@pytest.mark.parametrize("defense", ["bit_depth", "{name:jpeg,quality:50}", "random_resize_pad"])
def test_a_defence_is_put_before_a_checkpoint_and_attacked_through(defense, trained, monkeypatch, tmp_path):
    question = ["eval=[clean,pgd20]", "subset=first:20", f"model.defense={defense}"]
    values = []
    for name in ("first", "second"):
        evaluated(monkeypatch, f"ckpt={trained}", *question, f"run_dir={tmp_path / name}")
        values.append([row["value"] for row in json.loads((tmp_path / name / "summary.json").read_text())])
    assert values[0] == values[1]
    config = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    assert config["eval"]["pgd20"]["attack"]["eot"] == (20 if defense == "random_resize_pad" else 1)
