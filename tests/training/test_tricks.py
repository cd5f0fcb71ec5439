"""Probes, guards and early stopping in real trainings on the digits."""

from __future__ import annotations

import pytest
import torch
from trainings import Watch, fit, weights

from ares_lightning.attacks import make_attack
from ares_lightning.training.tricks import NonFiniteError, NonFiniteGuard, OverfittingProbe

LEARNS = ["adv=fgsm", "threat.eps=0.02", "optim.lr=0.01", "optim.warmup_epochs=0", "trainer.limit_train_batches=30"]
LEARNS += ["trainer.max_epochs=4", "data.batch_size=32"]
PROBED = ["trick=[overfitting_probe]", *LEARNS]


class Collapse(Watch):
    """Makes the network forget everything at the end of an epoch, as catastrophic overfitting does."""

    def __init__(self, epoch: int):
        self.epoch, self.ends = epoch, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.is_last_batch:
            self.ends.append(weights(pl_module.net))
            if trainer.current_epoch == self.epoch:
                torch.nn.init.zeros_(pl_module.net.backbone.head.weight)


WARNING = "overfitting probe: after epoch 2 pgd leaves "
OUTCOMES = {
    "warn": (4, "catastrophic overfitting; going on"),
    "stop": (3, "catastrophic overfitting; stopping\n"),
    "fall_back": (3, "catastrophic overfitting; stopping with the weights of the epoch before"),
}


@pytest.mark.parametrize("action", OUTCOMES)
def test_a_collapse_is_named_and_acted_upon(action, tmp_path, capsys):
    epochs, said = OUTCOMES[action]
    watch = Collapse(epoch=2)
    run = fit(tmp_path, *PROBED, f"trick.overfitting_probe.action={action}", callbacks=[watch])
    printed = capsys.readouterr().out
    assert printed.count("overfitting probe") == 1
    assert WARNING in printed
    assert said in printed
    assert run.trainer.current_epoch == epochs
    end = weights(run.module.net)
    if action == "fall_back":
        assert all(torch.equal(value, end[name]) for name, value in watch.ends[1].items())
        checkpoint = run.checkpoint()
        assert all(torch.equal(checkpoint["state_dict"][f"net.{name}"], value) for name, value in end.items())
    elif action == "stop":
        assert not end["backbone.head.weight"].any()


def test_a_healthy_training_is_left_alone(tmp_path, capsys):
    run = fit(tmp_path, *PROBED)
    assert run.trainer.current_epoch == 4
    assert "overfitting probe" not in capsys.readouterr().out
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert "train/probe_acc" in rows[0]


def test_a_resumed_training_remembers_what_the_probe_saw(tmp_path, capsys):
    """The collapse comes in the first epoch after the resume; so do the weights to fall back to."""
    settings = [*PROBED, "trick.overfitting_probe.action=fall_back"]
    first = Collapse(epoch=-1)
    half = fit(tmp_path / "half", *settings, "trainer.max_epochs=2", callbacks=[first])
    watch = Collapse(epoch=2)
    run = fit(tmp_path / "resumed", *settings, callbacks=[watch], resume=half.end)
    assert WARNING in capsys.readouterr().out
    assert all(torch.equal(value, first.ends[1][name]) for name, value in weights(run.module.net).items())


def test_probes_that_make_no_sense_are_refused():
    attack = make_attack("pgd", eps=0.1)
    with pytest.raises(ValueError, match=r"^action=ask: expected one of warn, stop, fall_back"):
        OverfittingProbe(attack, action="ask")
    with pytest.raises(ValueError, match=r"^drop=-0\.2: expected a number of at least 0"):
        OverfittingProbe(attack, drop=-0.2)


class Poison(Watch):
    """Plants a NaN in the network before a batch."""

    def __init__(self, epoch: int, batch: int):
        self.place = (epoch, batch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.place:
            torch.nn.init.constant_(pl_module.net.backbone.head.bias, float("nan"))


def is_finite(state):
    return all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize(
    ("settings", "place", "step"),
    [
        ([], (1, 1), 5),
        ([], (1, 2), 6),
        (["trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=5"], (1, 0), 4),
        (["trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=5"], (1, 1), 4),
        (["trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=5"], (1, 4), 6),
    ],
)
def test_the_first_step_whose_loss_is_no_number_is_named_and_the_last_checkpoint_is_finite(
    settings, place, step, tmp_path
):
    with pytest.raises(NonFiniteError, match=f"^train/loss is not finite at step {step}, epoch 1; lower optim.lr"):
        fit(tmp_path, *settings, "trainer.max_epochs=2", callbacks=[Poison(*place)])
    last = tmp_path / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    assert (saved["epoch"], is_finite(saved["state_dict"])) == (0, True)
    run = fit(tmp_path / "resumed", *settings, "trainer.max_epochs=2", resume=last)
    assert is_finite(run.module.net.state_dict())


def test_a_rate_without_bounds_ends_in_one_line(tmp_path):
    rate = ["optim=sgd", "optim.lr=1e30", "optim.warmup_epochs=0"]
    with pytest.raises(NonFiniteError, match=r"^train/loss is not finite at step 2, epoch 0; lower optim\.lr.*$"):
        fit(tmp_path, *rate, "trick=[ema]")
    assert not list(tmp_path.rglob("*.ckpt"))


def test_weights_that_break_in_the_last_step_before_a_validation_are_named(tmp_path):
    broken = ["optim=sgd", "optim.lr=1e38", "optim.warmup_epochs=0", "trainer.limit_train_batches=1"]
    with pytest.raises(NonFiniteError, match=r"^the network gives no finite logits after step 1; lower optim\.lr"):
        fit(tmp_path, *broken)
    assert not (tmp_path / "checkpoints").exists()


def test_a_long_epoch_is_looked_into_every_so_many_steps(tmp_path):
    class Counts(Watch):
        batches = 0

        def on_train_batch_start(self, *_):
            self.batches += 1

    watch = Counts()
    with pytest.raises(NonFiniteError, match="step 3, epoch 0"):
        fit(tmp_path, "trainer.limit_train_batches=60", callbacks=[watch, Poison(0, 2)])
    assert watch.batches == 50
    with pytest.raises(ValueError, match=r"^every_n_steps=0: expected a whole number"):
        NonFiniteGuard(every_n_steps=0)


def test_training_stops_when_robust_accuracy_has_not_risen_for_so_many_validations(tmp_path):
    still = ["optim=sgd", "optim.lr=0", "trainer.max_epochs=6"]
    run = fit(tmp_path, "trick=[early_stopping]", "trick.early_stopping.patience=2", *still)
    assert run.trainer.current_epoch == 3
    stopping = run.trainer.early_stopping_callback
    assert (stopping.monitor, stopping.mode) == ("val/robust_acc", "max")
