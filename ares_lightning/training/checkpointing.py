"""Checkpoints: when they are written, what they hold beyond Lightning's own, and that none is half a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from ares_lightning.atomic import replacing
from ares_lightning.training.preemption import STEPS_BETWEEN_AGREEMENTS, Stopped, StopSignals


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint so that it takes the place of the one before as a whole.

    Lightning's own keeps a second copy in memory, does not synchronise, and by way of another folder, so across
    disks by copying: a kill or a full disk can leave half a file in place of a whole one.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write `checkpoint` to `path`; raises WriteError where that is impossible."""
        with replacing(Path(path)) as file:
            torch.save(checkpoint, file)


class Checkpoints(Checkpoint):
    """Writes `last.ckpt` after every epoch and `best.ckpt` after one whose validation was the best so far.

    folder: where they lie. monitor: the metric of the validation; mode: whether its `max` or its `min` is best.
    every_n_steps: also writes `last.ckpt` after so many optimizer steps; None for after epochs only.
    stop: signals on which `last.ckpt` is written after the step, or after the epoch whose last step it was,
    validation included; the training then ends with Stopped.

    A training that goes on from `last.ckpt` does what an uninterrupted one would have done: beside Lightning's
    state, a checkpoint holds the place in the epoch, the random state of every process, the sums of the epoch's
    running means, and the best score. It is written only where no gradient waits for its optimizer step.
    """

    def __init__(
        self,
        folder: Path,
        *,
        monitor: str,
        mode: str,
        every_n_steps: int | None = None,
        stop: StopSignals | None = None,
    ) -> None:
        if mode not in _BETTER:
            raise ValueError(f"mode={mode}: expected one of {', '.join(_BETTER)}")
        self.folder, self.monitor, self.mode = folder, monitor, mode
        self.every_n_steps, self.stop = every_n_steps, stop
        self.best_score: float | None = None
        self._score: float | None = None
        self._loader_state: Any = None
        self._random_states: dict[str, Tensor] = {}
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Have all processes name the folder of rank 0."""
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up the place in the epoch, the random state and the decision to stop early; have signals wait.

        Raises ValueError where a step takes another number of images than before, in mid-epoch.
        """
        if self.stop is not None:
            self.stop.defer(trainer)
        if self._loader_state is not None:  # Lightning forgets it where the number of steps is asked for earlier
            _loader(trainer).load_state_dict(self._loader_state)
        _set_random_states(self._random_states, trainer)
        stoppers = trainer.early_stopping_callbacks
        if any(isinstance(it, EarlyStopping) and it.wait_count >= it.patience for it in stoppers):
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write `last.ckpt` in mid-epoch where a signal or `every_n_steps` asks for it."""
        if self._sums:
            _add_sums(self._sums, trainer)
            self._sums = {}
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        signum = 0
        if self.stop and (trainer.world_size == 1 or trainer.global_step % STEPS_BETWEEN_AGREEMENTS == 0):
            signum = self.stop.agreed(trainer)
        if signum or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            trainer.save_checkpoint(self.folder / "last.ckpt")
        if signum:
            raise Stopped(signum)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the score."""
        if not trainer.sanity_checking and self.monitor in trainer.callback_metrics:
            self._score = float(trainer.callback_metrics[self.monitor])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write `best.ckpt` if it is, then `last.ckpt`, which knows of it."""
        score, self._score = self._score, None
        if score is not None and (self.best_score is None or _BETTER[self.mode](score, self.best_score)):
            self.best_score = score
            trainer.save_checkpoint(self.folder / "best.ckpt")
        trainer.save_checkpoint(self.folder / "last.ckpt")
        if self.stop is not None and self.stop.agreed(trainer):
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End with Stopped where a signal has ended the training."""
        signum = 0 if self.stop is None else self.stop.agreed(trainer)
        if signum:
            raise Stopped(signum)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Have signals end the work at once again."""
        if self.stop is not None:
            self.stop.release()

    def state_dict(self) -> dict[str, Any]:
        """Return the best score."""
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best score."""
        self.best_score = state_dict["best_score"]

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what belongs to each process; all of them take part."""
        checkpoint["random_states"] = _random_states(trainer)
        if not trainer.is_last_batch:
            checkpoint["loader_state"] = _loader(trainer).state_dict()
            checkpoint["epoch_sums"] = _epoch_sums(trainer)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what belongs to each process until the training starts."""
        self._loader_state = checkpoint.get("loader_state")
        self._random_states = checkpoint.get("random_states", {})
        self._sums = checkpoint.get("epoch_sums", {})


_BETTER: dict[str, Callable[[float, float], bool]] = {"max": float.__gt__, "min": float.__lt__}


def _loader(trainer: L.Trainer) -> Any:
    """Return the loader of the training images, which knows how far it is."""
    return trainer.train_dataloader


def _gathered(value: Tensor, trainer: L.Trainer) -> Tensor:
    """Return the tensors of all processes, [processes, …], on the CPU."""
    if trainer.world_size == 1:
        return value.detach().cpu().clone()[None]
    own = value.detach().to(trainer.strategy.root_device)
    gathered = [torch.empty_like(own) for _ in range(trainer.world_size)]
    torch.distributed.all_gather(gathered, own)
    return torch.stack(gathered).cpu()


def _random_states(trainer: L.Trainer) -> dict[str, Tensor]:
    """Return the states of torch's generators on the CPU and the GPU in use, [processes, bytes] each."""
    states = {"cpu": torch.get_rng_state()}
    if trainer.strategy.root_device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(trainer.strategy.root_device)
    return {name: _gathered(state, trainer) for name, state in states.items()}


def _set_random_states(states: dict[str, Tensor], trainer: L.Trainer) -> None:
    """Give this process its state, where there were fewer processes that of another one.

    A copy of it: torch reads a state from the beginning of its storage, whichever part of that it is given.
    """
    own = {name: saved[trainer.global_rank % len(saved)].clone() for name, saved in states.items()}
    if "cpu" in own:
        torch.set_rng_state(own["cpu"])
    if "cuda" in own and trainer.strategy.root_device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"], trainer.strategy.root_device)


def _epoch_sums(trainer: L.Trainer) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the weighted sums and the weights, [processes] each, behind every mean that the epoch will log."""
    return {
        key: (_gathered(result.value, trainer), _gathered(result.cumulated_batch_size, trainer))
        for key, result in trainer.fit_loop.epoch_loop._results.items()
        if result.is_tensor and result.meta.is_mean_reduction
    }


def _add_sums(saved: dict[str, tuple[Tensor, Tensor]], trainer: L.Trainer) -> None:
    """Add the share of this process in `saved` to the running means; all of it is shared out."""
    own = slice(trainer.global_rank, None, trainer.world_size)
    for key, result in trainer.fit_loop.epoch_loop._results.items():
        if key in saved:
            values, weights = saved[key]
            result.value = result.value + values[own].sum().to(result.value.device)
            result.cumulated_batch_size = result.cumulated_batch_size + weights[own].sum().to(result.value.device)
