"""Attacks whose examples are made on one model to fool others: the iterative method with momentum and its kin."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ares_lightning.attacks.attack import check_count
from ares_lightning.attacks.pgd import BIM
from ares_lightning.attacks.search import Index, Rows, Search
from ares_lightning.attacks.threat import ORDER, Budget, parse_budget

KERNEL_SPAN = 3.0
"""Standard deviations from the middle of the translation-invariant kernel to its edge (arXiv 1904.02884)."""
TTA_EPS, TTA_STEPS_TO_EDGE = "16/255", 8
"""Budget of arXiv 2012.11207, section 4.1, and how many of its steps of 2/255 reach it."""


@dataclass(frozen=True, kw_only=True)
class MIM(BIM):
    """Momentum iterative method: BIM along the running sum of normalised gradients (k F + k B).

    g ← momentum · g + ∇ / ‖∇‖₁ for each sample by itself, then a steepest step along g. The norm is taken a pixel,
    as the method's implementations do. Every iterate counts.

    steps: k, 20 as in ARES-Bench (arXiv 2302.14301).
    step_size: length of a step in the norm, a number or text such as "1/255"; None takes eps / steps, as the
        paper does.
    momentum: decay factor of the running sum, 1.0 (the paper, section 4.1); 0 is BIM.

    Dong et al. 2018, arXiv 1710.06081, algorithm 1.
    """

    name: ClassVar[str] = "mim"
    paper: ClassVar[str] = "arXiv 1710.06081"

    momentum: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "momentum", parse_budget(self.momentum, "momentum"))

    def _step_size(self, eps: Tensor) -> Budget:
        return eps / self.steps if self.step_size is None else super()._step_size(eps)

    def _run(self, search: Search) -> None:
        rows = self._begin(search)
        for step in range(self.steps):
            gradient = self._gradient(search, rows, step)
            if not len(search):
                return
            rows.velocity = self.momentum * rows.velocity + self._normalized(gradient)
            move = self.ball.steepest_step(rows.images, rows.velocity, self._step_size(search.eps))
            rows.images = self.ball.project(move.add_(rows.images), search.clean, search.eps)
        search.finish(rows.images)

    def _begin(self, search: Search) -> Rows:
        """Return what the run holds of each sample before its first step."""
        return search.track(images=search.clean, velocity=torch.zeros_like(search.clean))

    def _gradient(self, search: Search, rows: Rows, step: int) -> Tensor:
        """Spend the passes of a step; return the direction that the remaining samples add to their velocity."""
        return search.gradient(rows.images).gradient

    def _normalized(self, gradient: Tensor) -> Tensor:
        """Divide by the mean magnitude of each sample's pixels."""
        size = gradient.abs().mean((1, 2, 3), keepdim=True)
        return gradient / size.clamp_(min=torch.finfo(gradient.dtype).tiny)


@dataclass(frozen=True, kw_only=True)
class SINIFGSM(MIM):
    """Scale-invariant Nesterov method: MIM on the mean gradient over darker copies of a point looked ahead to.

    The point is images + momentum · step_size · g, clamped to the box; copy i of it is divided by 2^i. For L2 and
    L1 the look-ahead is scaled so that a g of even magnitude reaches one step far. Costs k · scales F and as many
    B; only the last iterates are judged. Settings as in `mim`, besides:

    scales: copies, 5 (the paper, section 4.1); 1 is NI-FGSM.

    Lin et al. 2020, arXiv 1908.06281, algorithm 1.
    """

    name: ClassVar[str] = "si_ni_fgsm"
    kind: ClassVar[str] = "transfer"
    paper: ClassVar[str] = "arXiv 1908.06281"

    scales: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("scales", self.scales)

    def _gradient(self, search: Search, rows: Rows, step: int) -> Tensor:
        reach = torch.as_tensor(self._step_size(search.eps)) * rows.images[0].numel() ** (-1 / ORDER[self.norm])
        reach = self.momentum * reach.to(rows.images).reshape(-1, 1, 1, 1)
        ahead = (rows.images + reach * rows.velocity).clamp_(0, 1)
        total = torch.zeros_like(ahead)
        for i in range(self.scales):
            total += search.gradient(ahead, view=partial(_darker, 2**i), judge=False).gradient
        return total / self.scales


