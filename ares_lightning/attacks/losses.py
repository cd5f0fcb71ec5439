"""Losses that an attack raises: logits [N, C] and labels to one value a sample, [N]."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy with class labels int64 [N] or soft labels [N, C]."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `max_{k ≠ y} z_k − z_y`, positive where the prediction is wrong (Carlini & Wagner 2017, f6).

    Raises ValueError for soft labels, of which no single class can be told apart.
    """
    if labels.ndim != 1:
        raise ValueError("loss=margin: needs class labels [N]; soft labels [N, C] go with loss=ce")
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return logits.scatter(1, labels[:, None], -float("inf")).amax(1) - own


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin}
