"""One run folder whichever launcher, ranks that agree, jobs that are requeued: real processes on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from processes import ROOT, SHORT, environment, finish, here, last_weights, run, same_weights, start, wait_for

from ares_lightning import build
from ares_lightning.launch import CONFIG_DIR
from ares_lightning.training.devices import device_settings

TWO = [*SHORT, "trainer.max_epochs=1", "data.batch_size=16"]
BY_HAND = ["trainer=cpu", "trainer.num_nodes=2", "trainer.strategy=ddp"]
TORCHRUN = ["-m", "torch.distributed.run"]
FILES = {"config.yaml", "checkpoints", "metrics.csv", "verdicts", "summary.json", "about.json", "sanity.json"}
FILES |= {"report.html"}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def program(*arguments: str) -> list[str]:
    return [str(ROOT / "train.py"), *arguments]


def the_run_folder(cwd: Path, *more: str) -> Path:
    """The only thing that was written: one run folder, whole."""
    assert [path.name for path in cwd.iterdir()] == ["runs"]
    (name,) = (path for path in (cwd / "runs").iterdir() if path.is_dir() and path.name != ".submitit")
    (run_dir,) = name.iterdir()
    names = {path.name for path in run_dir.iterdir()}
    assert FILES.union(more) <= names <= FILES.union(more, ["examples.npz"])
    return run_dir


def both(processes: list[subprocess.Popen[str]]) -> None:
    for done in [finish(process) for process in processes]:
        assert done.returncode == 0, done.stderr


def on_two_nodes(cwd: Path, *arguments: str, **variables: str) -> None:
    """Two processes of torchrun, as on two nodes."""
    port = free_port()
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    both(
        [
            start(
                *TORCHRUN,
                *nodes,
                "--node-rank",
                rank,
                *program(*arguments),
                cwd=cwd,
                env={"GLOO_SOCKET_IFNAME": "lo"} | variables,
            )
            for rank in (0, 1)
        ]
    )


def slurm(rank: int, port: int, **more: str) -> dict[str, str]:
    """What srun sets for one of two tasks on one node."""
    job = {"JOB_ID": "4711", "JOB_NAME": "train", "NTASKS": "2", "NTASKS_PER_NODE": "2", "NNODES": "1"}
    task = {"PROCID": str(rank), "LOCALID": str(rank), "NODEID": "0", "NODELIST": "localhost"}
    return {f"SLURM_{name}": value for name, value in (job | task).items()} | {"MASTER_PORT": str(port)} | more


def as_slurm_job(cwd: Path, *arguments: str) -> None:
    port = free_port()
    both([start(*program(*arguments), cwd=cwd, env=slurm(rank, port)) for rank in (0, 1)])


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Path:
    """A run of two processes that Lightning has started."""
    cwd = tmp_path_factory.mktemp("simulated")
    both([start(*program("trainer=ddp_sim", *TWO), cwd=cwd)])
    return the_run_folder(cwd)


@pytest.mark.proof
def test_torchrun_makes_one_run_folder(simulated, tmp_path):
    workers = ["--nproc-per-node", "2", "--master-port", str(free_port())]
    both([start(*TORCHRUN, *workers, *program("trainer=ddp_sim", *TWO), cwd=tmp_path)])
    assert same_weights(the_run_folder(tmp_path), simulated)


OTHER_CLOCK = """
import os, time
if os.environ.get("RANK") == "1":
    now = time.strftime
    time.strftime = lambda format, *given: now(format, *(given or [time.localtime(time.time() + 60)]))
