"""Measurements on gradients: are there any, do they tell where the loss rises, and does an attack end its climb?"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ares_lightning.attacks import Outcome, Threat, make_attack
from ares_lightning.attacks.losses import LOSSES, Loss, margin
from ares_lightning.attacks.noise import sample_noise
from ares_lightning.attacks.passes import Passes, call_model, predicted_classes
from ares_lightning.attacks.threat import ORDER
from ares_lightning.evaluation.sanity.rule import largest_distance

DIFFERENCE = {torch.float32: 1e-3, torch.float64: 1e-5}
"""By how much all pixels are moved to measure a slope."""
NUM_DIRECTIONS = 4
"""Random directions that gradients are held against."""
WRONG_SLOPE = {torch.float32: 0.3, torch.float64: 0.1}
"""A gradient is wrong where it misses the slopes measured by this share of both. Honest networks were seen to miss
0.011 at most in float64 (digits CNNs and CIFAR-10 ResNet-20s, trained adversarially or not)."""
CLIMBS = (1 / 64, 1 / 16, 1 / 4, 1)
"""Lengths of a single step along the gradient, in budgets; PGD-20 takes 1/4."""
TRACE_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class GradientProbes:
    """What was measured on the gradients of the images that are classified rightly. Counts are of these images.

    num_images: so many. has_gradient: the output depends on the input at all, for autograd; else the rest is None.
    zero: gradients that are exactly zero, by loss and precision (`ce`, `margin`, `ce_fp64`, `margin_fp64`; the last
        two where the model works in float64). num_non_finite: with NaN or infinite gradients of `ce` or `margin`.
    num_wrong: gradients of the margin that miss measured slopes, along itself and random directions.
    uphill: by the length of a step in budgets, how many images' margins a step along the gradient raises further
        than NUM_DIRECTIONS random steps of the same length.
    trace: mean margin at each step of PGD-20, of the images that it never breaks; trace_survivors: so many.
    refused: what PGD-20 said where it refuses the model; else of its result: num_astray, the adversarial examples
        outside box or budget or with NaN; num_recounted: verdicts that a fresh forward, in another order, does not
        confirm; num_lost: images that one of its steps broke and its verdict does not.
    """

    num_images: int
    has_gradient: bool
    zero: dict[str, int] | None = None
    num_non_finite: int | None = None
    num_wrong: int | None = None
    uphill: dict[str, int] | None = None
    trace: list[float] | None = None
    trace_survivors: int | None = None
    refused: str | None = None
    num_astray: int | None = None
    num_recounted: int | None = None
    num_lost: int | None = None


def probe_gradients(
    net: nn.Module,
    exact: nn.Module | None,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    seed: int,
    batch_size: int,
) -> GradientProbes:
    """Measure gradients of a model, and of its copy `exact` in float64 if there is one, both in eval mode.

    images: [N, C, H, W], all of them classified rightly, with labels int64 [N].
    """
    slopes = {name: _gradient(net, images, labels, LOSSES[name], batch_size) for name in ("ce", "margin")}
    if slopes["margin"] is None or slopes["ce"] is None:
        return GradientProbes(num_images=len(images), has_gradient=False)
    found = {name: gradient for name, gradient in slopes.items() if gradient is not None}
    non_finite = sum((~gradient.flatten(1).isfinite().all(1)).long() for gradient in found.values())
    if exact is not None:
        for name in ("ce", "margin"):
            gradient = _gradient(exact, images.double(), labels, LOSSES[name], batch_size)
            if gradient is not None:
                found[f"{name}_fp64"] = gradient
    judged = (net, images) if exact is None else (exact, images.double())
    measured = GradientProbes(
        num_images=len(images),
        has_gradient=True,
        zero={name: int((gradient == 0).flatten(1).all(1).sum()) for name, gradient in found.items()},
        num_non_finite=int((torch.as_tensor(non_finite) > 0).sum()),
        num_wrong=_num_wrong(*judged, labels, seed, batch_size),
        uphill=_uphill(net, images, labels, found["margin"].nan_to_num(), threat, seed, batch_size),
    )
    return _with_attack(measured, net, images, labels, threat, seed, batch_size)


def _gradient(net: nn.Module, images: Tensor, labels: Tensor, loss: Loss, batch_size: int) -> Tensor | None:
    """Return the gradient of the loss [N, C, H, W], None where autograd knows of no way to the input."""
    gradients: list[Tensor] = []
    for part in Passes(batch_size).parts(len(images), backward=True):
        points = images[part].clone().requires_grad_()
        with torch.enable_grad():
            total = loss(call_model(net, points), labels[part]).sum()
        if not total.requires_grad:
            return None
        gradients += torch.autograd.grad(total, points, materialize_grads=True)
    return torch.cat(gradients)


def _margins(net: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    parts = Passes(batch_size).parts(len(images), backward=True)
    return torch.cat([margin(call_model(net, images[part]), labels[part]) for part in parts])


def _directions(images: Tensor, seed: int, kind: str) -> list[Tensor]:
    """Draw NUM_DIRECTIONS random directions [N, C, H, W]."""
    shape, ids = tuple(images.shape[1:]), range(len(images))
    return [sample_noise("normal", (seed, kind, k), ids, shape, images) for k in range(NUM_DIRECTIONS)]


def _num_wrong(net: nn.Module, images: Tensor, labels: Tensor, seed: int, batch_size: int) -> int:
    """Return how many gradients of the margin miss the slopes measured by small steps from the image into the box.

    In float64 along the gradient and random directions; in float32 along the gradient, where slopes outdo rounding.
    """
    size = DIFFERENCE[images.dtype]
    gradient = _gradient(net, images, labels, LOSSES["margin"], batch_size)
    if gradient is None:
        return len(images)
    start = _margins(net, images, labels, batch_size)
    missed, total = gradient.new_zeros(2, len(images), dtype=torch.float64)
    random = _directions(images, seed, "slopes") if images.dtype == torch.float64 else []
    for direction in (gradient, *random):
        step = size * direction.sign()
        step = torch.where(images + step < 0, size, torch.where(images + step > 1, -size, step))
        rise = (_margins(net, images + step, labels, batch_size) - start).double()
        expected = (gradient * step).flatten(1).sum(1).double()
        missed = missed + (rise - expected).abs()
        total = total + rise.abs() + expected.abs()
    return int((~(missed <= WRONG_SLOPE[images.dtype] * total)).sum())


def _uphill(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    gradient: Tensor,
    threat: Threat,
    seed: int,
    batch_size: int,
) -> dict[str, int]:
    """Return how many margins one step along the gradient raises further than random steps, by its length."""
    counts = {}
    random = _directions(images, seed, "steps")
    for share in CLIMBS:
        along, *across = (
            _margins(
                net,
                (images + threat.ball.steepest_step(images, direction, share * threat.eps)).clamp(0, 1),
                labels,
                batch_size,
            )
            for direction in (gradient, *random)
        )
        counts[f"{share:.3g}"] = int((along > torch.stack(across).amax(0)).sum())
    return counts


def _with_attack(
    measured: GradientProbes,
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    seed: int,
    batch_size: int,
) -> GradientProbes:
    """Add what a run of PGD shows."""
    attack = make_attack("pgd", norm=threat.norm, eps=threat.eps, steps=TRACE_STEPS)
    margins: list[Tensor] = []

    def traced(logits: Tensor, labels: Tensor) -> Tensor:
        margins.append(margin(logits.detach(), labels))
        return LOSSES["ce"](logits, labels)

    ids = torch.arange(len(images))
    for part in Passes(batch_size).parts(len(images), backward=True):
        attack.craft(net, images[part], labels[part], loss=traced, sample_ids=ids[part], seed=seed)
    by_step = torch.stack([torch.cat(margins[step::TRACE_STEPS]) for step in range(TRACE_STEPS)])
    broke = (by_step > 0).any(0)
    survives = ~broke & by_step.isfinite().all(0)
    measured = replace(
        measured,
        trace=by_step[:, survives].double().mean(1).tolist() if bool(survives.any()) else [],
        trace_survivors=int(survives.sum()),
    )
    try:
        outcome = attack(net, images, labels, sample_ids=ids, seed=seed, batch_size=batch_size)
    except ValueError as error:
        return replace(measured, refused=str(error))
    return replace(
        measured,
        num_astray=_num_astray(outcome, images, threat),
        num_recounted=_num_recounted(net, outcome, labels, batch_size),
        num_lost=int((broke & ~outcome.broken).sum()),
    )


def _num_astray(outcome: Outcome, images: Tensor, threat: Threat) -> int:
    """Return how many images found lie outside box or budget, hold NaN, or have a distance that is not theirs."""
    found = outcome.images
    in_box = ((found >= 0) & (found <= 1)).flatten(1).all(1)  # false of NaN
    far = (found.double() - images.double()).flatten(1).norm(p=ORDER[threat.norm], dim=1)
    kept = (far <= largest_distance(threat.norm, threat.eps, found.dtype)) & (far - outcome.distance < 1e-9)
    return int((~(in_box & kept)).sum())


def _num_recounted(net: nn.Module, outcome: Outcome, labels: Tensor, batch_size: int) -> int:
    """Return how many verdicts a fresh forward of the images found, last one first, does not confirm."""
    parts = Passes(batch_size).parts(len(labels), backward=True)
    backwards = outcome.images.flip(0)
    logits = torch.cat([call_model(net, backwards[part]) for part in parts]).flip(0)
    return int(((predicted_classes(logits) != labels) != outcome.broken).sum())
