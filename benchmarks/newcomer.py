"""The newcomer's path on a fresh clone, timed: install, demo, own images, own model, comparison.

    python benchmarks/newcomer.py
    python benchmarks/newcomer.py --clone ares-lightning --steps 3 4 5 6     # in a clone whose .venv is there

The steps are the numbered headings of docs/getting-started.md, their commands the `sh` blocks below, read from the
page of the clone and run in its folder as they stand. What the page takes for granted is made before the clock
starts, once there is an environment: scikit-learn's digits as photos/<split>/<class>/*.png, and weights.pth, a timm
network trained on them in plain PyTorch. Installing downloads what pip does not have in its cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = Path("docs/getting-started.md")
OUTPUT = ROOT / "benchmarks" / "results" / "newcomer-cpu.json"
PHOTO_SIZE = 40
ARCHITECTURE, IMG_SIZE, EPOCHS = "mobilenetv3_small_050", 32, 5
"""Of the newcomer's own model, which the page names."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Step:
    """A numbered heading of the page and its commands."""

    number: int
    title: str
    commands: tuple[str, ...]


def steps(page: str) -> Iterator[Step]:
    """Yield the steps of the page that have commands."""
    for number, title, text in re.findall(r"^## (\d+)\. (.*?)\n(.*?)(?=^## |\Z)", page, re.M | re.S):
        lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
        commands = [line.partition(" #")[0].strip() for line in lines]
        if any(commands):
            yield Step(int(number), title, tuple(filter(None, commands)))


def write_photos(folder: Path, every: int = 1) -> None:
    """Write scikit-learn's digits as PNG files, each or every so many of them, a fifth for testing."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images[::every], digits.target[::every], strict=True)):
        place = folder / ("train" if i % 5 else "val") / f"digit-{label}" / f"{i:04d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((pixels * 15.9).astype("uint8"))
        grey.resize((PHOTO_SIZE, PHOTO_SIZE), Image.Resampling.BICUBIC).convert("RGB").save(place)


def write_weights(photos: Path, file: Path) -> None:
    """Train a timm network on the photos, as somebody without this project would."""
    import timm
    import torch
    from torchvision import datasets, transforms

    torch.manual_seed(0)
    prepare = [transforms.CenterCrop(IMG_SIZE), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    folder = datasets.ImageFolder(str(photos / "train"), transforms.Compose(prepare))
    images, labels = torch.stack([image for image, _ in folder]), torch.tensor(folder.targets)
    net = timm.create_model(ARCHITECTURE, num_classes=len(folder.classes)).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    torch.save(net.state_dict(), file)


def fresh_clone(folder: Path) -> Path:
    """Clone the checkout of this file; return the clone."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


def run(command: str, clone: Path) -> float:
    """Run a command of the page in the clone, with its environment first in the path; return its seconds.

    Raises CalledProcessError where it fails.
    """
    path = os.pathsep.join([str((clone / ".venv" / "bin").resolve()), os.environ["PATH"]])
    print(f"$ {command}", flush=True)
    begin = time.perf_counter()
    subprocess.run(["bash", "-c", command], cwd=clone, check=True, env=os.environ | {"PATH": path})
    return time.perf_counter() - begin


def prepare(clone: Path) -> None:
    """Make what the page takes for granted, with the environment of the clone."""
    if not (clone / "weights.pth").exists():
        python = clone.resolve() / ".venv" / "bin" / "python"
        subprocess.run([python, Path(__file__).resolve(), "--prepare", clone.resolve()], check=True, cwd=clone)


def facts(clone: Path) -> dict[str, object]:
    """Return on what the path was gone, as the environment of the clone tells it."""
    words = (
        "import json, torch, provenance as p; "
        "print(json.dumps({'device': p.device_name(torch.device('cpu')), 'threads': torch.get_num_threads(), "
        "'versions': {n: p.version(n) for n in ('ares-lightning', 'torch', 'lightning', 'timm')}, "
        "'revision': p.revision()}))"
    )
    python = clone.resolve() / ".venv" / "bin" / "python"
    told = subprocess.run(
        [python, "-c", words], cwd=clone / "benchmarks", check=True, capture_output=True, text=True
    )
    found: dict[str, object] = json.loads(told.stdout)
    hardware = {"device": found.pop("device"), "threads": found.pop("threads"), "host": platform.platform()}
    return {**found, "hardware": hardware, "python": platform.python_version()}


def main() -> None:
    """Go the path and write how long each step took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clone", type=Path, help="a clone to go it in; otherwise one is made and thrown away")
    parser.add_argument("--steps", type=int, nargs="+", metavar="NUMBER", help="those to go; default: all")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="only write photos/ and weights.pth there")
    options = parser.parse_args()
    if options.prepare is not None:
        write_photos(options.prepare / "photos")
        write_weights(options.prepare / "photos", options.prepare / "weights.pth")
        return
    with tempfile.TemporaryDirectory() as scratch:
        clone = options.clone or fresh_clone(Path(scratch) / "ares-lightning")
        rows, told = [], {}
        for step in steps((clone / PAGE).read_text()):
            if options.steps is not None and step.number not in options.steps:
                continue
            if (clone / ".venv" / "bin" / "python").exists():
                prepare(clone)
                told = told or facts(clone)  # before the demo draws its figure anew
            seconds = [round(run(command, clone), 1) for command in step.commands]
            rows.append({"step": step.number, "title": step.title, "commands": step.commands, "seconds": seconds})
        told = told or facts(clone)
    result = {
        "command": f"python benchmarks/newcomer.py {shlex.join(sys.argv[1:])}".strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **told,
        "seconds": round(sum(sum(row["seconds"]) for row in rows), 1),
        "steps": rows,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(f"{row['step']}. {row['title']}: {sum(row['seconds']):.0f} s")
    print(options.output)


if __name__ == "__main__":
    main()
