"""The examples of docs/extending.md, run by the real programs; each does what it is there for."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from processes import ROOT, assert_one_line, here, last_weights
from sklearn.datasets import load_digits
from torch.utils.data import Dataset

from ares_lightning import build
from ares_lightning.attacks import make_attack
from ares_lightning.attacks.passes import Passes
from ares_lightning.build.own import own_class
from ares_lightning.export import export
from ares_lightning.launch import CONFIG_DIR
from ares_lightning.training.objectives import InnerAttack
from examples.attack import ODIPGD
from examples.evaluator import Rotations
from examples.objective import Mixture

EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name != "__init__.py")
CONFIGS = ["--config-dir", str(ROOT / "examples" / "conf")]
ALL_OF_THEM = ["adv=mixture", "trick=[head_first]", "data=npz", "model=mlp", "attack=odi_pgd"]
ASKED = "eval=[clean,noise,attack,rotations]"
PAGE = ROOT / "docs" / "extending.md"


def composed(program: str, *overrides: str):
    search = f"hydra.searchpath=[file://{ROOT / 'examples' / 'conf'}]"
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(program, [search, *overrides])


def test_the_pages_data_set_is_there(tmp_path):
    (block,) = re.findall(r"```yaml\n# conf/data/svhn\.yaml\n(.*?)```", PAGE.read_text(), re.S)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "svhn.yaml").write_text(block)
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        data = compose("train", [f"hydra.searchpath=[file://{tmp_path}]", "data=svhn", "data.root=/data/svhn"]).data
    assert (data.name, data.img_size, data.num_classes) == ("svhn", 32, 10)
    assert own_class(data.train._target_, Dataset)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "digits.npz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dataset.py", str(file)])
        runpy.run_path(str(ROOT / "examples" / "dataset.py"), run_name="__main__")
    return file


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory) -> Path:
    """One training that uses every example, for one epoch, in which the last layer alone is trained."""
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    more = [f"data.root={digits}", "data.num_workers=1", "trainer.max_epochs=1", "callbacks.progress=false"]
    done = here("train.py", *CONFIGS, *ALL_OF_THEM, ASKED, *more, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir


def verdicts(run_dir: Path, evaluator: str) -> pd.DataFrame:
    rows = pd.read_parquet(run_dir / "verdicts")
    return rows[rows["evaluator"] == evaluator].set_index("sample_id").sort_index()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_fits_on_a_page_and_begins_with_its_command(path):
    text = path.read_text()
    assert len(text.splitlines()) < 40
    commands = re.findall(r"^python (train|evaluate)\.py (--config-dir examples/conf .*)$", text, re.M)
    assert commands
    for program, rest in commands:
        overrides = [part for part in shlex.split(re.sub(r"<.*>", "x", rest))[2:] if not part.startswith("ckpt=")]
        assert composed(program, *overrides)
        assert f"python {program}.py {rest}" in PAGE.read_text()


def test_the_data_set_gives_its_own_images_under_names_that_stay(trained):
    rows = verdicts(trained, "clean")
    assert rows["sample_name"].tolist() == [f"test/{i:05d}" for i in range(360)]
    assert (rows["label"].to_numpy() == load_digits().target[-360:]).all()
    assert set(rows["set"]) == {"npz"}


def test_the_objective_weighs_clean_against_adversarial(trained):
    metrics = pd.read_csv(trained / "metrics.csv")
    assert metrics["train/clean_acc"].iloc[0] > metrics["train/robust_acc"].iloc[0]
    net, images = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)), torch.rand(5, 1, 2, 2)
    labels, inner = torch.tensor([0, 1, 2, 0, 1]), InnerAttack(attack=make_attack("pgd", eps=0.1))
    adversarial = inner.craft(net, images, labels, epoch=0, sample_ids=None)
    losses = [F.cross_entropy(net(each), labels) for each in (images, adversarial)]
    mixture, _ = Mixture(inner, clean_weight=0.2).loss(net, images, adversarial, labels, 0)
    torch.testing.assert_close(mixture, 0.2 * losses[0] + 0.8 * losses[1])


def test_the_trick_trains_the_last_layer_alone_at_first(trained, digits):
    cfg = composed("train", "data=npz", "model=mlp", f"data.root={digits}")
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    begun = build.build_classifier(cfg, 10).state_dict()
    ended = last_weights(trained)
    changed = {name for name in begun if not torch.equal(begun[name], ended[f"net.{name}"])}
    assert changed == {"backbone.head.weight", "backbone.head.bias"}
    assert verdicts(trained, "clean")["broken"].mean() < 0.5, "which goes a long way"


def test_the_model_is_a_perceptron(trained):
    names = [name for name in last_weights(trained) if name.endswith("weight")]
    assert [name for name in names if "layers" not in name] == ["net.backbone.head.weight"]
    assert last_weights(trained)["net.backbone.layers.1.weight"].shape == (256, 64)


def test_the_attack_keeps_its_budget_and_beats_noise(trained):
    rows = verdicts(trained, "attack")
    assert set(rows["attack"]) == {"odi_pgd"}
    assert rows["distance"].max() <= 0.1 + 6e-8
    assert set(rows.loc[~rows["broken"], "forwards"]) == {22}
    assert rows["broken"].sum() > verdicts(trained, "noise")["broken"].sum()


def test_the_attack_begins_at_more_different_outputs_than_noise():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    images, labels = torch.rand(16, 1, 8, 8), torch.zeros(16, dtype=torch.int64)

    def spread(attack) -> float:
        starts = [net(attack.craft(net, images, labels, seed=seed)) for seed in range(4)]
        return float(torch.stack(starts).std(0).mean())

    assert spread(ODIPGD(eps=0.1, steps=0)) > 2 * spread(make_attack("noise", eps=0.1))


def test_the_evaluator_finds_the_worst_angle(trained):
    clean, turned = verdicts(trained, "clean"), verdicts(trained, "rotations")
    assert (turned["broken"] >= clean["broken"]).all()
    assert turned["broken"].mean() > clean["broken"].mean()
    rows = json.loads((trained / "summary.json").read_text())
    (row,) = [row for row in rows if row["evaluator"] == "rotations"]
    assert row["metric"] == "robust_accuracy"
    assert row["value"] == pytest.approx(1 - turned["broken"].mean())
    net, images, labels = torch.nn.Flatten(), torch.rand(8, 1, 3, 3), torch.arange(8)
    (still,) = Rotations("still", degrees=0).verdicts(net, images, labels, torch.arange(8), 0, Passes())
    assert torch.equal(still.outcome.broken, net(images).argmax(1) != labels)


def test_the_checkpoint_is_evaluated_with_its_own_data_and_model(trained, tmp_path):
    done = here(
        "evaluate.py",
        *CONFIGS,
        f"ckpt={trained}",
        ASKED,
        "attack=odi_pgd",
        "trust=[examples]",
        f"run_dir={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "summary.json").read_text() == (trained / "summary.json").read_text()


def test_a_checkpoint_does_not_say_what_is_imported(trained, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil.py").write_text("raise SystemExit('was run')")
    checkpoint = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["config"]["adv"]["_target_"] = "evil.Net"
    torch.save(checkpoint, tmp_path / "accomplice.ckpt")
    checkpoint["config"]["model"]["_target_"] = "evil.Net"
    torch.save(checkpoint, tmp_path / "evil.ckpt")
    for asks in (
        ["evaluate.py", f"ckpt={tmp_path / 'evil.ckpt'}"],
        ["evaluate.py", f"ckpt={tmp_path / 'evil.ckpt'}", "trust=[examples]"],
        ["train.py", f"resume={tmp_path / 'evil.ckpt'}", f"run_dir={tmp_path}"],
    ):
        assert_one_line(here(*asks), r"evil\.Net.*, whose code would be run; give trust=")
    other = f"eval.transfer.models={{evil: {tmp_path / 'evil.ckpt'}}}"
    for first in (trained, tmp_path / "accomplice.ckpt"):
        asks = ["evaluate.py", f"ckpt={first}", "trust=[examples]", "eval=[transfer]", other]
        assert_one_line(here(*asks, f"run_dir={tmp_path}"), r"evil\.Net, whose code would be run")
    with pytest.raises(ValueError, match=r"evil\.Net, whose code would be run; give --trust evil\.Net if"):
        export(tmp_path / "evil.ckpt", "safetensors", output=tmp_path / "export")


def test_timm_cannot_hold_the_model(trained, tmp_path):
    with pytest.raises(ValueError, match=r"--to timm: timm has no examples\.model\.MLP; export --to safetensors"):
        export(trained, "timm", output=tmp_path / "timm", trust=["examples"])
    assert not (tmp_path / "timm").exists()


def test_the_data_set_is_looked_for_where_data_root_says(trained, digits, tmp_path):
    moved = tmp_path / "moved.npz"
    with np.load(digits) as file:
        np.savez(moved, test_images=file["test_images"][:5], test_labels=file["test_labels"][:5])
    moved_to = [f"data.root={moved}", "trust=[examples.model.MLP,examples.dataset]"]
    done = here("evaluate.py", f"ckpt={trained}", *moved_to, "eval=[clean]", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "n = 5" in done.stdout


def test_the_model_goes_out_with_a_card_whose_command_evaluates_it(trained, digits, tmp_path, monkeypatch):
    folder = export(trained, "safetensors", output=tmp_path / "out", trust=["examples"])
    card = (folder / "README.md").read_text()
    assert "\nexamples.model.MLP, 0.1 M parameters" in card
    (command,) = re.findall(r"^python evaluate\.py (.*) data=…$", card, re.M)
    monkeypatch.chdir(folder)
    own = ["data=npz", f"data.root={digits}", "eval=[clean]", f"run_dir={tmp_path / 'run'}"]
    done = here("evaluate.py", *CONFIGS, *shlex.split(command), *own)
    assert done.returncode == 0, done.stderr
    assert verdicts(tmp_path / "run", "clean")["broken"].equals(verdicts(trained, "clean")["broken"])
    card = (export(trained, "robustbench", output=tmp_path / "rb", trust=["examples"]) / "README.md").read_text()
    assert "`network` is an object of the class above, which these files do not hold" in card
