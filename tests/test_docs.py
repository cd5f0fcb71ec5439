"""The pages: their commands parse as the programs would parse them, their code runs, their links lead somewhere."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from processes import ROOT, here

from ares_lightning import build
from ares_lightning.launch import CONFIG_DIR
from ares_lightning.training.objectives import OBJECTIVES
from ares_lightning.training.optim import OptimSettings

with patch.object(sys, "path", [str(ROOT / "benchmarks"), *sys.path]):
    newcomer = importlib.import_module("newcomer")

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
LAUNCHERS = ("torchrun", "srun")
"""What may stand before one of the two programs."""
FOREIGN = ("git", "cd", ".", "export", "tensorboard", "wandb", "#!/bin/bash", "#SBATCH")
"""Programs of others that pages may call."""
TABLES = ("benchmarks/table.py", "ares_lightning.attacks", "ares_lightning.data")
"""Those that take no options; other tests run them."""
NEED_IMAGES = ("ood", "corruptions", "frequency", "transfer", "sanity")
"""Evaluators that cannot be built without the images they ask about."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The lines of the page's `sh` blocks, continued ones as one, without comments."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    lines = [line if line.startswith("#") else re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]
    return [line for line in lines if line and not line.startswith("# ")]


COMMANDS = [(name, command) for name, page in zip(NAMES, PAGES, strict=True) for command in commands(page)]


@contextlib.contextmanager
def parsing_alone() -> Iterator[None]:
    """Let programs end once their command line is parsed."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(*args: object, **options: object) -> None:
        parse(*args, **options)
        raise Parsed

    with patch.object(argparse.ArgumentParser, "parse_args", parse_and_end):
        yield


class Parsed(Exception):  # noqa: N818
    """A command line was fine."""


def check_options(words: Sequence[str]) -> None:
    """Have the argparse of `python <words>` parse its options."""
    is_module = words[0] == "-m"
    program, options = (words[1], words[2:]) if is_module else (words[0], words[1:])
    if program in TABLES:
        assert not options
        return
    if program.startswith("examples."):
        assert importlib.util.find_spec(program)
        return
    start = runpy.run_module if is_module else runpy.run_path
    with patch.object(sys, "argv", [program, *options]), parsing_alone(), pytest.raises(Parsed):
        start(program if is_module else str(ROOT / program), run_name="__main__")


def composed(program: str, words: Sequence[str]) -> DictConfig:
    """Compose the config of a command line; of a sweep its first run, Hydra's own settings left out."""
    given = get_args_parser().parse_args(words)
    overrides = [word for word in given.overrides if not word.startswith(("hydra.", "hydra/"))]
    for place, override in enumerate(OverridesParser.create().parse_overrides(overrides)):
        if override.is_sweep_override():
            assert given.multirun, f"{override.input_line}: needs -m"
            first = next(iter(override.sweep_string_iterator()))
            overrides[place] = f"{override.get_key_element()}={first}"
    if given.config_dir:
        folder = ROOT if given.config_dir.startswith("examples") else Path.cwd()
        overrides.append(f"hydra.searchpath=[file://{folder / given.config_dir}]")
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(given.config_name or program, overrides)


def check_program(program: str, words: Sequence[str]) -> None:
    cfg = composed(program, words)
    build.check_keys(cfg)
    if program == "train":
        assert "_target_" in cfg.adv or cfg.adv.name in OBJECTIVES
        if cfg.resume is None:
            OptimSettings(**cfg.optim)
    cfg.data.img_size = cfg.data.img_size or 224  # as build_data would say once there are images
    asked = [name for name in cfg.get("eval") or () if name not in NEED_IMAGES]
    cfg.eval = OmegaConf.masked_copy(cfg.eval, asked) if asked else {}
    assert {evaluator.name for evaluator in build.build_evaluators(cfg, None, None)} >= set(asked)


