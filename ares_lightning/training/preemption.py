"""Signals that end a training: the handler only takes note, the training stops where its state can be saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Self

import lightning as L
import torch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""SIGTERM of schedulers that take a job away, Ctrl-C, SLURM's --signal=USR1@…, and submitit's SIGUSR2."""

STEPS_BETWEEN_AGREEMENTS = 10
"""Steps after which several processes ask each other about signals, since that waits for the device."""

SECONDS_BETWEEN_PRESSES = 1.0
"""A second Ctrl-C counts from here on; before, it is the same one, passed on by a launcher."""


class Stopped(BaseException):
    """A signal has ended the work; what it was doing can be gone on with."""

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message)
        self.signum = signum

    @property
    def name(self) -> str:
        """The name of the signal, such as SIGTERM."""
        return signal.Signals(self.signum).name


class StopSignals:
    """While entered, listens to STOP_SIGNALS: they end the work at once, or at its next resting point.

    At once means by an exception, Stopped or KeyboardInterrupt. Between `defer` and `release` the first signal is
    only kept in `signum`, for `agreed` to look at; a second Ctrl-C ends the work at once.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._pressed_at = 0.0
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
            self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def defer(self, trainer: L.Trainer) -> None:
        """Keep signals until they are asked for, in place of the trainer's own way with them.

        Lightning's handler of SIGTERM broadcasts inside the handler, and its loop asks rank 0 for that signal in
        every step of several processes, which holds a GPU up; `agreed` does either's work.
        """
        self._deferred = True
        if self._before:
            self._listen()
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _ask_nobody  # type: ignore[method-assign]

    def release(self) -> None:
        """End the work at once from here on."""
        self._deferred = False

    def agreed(self, trainer: L.Trainer) -> int:
        """Return the signal that any of the processes was sent, 0 for none; every process has to ask."""
        if trainer.world_size == 1:
            return self.signum
        own = torch.tensor(self.signum, device=trainer.strategy.root_device)
        agreed = int(trainer.strategy.reduce(own, reduce_op="max"))
        self.signum = self.signum or agreed  # one that came meanwhile is for the next time
        return agreed

    def _listen(self) -> None:
        for signum in self._before:
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again = signum == self.signum == signal.SIGINT and now - self._pressed_at > SECONDS_BETWEEN_PRESSES
        if self._deferred and not again:
            if signum == signal.SIGINT and not self.signum:
                self._pressed_at = now
                os.write(2, b"\nstops once this step is done and saved; Ctrl-C again interrupts at once\n")
            self.signum = self.signum or signum
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise Stopped(signum)


def _ask_nobody() -> None:
    """Stand in for the broadcast that `StopSignals.agreed` makes superfluous."""
