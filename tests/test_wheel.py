"""The built wheel, installed and used where nothing of the checkout lies."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf
from processes import ROOT, assert_one_line, environment

from ares_lightning.launch import CONFIG_DIR

SHORT = ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "subset=first:6"]
SHORT += ["callbacks.progress=false"]
OWN = ["--config-dir", "conf", "attack=odi_pgd", "data=npz", "data.root=digits.npz", "data.num_workers=1"]
TELLS_WHAT_IT_IMPORTS = """
import atexit, os, sys

def tell():
    with open(os.environ["IMPORTED"], "a") as file:
        for module in list(sys.modules.values()):
            print(getattr(module, "__file__", None), file=file)

atexit.register(tell)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build_wheel = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build_wheel, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """The wheel as pip installs it, beside the libraries that are there."""
    folder = tmp_path_factory.mktemp("site")
    install = [
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
        "--target",
        str(folder),
    ]
    subprocess.run([sys.executable, "-m", "pip", *install, str(wheel)], check=True, capture_output=True)
    (folder / "sitecustomize.py").write_text(TELLS_WHAT_IT_IMPORTS)
    return folder


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A user's folder: copies of the examples in a package of theirs, configs, and data."""
    shutil.copytree(ROOT / "examples", tmp_path / "mine", ignore=shutil.ignore_patterns("conf", "__pycache__"))
    shutil.copytree(ROOT / "examples" / "conf", tmp_path / "conf")
    for config in (tmp_path / "conf").rglob("*.yaml"):
        config.write_text(config.read_text().replace("examples.", "mine."))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dataset.py", str(tmp_path / "digits.npz")])
        runpy.run_path(str(ROOT / "examples" / "dataset.py"), run_name="__main__")
    return tmp_path


def installed(program: str, *arguments: str, site: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run an installed program; whatever its processes import is of the wheel, of the user, or of the libraries."""
    imported = cwd / "imported.txt"
    imported.unlink(missing_ok=True)
    env = environment(PYTHONPATH=str(site), IMPORTED=str(imported))
    command = [str(site / "bin" / program), *arguments]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    files = {Path(line) for line in imported.read_text().splitlines() if line.startswith("/")}
    assert site / "ares_lightning" / "launch.py" in files
    libraries = (*map(Path, (sys.prefix, sys.base_prefix, os.path.dirname(os.__file__))), site, cwd)
    assert not [file for file in files if not any(file.is_relative_to(place) for place in libraries)]
    return done


def test_the_wheel_carries_the_configs_and_the_page(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"ares_lightning/conf/{path.relative_to(CONFIG_DIR)}" for path in CONFIG_DIR.rglob("*.yaml")}
    assert len(shipped) > 30
    templates = {f"evaluation/report/templates/{name}" for name in ("report.html", "page.css", "page.js")}
    beside_code = templates | {"models/zoo.csv", "py.typed"}
    assert shipped | {f"ares_lightning/{name}" for name in beside_code} <= names


def test_the_wheel_trains_from_any_folder_with_a_users_own_classes(site, elsewhere):
    """The evaluation at its end included; from their own --config-dir, a loading process among its processes."""
    own = [*OWN, "adv=mixture", "eval=[clean,attack]", "run_dir=run"]
    done = installed("ares-train", *own, *SHORT, site=site, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert set(pd.read_parquet(elsewhere / "run" / "verdicts")["attack"]) == {"none", "odi_pgd"}
    assert OmegaConf.load(elsewhere / "run" / "config.yaml").adv._target_ == "mine.objective.Mixture"


@pytest.mark.proof
def test_the_wheel_trains_and_evaluates_from_any_folder(site, elsewhere, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    done = installed("ares-train", *SHORT, "run_dir=run", site=site, cwd=empty)
    assert done.returncode == 0, done.stderr
    done = installed("ares-evaluate", "ckpt=run", "eval=[quick,sanity]", "subset=first:6", site=site, cwd=empty)
    assert done.returncode == 0, done.stderr
    assert list(empty.glob("runs/*/*/report.html"))
    assert_one_line(
        installed("ares-train", "attack=odi_pgd", site=site, cwd=empty), "attack=odi_pgd: no such choice"
    )
    own = [*OWN, "adv=mixture", "model=mlp", "trick=[head_first]", "eval=[attack,rotations]", "trainer=ddp_sim"]
    done = installed("ares-train", *own, *SHORT, "run_dir=run", site=site, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    ask = ["--config-dir", "conf", "ckpt=run", "eval=[attack,rotations]", "attack=odi_pgd", "trainer=ddp_sim"]
    done = installed(
        "ares-evaluate", *ask, "trust=[mine]", "subset=first:6", "run_dir=again", site=site, cwd=elsewhere
    )
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "again" / "summary.json").read_text() == (elsewhere / "run" / "summary.json").read_text()
    (elsewhere / "mine").rename(elsewhere / "yours")
    done = installed("ares-evaluate", "ckpt=run", "trust=[mine]", site=site, cwd=elsewhere)
    assert_one_line(
        done, r"data\.test\._target_=mine\.dataset\.NpzImages: there is no module mine in .*; run where"
    )