def write_own(page: Path, folder: Path) -> None:
    """Write the configs of a page, each to the path in its first line, and the class that they name."""
    for block in blocks(page, "yaml"):
        path = re.match(r"# (conf/\S+\.yaml)\n", block)
        if path:
            (folder / path[1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / path[1]).write_text(block)
    (folder / "mine.py").write_text((ROOT / "examples" / "attack.py").read_text().replace("ODIPGD", "MyAttack"))


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {text}"[:90] for page, text in COMMANDS])
def test_a_pages_command_is_one_that_the_program_takes(page, command, monkeypatch, tmp_path):
    write_own(ROOT / page, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("IMAGENET_DIR", "/data/imagenet")
    words = shlex.split(re.sub("<[^>]*>|…", "x", command))
    programs = {"train.py": "train", "evaluate.py": "evaluate", "ares-train": "train", "ares-evaluate": "evaluate"}
    place = next((i for i, word in enumerate(words) if word in programs), None)
    if place is not None and (words[0] in (*LAUNCHERS, *programs) or words[:place] == ["python"]):
        check_program(programs[words[place]], words[place + 1 :])
    elif words[0] == "python":
        check_options(words[1:])
    elif words[0] == "make":
        targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1:]
        assert set(words[1:]) <= set(targets)
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.findall(r"(?:ares-lightning|\.)\[(.*?)\]", command)
        assert words[1] == "install"
        assert {extra for names in named for extra in names.split(",")} <= set(extras)
    else:
        assert words[0] in FOREIGN, f"{page}: {command}"


def test_a_wrong_key_option_or_choice_would_be_seen():
    with pytest.raises(Exception, match="epz"):
        check_program("train", ["adv.epz=1"])
    with pytest.raises(Exception, match="no_such_suite"):
        check_program("evaluate", ["eval=[no_such_suite]"])
    with pytest.raises(build.ConfigError, match="steps"):
        check_program("evaluate", ["eval=attack", "attack=pgd", "attack.steps=x"])
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        check_options(["-m", "ares_lightning.evaluation.report", "runs", "--no-such-option"])


@pytest.fixture(scope="module")
def newcomers(tmp_path_factory) -> Path:
    """A folder in which the commands of docs/getting-started.md have been run, but for installing and the demo."""
    folder = tmp_path_factory.mktemp("newcomer")
    newcomer.write_photos(folder / "photos", every=6)
    with patch.object(newcomer, "EPOCHS", 1):
        newcomer.write_weights(folder / "photos", folder / "weights.pth")
    short = {
        "train.py": ["trainer.max_epochs=1", "data.num_workers=0", "data.num_val=20", "subset=first:10"],
        "evaluate.py": ["subset=first:4", "data.num_workers=0", "eval=[clean,pgd20]"],
    }
    with contextlib.chdir(folder):
        for step in newcomer.steps((ROOT / newcomer.PAGE).read_text()):
            for command in step.commands:
                words = shlex.split(command)
                if words[0] == "make":
                    continue
                if words[1] == "-m":
                    with patch.object(sys, "argv", words[2:]), pytest.raises(SystemExit) as end:
                        runpy.run_module(words[2], run_name="__main__")
                    assert end.value.code == 0
                else:
                    done = here(*words[1:], *short[words[1]])
                    assert done.returncode == 0, f"{command}: {done.stderr}"
    return folder


def test_the_pages_say_how_long_each_of_the_newcomers_steps_took():
    steps = json.loads((ROOT / "benchmarks" / "results" / "newcomer-cpu.json").read_text())["steps"]
    *first, last = (f"{sum(step['seconds']):.0f}" for step in steps)
    asked = [list(step.commands) for step in newcomer.steps((ROOT / newcomer.PAGE).read_text())]
    assert [step["commands"] for step in steps] == asked
    for page in (ROOT / newcomer.PAGE, ROOT / "README.md"):
        assert f"{', '.join(first)} and {last} seconds" in " ".join(page.read_text().split())
    assert [command for step in asked for command in step] == commands(ROOT / "README.md")[2:8]


def test_the_readme_shows_the_results_of_the_demo():
    for adv, run in (("none", "clean-trained"), ("pgd", "adversarially-trained")):
        summary = json.loads((ROOT / "docs" / "results" / f"demo-{run}.json").read_text())
        rows = [next(row for row in summary if row["evaluator"] == name) for name in ("clean", "pgd20")]
        cells = [f"{row['value']:.1%} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]" for row in rows]
        line = f"| `adv={adv}` | {cells[0]} | {cells[1]} |".replace("%", " %")
        assert line in (ROOT / "README.md").read_text()


def test_the_newcomers_commands_lead_from_images_to_a_comparison(newcomers):
    assert [step.title for step in newcomer.steps((ROOT / newcomer.PAGE).read_text())] == [
        "Install", "Demo", "Train on your own images", "Find out how robust it is",
        "Evaluate a model of your own", "Compare",
    ]  # fmt: skip
    for run in ("photos", "photos-attacked", "own-model"):
        rows = json.loads((newcomers / "runs" / run / "summary.json").read_text())
        assert next(row["n"] for row in rows if row["evaluator"] == "worst_case") in (4, 10)
    page = (newcomers / "runs" / "comparison.html").read_text()
    assert "photos" in page
    assert "mobilenetv3_small_050" in page


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_pages_python_runs(page, newcomers, monkeypatch):
    monkeypatch.chdir(newcomers)
    monkeypatch.syspath_prepend(str(ROOT))
    for command in commands(page):
        if "run_dir=runs/check-" in command:
            words = [word for word in shlex.split(command)[1:] if not word.startswith("trainer=")]
            done = here(*words, "eval=[clean,pgd20]", "subset=first:40", "data.num_workers=0")
            assert done.returncode == 0, done.stderr
    exec("\n".join(blocks(page, "python")), {"__name__": page.stem})


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_pages_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_every_page_is_reached_from_the_readme():
    seen, left = set(), [PAGES[0]]
    while left:
        page = left.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text())
        left += [(page.parent / link).resolve() for link in links if not link.startswith("http")]
    assert set(PAGES) <= seen


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_every_result_is_listed_with_its_command_and_hardware(file, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page, report = ROOT / "docs" / "benchmarks.md", json.loads(file.read_text())
    (row,) = [line for line in page.read_text().splitlines() if line.startswith(f"| `{file.name}`")]
    assert (report.get("device") or report["hardware"]["device"]) in row
    assert report["command"] in commands(page)
    check_options(shlex.split(report["command"])[1:])


def test_the_citation_is_that_of_the_project():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["cff-version"] == "1.2.0"
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert {"message", "title", "authors"} <= set(cited)
    assert cited["references"][0]["url"].endswith("2302.14301")
