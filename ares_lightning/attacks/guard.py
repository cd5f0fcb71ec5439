"""What an attack does to the caller's model while it runs, and undoes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Model = Callable[[Tensor], Tensor]


MODES = ("eval", "train")


@contextmanager
def guarded(model: Model, device: torch.device, key: tuple[object, ...], mode: str = "eval") -> Iterator[None]:
    """Put a model into eval mode with frozen parameters; on leaving, also after an error, it is as it was.

    key: from which the random numbers follow that a randomised model draws inside; every other model draws none.
    mode: `eval`, or `train` to leave every module in the mode that it is in, where batch norms in training mode use
    the batch's statistics and keep their own as they are.

    Restored are the training flag of every sub-module, `requires_grad` of every parameter and the random
    state of the CPU and of `device`. `.grad` is never written, since attacks differentiate with respect to
    the image only. Gradients are off inside, except where an attack asks for them, and an outer
    `torch.inference_mode` is lifted. Frozen parameters also spare compiled networks the weight gradients
    and transformers the activations saved for them.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [(module, module.training) for module in modules]
    trainable = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    devices = [device] if device.type == "cuda" else []
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices):
        _seed(device, int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little"))
        try:
            if mode == "eval" and isinstance(model, nn.Module) and any(training for _, training in modes):
                model.eval()
            for parameter in trainable:
                parameter.requires_grad_(False)
            with still_statistics(modules):
                yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter in trainable:
                parameter.requires_grad_(True)


@contextmanager
def still_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep the running statistics of the norms among `modules` that are in training mode as they are."""
    tracking: list[Any] = [m for m in modules if m.training and getattr(m, "track_running_stats", False)]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


def _seed(device: torch.device, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in the tensors' own precision: no autocast and, on CUDA, no TF32."""
    cudnn: Any = torch.backends.cudnn
    backends = [cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul] if device.type == "cuda" else []
    before = [backend.fp32_precision for backend in backends]
    with torch.autocast(device.type, enabled=False):
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
