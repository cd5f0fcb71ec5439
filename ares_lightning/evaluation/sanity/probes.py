"""Measurements on a model alone: does it give logits, the same ones twice, and whatever stands beside an image?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ares_lightning.attacks import Threat
from ares_lightning.attacks.guard import full_precision, guarded
from ares_lightning.attacks.noise import sample_noise
from ares_lightning.attacks.passes import Passes, call_model, predicted_classes
from ares_lightning.evaluation.sanity.gradients import GradientProbes, probe_gradients

NUM_PASSES = 5
"""Passes of the same batch by which AutoAttack tells a randomised model (its checks.py)."""
NUM_ALONE = 4
"""Images that are passed one by one."""
ROW_SUM_SLACK = 1e-5
"""By how much rows of probabilities may miss their sum (AutoAttack's checks.py)."""
LOG_SUM_SLACK = 1e-4
NEAR_THE_END = 1e-4
"""An output this near to the smallest or largest of all, as a share of their distance, is at the end of a scale."""
SAME_IN_FP64 = 1e-3
"""A copy in float64 stands for the model where no normalised logits of theirs are further apart."""
PIXEL_CHANGES = (1e-5, 1e-4, 1e-3, 1 / 510, 1 / 255, 2 / 255, 4 / 255, 8 / 255, 16 / 255)
"""By how much all pixels are moved, up or down at random, to see when the logits move."""
JUMP_SIZES, JUMP_RATIO = (1e-5, 1e-3), 0.3
"""Logits that a hundred times smaller a change moves this much as far have jumped; of smooth ones it is 0.01."""


@dataclass(frozen=True, kw_only=True)
class Probes:
    """What was measured on a model. Counts are of images; a change of logits is the L2 distance of normalised ones.

    num_images, num_right: asked about, and classified rightly. num_classes: of the model. largest_label: of the
        data.
    num_non_finite: with logits that are not all finite; all that follows is about the others.
    output: `logits`, `log-probabilities`, `probabilities`, `scaled probabilities` or `values in [0, 1]`.
    share_at_ends: share of the outputs that lie at the smallest or largest of all outputs.
    repeat_change: largest change between passes of the same batch, one of them with gradients on; repeat_right: by
        how much the number of right ones varied. changes_itself: a forward changes buffers or parameters.
    neighbour_change: largest change by other images beside, another order, or none beside; None where the model
        fails on them, with neighbour_error. in_fp64: measured in float64, where rounding is no excuse.
    num_training: modules that stay in training mode after `eval()`.
    gradient_calls: gradient computations inside one forward.
    unmoved: how many images' logits stay exactly as they are, for each of PIXEL_CHANGES. num_jumps: how many
        images' logits jump.
    gradients: see GradientProbes; None where no image is classified rightly.
    """

    num_images: int
    num_right: int
    num_classes: int
    largest_label: int
    num_non_finite: int
    output: str
    share_at_ends: float
    repeat_change: float
    repeat_right: int
    changes_itself: bool
    neighbour_change: float | None
    neighbour_error: str | None
    in_fp64: bool
    num_training: int
    gradient_calls: int
    unmoved: dict[str, int]
    num_jumps: int
    gradients: GradientProbes | None

    @property
    def num_finite(self) -> int:
        """Images with finite logits."""
        return self.num_images - self.num_non_finite


def take_probes(
    net: nn.Module, images: Tensor, labels: Tensor, threat: Threat, *, seed: int = 0, batch_size: int = 128
) -> Probes:
    """Measure a model on images [N, C, H, W] in [0, 1] with labels int64 [N], in the images' precision.

    It comes back as it was. That costs about as much as PGD-20 three times. batch_size: images in a pass; as in
    every attack, one without a backward may take four times as many.

    Raises ValueError where the model does not return logits [N, classes], naming what it returns.
    """
    device = images.device
    with guarded(net, device, (seed, "sanity")), full_precision(device):
        num_training = sum(module.training for module in net.modules())
        state = _state(net)
        logits = _all_logits(net, images, batch_size)
        finite = logits.isfinite().all(1)
        gradient_calls = _gradient_calls(net, images[:batch_size])
        repeat_change, repeat_right = _repeats(net, images, labels, logits, batch_size)
        exact = _in_fp64(net, images, logits, batch_size)
        neighbours = (net, images, logits) if exact is None else exact
        neighbour_change, neighbour_error = _neighbours(*neighbours, seed, batch_size)
        rows = finite.nonzero().squeeze(1)
        unmoved, num_jumps = _pixel_changes(net, images[rows], seed, batch_size)
        changes_itself = any(not torch.equal(old, new) for old, new in zip(state, _state(net), strict=True))
        right = (finite & (predicted_classes(logits) == labels)).nonzero().squeeze(1)
        copy_in_fp64 = None if exact is None else exact[0]
        gradients = None
        if len(right):
            gradients = probe_gradients(net, copy_in_fp64, images[right], labels[right], threat, seed, batch_size)
    return Probes(
        num_images=len(images),
        num_right=len(right),
        num_classes=logits.shape[1],
        largest_label=int(labels.max()),
        num_non_finite=int((~finite).sum()),
        output=_kind_of_output(logits[rows]),
        share_at_ends=_share_at_ends(logits[rows]),
        repeat_change=repeat_change,
        repeat_right=repeat_right,
        changes_itself=changes_itself,
        neighbour_change=neighbour_change,
        neighbour_error=neighbour_error,
        in_fp64=exact is not None,
        num_training=num_training,
        gradient_calls=gradient_calls,
        unmoved=unmoved,
        num_jumps=num_jumps,
        gradients=gradients,
    )


def _all_logits(net: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Return the logits [N, classes] of images [N, C, H, W]."""
    parts = Passes(batch_size).parts(len(images), backward=True)
    return torch.cat([call_model(net, images[part]) for part in parts])


def _change(logits: Tensor, others: Tensor) -> Tensor:
    """Return the L2 distances of L2-normalised logits [N], 2 where only `others` are not finite."""
    apart: Tensor = (_normalized(logits) - _normalized(others)).norm(dim=1)
    return apart.nan_to_num(nan=2.0).where(logits.isfinite().all(1), 0)


def _normalized(logits: Tensor) -> Tensor:
    logits = logits.double()
    largest = logits.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    logits = logits / largest
    unit: Tensor = logits / logits.norm(dim=1, keepdim=True).clamp(min=1)
    return unit


def _repeats(net: nn.Module, images: Tensor, labels: Tensor, logits: Tensor, batch_size: int) -> tuple[float, int]:
    """Return the largest change of logits between passes, and how far apart the numbers of right ones lie."""
    passes = [logits, *(_all_logits(net, images, batch_size) for _ in range(NUM_PASSES - 2))]
    with torch.enable_grad():
        passes.append(_all_logits(net, images.clone().requires_grad_(), batch_size).detach())
    right = [int((predicted_classes(found) == labels).sum()) for found in passes]
    return max(float(_change(logits, found).max()) for found in passes[1:]), max(right) - min(right)


def _neighbours(
    net: nn.Module, images: Tensor, logits: Tensor, seed: int, batch_size: int
) -> tuple[float | None, str | None]:
    """Return the largest change of logits by what else is in the batch, or why the model cannot be asked."""
    images, logits = images[:batch_size], logits[:batch_size]
    half = -(-len(images) // 2)
    noise = sample_noise("uniform", (seed, "neighbours"), range(len(images) - half), images.shape[1:], images)
    strangers = torch.cat([images[:half], (noise + 1) / 2])
    alone = range(min(NUM_ALONE, len(images)))
    try:
        changes = [
            _change(logits, call_model(net, images.flip(0)).flip(0)),
            _change(logits[:half], call_model(net, strangers)[:half]),
            *(_change(logits[i : i + 1], call_model(net, images[i : i + 1])) for i in alone),
        ]
    except (RuntimeError, ValueError) as error:
        return None, str(error).splitlines()[0]
    return float(torch.cat(changes).max()), None


def _in_fp64(
    net: nn.Module, images: Tensor, logits: Tensor, batch_size: int
) -> tuple[nn.Module, Tensor, Tensor] | None:
    """Return a copy in float64 with its images and logits, None where there is none that does the same."""
    try:
        exact = copy.deepcopy(net).double()
        found = _all_logits(exact, images.double(), batch_size)
    except Exception:  # whatever a stranger's module raises when it is copied or fed float64: it has no such copy
        return None
    if found.dtype != torch.float64 or float(_change(logits, found).max()) > SAME_IN_FP64:
        return None
    return exact, images.double(), found


def _pixel_changes(net: nn.Module, images: Tensor, seed: int, batch_size: int) -> tuple[dict[str, int], int]:
    """Return how many images' logits do not move, by the size of the change, and how many images' logits jump."""
    if not len(images):
        return {}, 0
    signs = sample_noise("uniform", (seed, "pixels"), range(len(images)), tuple(images.shape[1:]), images).sign()
    signs = torch.where(images == 0, 1, torch.where(images == 1, -1, signs))
    logits = _all_logits(net, images, batch_size)
    moved = {size: _all_logits(net, (images + size * signs).clamp(0, 1), batch_size) for size in PIXEL_CHANGES}
    unmoved = {f"{size:.2g}": int((found == logits).all(1).sum()) for size, found in moved.items()}
    small, large = ((moved[size] - logits).double().norm(dim=1) for size in JUMP_SIZES)
    rounding = NUM_ROUNDINGS * torch.finfo(logits.dtype).eps * logits.double().norm(dim=1)
    return unmoved, int(((small > JUMP_RATIO * large) & (small > rounding)).sum())


NUM_ROUNDINGS = 64
"""A change of logits by fewer relative rounding errors than this is no change."""


class _CountGradients(TorchFunctionMode):
    """Counts the ways into autograd, whatever name they are called by."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func in (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad)
        return func(*args, **(kwargs or {}))


def _gradient_calls(net: nn.Module, images: Tensor) -> int:
    calls = _CountGradients()
    with calls:
        call_model(net, images)
    return calls.count


def _state(net: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in (*net.parameters(), *net.buffers())]


def _kind_of_output(logits: Tensor) -> str:
    if not len(logits):
        return "logits"
    logits = logits.double()
    sums = logits.sum(1)
    if bool((logits >= 0).all()) and float(sums.min()) > 0:
        if bool(((sums - 1).abs() < ROW_SUM_SLACK).all()):
            return "probabilities"
        if bool(((sums / sums.mean() - 1).abs() < ROW_SUM_SLACK).all()):
            return "scaled probabilities"
        if float(logits.max()) <= 1:
            return "values in [0, 1]"
    if bool((logits.logsumexp(1).abs() < LOG_SUM_SLACK).all()):
        return "log-probabilities"
    return "logits"


def _share_at_ends(logits: Tensor) -> float:
    """Return the share of outputs, but for one at each end, that lie at an end of the range of all outputs."""
    if not len(logits):
        return 0.0
    smallest, largest = logits.double().aminmax()
    slack = NEAR_THE_END * (largest - smallest)
    ends = (logits <= smallest + slack) | (logits >= largest - slack)
    return max(0, int(ends.sum()) - 2) / logits.numel()
