"""The published recipes, held to tests/recipes.csv, which is typed from the publications, not from the configs."""

from __future__ import annotations

import csv
import re
import sys
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from photos import save
from timm.layers import DropPath
from torch import nn

from ares_lightning import build
from ares_lightning.data import RobustDataModule
from ares_lightning.launch import CONFIG_DIR, train_main
from ares_lightning.models import ZOO
from ares_lightning.training import RobustTraining
from ares_lightning.training.objectives import AdversarialTraining, InnerAttack
from ares_lightning.training.optim import OptimSettings
from ares_lightning.training.tricks import EMA

ROWS = {row["recipe"]: row for row in csv.DictReader((Path(__file__).parent / "recipes.csv").open())}
EXPERIMENTS = CONFIG_DIR / "experiment"
WNIDS = ("n01440764", "n02123045")
NORMALISATIONS = {
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "none": ([0.0] * 3, [1.0] * 3),
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
}
STARTS = {True: "uniform", False: "clean", "normal": "normal"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A miniature of ImageNet, two of its classes, and one of CIFAR-10, all ten, of photographs."""
    root = tmp_path_factory.mktemp("data")
    for split, number in (("train", 8), ("val", 2)):
        for i in range(2 * number):
            save(root / "imagenet" / split / WNIDS[i % 2] / f"ILSVRC2012_{split}_{i + 1:08d}.JPEG", i)
    for split, number in (("train", 3), ("test", 1)):
        for i in range(10 * number):
            save(root / "cifar10" / split / f"class{i % 10}" / f"{i:04d}.png", i, 32, 32)
    return root


def header(recipe: str) -> list[str]:
    lines = (EXPERIMENTS / f"{recipe}.yaml").read_text().splitlines()
    return [line for line in lines[: lines.index("")] if line.startswith("#")]


def composed(root: Path, recipe: str) -> DictConfig:
    """Compose the command that stands in the header, on the miniature data, from random weights."""
    program, *overrides = header(recipe)[1].removeprefix("# python ").split()
    assert program == "train.py"
    data = recipe.partition("/")[0]
    ours = {
        f"data.root=/data/{data}": f"data.root={root / data}",
        "model.weights=/data/clean.pt": "model.weights=null",
    }
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose("train", [*(ours.get(o, o) for o in overrides), "data.num_val=4", "data.num_workers=0"])


@cache
def built(root: Path, recipe: str) -> tuple[DictConfig, RobustTraining, RobustDataModule]:
    """Build what the command trains; the network without memory, on the meta device."""
    cfg = composed(root, recipe)
    data = build.build_data(cfg, training=True)
    with torch.device("meta"):
        net = build.build_classifier(cfg, data.num_classes)
    return cfg, build.build_module(cfg, net, data), data


def pairs(text: str) -> dict[float, float]:
    """Read `0:512 6:224` as a mapping, and `512` as one from 0."""
    parts = (part.partition(":")[::2] for part in (text if ":" in text else f"0:{text}").split())
    return {float(key): float(value) for key, value in parts}


def number(text: str) -> float:
    return float(Fraction(text))


def test_every_recipe_is_in_the_table_and_has_a_row_there():
    assert sorted(ROWS) == sorted(str(p.relative_to(EXPERIMENTS).with_suffix("")) for p in EXPERIMENTS.glob("*/*"))


@pytest.mark.parametrize("recipe", ROWS)
def test_a_header_tells_the_command_the_source_the_hardware_and_the_published_numbers(recipe):
    lines = header(recipe)
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith(f"# python train.py experiment={recipe} data.root=/data/")
    text = " ".join(line.lstrip("# ") for line in lines[2:])
    assert re.search(r"Published, in %.*clean \d\d\.\d.*\(n (= [\d,]+|is not stated)", text)
    assert re.search(r"(PGD-\d+|PGD is not stated)", text)
    assert re.search(r"AutoAttack (\d\d\.\d|is not stated)", text)
    assert "Hardware" in text
    base = re.search(r"the settings of (\w+)\.yaml|those of (\w+)\.yaml", text)
    told = text if base is None else " ".join(header(f"imagenet/{base[1] or base[2]}"))
    assert "Otherwise than in the published code: " in told.replace("# ", "")
    assert re.search(r"arXiv \d{4}\.\d{5}", told.replace("# ", ""))


def test_the_training_page_shows_the_numbers_of_every_header():
    page = (CONFIG_DIR.parent / "docs" / "training.md").read_text()
    cells = dict(re.findall(r"^\| `((?:imagenet|cifar10)/\w+)` \| (.*) \|$", page, re.M))
    assert list(cells) == list(ROWS)
    for recipe, line in cells.items():
        _, clean, robust, n, _ = line.split(" | ")
        text = re.sub(r" # |# ", " ", " ".join(header(recipe)))
        assert all(figure in text for figure in (f"clean {clean}", re.findall(r"[\d.]+$", robust)[0], n)), recipe


@pytest.mark.parametrize("recipe", ROWS)
def test_the_network_is_the_published_one(recipe, root):
    row = ROWS[recipe]
    cfg, module, data = built(root, recipe)
    assert cfg.model.name == row["network"]
    assert data.num_classes == (1000 if recipe.startswith("imagenet/") else 10)
    activations = {type(m).__name__.lower() for m in module.net.modules()} & {"relu", "gelu", "silu"}
    assert activations == {row["activation"]}
    drops = [m.drop_prob for m in module.net.modules() if isinstance(m, DropPath)]
    assert max(drops, default=0.0) == pytest.approx(float(row["drop_path"]))
    other = cfg.copy()
    other.model.name, other.data.img_size = "resnet10t", 32
    small = build.build_classifier(other, data.num_classes)
    normalisation = small.normalize.mean.flatten().tolist(), small.normalize.std.flatten().tolist()
    for found, published in zip(normalisation, NORMALISATIONS[row["normalisation"]], strict=True):
        assert found == pytest.approx(published, rel=1e-6)


@pytest.mark.parametrize("recipe", [recipe for recipe in ROWS if recipe.startswith("imagenet/ares")])
def test_the_networks_of_ares_are_those_of_the_zoo(recipe):
    row = ROWS[recipe]
    (zoo,) = [m for m in ZOO.values() if m.training == "at" and m.architecture == row["network"]]
    assert (zoo.activation, zoo.normalisation) == (row["activation"], row["normalisation"])
    published = [
        f"{p.percent['autoattack']:.2f}".removesuffix("0") for p in zoo.published if "autoattack" in p.percent
    ]
    text = " ".join(header(recipe))
    assert published
    assert all(f"AutoAttack {percent}" in text for percent in published)


@pytest.mark.parametrize("recipe", ROWS)
def test_weights_are_updated_as_published(recipe, root):
    row = ROWS[recipe]
    cfg, module, data = built(root, recipe)
    devices = cfg.trainer.devices
    assert devices == int(row["devices"])
    batches = pairs(row["batch"])
    for epoch, batch in batches.items():
        assert data.batch_size_at(int(epoch)) * devices == batch
    optim = module.optim.scaled(data.batch_size_at(0) * devices)
    assert optim.lr == pytest.approx(float(row["lr"]))
    assert cfg.trainer.max_epochs == int(row["epochs"])
    factor = optim.schedule_factor(cfg.trainer.max_epochs)
    rates = pairs(row["rates"])
    assert {epoch: factor(epoch) * optim.lr for epoch in rates} == pytest.approx(rates, rel=1e-3)
    optimizer = optim.optimizer(module.net)
    kind, *words = row["optimizer"].split()
    assert type(optimizer).__name__.lower() == kind
    if kind == "sgd":
        assert all((g["momentum"], g["nesterov"]) == (0.9, bool(words)) for g in optimizer.param_groups)
    else:
        betas = tuple(map(float, row["betas"].split()))
        assert all((g["betas"], g["eps"]) == (betas, 1e-8) for g in optimizer.param_groups)
    decays = {p.ndim > 1 for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert {g["weight_decay"] for g in optimizer.param_groups} - {0.0} == {float(row["weight_decay"])}
    assert decays == ({True, False} if row["decays_norms"] == "yes" else {True})
    assert (optim.clip_grad_norm, optim.agc, optim.layer_decay) == (None, None, None)
    average = cfg.trick.ema if "ema" in (cfg.get("trick") or {}) else None
    assert (average.decay if average else None) == (float(row["ema"]) if row["ema"] else None)
    assert average is None or average.warmup is False


@pytest.mark.parametrize("recipe", ROWS)
def test_images_and_labels_are_changed_as_published(recipe, root):
    row = ROWS[recipe]
    cfg, module, data = built(root, recipe)
    augmentation = module.augmentation
    assert module.label_smoothing == float(row["smoothing"])
    assert (augmentation.mixup, augmentation.cutmix) == (float(row["mixup"]), float(row["cutmix"]))
    if augmentation.mixes:
        assert augmentation.switch_prob == float(row["switch"])
    assert augmentation.erasing == float(row["erasing"])
    assert (data.wishes.randaugment or "", data.wishes.color_jitter) == (row["randaugment"], float(row["jitter"]))
    assert (data.repeats, data.num_views, data.replays) == (1, 1, 1)
    for epoch, side in pairs(row["resolution"]).items():
        assert (cfg.data.img_size if data.resolution is None else data.resolution.at(int(epoch))) == side


@pytest.mark.parametrize("recipe", ROWS)
def test_the_attack_is_the_published_one(recipe, root):
    row = ROWS[recipe]
    cfg, module, _ = built(root, recipe)
    objective, eps = module.objective, number(row["eps"])
    assert isinstance(objective, AdversarialTraining)
    assert cfg.adv.name == row["objective"]
    assert getattr(objective, "beta", None) == (float(row["beta"]) if row["beta"] else None)
    inner = objective.inner
    attack = inner.at(cfg.trainer.max_epochs - 1)
    assert (attack.name, attack.norm, attack.steps) == (row["attack"], "linf", int(row["steps"]))
    assert attack.threat.eps == pytest.approx(eps)
    assert build.build_threat(cfg) == module.val_attack.threat == attack.threat
    assert STARTS[attack.random_start] == row["start"]
    assert inner.mode == row["mode"]
    assert objective.hard_labels == (row["hard_labels"] == "yes")
    if not row["step"]:
        return
    assert pixels(attack) == pytest.approx(number(row["step"]))
    growing = int(row["eps_warmup"])
    for epoch in range(growing):
        assert inner.at(epoch).threat.eps == pytest.approx(eps * epoch / growing)
        assert pixels(inner.at(epoch)) == pytest.approx(number(row["step"])), "the steps do not grow with it"
    lengthening = int(row["step_warmup"])
    for epoch in range(lengthening):
        assert pixels(inner.at(epoch)) == pytest.approx(number(row["step"]) * epoch / lengthening)
        assert inner.at(epoch).threat.eps == pytest.approx(eps)


def pixels(attack) -> float:
    """The length of a step in the scale of the pixels."""
    step = attack.step_size
    return float(step.removesuffix(" eps")) * attack.threat.eps if isinstance(step, str) else step


STAND_INS = {
    "imagenet/ares_swin_b": (
        ["model.name=vit_tiny_patch16_224", "trainer.max_epochs=2", "data.batch_size=4"],
        2 * 3,
    ),
    "imagenet/debenedetti_xcit_s12": (
        ["model.name=xcit_nano_12_p16_224", "trainer.max_epochs=2", "data.batch_size=4"],
        2 * 3,
    ),
    "imagenet/singh_convnext_t": (
        ["+model.settings.depths=[1,1,1,1]", "model.weights=null", "trainer.max_epochs=1", "data.batch_size=6"],
        2,
    ),
    "imagenet/fast_resnet50": (
        [
            "model.name=resnet10t",
            "trainer.max_epochs=7",
            "data.batch_size={0: 4, 6: 2, 12: 2}",
            "aug.resolution={0: 32, 6: 48, 12: 64}",
        ],
        6 * 3 + 6,
    ),
}


@pytest.mark.parametrize("recipe", STAND_INS)
def test_a_recipe_trains_small_networks_on_few_images(recipe, root, tmp_path):
    overrides, steps = STAND_INS[recipe]
    small = ["data.num_val=4", "data.num_workers=0", "data.img_size=64", "adv.val_steps=1", "trainer=cpu"]
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        data_root = f"data.root={root / 'imagenet'}"
        cfg = compose("train", [f"experiment={recipe}", data_root, *small, *overrides])
    data = build.build_data(cfg, training=True)
    module = build.build_module(cfg, build.build_classifier(cfg, data.num_classes), data)
    trainer = build.build_trainer(cfg, tmp_path)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == steps, "12 images in batches of each epoch's own size"
    assert trainer.callback_metrics["train/loss"].isfinite()
    averages = [callback.num_updates for callback in trainer.callbacks if isinstance(callback, EMA)]
    assert averages == ([steps] if ROWS[recipe]["ema"] else [])


def one_line(monkeypatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        train_main()
    line = str(caught.value.code)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("recipe", ROWS)
def test_a_recipe_without_its_data_names_their_key(recipe, monkeypatch):
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("train", [f"experiment={recipe}"])
    with pytest.raises(build.ConfigError, match=r"^data\.root=null: "):
        build.build_data(cfg, training=True)


def test_without_its_data_or_its_weights_a_recipe_ends_in_one_line(root, tmp_path, monkeypatch):
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    command = ["experiment=imagenet/singh_convnext_t", f"launch.root={tmp_path}", "data.num_val=4"]
    assert one_line(monkeypatch, *command).startswith("error: data.root=null: ")
    data = f"data.root={root / 'imagenet'}"
    assert one_line(monkeypatch, *command, data).startswith("error: model.weights=clean.pt: is no file")
    assert not list(tmp_path.iterdir())


def test_a_cosine_begins_after_the_warm_up_where_it_is_asked_to():
    settings = {"name": "adamw", "lr": 1.0, "weight_decay": 0.0, "warmup_epochs": 10, "cooldown_epochs": 10}
    after = OptimSettings(**settings, warmup_prefix=True).schedule_factor(50)
    under = OptimSettings(**settings).schedule_factor(50)
    assert [after(epoch) for epoch in (5, 10, 25, 40, 45)] == pytest.approx([0.5, 1.0, 0.5, 0.0, 0.0])
    assert under(10) == pytest.approx((1 + 2**-0.5) / 2), "a quarter of the cosine's 40 epochs has gone by"
    with pytest.raises(
        ValueError, match="warmup_prefix=true: goes with schedule=cosine, this is schedule=constant"
    ):
        OptimSettings(**settings, warmup_prefix=True, schedule="constant")


class Linear(nn.Module):
    """Three classes, of which each pixel speaks for one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[2.0, -1.0, -1.0], [-1.0, 2.0, -1.0], [0.0, -1.5, 2.0]]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight.T


def test_an_attack_on_the_class_itself_makes_what_it_makes_of_class_labels():
    images, labels = torch.full((2, 3, 1, 1), 0.5), torch.tensor([0, 1])
    mixed = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.6, 0.4]])
    cfg = ["adv=pgd", "adv.random_start=false", "adv.eps=0.1", "data=digits"]
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        attack = build.build_objective(compose("train", cfg), Linear(), 3).inner.attack
    hard = AdversarialTraining(InnerAttack(attack=attack), hard_labels=True)
    soft = AdversarialTraining(InnerAttack(attack=attack))
    net = Linear()
    assert torch.equal(hard.craft(net, images, mixed, 0), soft.craft(net, images, labels, 0))
    assert not torch.equal(soft.craft(net, images, mixed, 0), soft.craft(net, images, labels, 0))
    assert torch.equal(hard.loss(net, images, images, mixed, 0)[0], soft.loss(net, images, images, mixed, 0)[0])
    with pytest.raises(ValueError, match="hard_labels=1: expected true or false"):
        AdversarialTraining(InnerAttack(attack=attack), hard_labels=1)
