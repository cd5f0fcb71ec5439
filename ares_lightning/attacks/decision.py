"""Decision-based attacks, which see the predicted class of their queries only: Boundary and Evolutionary."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ares_lightning.attacks.attack import Attack, check_count
from ares_lightning.attacks.search import Rows, Search
from ares_lightning.attacks.threat import per_pixel

START_BISECTIONS = 10


@dataclass(frozen=True, kw_only=True)
class _BoundaryWalk(Attack):
    """A walk of adversarial images along the decision boundary, from a random image towards the clean one.

    Random images are queried until one is misclassified: uniform noise as in the papers and, in turn, uniform
    noise on coarser and coarser grids, since a network often gives one and the same class to all noise of full
    resolution and the samples of that class would find no start. 10 bisections bring it near the boundary.
    A sample that finds no start is not broken, whatever that says of the model.

    There is no targeted form: random images are hardly ever of a given class, and a start taken from other
    samples would make the verdict depend on them.
    """

    kind: ClassVar[str] = "decision-based"
    norms: ClassVar[tuple[str, ...]] = ("l2",)
    targeted: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    nearest: ClassVar[bool] = True

    norm: str = "l2"
    queries: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("queries", self.queries)

    def _run(self, search: Search) -> None:
        """In every pass each sample spends one query: for a start, on a bisection, or on a step of the walk."""
        rows = search.track(
            images=search.clean,
            near=search.clean,
            bisections=torch.full_like(search.labels, -1),  # made so far; -1 before there is a start
        )
        self._begin(search, rows)
        some_start = True
        for query in range(self.queries):
            rows.walks = rows.bisections == START_BISECTIONS
            rows.candidate = self._propose(search, rows, query)
            some_start = some_start and not bool(rows.walks.all())
            if some_start:
                start = torch.where(
                    per_pixel(rows.bisections < 0), _random_images(search, query), (rows.near + rows.images) / 2
                )
                rows.candidate = torch.where(per_pixel(rows.walks), rows.candidate, start)
            adversarial = search.forward(rows.candidate).broken
            if not len(search):
                return
            rows.images = torch.where(per_pixel(adversarial), rows.candidate, rows.images)
            self._learn(rows, adversarial, query)
            if some_start:
                bisects = (rows.bisections >= 0) & ~rows.walks
                rows.near = torch.where(per_pixel(bisects & ~adversarial), rows.candidate, rows.near)
                rows.bisections = rows.bisections + (bisects | (adversarial & ~rows.walks))

    @abstractmethod
    def _begin(self, search: Search, rows: Rows) -> None:
        """Add to `rows` what the walk adapts."""

    @abstractmethod
    def _propose(self, search: Search, rows: Rows, query: int) -> Tensor:
        """Return the next images of the walk, [n, C, H, W] in [0, 1]."""

    @abstractmethod
    def _learn(self, rows: Rows, adversarial: Tensor, query: int) -> None:
        """Adapt the walk of the samples in `rows.walks` to which of their images were adversarial, bool [n]."""


def _random_images(search: Search, query: int) -> Tensor:
    """Draw uniform noise on a grid: of the images' size at first, then halved with every query, and again."""
    channels, *size = search.clean.shape[1:]
    halvings = query % max(size).bit_length()
    grid = [max(1, side >> halvings) for side in size]
    noise = search.noise("uniform", (channels, *grid), "start", query)
    return F.interpolate((noise + 1) / 2, size, mode="bilinear").clamp_(0, 1)


def _length(images: Tensor) -> Tensor:
    """Return the L2 norms as [n, 1, 1, 1], large enough to divide by."""
    lengths = torch.linalg.vector_norm(images.flatten(1), dim=1)
    return per_pixel(lengths.clamp_(min=torch.finfo(images.dtype).tiny))