@dataclass(frozen=True, kw_only=True)
class DIM(MIM):
    """Diverse inputs method: MIM, each of whose gradients is taken through a random resize and pad (k F + k B).

    With probability `diversity_prob`, a sample is shrunk bilinearly to a random size, from `resize_rate` times its
    own to one pixel less, and put at a random place on black of its own size, so that models of a fixed input size
    work as well. Drawn for every sample and step; only the last iterates are judged. Settings as in `mim`, besides:

    diversity_prob: 0.7. resize_rate: 0.85. Both as in ARES-Bench, arXiv 2302.14301; the paper enlarges 299 pixels
        to as many as 330 with probability 0.5.

    Xie et al. 2019, arXiv 1803.06978, section 3.3 (M-DI²-FGSM).
    """

    name: ClassVar[str] = "dim"
    kind: ClassVar[str] = "transfer"
    paper: ClassVar[str] = "arXiv 1803.06978"

    diversity_prob: float = 0.7
    resize_rate: float = 0.85

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("diversity_prob", "resize_rate"):
            value = parse_budget(getattr(self, key), key)
            if value > 1 or (value == 0 and key == "resize_rate"):
                raise ValueError(f"{key}={value}: expected a share of at most 1, such as {getattr(DIM, key)}")
            object.__setattr__(self, key, value)

    def _begin(self, search: Search) -> Rows:
        rows = super()._begin(search)
        rows.draws = (search.noise("uniform", (self.steps, 4)) + 1) / 2
        return rows

    def _gradient(self, search: Search, rows: Rows, step: int) -> Tensor:
        if self.diversity_prob == 0:
            return super()._gradient(search, rows, step)

        def resized(images: Tensor, index: Index) -> Tensor:
            return resize_and_pad(images, rows.draws[index][:, step], self.diversity_prob, self.resize_rate)

        return search.gradient(rows.images, view=resized, judge=False).gradient


@dataclass(frozen=True, kw_only=True)
class TIM(DIM):
    """Translation-invariant method: DIM whose gradients are smoothed by a Gaussian (k F + k B).

    As in ARES-Bench, the diverse inputs of `dim` are part of it; diversity_prob=0 leaves them out, is TI-MI-FGSM,
    and then every iterate counts. Settings as in `dim`, besides:

    kernel_size: odd width of the Gaussian, which ends at 3 standard deviations, 15 (the paper, section 4.1).

    Dong et al. 2019, arXiv 1904.02884, equation 8.
    """

    name: ClassVar[str] = "tim"
    paper: ClassVar[str] = "arXiv 1904.02884"

    kernel_size: int = 15

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("kernel_size", self.kernel_size)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size}: expected an odd number of pixels")

    def _gradient(self, search: Search, rows: Rows, step: int) -> Tensor:
        return smooth(super()._gradient(search, rows, step), self.kernel_size, KERNEL_SPAN)


@dataclass(frozen=True, kw_only=True)
class VMIFGSM(MIM):
    """Variance tuning: MIM whose gradients are corrected by what the neighbourhood of the last iterate showed.

    To ∇ at an iterate is added v = (mean gradient over neighbours of the last iterate) − (gradient there), v = 0 at
    first. Neighbours are uniform points of a ball around the iterate, clamped to the box. Costs
    k + (k − 1) · num_neighbors F and as many B; every iterate counts. Settings as in `mim`, besides:

    num_neighbors: N, 20 in the paper; 10 as in ARES-Bench, arXiv 2302.14301.
    neighborhood: radius of the ball in budgets, 1.5 (the paper's β, section 4.1).

    Wang & He 2021, arXiv 2103.15571, algorithm 1.
    """

    name: ClassVar[str] = "vmi_fgsm"
    kind: ClassVar[str] = "transfer"
    paper: ClassVar[str] = "arXiv 2103.15571"

    num_neighbors: int = 10
    neighborhood: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_neighbors", self.num_neighbors)
        object.__setattr__(self, "neighborhood", parse_budget(self.neighborhood, "neighborhood"))

    def _begin(self, search: Search) -> Rows:
        rows = super()._begin(search)
        rows.variance = torch.zeros_like(search.clean)
        return rows

    def _gradient(self, search: Search, rows: Rows, step: int) -> Tensor:
        gradient = super()._gradient(search, rows, step)
        tuned: Tensor = gradient + rows.variance
        if len(search) and step + 1 < self.steps:  # the last step leaves no other to tune
            total = torch.zeros_like(gradient)
            for _ in range(self.num_neighbors):
                neighbors = self.ball.uniform(rows.images, self.neighborhood * search.eps, search.noise)
                total += search.gradient(neighbors, judge=False).gradient
            rows.variance = total / self.num_neighbors - gradient
        return tuned


