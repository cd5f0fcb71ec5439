"""The run folder of a training: where it lies, which process writes it, and what there is in it to go on with."""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ares_lightning.atomic import WriteError, replacing
from ares_lightning.build.config import ConfigError
from ares_lightning.models.checkpoints import read_checkpoint


@dataclass(frozen=True)
class Start:
    """Where a training begins: in which folder (None for a new one), from which checkpoint, with which settings."""

    run_dir: Path | None = None
    path: Path | None = None
    checkpoint: dict[str, Any] | None = None
    config: Any = None


def find_start(cfg: DictConfig) -> Start:
    """Find what `resume` and `run_dir` name, or what a job that was requeued has to go on with.

    Raises ConfigError where there is no such thing, or where it is not that of `run_dir`.
    """
    run_dir, resume = None if cfg.run_dir is None else Path(cfg.run_dir), cfg.resume
    if resume is None and _is_restarted():
        own = run_dir or new_run_dir(cfg)
        if (own / "config.yaml").exists():
            run_dir, resume = own, "last"
    if resume is None:
        if run_dir is not None and is_main_process() and (run_dir / "config.yaml").exists():
            raise ConfigError(f"run_dir={run_dir}: {_TAKEN}")
        return Start(run_dir)
    if resume != "last":
        path = Path(resume)
        if run_dir is not None and (run_dir / "config.yaml").exists():
            own_folder = (run_dir / "checkpoints").resolve()
            if path.resolve().parent != own_folder:
                raise ConfigError(
                    f"resume={resume}: run_dir={run_dir} holds another run; give resume=last to go on with that, "
                    "or another run_dir"
                )
    elif run_dir is None:
        raise ConfigError("resume=last: give run_dir=<the run to go on with> as well")
    else:
        path = run_dir / "checkpoints" / "last.ckpt"
        if not path.is_file() and (run_dir / "config.yaml").is_file():
            if is_main_process():
                print(f"resume=last: no checkpoint yet in {run_dir}; begins again with the settings in config.yaml")
            return Start(run_dir, config=read_config(run_dir))
    if not path.is_file():
        raise ConfigError(f"resume={resume}: no such checkpoint: {path}")
    checkpoint = read_checkpoint(path)
    return Start(run_dir, path, checkpoint, OmegaConf.create(checkpoint["config"]))


_TAKEN = "already holds a run; give resume=last to go on, or another run_dir"


def new_run_dir(cfg: DictConfig) -> Path:
    """Return the folder of a new training, `<root>/<name>/<run id>`.

    The run id is RUN_ID, else the id of the SLURM job (which a requeued job keeps; of an array, with the task),
    else that of torchrun's rendezvous, else the time, with the number of the job in a sweep, and a number where it
    is taken. Of the processes of a training only rank 0 knows the time that counts; the others are told.

    Raises ConfigError where a given id is taken and the job was not requeued.
    """
    folder = Path(cfg.launch.root) / str(cfg.name)
    given = _given_id()
    if given is not None:
        run_dir = folder / given
        if is_main_process() and not _is_restarted() and (run_dir / "config.yaml").exists():
            raise ConfigError(f"run_dir={run_dir}: {_TAKEN}")
        return run_dir
    now = time.strftime("%Y%m%d-%H%M%S")
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        now = f"{now}-job{HydraConfig.get().job.num}"
    names = itertools.chain([now], (f"{now}-{number}" for number in itertools.count(2)))
    return next(folder / name for name in names if not (folder / name).exists())


def _given_id() -> str | None:
    rendezvous = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return os.environ.get("RUN_ID") or slurm_job_id() or (None if rendezvous == "none" else rendezvous)


def slurm_job_id() -> str | None:
    """Return the id of the SLURM job as scontrol takes it, `<array>_<task>` in an array; None outside SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID") or None


def _is_restarted() -> bool:
    """Whether SLURM has requeued this job, or torchrun has started its processes again."""
    counts = (os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return any(count.isdecimal() and int(count) > 0 for count in counts)


def is_main_process() -> bool:
    """Whether this process is rank 0, as far as can be known before the processes have found each other."""
    ranks = (os.environ.get(name, "0") for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))
    return all(rank == "0" for rank in ranks)


def requeue() -> str:
    """Put this SLURM job back into the queue; return one line on what came of it."""
    job = slurm_job_id()
    if job is None:
        return "launch.requeue=true: this is no SLURM job, nothing was requeued"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    except OSError as error:
        return f"launch.requeue=true: scontrol requeue {job} failed: {error.strerror}"
    if done.returncode:
        return f"launch.requeue=true: scontrol requeue {job} failed: {' '.join(done.stderr.split())}"
    return f"requeued: {job}"


def read_config(run_dir: Path) -> Any:
    """Return the config of a run folder, None where there is none yet."""
    file = run_dir / "config.yaml"
    return OmegaConf.load(file) if file.exists() else None


def write_config(cfg: DictConfig, run_dir: Path) -> None:
    """Make the run folder and write the resolved config into it; raises ConfigError where that is impossible."""
    try:
        with replacing(run_dir / "config.yaml") as file:
            file.write(OmegaConf.to_yaml(cfg, resolve=True).encode())
    except WriteError as error:
        raise ConfigError(f"run_dir={run_dir}: {error}") from error


@contextmanager
def inherited(**variables: str) -> Iterator[None]:
    """Set environment variables for the processes that are started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
