"""All that a GPU has to show, each part in a process of its own that is ended at its time limit.

    python benchmarks/cuda.py                                                     # checks and training steps
    python benchmarks/cuda.py --weights resnet20.pt --images cifar10/test         # and attacks: 10 minutes in all
    python benchmarks/cuda.py --parts checks --seconds 120

checks: tests/test_cuda.py, in several processes. attacks and autoattack: attacks.py beside its peers. training:
training.py, the published step beside ours. What the parts print goes to cuda.log, how they ended to cuda.json,
and the figures of each to a file of its own, all in --output; a part that is ended keeps what it has written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import torch
from provenance import device_name, revision, version

BENCHMARKS = Path(__file__).parent
PROCESSES = 8
"""That share the GPU in the checks."""
PACKAGES = ("torch", "torchvision", "lightning", "timm", "triton", "torchattacks", "foolbox", "pyautoattack")
VERDICT = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b (tests/\S+)")


@dataclass(frozen=True)
class Part:
    """What follows `python`, and the seconds that it may take."""

    command: list[str]
    seconds: int


def make_parts(options: argparse.Namespace) -> dict[str, Part]:
    """Return the parts by name, in the order of their worth."""

    def script(name: str, output: str, *arguments: object) -> list[str]:
        path, device = str(BENCHMARKS / name), options.device
        return [path, "--device", device, *map(str, arguments), "--output", str(options.output / output)]

    pytest = ["-m", "pytest", "tests/test_cuda.py", "-vv", "-n", str(PROCESSES), "--dist", "loadgroup"]
    parts = {"checks": Part([*pytest, "--durations=15", "-p", "no:cacheprovider"], 180)}
    if options.weights is not None:
        subject = ["--weights", options.weights, "--images", options.images, "--n", 512, "--batch-size", 512]
        brief = ["--repeats", 5, "--attacks", "pgd", "pgd_bf16", "apgd_ce", "fmn", "curve"]
        whole = ["--repeats", 1, "--attacks", "autoattack", "square", "fab_t", "apgd_t"]
        parts["attacks"] = Part(script("attacks.py", "robust-cifar10-cuda.json", *subject, *brief), 75)
    steps = ["--networks", *options.networks, "--rounds", 5]
    parts["training"] = Part(script("training.py", "training-cuda.json", *steps), 240)
    if options.weights is not None:
        parts["autoattack"] = Part(
            script("attacks.py", "robust-cifar10-cuda-autoattack.json", *subject, *whole), 150
        )
    return parts


def run(part: Part, seconds: float, log: IO[str]) -> tuple[int | None, str]:
    """Run a part; return its exit code, None if it was ended, and what it printed."""
    log.write(f"\n$ python {shlex.join(part.command)}\n")
    log.flush()
    begin = log.tell()
    process = subprocess.Popen(
        [sys.executable, *part.command],
        cwd=BENCHMARKS.parent,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        code: int | None = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        code = None
    return code, Path(log.name).read_bytes()[begin:].decode(errors="replace")


def verdicts(printed: str) -> dict[str, Any]:
    """Return what pytest has said of the tests, by the last word on each."""
    said = {name: word for word, name in VERDICT.findall(printed)}
    counts = {word.lower(): sum(own == word for own in said.values()) for word in sorted({*said.values()})}
    return {
        "counts": counts,
        "not_passed": sorted(name for name, word in said.items() if word in ("FAILED", "ERROR")),
    }


def main() -> None:
    """Run the parts one after the other and write down how each of them ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="checks, attacks, training, autoattack")
    parser.add_argument("--seconds", type=float, default=600, help="for all parts (default 600)")
    parser.add_argument("--weights", type=Path, help="of a CIFAR-10 ResNet-20, see attacks.py")
    parser.add_argument("--images", type=Path, help="folder of class folders of 32x32 images")
    parser.add_argument("--networks", nargs="+", default=["resnet50", "vit_base_patch16_224"], metavar="NAME")
    parser.add_argument("--device", default="cuda", help="cpu to try this script out")
    parser.add_argument("--output", type=Path, default=BENCHMARKS / "results")
    options = parser.parse_args()
    if (options.weights is None) != (options.images is None):
        parser.error("--weights and --images go together")
    parts = make_parts(options)
    unknown = set(options.parts or ()) - parts.keys()
    if unknown:
        parser.error(f"--parts {' '.join(sorted(unknown))}: expected some of {' '.join(parts)}")
    options.output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    report: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/cuda.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "device": device_name(torch.device(options.device)),
        "parts": {},
    }
    with (options.output / "cuda.log").open("a") as log:
        for name in options.parts or parts:
            begin = time.monotonic()
            limit = min(parts[name].seconds, deadline - begin)
            code, printed = run(parts[name], limit, log)
            ended: dict[str, Any] = {"exit_code": code, "seconds": round(time.monotonic() - begin, 1)}
            report["parts"][name] = ended | (verdicts(printed) if name == "checks" else {})
            (options.output / "cuda.json").write_text(json.dumps(report, indent=1) + "\n")
            print(f"{name}: {'ended at its limit' if code is None else f'exit code {code}'}, {ended['seconds']} s")
            print("\n".join(printed.splitlines()[-40:]), flush=True)


if __name__ == "__main__":
    main()