"""


def test_torchrun_on_two_nodes_makes_one_run_folder_though_their_clocks_differ(simulated, tmp_path):
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(OTHER_CLOCK)
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    periodic = ["callbacks.periodic.every_n_epochs=1", "callbacks.periodic.weights=[raw]"]
    on_two_nodes(cwd, *BY_HAND, *TWO, *periodic, PYTHONPATH=f"{tmp_path / 'clock'}{os.pathsep}{ROOT}")
    assert same_weights(the_run_folder(cwd, "periodic"), simulated)


@pytest.mark.proof
def test_a_slurm_job_makes_one_run_folder_with_its_id(simulated, tmp_path):
    as_slurm_job(tmp_path, "trainer=ddp_sim", *TWO)
    run_dir = the_run_folder(tmp_path)
    assert run_dir.name == "4711"
    assert same_weights(run_dir, simulated)


@pytest.mark.proof
def test_a_sweep_by_submitit_makes_a_run_folder_a_job(tmp_path):
    sweep = ["-m", "hydra/launcher=submitit_local", "seed=0,1", "hydra.launcher.timeout_min=5"]
    both([start(*program(*sweep, *TWO), cwd=tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    runs = list((tmp_path / "runs" / "cnn-pgd-digits").iterdir())
    assert len(runs) == 2
    assert all({path.name for path in run_dir.iterdir()} >= FILES for run_dir in runs)
    assert {path.name for path in (tmp_path / "runs").iterdir()} <= {"cnn-pgd-digits", ".submitit", "multirun.yaml"}


SCONTROL = """#!/bin/sh
echo "$@" >> "$SCONTROL_LOG"
"""


def test_a_requeued_job_goes_on_by_itself(tmp_path):
    """SIGUSR1 before the time is over, scontrol requeue, and the same job started again."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text(SCONTROL)
    (tools / "scontrol").chmod(0o755)
    fake = {"PATH": f"{tools}:{os.environ['PATH']}", "SCONTROL_LOG": str(tools / "log")}
    job = {"SLURM_JOB_ID": "99", "SLURM_ARRAY_JOB_ID": "98", "SLURM_ARRAY_TASK_ID": "3", **fake}
    longer = [*SHORT, "trainer.max_epochs=6", "launch=slurm"]
    root = tmp_path / "root"
    arguments = ["train.py", *longer, f"launch.root={root}"]
    run_dir = root / "cnn-pgd-digits" / "98_3"
    process = start(*arguments, env=job)
    wait_for(run_dir / "checkpoints" / "last.ckpt", process)
    process.send_signal(signal.SIGUSR1)
    done = finish(process)
    assert done.returncode == 128 + signal.SIGUSR1, done.stderr
    assert "requeued: 98_3" in done.stderr
    assert (tools / "log").read_text() == "requeue 98_3\n"
    assert run(*arguments, env=job).returncode == 1, "the folder is taken, unless the job was requeued"
    again = run(*arguments, env=job | {"SLURM_RESTART_COUNT": "1"})
    assert again.returncode == 0, again.stderr
    whole = tmp_path / "whole"
    assert here("train.py", *longer, f"run_dir={whole}").returncode == 0
    assert same_weights(run_dir, whole)
    assert (run_dir / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


@pytest.mark.proof
def test_one_rank_is_signalled_both_stop_and_go_on_as_if_they_had_not(tmp_path):
    """With dropout, for which every rank has a random state of its own."""
    network = ["model=vit_ti", "+model.settings.depth=1", "+model.settings.drop_rate=0.5", "eval=[clean]"]
    longer = ["trainer=ddp_sim", *SHORT[1:3], *network, "trainer.max_epochs=4", "trainer.limit_train_batches=25"]
    longer += ["data.batch_size=16", "adv.steps=1", "subset=first:6"]
    process = start("train.py", *longer, f"run_dir={tmp_path}")
    wait_for(tmp_path / "checkpoints" / "last.ckpt", process)
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "Traceback" not in done.stderr
    assert len(re.findall("stopped by SIGTERM at step", done.stderr)) == 1
    both([start("train.py", f"run_dir={tmp_path}", "resume=last")])
    both([start("train.py", *longer, f"run_dir={tmp_path / 'whole'}")])
    assert same_weights(tmp_path, tmp_path / "whole")


def test_all_ranks_share_the_evaluation_that_ends_a_training(tmp_path):
    evaluation = ["eval=[clean,pgd20]", "subset=first:100"]
    done = run("train.py", "trainer=ddp_sim", *TWO, *evaluation, f"run_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    parts = [path.name[:9] for path in (tmp_path / "verdicts").glob("part-*.parquet")]
    assert set(parts) == {"part-0000", "part-0001"}
    rows = pd.read_parquet(tmp_path / "verdicts")
    assert rows.groupby("evaluator")["sample_id"].nunique().to_dict() == {"clean": 100, "pgd20": 100}
    assert done.stdout.count("report: ") == 1


def collectives(tmp_path: Path, *overrides: str) -> dict[str, int]:
    run_dir = tmp_path / str(len(overrides))
    few = [
        "trainer=ddp_sim",
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=6",
        "trainer.limit_val_batches=1",
    ]
    workers = ["--nproc-per-node", "2", "--master-port", str(free_port())]
    done = run(*TORCHRUN, *workers, "tests/distributed_steps.py", run_dir, *few, *overrides)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_the_attack_adds_no_collective(tmp_path):
    plain = collectives(tmp_path, "adv=none")
    assert plain["gloo:all_reduce"] >= 4
    assert collectives(tmp_path, "adv=pgd", "adv.steps=3") == plain


def test_two_processes_with_half_the_batch_make_the_same_updates(tmp_path):
    """On a network without batch statistics, under attack, within rounding; and validate on the same images."""
    few = ["model=vit_ti", "+model.settings.depth=2", "trainer.max_epochs=1", "trainer.limit_train_batches=5"]
    few += [
        "subset=first:6",
        "eval=[clean]",
        "adv.val_steps=2",
        "data.num_val=101",
        "data.eval_batch_size=16",
        "optim=sgd",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    for arguments in (
        ["trainer=cpu", "data.batch_size=32", f"run_dir={one}"],
        ["trainer=ddp_sim", "data.batch_size=16", f"run_dir={two}"],
    ):
        done = (here if "trainer=cpu" in arguments else run)("train.py", *few, *arguments)
        assert done.returncode == 0, done.stderr
    mine, other = last_weights(one), last_weights(two)
    for key, value in mine.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5, msg=key)
    counted = pd.read_csv(one / "metrics.csv").filter(like="val/") * 101
    assert ((counted - pd.read_csv(two / "metrics.csv").filter(like="val/") * 101).abs() < 1e-3).all(axis=None)
    assert ((counted - counted.round()).abs() < 1e-3).all(axis=None), "every one of the 101 images counts once"


NAMESPACES = """
set -e
ip link set lo up
unshare -n sleep 300 & other=$!
trap 'kill $other' EXIT
for i in 1 2 3 4 5 6 7 8 9 10; do
    [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ] && break; sleep 0.2
done
ip link add left type veth peer name right netns $other
ip addr add 10.0.0.1/24 dev left
ip link set left up
nsenter -t $other -n ip addr add 10.0.0.2/24 dev right
nsenter -t $other -n ip link set right up
nsenter -t $other -n ip link set lo up
GLOO_SOCKET_IFNAME=right nsenter -t $other -n "$@" --node-rank 1 $TRAIN & far=$!
GLOO_SOCKET_IFNAME=left "$@" --node-rank 0 $TRAIN
wait $far
"""


@pytest.mark.proof
def test_two_nodes_with_addresses_of_their_own_train_to_the_same_weights(simulated, tmp_path):
    refusal = subprocess.run(["unshare", "-Urn", "true"], capture_output=True, text=True).stderr
    if refusal or not shutil.which("nsenter") or not shutil.which("ip"):
        pytest.skip(f"no network namespaces here: {refusal or 'nsenter and ip are needed'}")
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "10.0.0.1", "--master-port", "29500"]
    torchrun = [sys.executable, *TORCHRUN, *nodes]
    train = environment(TRAIN=" ".join(program(*BY_HAND, *TWO)))
    namespaces = ["unshare", "-Urn", "bash", "-c", NAMESPACES, "bash", *torchrun]
    done = subprocess.run(namespaces, cwd=tmp_path, env=train, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert same_weights(the_run_folder(tmp_path), simulated)


DEVICES = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "auto"}
DEVICES |= {"sync_batchnorm": False}


def test_precision_follows_the_device():
    assert device_settings(**DEVICES)["precision"] == "32-true"
    best = device_settings(**DEVICES | {"accelerator": "auto"})["precision"]
    assert best == ("bf16-mixed" if torch.cuda.is_available() else "32-true")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "trainer.devices=1000",
            r"trainer\.devices=1000: (there is no GPU here; trainer=ddp_sim|there are \d+ GPUs)",
        ),
        ("trainer.num_nodes=2", r"trainer\.num_nodes=2: there is no GPU here; trainer=ddp_sim"),
        ("trainer=ddp_sim trainer.devices=1000", r"trainer\.devices=1000: more CPU processes than the \d+ cores"),
        ("trainer.devices=0", r"trainer\.devices=0: expected auto or a whole number"),
        ("trainer.strategy=fsdp", r"trainer\.strategy=fsdp: attacks differentiate whole parameters"),
        ("trainer.strategy=deepspeed", r"trainer\.strategy=deepspeed: attacks differentiate whole parameters"),
        ("trainer.strategy=ddp_spawn", r"trainer\.strategy=ddp_spawn: .*expected one of auto, ddp, "),
        ("trainer=cpu trainer.sync_batchnorm=true", r"trainer\.sync_batchnorm=true: CPU processes cannot"),
        ("trainer.sync_batchnorm=1", r"trainer\.sync_batchnorm=1: expected true or false"),
        ("trainer.precision=8", r"trainer\.precision=8: expected one of auto, 32-true, bf16-mixed, 16-mixed"),
        ("callbacks.checkpoint.every_n_steps=0", r"callbacks\.checkpoint\.every_n_steps=0"),
        ("callbacks.checkpoint.mode=most", r"callbacks\.checkpoint\.mode=most: expected one of max, min"),
    ],
)
def test_devices_that_cannot_be_are_refused_in_one_line(override, message, tmp_path):
    if torch.cuda.is_available() and override in ("trainer.num_nodes=2",):
        pytest.skip("this machine has a GPU")
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("train", override.split())
    with pytest.raises(build.ConfigError, match=message) as error:
        build.build_trainer(cfg, tmp_path)
    assert "\n" not in str(error.value)
