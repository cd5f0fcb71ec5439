"""Running the two programs, mostly in processes of their own, and looking at what they leave behind."""

from __future__ import annotations

import io
import os
import re
import runpy
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).parent.parent

SHORT = ["trainer.max_epochs=2", "trainer.limit_train_batches=6", "trainer.limit_val_batches=1"]
SHORT += [
    "model.settings.width=8",
    "data.batch_size=32",
    "subset=first:6",
    "eval=[clean]",
    "callbacks.progress=false",
]


def environment(**variables: str) -> dict[str, str]:
    """That of the test without what a launcher may have put there."""
    launchers = ("SLURM_", "TORCHELASTIC_", "RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "NODE_RANK")
    own = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    paths = os.pathsep.join([str(ROOT), *filter(None, [own.get("PYTHONPATH")])])
    return own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | variables


def start(
    *arguments: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None, start_new_session: bool = False
) -> subprocess.Popen[str]:
    """Start `python <arguments>`."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment(**(env or {})),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=start_new_session,
    )


def finish(process: subprocess.Popen[str], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Wait for what `start` has started."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still runs: {process.communicate()}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(*arguments: object, timeout: float = 300, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `python <arguments>`, by default in the repository."""
    return finish(start(*arguments, **options), timeout)


def here(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `python <program> <arguments>` in this process, which has loaded the libraries already."""
    argv, out, err, code = [program, *map(str, arguments)], io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            err.write(f"{end.code}\n" if isinstance(end.code, str) else "")
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def wait_for(path: Path, process: subprocess.Popen[str], newer_than: int = 0) -> None:
    """Wait until a running process has written a file, later than a time in ns."""
    deadline = time.monotonic() + 120
    while not path.exists() or path.stat().st_mtime_ns <= newer_than:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_parts(run_dir: Path, process: subprocess.Popen[str], more_than: int = 0) -> None:
    """Wait until a running evaluation has written verdicts."""
    deadline = time.monotonic() + 120
    while len(list((run_dir / "verdicts").glob("part-*.parquet"))) <= more_than:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def last_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def same_weights(one: Path, two: Path) -> bool:
    """Whether two trainings have ended with the same weights, bit for bit."""
    mine, other = last_weights(one), last_weights(two)
    return mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


def assert_one_line(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert re.search(message, done.stderr), done.stderr


def wandb_records(log: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a 7-byte header, then LevelDB's log format in blocks of 32 KiB."""
    place, record = 7, b""
    while place + 7 <= len(log):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", log[place : place + 7])
        record += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, or the last part
            yield record
            record = b""
