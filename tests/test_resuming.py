"""A training that is stopped, killed or out of disk goes on as if nothing had been: real runs, real signals."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from processes import (
    SHORT,
    assert_one_line,
    finish,
    here,
    last_weights,
    run,
    same_weights,
    start,
    wait_for,
    wait_for_parts,
    wandb_records,
)
from wandb.proto.wandb_internal_pb2 import Record

from ares_lightning import build
from ares_lightning.atomic import WriteError, replacing
from ares_lightning.launch import CONFIG_DIR
from ares_lightning.training.checkpointing import AtomicCheckpointIO
from ares_lightning.training.preemption import Stopped, StopSignals


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run of SHORT, in which other settings of `callbacks.checkpoint` change nothing."""
    run_dir = tmp_path_factory.mktemp("whole")
    done = here("train.py", *SHORT, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir


def assert_same_run(run_dir: Path, whole: Path) -> None:
    """Weights, epochs and summary are those of the uninterrupted run, and no half-written file is left."""
    assert same_weights(run_dir, whole)
    assert (run_dir / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert (run_dir / "summary.json").read_text() == (whole / "summary.json").read_text()
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    best = [torch.load(path / "checkpoints" / "best.ckpt", weights_only=True) for path in (run_dir, whole)]
    assert best[0]["epoch"] == best[1]["epoch"]


def test_a_file_is_replaced_as_a_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "folder" / "file"
    with replacing(path) as file:
        file.write(b"first")
    with suppress(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half of the sec")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"first"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    below = path / "below" / "file"
    with pytest.raises(WriteError, match=r"below/file: cannot be written: Not a directory$"), replacing(below):
        pass


def test_a_checkpoint_that_finds_the_disk_full_leaves_the_one_before(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(10)}, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(
            WriteError, match=r"last\.ckpt: cannot be written: File too large; the one before is kept$"
        ):
            AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.equal(torch.load(path, weights_only=True)["weights"], torch.ones(10))
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_training_on_a_full_disk_says_so_in_one_line_and_goes_on_when_there_is_room(whole, tmp_path):
    process = start("train.py", *SHORT, f"run_dir={tmp_path}")
    wait_for(tmp_path / "checkpoints" / "last.ckpt", process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
    reason = r"\w+\.ckpt: cannot be written: File too large; the one before is kept"
    assert_one_line(finish(process), rf"{tmp_path}/checkpoints/{reason}; resume=last run_dir={tmp_path} goes on")
    assert not list(tmp_path.rglob("*.tmp"))
    again = here("train.py", f"run_dir={tmp_path}", "resume=last")
    assert again.returncode == 0, again.stderr
    assert_same_run(tmp_path, whole)


def survive(kills: int, seed: int, whole: Path, run_dir: Path) -> None:
    """Kill a training again and again at random moments after its first file, then let it end."""
    moments = random.Random(seed)
    steps = ["callbacks.checkpoint.every_n_steps=1"]
    arguments = [*SHORT, *steps]
    for _ in range(kills):
        config = run_dir / "config.yaml"
        before = config.stat().st_mtime_ns if config.exists() else 0
        process = start("train.py", *arguments, f"run_dir={run_dir}")
        wait_for(config, process, newer_than=before)  # it is written at each start
        time.sleep(moments.uniform(0, 1.5))
        process.kill()
        finish(process)
        arguments = ["resume=last"]
    done = here("train.py", f"run_dir={run_dir}", "resume=last")
    assert done.returncode == 0, done.stderr
    assert_same_run(run_dir, whole)


def test_a_training_survives_being_killed_at_any_moment(whole, tmp_path):
    survive(3, 0, whole, tmp_path)


@pytest.mark.proof
@pytest.mark.parametrize("seed", range(1, 6))
def test_a_training_survives_being_killed_at_many_moments(seed, whole, tmp_path):
    survive(4, seed, whole, tmp_path)


@pytest.mark.parametrize(
    "signum",
    [
        pytest.param(signal.SIGTERM, id="SIGTERM"),
        pytest.param(signal.SIGUSR1, id="SIGUSR1", marks=pytest.mark.proof),
        pytest.param(signal.SIGINT, id="SIGINT", marks=pytest.mark.proof),
    ],
)
def test_a_signal_stops_a_training_in_mid_epoch_without_loss(signum, tmp_path):
    longer = [*SHORT, "trainer.limit_train_batches=19", "trainer.max_epochs=4", "adv.steps=10"]
    process = start("train.py", *longer, f"run_dir={tmp_path}")
    wait_for(tmp_path / "checkpoints" / "last.ckpt", process)
    process.send_signal(signum)
    done = finish(process)
    assert done.returncode == 128 + signum, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "stopped by" in line]
    assert line.startswith(f"stopped by {signum.name} at step ")
    step = int(line.split()[5].rstrip(";"))
    assert line.endswith(f"resume=last run_dir={tmp_path} goes on")
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step
    assert not (tmp_path / "verdicts").exists(), "no evaluation was run"
    assert here("train.py", f"run_dir={tmp_path}", "resume=last").returncode == 0
    other = tmp_path / "whole"
    assert here("train.py", *longer, f"run_dir={other}").returncode == 0
    assert_same_run(tmp_path, other)


def test_a_signal_to_every_process_of_a_job_leaves_the_loading_processes_at_work(tmp_path):
    longer = [*SHORT, "trainer.limit_train_batches=19", "trainer.max_epochs=40", "data.num_workers=2"]
    process = start("train.py", *longer, f"run_dir={tmp_path}", start_new_session=True)
    wait_for(tmp_path / "checkpoints" / "last.ckpt", process)
    os.killpg(process.pid, signal.SIGTERM)
    done = finish(process)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert re.search("stopped by SIGTERM at step", done.stderr)


def test_a_signal_that_comes_while_processes_ask_each_other_is_not_lost():
    class Interrupted:
        """Stands for a strategy of two processes: the signal comes after this one has said that it has none."""

        root_device = torch.device("cpu")

        def reduce(self, value: torch.Tensor, reduce_op: str) -> torch.Tensor:
            os.kill(os.getpid(), signal.SIGUSR1)
            return value

    trainer = SimpleNamespace(
        world_size=2, strategy=Interrupted(), fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace())
    )
    with StopSignals() as signals:
        signals.defer(trainer)
        assert signals.agreed(trainer) == 0
        assert signals.agreed(trainer) == signal.SIGUSR1


def test_ctrl_c_pressed_twice_interrupts_at_once(tmp_path):
    slow = ["adv.steps=300", "data.batch_size=500", "model.settings.width=32", "trainer.limit_train_batches=2"]
    process = start("train.py", *SHORT, *slow, f"run_dir={tmp_path}")
    wait_for(tmp_path / "config.yaml", process)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    done = finish(process, timeout=20)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert "Ctrl-C again interrupts at once" in done.stderr
    assert f"resume=last run_dir={tmp_path} goes on" in done.stderr


class StopAt(Callback):
    """Takes note of a signal in the middle of a step."""

    def __init__(self, signals: StopSignals, step: int) -> None:
        self.signals, self.step = signals, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            self.signals.signum = signal.SIGTERM


def fit(run_dir: Path, *overrides: str, stop_at: int = -1, goes_on: bool = False) -> L.Trainer:
    """Train in this process, up to a step or to the end."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose(
            "train", [*SHORT, *overrides] if "model=vit_ti" not in overrides else [*SHORT[:3], *overrides]
        )
    L.seed_everything(cfg.seed, verbose=False)
    data = build.build_data(cfg, training=True)
    module = build.build_module(cfg, build.build_classifier(cfg, data.num_classes), data)
    signals = StopSignals()
    trainer = build.build_trainer(cfg, run_dir, signals)
    trainer.callbacks.insert(0, StopAt(signals, stop_at))
    checkpoint = run_dir / "checkpoints" / "last.ckpt" if goes_on else None
    if stop_at < 0:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    else:
        with pytest.raises(Stopped):
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return trainer


SETTINGS = {
    "plain": [],
    "dropout": ["model=vit_ti", "+model.settings.depth=2", "+model.settings.drop_rate=0.5", "adv.steps=1"],
    "accumulated": ["trainer.accumulate_grad_batches=4", "trainer.limit_train_batches=10"],
    "seldom validated": ["trainer.check_val_every_n_epoch=2"],
    "workers": ["data.num_workers=1"],
    "sgd, mixup": ["optim=sgd", "aug.mixup=0.5", "aug.erasing=0.5", "aug.label_smoothing=0.1"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_stopped_anywhere_ends_as_if_it_had_not_been(name, tmp_path):
    """In mid-epoch, after the last step of an epoch, and twice in one epoch."""
    settings = SETTINGS[name]
    steps = fit(tmp_path / "whole", *settings).global_step
    per_epoch = steps // 2
    for stops in ([0], [per_epoch - 1], [per_epoch, per_epoch + 1], [steps - 1]):
        run_dir = tmp_path / f"stopped{stops[0]}"
        for place, step in enumerate(stops):
            fit(run_dir, *settings, stop_at=step, goes_on=place > 0)
        fit(run_dir, *settings, goes_on=True)
        assert same_weights(run_dir, tmp_path / "whole"), stops
        assert (run_dir / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text(), stops
        mine, other = (
            torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
            for path in (run_dir, tmp_path / "whole")
        )
        assert mine == other, "the best score, and how long it has not been better"


def test_early_stopping_is_not_forgotten(tmp_path):
    settings = ["trick=[early_stopping]", "trick.early_stopping.patience=1", "trainer.max_epochs=30", "optim.lr=0"]
    whole = fit(tmp_path, *settings)
    assert whole.current_epoch == 2
    again = fit(tmp_path, *settings, goes_on=True)
    assert again.global_step == whole.global_step, "the training was over"
    assert len(pd.read_csv(tmp_path / "metrics.csv")) == 2


def test_a_training_killed_before_its_first_checkpoint_begins_again(whole, tmp_path):
    process = start("train.py", *SHORT, f"run_dir={tmp_path}")
    wait_for(tmp_path / "config.yaml", process)
    process.kill()
    finish(process)
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()
    again = here("train.py", f"run_dir={tmp_path}", "resume=last")
    assert again.returncode == 0, again.stderr
    assert f"no checkpoint yet in {tmp_path}; begins again with the settings in config.yaml" in again.stdout
    assert_same_run(tmp_path, whole)


def test_a_training_killed_in_its_evaluation_goes_on_with_that(tmp_path):
    evaluation = ["eval=[clean,pgd20]", "subset=first:200", "data.eval_batch_size=4"]
    process = start("train.py", *SHORT, *evaluation, f"run_dir={tmp_path}")
    wait_for_parts(tmp_path, process, more_than=1)
    process.kill()
    finish(process)
    before = last_weights(tmp_path)
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "verdicts").glob("*.parquet")}
    again = here("train.py", f"run_dir={tmp_path}", "resume=last")
    assert again.returncode == 0, again.stderr
    assert all(path.stat().st_mtime_ns == written for path, written in parts.items())
    rows = pd.read_parquet(tmp_path / "verdicts")
    assert not rows.duplicated(["evaluator", "sample_id"]).any()
    assert (tmp_path / "report.html").exists()
    after = last_weights(tmp_path)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_signal_in_the_evaluation_ends_it_at_once(tmp_path):
    evaluation = ["eval=[clean,pgd20]", "subset=first:200", "data.eval_batch_size=4", "eval.pgd20.attack.steps=500"]
    process = start("train.py", *SHORT, *evaluation, f"run_dir={tmp_path}")
    wait_for_parts(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    assert done.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in done.stderr
    assert f"resume=last run_dir={tmp_path} goes on" in done.stderr


def test_a_weights_and_biases_run_is_continued_under_its_id(tmp_path):
    logger = ["logger=wandb", "logger.offline=true"]
    longer = [*SHORT, "trainer.max_epochs=20"]
    process = start("train.py", *longer, *logger, f"run_dir={tmp_path}")
    wait_for(tmp_path / "checkpoints" / "last.ckpt", process)
    process.send_signal(signal.SIGTERM)
    assert finish(process).returncode == 128 + signal.SIGTERM
    given = OmegaConf.load(tmp_path / "config.yaml").logger.id
    done = run("train.py", *logger, f"run_dir={tmp_path}", "resume=last", "trainer.max_epochs=20")
    assert done.returncode == 0, done.stderr
    ids = []
    for log in tmp_path.glob("wandb/offline-run-*/run-*.wandb"):
        for data in wandb_records(log.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.append(record.run.run_id)
    assert set(ids) == {given}
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2


def test_a_loading_process_that_dies_is_named(tmp_path):
    longer = [*SHORT, "trainer.max_epochs=200", "data.num_workers=1"]
    process = start("train.py", *longer, f"run_dir={tmp_path}")
    wait_for(tmp_path / "checkpoints" / "last.ckpt", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [child for child in children if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    done = finish(process)
    assert done.returncode == 1
    death = rf"data\.num_workers=1: DataLoader worker .*{workers[0]}"
    # torch raises it wherever the main process happens to be, and in a finaliser Python prints it before
    line = done.stderr.strip().splitlines()[-1]
    assert re.search(rf"{death}.*resume=last run_dir={tmp_path} goes on", line), done.stderr
    assert last_weights(tmp_path)


def test_a_checkpoint_that_is_further_than_the_training_is_to_be_is_refused():
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("train", ["trainer.max_epochs=2"])
    checkpoint = {"epoch": 3, "config": OmegaConf.to_container(cfg, resolve=True)}
    with pytest.raises(build.ConfigError, match=r"^trainer\.max_epochs=2: the checkpoint has 3 epochs behind it"):
        build.check_resumed(cfg, checkpoint)


def test_what_does_not_fit_a_checkpoint_is_refused_in_one_line(whole, tmp_path):
    last = whole / "checkpoints" / "last.ckpt"
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("name: other")
    file = tmp_path / "file"
    file.write_text("")
    for arguments, message in (
        ([f"resume={last}", f"run_dir={other}"], rf"resume={last}: run_dir={other} holds another run"),
        (
            ["resume=last", f"run_dir={whole}", "optim.lr=0.5"],
            r"optim\.lr=0\.5: the checkpoint was made with 0\.00",
        ),
        (
            ["resume=last", f"run_dir={whole}", "data.batch_size=16", "trainer.max_epochs=4"],
            r"data\.batch_size: the checkpoint was made with 32 images a step over all processes, now it is 16",
        ),
        (["resume=last", f"run_dir={whole}", "optim=sgd"], r"optim\.name=sgd: the checkpoint was made with adamw"),
        (["resume=last", f"run_dir={whole}", "model.settings.width=16"], r"last\.ckpt: "),
        (["resume=last", f"run_dir={tmp_path}"], r"resume=last: no such checkpoint"),
        ([f"run_dir={file}/below"], rf"run_dir={file}/below: .*cannot be written: Not a directory"),
    ):
        assert_one_line(here("train.py", *SHORT, *arguments), message)
    assert (other / "config.yaml").read_text() == "name: other"
