"""Threat models: the L-inf, L2 and L1 ball around a clean image, cut with the box [0, 1].

Shapes: images, clean images and gradients are [N, C, H, W]; a budget is a float or a tensor [N].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

MAX_CLIPPINGS = 32
"""Rounds that find a scale; each but the last clips a pixel more. Were they too few, steps would fall short."""

SLACK = {torch.float32: 1e-5, torch.float64: 1e-9}
"""By how much, relative to it, rounding may take an image past its L2 or L1 budget."""

ORDER = {"linf": math.inf, "l2": 2.0, "l1": 1.0}
"""The p of each norm."""
DUAL_ORDER = {"linf": 1.0, "l2": 2.0, "l1": math.inf}
"""The p of the norm that measures gradients: 1/p + 1/q = 1."""

Budget = float | Tensor
NoiseSource = Callable[[str, tuple[int, ...]], Tensor]
"""Draws per-sample random numbers: kind ("uniform" in [-1, 1) or "normal") and shape to a tensor [N, *shape]."""


def parse_budget(value: object, key: str = "eps") -> float:
    """Read a budget in units of the [0, 1] scale from a number or from text such as `4/255` or `0.0157`.

    Raises ValueError, naming `key` and the value, unless it is a finite number of at least 0.
    """
    try:
        number = float(Fraction(value.strip())) if isinstance(value, str) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{key}={value}: expected a number of at least 0, such as 8/255 or 0.03")
    return number


@dataclass(frozen=True)
class Threat:
    """What the adversary may do: move an image by at most `eps` in `norm`, staying inside [0, 1]."""

    norm: str
    eps: float

    @property
    def ball(self) -> Ball:
        """The geometry of the norm."""
        return BALLS[self.norm]


class Ball(ABC):
    """The geometry of one norm."""

    @abstractmethod
    def distance(self, images: Tensor, clean: Tensor) -> Tensor:
        """Return the norm of `images - clean`, float64 [N]."""

    @abstractmethod
    def project(self, images: Tensor, clean: Tensor, eps: Budget) -> Tensor:
        """Return the points of ball ∩ box that are nearest to `images` in the Euclidean sense."""

    def take_back(self, images: Tensor, clean: Tensor, eps: Budget) -> Tensor:
        """Return `images`, scaled back to the budget where rounding has put them past it by half of SLACK."""
        budget = torch.as_tensor(eps, dtype=torch.float64, device=clean.device).reshape(-1)
        distance = self.distance(images, clean)
        beyond = distance > budget * (1 + SLACK[clean.dtype] / 2)
        if clean.device.type == "cpu" and not bool(beyond.any()):
            return images  # on a device, reading this would cost more than the scaling
        size = (images.double() - clean.double()).abs() * per_pixel(budget / distance)
        return torch.where(per_pixel(beyond), _displace(clean, images, size), images)

    @abstractmethod
    def steepest_step(self, images: Tensor, gradient: Tensor, size: Budget) -> Tensor:
        """Return the step of norm `size` along which the loss, linearised at `images`, rises most."""

    @abstractmethod
    def uniform(self, clean: Tensor, eps: Budget, noise: NoiseSource) -> Tensor:
        """Return points drawn uniformly from the ball around `clean`, clamped to the box."""


class _LInf(Ball):
    def distance(self, images: Tensor, clean: Tensor) -> Tensor:
        return (images.double() - clean.double()).flatten(1).abs().amax(1)

    def project(self, images: Tensor, clean: Tensor, eps: Budget) -> Tensor:
        eps = per_sample(eps, clean)
        return torch.clamp(images, clean - eps, clean + eps).clamp_(0, 1)

    def steepest_step(self, images: Tensor, gradient: Tensor, size: Budget) -> Tensor:
        return gradient.sign().mul_(per_sample(size, images))

    def uniform(self, clean: Tensor, eps: Budget, noise: NoiseSource) -> Tensor:
        delta = noise("uniform", tuple(clean.shape[1:])).mul_(per_sample(eps, clean))
        return self.project(clean + delta, clean, eps)


class _L2(Ball):
    def distance(self, images: Tensor, clean: Tensor) -> Tensor:
        distance: Tensor = torch.linalg.vector_norm((images.double() - clean.double()).flatten(1), dim=1)
        return distance

    def project(self, images: Tensor, clean: Tensor, eps: Budget) -> Tensor:
        """Scale the perturbation by the one factor s at which `min(s·|delta|, room)` has norm eps.

        The KKT conditions of min ‖z − delta‖² over the ball and the box give z = clip(s·delta). Given which pixels
        the box clips, s follows; a larger s clips more of them. From the s that clips none, this climbs to the
        answer in a few rounds without ever passing it.
        """
        size, room, budget = _magnitudes(images, clean, eps)
        square = size.square()
        scale = _scale_to(budget.square(), square.sum(1, keepdim=True))
        for _ in range(MAX_CLIPPINGS):
            clipped = size * scale > room
            left = budget.square() - torch.where(clipped, room.square(), 0).sum(1, keepdim=True)
            larger = _scale_to(left, torch.where(clipped, 0, square).sum(1, keepdim=True)).maximum(scale)
            if scale.device.type == "cpu" and torch.equal(larger, scale):
                break  # on a device, reading this would cost more than the rounds
            scale = larger
        kept = torch.minimum(size * scale, room)
        norm = torch.linalg.vector_norm(kept, dim=1, keepdim=True)
        return _displace(clean, images, kept * _shrink(norm, budget))

    def steepest_step(self, images: Tensor, gradient: Tensor, size: Budget) -> Tensor:
        largest = gradient.flatten(1).abs().amax(1).clamp_(min=torch.finfo(gradient.dtype).tiny)
        direction = gradient / per_sample(largest, gradient)  # squares of tiny gradients would vanish
        norm = torch.linalg.vector_norm(direction.flatten(1), dim=1).clamp_(min=1)
        return direction.mul_(per_sample(size, images) / per_sample(norm, direction))

    def uniform(self, clean: Tensor, eps: Budget, noise: NoiseSource) -> Tensor:
        direction = noise("normal", tuple(clean.shape[1:])).flatten(1)
        direction = direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        return _ball_point(direction, clean, eps, noise, self)


class _L1(Ball):
    def distance(self, images: Tensor, clean: Tensor) -> Tensor:
        return (images.double() - clean.double()).flatten(1).abs().sum(1)

    def project(self, images: Tensor, clean: Tensor, eps: Budget) -> Tensor:
        """Lower every magnitude by the one amount at which `min(max(|delta| − amount, 0), room)` sums to eps.

        The sum is Σ max(|delta| − amount, 0) − Σ max(|delta| − room − amount, 0): piecewise linear, so that
        one sort of both kinds of breakpoint gives the amount (Croce & Hein 2021, arXiv 2103.01208, prop. 2.1).
        """
        size, room, budget = _magnitudes(images, clean, eps)
        values = torch.cat([size, (size - room).clamp_(min=0)], dim=1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        weights = torch.where(order < size.shape[1], 1.0, -1.0).to(values.dtype)
        count, total = weights.cumsum(1), (weights * values).cumsum(1)
        sums = total - count * values
        place = (sums < budget).sum(1, keepdim=True)
        previous = (place - 1).clamp_(min=0, max=values.shape[1] - 1)
        slope = count.gather(1, previous)
        amount = (total.gather(1, previous) - budget) / slope.clamp(min=1)
        amount = torch.where(slope <= 0, values.gather(1, previous), amount)  # a plateau: every amount will do
        amount = torch.where(place == 0, values[:, :1], amount)
        amount = torch.where(place == values.shape[1], 0, amount).clamp_(min=0)
        kept = torch.minimum((size - amount).clamp_(min=0), room)
        return _displace(clean, images, kept * _shrink(kept.sum(1, keepdim=True), budget))

    def steepest_step(self, images: Tensor, gradient: Tensor, size: Budget) -> Tensor:
        """Spend `size` on the pixels with the largest gradients, each up to the edge of the box."""
        slope = gradient.flatten(1)
        room = torch.where(slope > 0, 1 - images.flatten(1), images.flatten(1)) * (slope != 0)
        order = slope.abs().argsort(dim=1, descending=True, stable=True)
        room = room.gather(1, order)
        spent_before = room.cumsum(1) - room
        budget = torch.as_tensor(size, dtype=room.dtype, device=room.device).reshape(-1, 1)
        spent = torch.minimum((budget - spent_before).clamp_(min=0), room)
        return torch.zeros_like(slope).scatter_(1, order, spent).mul_(slope.sign()).view_as(gradient)

    def uniform(self, clean: Tensor, eps: Budget, noise: NoiseSource) -> Tensor:
        draw = noise("uniform", tuple(clean.shape[1:])).flatten(1)
        laplace = draw.sign() * -torch.log1p(-draw.abs().clamp_(max=1 - torch.finfo(draw.dtype).eps))
        return _ball_point(laplace / laplace.abs().sum(1, keepdim=True), clean, eps, noise, self)


BALLS: dict[str, Ball] = {"linf": _LInf(), "l2": _L2(), "l1": _L1()}


def per_pixel(values: Tensor) -> Tensor:
    """Shape values [N] so that they broadcast over images [N, C, H, W]."""
    return values.view(-1, 1, 1, 1)


def per_sample(value: Budget, images: Tensor) -> Budget:
    """Shape a budget [N] so that it broadcasts over the pixels of images [N, …]."""
    if isinstance(value, Tensor):
        return value.to(images.dtype).view(-1, *[1] * (images.ndim - 1))
    return value


def _magnitudes(images: Tensor, clean: Tensor, eps: Budget) -> tuple[Tensor, Tensor, Tensor]:
    """Return, in float64: how far each pixel wants to move, how far the box lets it, and the budget [N, 1]."""
    delta = (images.double() - clean.double()).flatten(1)
    room = torch.where(delta > 0, 1 - clean.double().flatten(1), clean.double().flatten(1))
    return delta.abs(), room, torch.as_tensor(eps, dtype=torch.float64, device=clean.device).reshape(-1, 1)


def _scale_to(wanted: Tensor, square: Tensor) -> Tensor:
    """Return the factor, at most 1, that gives what has the squared norm `square` the squared norm `wanted`."""
    return torch.where(square > 0, (wanted.clamp(min=0) / square).sqrt(), 1).clamp_(max=1)


def _shrink(norm: Tensor, budget: Tensor) -> Tensor:
    """Return the factor that takes back what rounding has put past the budget."""
    return torch.where(norm > budget, budget / norm, 1)


def _displace(clean: Tensor, images: Tensor, size: Tensor) -> Tensor:
    """Move `clean` by `size` in the direction of `images`, rounding towards `clean`, so that no norm grows."""
    size = size.view_as(clean)
    moved = (clean + size * torch.sign(images - clean)).to(clean.dtype).clamp_(0, 1)
    beyond = (moved.double() - clean.double()).abs() > size
    return torch.where(beyond, torch.nextafter(moved, clean), moved)


def _ball_point(direction: Tensor, clean: Tensor, eps: Budget, noise: NoiseSource, ball: Ball) -> Tensor:
    """Scale a direction [N, d] on the unit sphere to a uniform point of the ball: radius eps · u^(1/d)."""
    unit = (noise("uniform", (1,)) + 1) / 2
    radius = per_sample(eps, clean[:, :1, 0, 0]) * unit ** (1 / direction.shape[1])
    return ball.project((clean + (direction * radius).view_as(clean)).clamp_(0, 1), clean, eps)
