"""How a model is called, and what it then predicts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ares_lightning.attacks.guard import Model

FORWARD_ROWS = 4
"""A pass without a backward keeps no activations and takes this many times the rows of one with."""


@dataclass(frozen=True)
class Passes:
    """How the model is called: `batch_size` rows at most in a pass with a backward (None: all), under bf16
    autocast or in full precision, `eot` times each for a randomised model, and in a search by `search_on`, if any,
    in its place."""

    batch_size: int | None = None
    precision: str = "fp32"
    eot: int = 1
    search_on: Model | None = None

    @property
    def in_doubt(self) -> bool:
        """Whether what a search shows has to be looked at again by the model itself in full precision."""
        return self.precision == "bf16" or self.search_on is not None

    def parts(self, num_rows: int, backward: bool) -> Iterator[slice]:
        """Cut rows into as few parts as passes may take, of about the same size."""
        most = num_rows if self.batch_size is None else self.batch_size * (1 if backward else FORWARD_ROWS)
        num_parts = -(-num_rows // max(most, 1))
        for k in range(num_parts):
            yield slice(k * num_rows // num_parts, (k + 1) * num_rows // num_parts)


def predict(model: Model, images: Tensor, passes: Passes) -> tuple[Tensor, Tensor]:
    """Return logits [N, classes] and predicted classes [N], at the images' precision.

    With `eot` draws of a randomised model, the means of the logits, and the class of the largest mean probability.
    """
    logits, predictions = [], []
    for part in passes.parts(len(images), backward=False):
        draws = torch.stack([call_model(model, images[part]) for _ in range(passes.eot)])
        logits.append(draws.mean(0))
        predictions.append(
            predicted_classes(draws.softmax(2, dtype=torch.float64).mean(0) if passes.eot > 1 else draws[0])
        )
    return torch.cat(logits), torch.cat(predictions)


def predicted_classes(logits: Tensor) -> Tensor:
    """Return the predicted classes [N]; −1, which is no class, where a logit is NaN."""
    return logits.argmax(1).where(~logits.isnan().any(1), -1)


def is_broken(prediction: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """Return bool [N]: the prediction is wrong, or, where targets are given, is the target."""
    return prediction != labels if targets is None else prediction == targets


def call_model(model: Model, images: Tensor) -> Tensor:
    """Return logits [N, classes]; raise ValueError where the model returns something else."""
    logits = model(images)
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model returned a {type(logits).__name__}; expected logits [{len(images)}, classes]")
    if not logits.is_floating_point():
        raise ValueError(f"the model returned {logits.dtype}; expected logits of a floating-point type")
    if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2:
        raise ValueError(
            f"the model returned shape {list(logits.shape)}; expected logits [{len(images)}, classes], two at least"
        )
    return logits


def check_logits(logits: Tensor, labels: Tensor, targets: Tensor | None) -> None:
    """Hold the classes and the labels to each other; values are read on the CPU only, where it is free."""
    if labels.ndim == 2 and labels.shape != logits.shape:
        raise ValueError(f"soft labels have shape {list(labels.shape)}; the logits {list(logits.shape)}")
    if logits.device.type == "cpu":
        check_classes(logits, labels, targets)


def check_classes(logits: Tensor, labels: Tensor, targets: Tensor | None) -> None:
    """Raise ValueError where labels or targets name a class that the model does not have."""
    for name, classes in (("labels", labels), ("targets", targets)):
        if classes is not None and classes.ndim == 1 and len(classes) and int(classes.max()) >= logits.shape[1]:
            raise ValueError(f"{name} hold {int(classes.max())}; the model has {logits.shape[1]} classes")
