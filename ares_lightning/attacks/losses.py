"""Losses that an attack raises: logits [N, C] and classes to one value a sample, [N]."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits [N, C], labels) -> [N]; raised for the labels, lowered for targets."""
Objective = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(logits [N, C], labels, aims [N] or None) -> [N], to be raised; `aims` are the classes to be reached, if any."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy with class labels int64 [N] or soft labels [N, C]."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `max_{k ≠ y} z_k − z_y`, positive where the prediction is wrong (Carlini & Wagner 2017, f6).

    Raises ValueError for soft labels, of which no single class can be told apart.
    """
    own = class_logits(logits, labels)
    return logits.scatter(1, labels[:, None], -float("inf")).amax(1) - own


def negative_logit(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `−z_y`; lowered for a target, it raises the target's logit (Zhao et al. 2021, arXiv 2012.11207).

    Raises ValueError for soft labels.
    """
    return -class_logits(logits, labels)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "logit": negative_logit}


def class_logits(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the logit of each sample's class, [N]; raise ValueError for soft labels, which name no class."""
    if classes.ndim != 1:
        raise ValueError("loss=margin, logit or dlr: needs class labels [N]; soft labels [N, C] go with loss=ce")
    return logits.gather(1, classes[:, None]).squeeze(1)


def class_gaps(logits: Tensor, labels: Tensor, aims: Tensor | None) -> Tensor:
    """Return the logits of the classes `aims` [N, k] minus that of the label, [N, k]."""
    assert aims is not None
    return logits.gather(1, aims) - class_logits(logits, labels)[:, None]


def as_objective(loss: Loss) -> Objective:
    """Return the objective that raises `loss` for the label, or lowers it for the class to be reached."""

    def objective(logits: Tensor, labels: Tensor, aims: Tensor | None) -> Tensor:
        value = loss(logits, labels) if aims is None else -loss(logits, aims)
        if value.shape != logits.shape[:1]:
            raise ValueError(f"the loss has shape {list(value.shape)}; expected [{len(logits)}], one a sample")
        return value

    return objective


def dlr(logits: Tensor, labels: Tensor, aims: Tensor | None) -> Tensor:
    """Return the difference of logits ratio, which no shift or scaling changes (arXiv 2003.01690, eq. 6 and 7).

    Untargeted, with the logits sorted as z_π1 ≥ z_π2 ≥ …: `(max_{k ≠ y} z_k − z_y) / (z_π1 − z_π3)`; with aims
    t: `(z_t − z_y) / (z_π1 − (z_π3 + z_π4) / 2)`. Fewer than 3 (with aims 4) classes leave nothing to divide
    by, and the numerator alone, the margin, is the loss.
    """
    if aims is None:
        difference = margin(logits, labels)
    else:
        difference = class_logits(logits, aims) - class_logits(logits, labels)
    if logits.shape[1] < (3 if aims is None else 4):
        return difference
    if aims is None:
        largest = logits.topk(3, dim=1).values
        spread = largest[:, 0] - largest[:, 2]
    else:
        largest = logits.topk(4, dim=1).values
        spread = largest[:, 0] - 0.5 * (largest[:, 2] + largest[:, 3])
    return difference / (spread + 1e-12)