def _adapted(step: Tensor, rows: Rows, adversarial: Tensor, share: float, rate: float) -> Tensor:
    """Lengthen the step of a sample that succeeded and shorten that of one that failed, for those that walk.

    The step is multiplied by exp(rate · (success − share)), and so stays where `share` of the queries succeed.
    """
    change = rate * (adversarial.to(step.dtype) - share)
    return (step * change.where(rows.walks, 0).exp()).clamp_(max=1)


@dataclass(frozen=True, kw_only=True)
class Boundary(_BoundaryWalk):
    """Boundary attack: a random step on the sphere around the clean image, then a step towards that image.

    Both steps adapt to each sample. Every fifth query stays on the sphere, and its length aims at half of those
    being adversarial; the step towards the clean image aims at a quarter, as in the authors' code. A sample
    costs `queries` forwards, or fewer where a budget is given and met.

    The start is random: uniform noise on the images' own and on ever coarser grids, until one is misclassified,
    then 10 bisections; a sample that finds none is not broken. There is no targeted form, for random images are
    hardly ever of a given class.

    queries: forwards a sample at most, 10,000, the budget of the other attacks of this kind.
    orthogonal_step, source_step: lengths of the steps at first, as shares of the distance, 0.01 as in the
        authors' code (Foolbox).

    Brendel et al. 2018, arXiv 1712.04248, algorithm 1 and sections 2.2 and 2.3.
    """

    name: ClassVar[str] = "boundary"
    paper: ClassVar[str] = "arXiv 1712.04248"

    orthogonal_step: float = 0.01
    source_step: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_shares(self, "orthogonal_step", "source_step")

    def _begin(self, search: Search, rows: Rows) -> None:
        rows.orthogonal_step = search.clean.new_full((len(search),), self.orthogonal_step)
        rows.source_step = search.clean.new_full((len(search),), self.source_step)

    def _propose(self, search: Search, rows: Rows, query: int) -> Tensor:
        offset = rows.images - search.clean
        distance = _length(offset)
        radial = offset / distance
        noise = search.noise("normal", tuple(search.clean.shape[1:]))
        tangent = noise - (noise * radial).sum((1, 2, 3), keepdim=True) * radial
        size = per_pixel(rows.orthogonal_step)
        on_sphere = (radial + size * tangent / _length(tangent)) * (distance / (1 + size.square()).sqrt())
        images: Tensor = (search.clean + on_sphere).clamp_(0, 1)
        if query % ORTHOGONAL_EVERY:
            images = torch.lerp(images, search.clean, per_pixel(rows.source_step))
        return images

    def _learn(self, rows: Rows, adversarial: Tensor, query: int) -> None:
        if query % ORTHOGONAL_EVERY:
            rows.source_step = _adapted(rows.source_step, rows, adversarial, SOURCE_SHARE, ADAPTATION)
        else:
            rows.orthogonal_step = _adapted(rows.orthogonal_step, rows, adversarial, ORTHOGONAL_SHARE, ADAPTATION)


ORTHOGONAL_EVERY = 5
ORTHOGONAL_SHARE, SOURCE_SHARE = 1 / 2, 1 / 4
ADAPTATION = 0.3
"""How much a query changes the logarithm of a step, where a success was sure to fail or the reverse."""