@dataclass(frozen=True, kw_only=True)
class TTA(TIM):
    """Transferable targeted attack: many steps that raise the target's logit, with DI, TI and MI (k F + k B).

    The gradients are summed as they are, since that of a logit does not vanish as the target is reached. It knows a
    targeted form only: a call raises ValueError without `targets`. Only the last iterates are judged. Settings as
    in `tim`, besides:

    eps: None takes 16/255 for L-inf. step_size: None takes eps / 8, which is 2/255. steps: 300. kernel_size: 5.
    loss: `logit`, or, as the paper compares it with, `ce`; also `margin`.

    Zhao et al. 2021, arXiv 2012.11207, section 3 and 4.1.
    """

    name: ClassVar[str] = "tta"
    needs_targets: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2012.11207"

    steps: int = 300
    kernel_size: int = 5
    loss: str = "logit"

    def __post_init__(self) -> None:
        if self.eps is None and self.norm == "linf":
            object.__setattr__(self, "eps", TTA_EPS)
        super().__post_init__()

    def _step_size(self, eps: Tensor) -> Budget:
        return eps / TTA_STEPS_TO_EDGE if self.step_size is None else float(self.step_size)

    def _normalized(self, gradient: Tensor) -> Tensor:
        return gradient


def _darker(divisor: int, images: Tensor, _: Index) -> Tensor:
    return images / divisor


def resize_and_pad(images: Tensor, draws: Tensor, probability: float, rate: float) -> Tensor:
    """Shrink each image to a size and put it at a place of its own on black, [n, C, H, W].

    draws: [n, 4] in [0, 1]: whether it is done (at most `probability`), size, top and left. Sizes run from
    ⌊rate · size⌋ up to one pixel less than the image's; the resize is bilinear, pixel centres half a pixel in.
    """
    applies = draws[:, 0] <= probability
    down = _placed(images.shape[2], draws[:, 1], draws[:, 2], applies, rate)
    across = _placed(images.shape[3], draws[:, 1], draws[:, 3], applies, rate)
    return down[:, None] @ images @ across[:, None].mT


def _placed(full: int, size: Tensor, place: Tensor, applies: Tensor, rate: float) -> Tensor:
    """Return matrices [n, full, full] that shrink a column of `full` pixels and put it at its place."""
    least = max(int(rate * full), 1)
    shrunk = torch.where(applies, _whole(size, least, max(full - 1, least)), full)
    start = _whole(place, 0, full - shrunk)[:, None]
    pixels = torch.arange(full, dtype=place.dtype, device=place.device)
    inside = pixels - start
    source = ((inside + 0.5) * (full / shrunk[:, None]) - 0.5).clamp_(0, full - 1)
    weights = (1 - (source[:, :, None] - pixels).abs()).clamp_(min=0)
    return weights * ((inside >= 0) & (inside < shrunk[:, None]))[:, :, None]


def _whole(draw: Tensor, low: int, high: int | Tensor) -> Tensor:
    """Turn draws in [0, 1] into whole numbers from `low` to `high`, equally likely."""
    return low + (draw * (high - low + 1)).floor().clamp_(max=high - low)


def smooth(images: Tensor, size: int, span: float) -> Tensor:
    """Convolve every channel with a Gaussian of odd width `size`, its edges `span` standard deviations away."""
    positions = torch.linspace(-span, span, size, dtype=torch.float64, device=images.device)
    column = torch.exp(-positions.square() / 2)
    kernel = column[:, None] * column
    kernel = (kernel / kernel.sum()).to(images).expand(images.shape[1], 1, size, size)
    return F.conv2d(images, kernel, padding=size // 2, groups=images.shape[1])
