"""Square Attack: random search over squares, by the scores alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ares_lightning.attacks.attack import Attack, check_count
from ares_lightning.attacks.losses import Objective, cross_entropy, margin
from ares_lightning.attacks.search import Search
from ares_lightning.attacks.threat import per_pixel, per_sample

DRAWN_AT_ONCE = 100
"""Iterations whose random numbers are drawn in one go."""
SHRINKS_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Iterations, of 10,000, after which the share of pixels to change is halved (section 4.1)."""
SCHEDULE_LENGTH = 10_000
NUM_TILES = 5
"""Tiles that start a perturbation, along each side."""
EDGE_POWERS = {"l2": 2, "l1": 4}
"""Powers of the distance with which the start and the windows of a norm fall off from their centre."""
SMALLEST_WINDOW = {"linf": 1, "l2": 3, "l1": 3}
NO_MASS = 1e-12


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Square Attack: changes one random square of the best image so far and keeps what raises the loss.

    queries: proposals after the start, 5000 as in AutoAttack; a survivor costs `queries` + 1 forwards a restart and
        no backward.
    p_init: share of the pixels that a window covers at first, 0.8 as in AutoAttack; it is halved after 10, 50, 200,
        500, 1000, 2000, 4000, 6000 and 8000 queries.
    rescale_schedule: scale these numbers from 10,000 queries to `queries`; False as in AutoAttack.
    restarts: runs with other random numbers for the samples not yet broken, 1; `craft` makes one run.

    What is raised is the margin, for targets minus their cross-entropy. Every sample draws its own windows, where
    the authors' code lets a batch share them: the law of each sample is the same, and no sample depends on others.

    Andriushchenko et al. 2020, arXiv 1912.00049, algorithms 1 to 3; for L1 and the defaults AutoAttack
    (arXiv 2003.01690) as published.
    """

    name: ClassVar[str] = "square"
    kind: ClassVar[str] = "score-based"
    needs_gradients: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 1912.00049"

    queries: int = 5000
    p_init: float = 0.8
    rescale_schedule: bool = False
    restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("queries", self.queries)
        check_count("restarts", self.restarts)
        if not 0 < self.p_init <= 1:
            raise ValueError(f"p_init={self.p_init}: expected a share above 0 and at most 1")

    def _objective(self) -> Objective:
        return _margin_or_cross_entropy

    def _run(self, search: Search) -> None:
        images = search.clean
        for _ in range(self.restarts if search.feedback else 1):
            images = self._search_at_random(search)
            if not len(search):
                return
        search.finish(images)

    def _search_at_random(self, search: Search) -> Tensor:
        """Spend one run of queries; return the images with the largest loss."""
        num_chans = search.clean.shape[1]
        rows = search.track(best=self._stripes(search) if self.norm == "linf" else self._tiles(search))
        rows.loss = search.forward(rows.best).loss
        for query in range(self.queries):
            if not len(search):
                break
            if query % DRAWN_AT_ONCE == 0:
                num_draws = num_chans + (2 if self.norm == "linf" else 5)
                rows.draws = search.noise("uniform", (DRAWN_AT_ONCE, num_draws))
            draws = rows.draws[:, query % DRAWN_AT_ONCE]
            propose = self._recoloured if self.norm == "linf" else self._exchanged
            rows.proposal = propose(search, rows.best, draws, self._window(query, search.clean))
            loss = search.forward(rows.proposal).loss
            better = loss > rows.loss
            rows.loss = torch.where(better, loss, rows.loss)
            rows.best = torch.where(per_pixel(better), rows.proposal, rows.best)
        best: Tensor = rows.best
        return best

    def _window(self, query: int, images: Tensor) -> int:
        """Return the side of the windows of a query."""
        height, width = images.shape[2:]
        time = query * SCHEDULE_LENGTH // self.queries if self.rescale_schedule else query
        share = self.p_init / 2 ** sum(time > after for after in SHRINKS_AFTER)
        side = max(round(math.sqrt(share * height * width)), SMALLEST_WINDOW[self.norm])
        if self.norm != "linf" and side % 2 == 0:
            side += 1
        return min(side, height, width)

    def _stripes(self, search: Search) -> Tensor:
        """Return vertical stripes of ±eps in each channel (algorithm 1's start)."""
        _, num_chans, _, width = search.clean.shape
        signs = search.noise("uniform", (num_chans, 1, width)).sign()
        delta = signs * per_sample(search.eps, search.clean)
        return self.ball.project(search.clean + delta, search.clean, search.eps)

    def _recoloured(self, search: Search, best: Tensor, draws: Tensor, side: int) -> Tensor:
        """Move one window to another corner of the ball (algorithm 2)."""
        height, width = best.shape[2:]
        rows = torch.arange(height, device=best.device) - _start(draws[:, 0], height, side)
        columns = torch.arange(width, device=best.device) - _start(draws[:, 1], width, side)
        inside = ((rows >= 0) & (rows < side))[:, None, :, None] & ((columns >= 0) & (columns < side))[
            :, None, None
        ]
        delta = 2 * per_sample(search.eps, best) * draws[:, 2:, None, None].sign()
        return self.ball.project(torch.where(inside, best + delta, best), search.clean, search.eps)

    def _tiles(self, search: Search) -> Tensor:
        """Return 5 × 5 tiles of bumps of either sign, scaled to the budget."""
        _, num_chans, height, width = search.clean.shape
        side = max(min(height, width) // NUM_TILES, 1)
        num_down, num_across = height // side, width // side
        draws = search.noise("uniform", (num_down, num_across, 1 + num_chans))
        tiles = self._bump(side, draws)
        tiles = tiles.view(-1, num_down, num_across, num_chans, side, side).permute(0, 3, 1, 4, 2, 5)
        delta = torch.zeros_like(search.clean)
        top, left = (height - num_down * side) // 2, (width - num_across * side) // 2
        delta[:, :, top : top + num_down * side, left : left + num_across * side] = tiles.reshape(
            -1, num_chans, num_down * side, num_across * side
        )
        return self._scaled(search, delta)

    def _exchanged(self, search: Search, best: Tensor, draws: Tensor, side: int) -> Tensor:
        """Empty one window and give its mass, and what the budget has left, to another (algorithm 3)."""
        height, width = best.shape[2:]
        power = 2 if self.norm == "l2" else 1
        first = _pixels(draws[:, 0:2], height, width, side).expand(-1, best.shape[1], -1)
        second = _pixels(draws[:, 2:4], height, width, side).expand_as(first)
        delta = (best - search.clean).flatten(2)
        eps = per_sample(search.eps, delta)
        room = (eps**power - _mass(delta.flatten(1), power)[:, None]).clamp_(min=0)
        old = delta.gather(2, first)
        delta.scatter_(2, first, 0)
        mass = _mass(old, power) + _mass(delta.gather(2, second), power)
        delta.scatter_(2, second, 0)
        new = self._bump(side, draws[:, 4:]) + old / (NO_MASS + _mass(old, power) ** (1 / power))
        new = new / (NO_MASS + _mass(new, power) ** (1 / power))
        size = (room / best.shape[1] + mass) ** (1 / power)
        if self.norm == "l1":
            size = size * best.shape[1]  # as AutoAttack; the projection takes back what is too much
        delta.scatter_(2, first, new * size)
        return self._scaled(search, delta.view_as(best))

    def _bump(self, side: int, draws: Tensor) -> Tensor:
        """Return unit bumps [..., C, side²] from draws [..., 1 + C]: which way each lies, and the signs."""
        upright, lying = _bumps(self.norm, side, draws.dtype, draws.device)
        return torch.where(draws[..., :1, None] > 0, lying, upright) * draws[..., 1:, None].sign()

    def _scaled(self, search: Search, delta: Tensor) -> Tensor:
        """Return images whose perturbation fills the budget (L2) or is its projection (L1)."""
        if self.norm == "l1":
            return self.ball.project(search.clean + delta, search.clean, search.eps)
        norm = torch.linalg.vector_norm(delta.flatten(1), dim=1, dtype=torch.float64)
        images = (search.clean + delta * per_sample(search.eps / (norm + NO_MASS), delta)).clamp_(0, 1)
        return self.ball.take_back(images, search.clean, search.eps)


def _margin_or_cross_entropy(logits: Tensor, labels: Tensor, aims: Tensor | None) -> Tensor:
    return margin(logits, labels) if aims is None else -cross_entropy(logits, aims)


def _start(draws: Tensor, length: int, side: int) -> Tensor:
    """Return the first of `side` pixels along an axis, int64 [n, 1], from draws [n] in [-1, 1).

    As in the authors' code the last place is not drawn, unless it is the only one.
    """
    return ((draws + 1) / 2 * (length - side)).long()[:, None]


def _pixels(draws: Tensor, height: int, width: int, side: int) -> Tensor:
    """Return the flat indices of the pixels of one window a sample, int64 [n, 1, side²], from draws [n, 2]."""
    reach = torch.arange(side, device=draws.device)
    rows = _start(draws[:, 0], height, side) + reach
    columns = _start(draws[:, 1], width, side) + reach
    return (rows[:, :, None] * width + columns[:, None]).view(-1, 1, side**2)


@lru_cache(maxsize=2 * len(SHRINKS_AFTER))
def _bumps(norm: str, side: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a bump above a dip, and the two side by side, of norm 1 and shape [side²]."""
    order = 2 if norm == "l2" else 1
    layers = torch.arange(1, side // 2 + 2, dtype=dtype, device=device)
    heights = (1 / layers ** EDGE_POWERS[norm]).flip(0).cumsum(0).flip(0)
    across = (torch.arange(side, device=device) - side // 2).abs()
    halves = []
    for sign, height in ((1, side // 2), (-1, side - side // 2)):
        down = (torch.arange(height, device=device) - height // 2).abs()
        half = heights[torch.maximum(down[:, None], across)]
        halves.append(sign * half / torch.linalg.vector_norm(half, order))
    bump = torch.cat(halves)
    bump = bump / torch.linalg.vector_norm(bump, order)
    return bump.flatten(), bump.T.flatten()


def _mass(delta: Tensor, power: int) -> Tensor:
    """Return the sum of |delta|^power over the last axis, which is kept."""
    return delta.abs().pow(power).sum(-1, keepdim=True)
