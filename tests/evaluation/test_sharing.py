"""One table of verdicts, whoever took them: batch sizes, processes, nodes, kills."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import shared_run
from processes import assert_one_line, finish, here, run, start

from ares_lightning.evaluation.verdicts import KEY

TORCHRUN = ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
TORCHRUN += ["--nnodes", "1", "--nproc-per-node"]
COLUMNS_OF_KEY = [*KEY, "evaluator"]


def table(run_dir: Path, columns: list[str] | None = None) -> pd.DataFrame:
    rows = pd.read_parquet(run_dir / "verdicts")
    assert not rows.duplicated(KEY).any()
    rows = rows.sort_values(KEY, ignore_index=True)
    return rows if columns is None else rows[columns]


def shared(
    weights: Path, run_dir: Path, *, batch_size: int = 16, processes: int = 1, precision: str = "fp64"
) -> None:
    if processes == 1:
        shared_run.main(weights, run_dir, batch_size, precision)
    else:
        done = run(*TORCHRUN, processes, shared_run.__file__, weights, run_dir, batch_size, precision)
        assert done.returncode == 0, done.stderr


CUTS = {
    "fp64": {"whole": (64, 1), "single": (1, 1), "two": (7, 2)},
    "fp32": {"whole": (64, 1), "three": (7, 3)},
}


@pytest.mark.parametrize("precision", ["fp64", pytest.param("fp32", marks=pytest.mark.proof)])
def test_verdicts_do_not_depend_on_batch_size_and_processes(weights, tmp_path, precision):
    cuts = CUTS[precision]
    for name, (batch_size, processes) in cuts.items():
        shared(weights, tmp_path / name, batch_size=batch_size, processes=processes, precision=precision)
    columns = None if precision == "fp64" else [*COLUMNS_OF_KEY, "broken", "clean_prediction"]
    whole = table(tmp_path / "whole", columns)
    assert set(whole.loc[whole["evaluator"] == "autoattack", "attack"]) == {"apgd_ce", "apgd_t", "fab_t", "square"}
    assert 0 < whole.loc[whole["evaluator"] == "autoattack"].groupby("sample_id")["broken"].any().mean() < 1
    for name, (_, processes) in cuts.items():
        pd.testing.assert_frame_equal(table(tmp_path / name, columns), whole)
        assert (tmp_path / name / "summary.json").read_text() == (tmp_path / "whole" / "summary.json").read_text()
        ranks = {path.name[:9] for path in (tmp_path / name / "verdicts").iterdir()}
        assert ranks == {f"part-{rank:04d}" for rank in range(processes)}
        check_shares(tmp_path / name, processes)


def check_shares(run_dir: Path, processes: int) -> None:
    """Survivors are dealt out anew for each member, one after the other, as benchmarks/scaling.py simulates it."""
    of_rank = [
        pd.concat(map(pd.read_parquet, (run_dir / "verdicts").glob(f"part-{rank:04d}-*"))).query(
            "evaluator == 'autoattack'"
        )
        for rank in range(processes)
    ]
    for attack in ("apgd_ce", "apgd_t", "fab_t", "square"):
        shares = [sorted(rows.loc[rows["attack"] == attack, "sample_id"]) for rows in of_rank]
        left = sorted(itertools.chain(*shares))
        assert left
        assert shares == [left[rank::processes] for rank in range(processes)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    few = ["trainer.max_epochs=1", "model.settings.width=8", "adv=fgsm", "eval=[]", "callbacks.progress=false"]
    done = here("train.py", *few, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir


def asked(steps: int, subset: str, batch_size: int) -> list[str]:
    """An evaluation in many parts, the more the smaller the batches."""
    attacks = [f"eval.{name}.attack.steps={steps}" for name in ("pgd20", "curve_threat")]
    batches = [f"subset={subset}", f"data.eval_batch_size={batch_size}"]
    return ["eval=[clean,pgd20,curve_threat]", "precision=fp64", *batches, *attacks]


ASKED = asked(80, "random:120@0", 4)


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole")
    done = here("evaluate.py", f"ckpt={checkpoint}", *ASKED, "data.eval_batch_size=64", f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir


def test_two_devices_and_two_nodes_give_the_table_of_one_process(checkpoint, whole, tmp_path):
    same = [f"ckpt={checkpoint}", *ASKED]
    devices = start("evaluate.py", *same, "trainer=ddp_sim", f"run_dir={tmp_path / 'devices'}")
    assert_ends_well(devices)
    nodes = ["trainer=cpu", "trainer.num_nodes=2", "trainer.strategy=ddp", f"run_dir={tmp_path / 'nodes'}"]
    port = str(29500 + random.randrange(1000))
    by_hand = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    both = [start("evaluate.py", *same, *nodes, env={**by_hand, "NODE_RANK": str(node)}) for node in (0, 1)]
    for process in both:
        assert_ends_well(process)
    for name in ("devices", "nodes"):
        pd.testing.assert_frame_equal(table(tmp_path / name), table(whole))
        assert (tmp_path / name / "summary.json").read_text() == (whole / "summary.json").read_text()
        assert {path.name[:9] for path in (tmp_path / name / "verdicts").iterdir()} == {"part-0000", "part-0001"}
        assert json.loads((tmp_path / name / "about.json").read_text())["run"]["world_size"] == 2


def test_the_folder_of_other_settings_is_refused_before_anything_is_written(checkpoint, whole):
    config = (whole / "config.yaml").read_bytes()
    done = here("evaluate.py", f"ckpt={checkpoint}", *ASKED, "seed=1", f"run_dir={whole}")
    assert_one_line(done, rf"run_dir={whole}: holds verdicts of eval\.clean on digits under other settings")
    assert (whole / "config.yaml").read_bytes() == config


def assert_ends_well(process: subprocess.Popen[str]) -> None:
    done = finish(process)
    assert done.returncode == 0, done.stderr


SETTINGS = [[], ["trainer=ddp_sim"], ["data.eval_batch_size=7"]]


def num_parts(run_dir: Path) -> int:
    return len(list((run_dir / "verdicts").glob("part-*.parquet")))


def killed_and_resumed(given: list[str], folder: Path, kills: int, seed: int) -> list[Path]:
    """Kill an evaluation again and again at random moments, with other settings each time, then let it end.

    One that ends in spite of that is followed by another, until all kills are done. Returns the run folders.
    """
    moments, killed, run_dirs = random.Random(seed), 0, [folder / "0"]
    while killed < kills:
        run_dir = run_dirs[-1]
        there = num_parts(run_dir)
        changed = [*SETTINGS[killed % len(SETTINGS)], f"run_dir={run_dir}"]
        process = start("evaluate.py", *given, *changed, start_new_session=True)
        while process.poll() is None and num_parts(run_dir) <= there:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        killed += finish(process).returncode == -signal.SIGKILL
        if (run_dir / "summary.json").exists():
            run_dirs.append(folder / str(len(run_dirs)))
    assert here("evaluate.py", *given, f"run_dir={run_dirs[-1]}").returncode == 0
    return run_dirs


def assert_same(run_dirs: list[Path], whole: Path) -> None:
    for run_dir in run_dirs:
        pd.testing.assert_frame_equal(table(run_dir), table(whole))
        assert (run_dir / "summary.json").read_text() == (whole / "summary.json").read_text()


def test_an_evaluation_killed_at_random_moments_goes_on_to_the_same_table(checkpoint, whole, tmp_path):
    assert_same(killed_and_resumed([f"ckpt={checkpoint}", *ASKED], tmp_path, 3, 0), whole)


@pytest.mark.proof
def test_an_evaluation_killed_twenty_times_goes_on_to_the_same_table(checkpoint, tmp_path):
    given = [f"ckpt={checkpoint}", *asked(4000, "random:240@0", 4)]
    whole = tmp_path / "whole"
    at_once = here("evaluate.py", *given, "data.eval_batch_size=64", f"run_dir={whole}")
    assert at_once.returncode == 0, at_once.stderr
    run_dirs = killed_and_resumed(given, tmp_path, 20, 0)
    assert len(run_dirs) < 5, "hardly any was killed twice"
    assert_same(run_dirs, whole)
