"""The evaluators during a training: in all processes, of averaged and raw weights, unnoticed by the training."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from processes import SHORT, assert_one_line, here, last_weights, run, same_weights

PERIODIC = [
    "callbacks.periodic.every_n_epochs=2",
    "callbacks.periodic.eval=[clean,pgd20]",
    "callbacks.periodic.subset=first:30",
]
FOUR = [*SHORT, "trainer.max_epochs=4", "eval=[clean,pgd20]", "trick=[ema]", "optim.lr=0.01"]


def test_two_processes_in_bf16_log_averaged_and_raw_weights_and_the_best_is_chosen_by_them(tmp_path):
    monitor = "periodic/worst_case/ema/robust_accuracy"
    where = ["trainer=ddp_sim", "trainer.precision=bf16-mixed", f"callbacks.checkpoint.monitor={monitor}"]
    done = run("train.py", *FOUR, *PERIODIC, *where, f"run_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    metrics = pd.read_csv(tmp_path / "metrics.csv")
    for which in ("ema", "raw"):
        names = [f"periodic/{name}" for name in (f"clean/{which}/clean_accuracy", f"pgd20/{which}/robust_accuracy")]
        assert metrics[names].notna().all(axis=1).tolist() == [False, True, False, True]
        for epoch in (1, 3):
            rows = pd.read_parquet(tmp_path / "periodic" / f"epoch-{epoch:04d}-{which}" / "verdicts")
            assert rows.groupby("evaluator")["sample_id"].nunique().to_dict() == {"clean": 30, "pgd20": 30}
            logged = metrics.loc[metrics["epoch"] == epoch, names].to_numpy()[0]
            counted = 1 - rows.groupby("evaluator")["broken"].mean()
            assert logged == pytest.approx([counted["clean"], counted["pgd20"]])
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] == metrics[monitor].idxmax()
    assert not list((tmp_path / "periodic").rglob("summary.json")), "they are no runs of their own"


@pytest.mark.proof
def test_the_training_notices_nothing(tmp_path):
    for name, settings in (("with", PERIODIC), ("without", [])):
        done = run("train.py", *FOUR, *settings, f"run_dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
    assert same_weights(tmp_path / "with", tmp_path / "without")
    assert last_weights(tmp_path / "with")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["callbacks.periodic.eval=[fgsm]"],
            r"callbacks\.periodic\.eval=\['fgsm'\]: expected null, or a list",
        ),
        (
            ["callbacks.periodic.weights=[best]"],
            r"callbacks\.periodic\.weights=\['best'\]: expected a list of",
        ),
        (
            ["callbacks.periodic.every_n_epochs=0"],
            r"callbacks\.periodic\.every_n_epochs=0: expected a whole",
        ),
        (
            ["trainer.check_val_every_n_epoch=3"],
            r"callbacks\.periodic\.every_n_epochs=2: never comes in trainer\.max_epochs=4 with",
        ),
        (
            ["callbacks.periodic.subset=first:999"],
            r"callbacks\.periodic\.subset=first:999: must be",
        ),
        (
            ["callbacks.periodic.weights=[ema]", "trick=[]", "callbacks.checkpoint.monitor=val/robust_acc"],
            r"callbacks\.periodic\.weights=\['ema'\]: no trick averages",
        ),
        (
            ["trick=[]", "callbacks.checkpoint.monitor=periodic/pgd20/ema/robust_accuracy"],
            r"monitor=periodic/pgd20/ema/robust_accuracy: expected one of .*periodic/pgd20/raw/robust_accuracy",
        ),
        (
            ["callbacks.checkpoint.monitor=periodic/pgd20/ema/accuracy"],
            r"monitor=periodic/pgd20/ema/accuracy: expected one of val/robust_acc, .*periodic/pgd20/ema/robust_acc",
        ),
    ],
)
def test_what_cannot_be_is_told_in_one_line(tmp_path, settings, message):
    assert_one_line(here("train.py", *FOUR, *PERIODIC, *settings, f"run_dir={tmp_path}"), message)
