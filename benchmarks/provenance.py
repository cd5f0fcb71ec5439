"""On what a figure was measured: the revision, the versions, the device."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch


def revision() -> str | None:
    """Return the git revision of this file's checkout, with + where files differ from it; None outside of git."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except OSError:
        return None
    return answer.stdout.strip() or None


def version(package: str) -> str | None:
    """Return the version of an installed package, None for one that is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """Return what a device is called, for a CPU with the number of its cores and their instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = f"{len(models)} x {models[0]}" if models else platform.processor()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    print(f"{datetime.now(UTC):%Y-%m-%d}, revision {revision()}")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    print(f"Python {platform.python_version()}, {versions}")
    print(device_name(torch.device("cpu")))