@dataclass(frozen=True, kw_only=True)
class Evolutionary(_BoundaryWalk):
    """Evolutionary attack: a (1+1)-CMA-ES with a diagonal covariance that mutates a few coordinates at a time.

    A mutation changes a twentieth of the coordinates, drawn in proportion to their variances, in a search space
    that is coarser than a large image. The mutant, `deviation` of the distance away and moved by the share
    `source_step` towards the clean image, replaces its parent if it is adversarial; evolution path and
    covariance then learn from the mutation. The share adapts to each sample by the 1/5 success rule. A sample
    costs `queries` forwards, or fewer where a budget is given and met.

    The start is random: uniform noise on the images' own and on ever coarser grids, until one is misclassified,
    then 10 bisections; a sample that finds none is not broken. There is no targeted form, for random images are
    hardly ever of a given class.

    queries: forwards a sample at most, 10,000 as in ARES-Bench.
    source_step: share of the distance by which a mutant is nearer, at first; mu = 0.01 as in ARES-Bench.
    deviation: length of a mutation as a share of the distance, sigma = 0.03 as in ARES-Bench.
    path_decay: share of the evolution path that stays when it learns, 1 − c_c = 0.99 as in ARES-Bench.
    covariance_rate: share of the covariance that is learnt anew, c_cov = 0.001 as in ARES-Bench.
    search_size: largest height and width of the search space, 45 as in the paper; the mutations of larger images
        are upsampled bilinearly.

    Dong et al. 2019, arXiv 1904.04433, algorithm 1; lengths of mutations as in the authors' code (ARES).
    """

    name: ClassVar[str] = "evolutionary"
    paper: ClassVar[str] = "arXiv 1904.04433"

    source_step: float = 0.01
    deviation: float = 0.03
    path_decay: float = 0.99
    covariance_rate: float = 0.001
    search_size: int = 45

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_shares(self, "source_step", "deviation", "path_decay", "covariance_rate")
        check_count("search_size", self.search_size)

    def _begin(self, search: Search, rows: Rows) -> None:
        channels, *size = search.clean.shape[1:]
        rows.variance = search.clean.new_ones(
            len(search), channels, *(min(side, self.search_size) for side in size)
        )
        rows.path = torch.zeros_like(rows.variance)
        rows.source_step = search.clean.new_full((len(search),), self.source_step)

    def _propose(self, search: Search, rows: Rows, query: int) -> Tensor:
        rows.mutation = self._mutation(search, rows)
        move = rows.mutation
        if move.shape != search.clean.shape:
            move = F.interpolate(move, search.clean.shape[2:], mode="bilinear")
        offset = rows.images - search.clean
        distance = _length(offset)
        left = 1 - per_pixel(rows.source_step)
        direction = left * offset + self.deviation * distance * move / _length(move)
        images: Tensor = search.clean + left * distance * direction / _length(direction)
        return images.clamp_(0, 1)

    def _mutation(self, search: Search, rows: Rows) -> Tensor:
        """Draw z from N(0, C) at the coordinates with the largest keys log C_ii + Gumbel noise, 0 elsewhere.

        That draws coordinates without replacement with probabilities in proportion to C_ii.
        """
        shape = tuple(rows.variance.shape[1:])
        gumbel = -(-((search.noise("uniform", shape) + 1) / 2).log()).log()
        keys = (rows.variance.log() + gumbel).flatten(1)
        chosen = keys.topk(max(1, keys.shape[1] // SELECTION), dim=1).indices
        mask = torch.zeros_like(keys).scatter_(1, chosen, 1).view_as(rows.variance)
        mutation: Tensor = mask * rows.variance.sqrt() * search.noise("normal", shape)
        return mutation

    def _learn(self, rows: Rows, adversarial: Tensor, query: int) -> None:
        better = per_pixel(adversarial & rows.walks)
        path = self.path_decay * rows.path + math.sqrt(1 - self.path_decay**2) * rows.mutation
        rows.path = torch.where(better, path, rows.path)
        variance = torch.lerp(rows.variance, path.square(), self.covariance_rate)
        rows.variance = torch.where(better, variance, rows.variance)
        rows.source_step = _adapted(rows.source_step, rows, adversarial, SUCCESS_SHARE, 1 / SUCCESS_TRIALS)


SELECTION = 20
"""One coordinate in so many takes part in a mutation (k = m / 20)."""
SUCCESS_SHARE, SUCCESS_TRIALS = 1 / 5, 30
"""mu · exp(P - 1/5), with P the share of successes in 30 trials, taken up trial by trial."""


def _check_shares(attack: Attack, *keys: str) -> None:
    for key in keys:
        if not 0 < getattr(attack, key) < 1:
            raise ValueError(f"{key}={getattr(attack, key)}: expected a number between 0 and 1")
