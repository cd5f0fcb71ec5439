"""Averages of the weights: what they are, where they are looked at, and that they survive an interruption."""

from __future__ import annotations

import pytest
import torch
from trainings import Watch, fit, weights

from ares_lightning.build import ConfigError
from ares_lightning.models.weights import trained_weights
from ares_lightning.training.tricks import EMA, SWA


class Steps(Watch):
    """The raw weights before the first step, after each, and at the ends of the epochs."""

    def on_train_start(self, trainer, pl_module):
        self.first, self.after, self.ends, self.seen = weights(pl_module.net), [], [], trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > self.seen:
            self.after.append(weights(pl_module.net))
        self.seen = trainer.global_step

    def on_train_epoch_end(self, trainer, pl_module):
        self.ends.append(weights(pl_module.net))


def floats(state):
    return {name: value for name, value in state.items() if value.is_floating_point()}


def assert_close(found, expected):
    for name, value in floats(expected).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def averaged(run):
    saved = run.checkpoint()["state_dict_ema"]
    return {name.removeprefix("net."): value for name, value in saved.items()}


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_is_the_plain_loop_over_the_steps(warmup, tmp_path):
    watch = Steps()
    run = fit(
        tmp_path, "trick=[ema]", "trick.ema.decay=0.7", f"trick.ema.warmup={warmup}", "trainer.max_epochs=2",
        callbacks=[watch],
    )  # fmt: skip
    assert len(watch.after) == 6
    average = floats(watch.first)
    for update, now in enumerate(watch.after):
        decay = min(0.7, 1 - (1 + update) ** (-2 / 3)) if warmup else 0.7
        average = {name: decay * value + (1 - decay) * now[name] for name, value in average.items()}
    assert_close(averaged(run), average)
    assert set(averaged(run)) == set(watch.first), "running statistics are averaged along"
    last = {name.removeprefix("net."): value for name, value in run.checkpoint()["state_dict"].items()}
    assert all(torch.equal(value, watch.after[-1][name]) for name, value in last.items())


def test_swa_is_the_mean_of_the_weights_at_the_ends_of_the_epochs(tmp_path):
    watch = Steps()
    run = fit(tmp_path, "trick=[swa]", "trick.swa.start_epoch=1", "trainer.max_epochs=4", callbacks=[watch])
    mean = {name: sum(end[name] for end in watch.ends[1:]) / 3 for name in floats(watch.first)}
    assert_close(averaged(run), mean)


def test_before_swa_begins_the_raw_weights_are_looked_at(tmp_path):
    run = fit(tmp_path, "trick=[swa]", "trick.swa.start_epoch=1", "trainer.max_epochs=2")
    first, second = (
        torch.load(tmp_path / "checkpoints" / name, weights_only=True) for name in ("best.ckpt", "last.ckpt")
    )
    assert ("state_dict_ema" in first) == (first["epoch"] == 1)
    assert "state_dict_ema" in second
    assert run.trainer.current_epoch == 2


def test_swa_begins_after_a_quarter_of_the_epochs_and_not_after_the_last(tmp_path):
    run = fit(tmp_path / "quarter", "trick=[swa]", "trainer.max_epochs=4")
    assert run.checkpoint()["callbacks"]["SWA"]["num_updates"] == 3
    with pytest.raises(ConfigError, match=r"^trick\.swa\.start_epoch=5: trainer\.max_epochs=1 ends before"):
        fit(tmp_path / "late", "trick=[swa]", "trick.swa.start_epoch=5")


def test_an_average_takes_accumulated_batches_as_one_step(tmp_path):
    accumulate = ["trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=5"]
    watch = Steps()
    run = fit(
        tmp_path, "trick=[ema]", "trick.ema.decay=0.7", "trick.ema.warmup=false", *accumulate, callbacks=[watch]
    )
    assert len(watch.after) == 3
    average = floats(watch.first)
    for now in watch.after:
        average = {name: 0.7 * value + 0.3 * now[name] for name, value in average.items()}
    assert_close(averaged(run), average)


@pytest.mark.parametrize("trick", ["ema", "swa"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_resumed_training_goes_on_with_the_same_average_bit_for_bit(trick, accumulated, tmp_path):
    settings = [f"trick=[{trick}]", "trainer.limit_train_batches=4", "optim.schedule=constant"]
    settings += [f"trainer.accumulate_grad_batches={accumulated}"]
    settings += ["trick.swa.start_epoch=0"] if trick == "swa" else ["trick.ema.warmup=false", "trick.ema.decay=0.7"]

    through = fit(tmp_path / "through", *settings, "trainer.max_epochs=3")
    half = fit(tmp_path / "half", *settings, "trainer.max_epochs=2")
    resumed = fit(tmp_path / "resumed", *settings, "trainer.max_epochs=3", resume=half.end)
    assert resumed.checkpoint()["global_step"] == through.checkpoint()["global_step"] == 12 // accumulated
    for part in "state_dict", "state_dict_ema":
        one, two = through.checkpoint()[part], resumed.checkpoint()[part]
        assert list(one) == list(two)
        assert all(torch.equal(value, two[name]) for name, value in one.items()), part


def test_validation_looks_at_the_average_and_training_goes_on_with_the_weights(tmp_path):
    class Looks(Watch):
        seen = None

        def on_validation_batch_end(self, trainer, pl_module, *_):
            self.seen = weights(pl_module.net)
            self.mode = pl_module.net.training

        def on_train_end(self, trainer, pl_module):
            self.net = pl_module.net

    looks, steps = Looks(), Steps()
    settings = ["trick=[ema]", "trick.ema.decay=0.7", "trick.ema.warmup=false"]
    run = fit(tmp_path, *settings, callbacks=[looks, steps])
    assert not looks.mode
    assert all(torch.equal(value, looks.seen[name]) for name, value in averaged(run).items())
    assert all(torch.equal(value, steps.after[-1][name]) for name, value in weights(looks.net).items())
    assert run.module.net is looks.net
    assert run.module.net.training
    assert not torch.equal(looks.seen["backbone.head.weight"], steps.after[-1]["backbone.head.weight"])


def test_evaluation_takes_either_of_the_two_weights_of_a_checkpoint(tmp_path):
    run = fit(tmp_path, "trick=[ema]", "trick.ema.decay=0.7", "trick.ema.warmup=false")
    path = tmp_path / "checkpoints" / "best.ckpt"
    best = run.checkpoint(path)
    entries = {"ema": "state_dict_ema", "raw": "state_dict", None: "state_dict_ema"}
    for which, entry in entries.items():
        taken = trained_weights(best, path, which)
        expected = {name.removeprefix("net."): value for name, value in best[entry].items()}
        assert {name for name in taken} <= set(expected) | set(best[entry])
        for name, value in taken.items():
            assert torch.equal(value, expected[name.removeprefix("net.")])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA(decay=1.0), r"decay=1\.0: expected a number from 0 to below 1"),
        (lambda: EMA(warmup=1), "warmup=1: expected true or false"),
        (lambda: SWA(start_epoch=-1), "start_epoch=-1: expected a whole number"),
    ],
)
def test_averages_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()
