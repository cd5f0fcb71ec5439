"""Evaluators: each asks one question of a classifier and answers with a verdict for every sample."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ares_lightning.attacks import Attack, Outcome
from ares_lightning.attacks.guard import full_precision, guarded
from ares_lightning.attacks.search import predicted_classes

CURVE_MULTIPLES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Budgets of a robustness curve where none are given: multiples of the threat model's budget."""


@dataclass(frozen=True)
class Verdicts:
    """The outcome of one attack at one budget on one batch; no attack (`norm` None) means the clean images."""

    attack: str
    norm: str | None
    eps: float
    outcome: Outcome


@dataclass(frozen=True)
class Evaluator(ABC):
    """A named question; `name` stands in every row that it yields."""

    name: str

    def fingerprint(self, seed: int, precision: str) -> str:
        """Return a hash of everything that decides this evaluator's verdicts on a given model and sample."""
        return hashlib.blake2b(f"{self!r} {seed} {precision}".encode(), digest_size=8).hexdigest()

    @abstractmethod
    def verdicts(
        self, net: nn.Module, images: Tensor, labels: Tensor, sample_ids: Tensor, seed: int
    ) -> Iterator[Verdicts]:
        """Yield verdicts on a batch: images [N, C, H, W] in [0, 1], labels and sample_ids int64 [N]."""


@dataclass(frozen=True)
class CleanEvaluator(Evaluator):
    """Is the clean image classified rightly?"""

    def verdicts(
        self, net: nn.Module, images: Tensor, labels: Tensor, sample_ids: Tensor, seed: int
    ) -> Iterator[Verdicts]:
        """Yield the clean predictions as verdicts at budget 0 (1 F)."""
        with guarded(net, images.device), full_precision(images.device):
            yield Verdicts("none", None, 0.0, _clean_outcome(images, labels, predicted_classes(net(images))))


@dataclass(frozen=True)
class AttackEvaluator(Evaluator):
    """Does the attack break the sample within its budget?"""

    attack: Attack

    def verdicts(
        self, net: nn.Module, images: Tensor, labels: Tensor, sample_ids: Tensor, seed: int
    ) -> Iterator[Verdicts]:
        """Yield the attack's verdicts."""
        outcome = self.attack(net, images, labels, sample_ids=sample_ids, seed=seed)
        yield Verdicts(self.attack.name, self.attack.norm, self.attack.threat.eps, outcome)


@dataclass(frozen=True)
class CurveEvaluator(Evaluator):
    """Which budgets does the sample withstand?

    eps: rising grid of budgets. Every budget is fully attacked, from the smallest up, and an adversarial example
    found at one budget counts at all larger ones, where its sample costs nothing more: the curve never rises and
    is at least as strong as independent runs.
    """

    attack: Attack
    eps: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.eps or list(self.eps) != sorted(set(self.eps)):
            raise ValueError(f"eps={list(self.eps)}: expected a rising list of budgets")

    def verdicts(
        self, net: nn.Module, images: Tensor, labels: Tensor, sample_ids: Tensor, seed: int
    ) -> Iterator[Verdicts]:
        """Yield budget 0 (the clean images) and then each budget of the grid."""
        with guarded(net, images.device), full_precision(images.device):
            known = _clean_outcome(images, labels, predicted_classes(net(images)))
        yield Verdicts(self.attack.name, self.attack.norm, 0.0, known)
        for eps in self.eps:
            survivors = (~known.broken).nonzero().squeeze(1)
            known = replace(
                known, forwards=torch.zeros_like(known.forwards), backwards=torch.zeros_like(known.backwards)
            )
            if len(survivors):
                found = self.attack.replace(eps=eps)(
                    net,
                    images[survivors],
                    labels[survivors],
                    sample_ids=sample_ids[survivors.to(sample_ids.device)],
                    seed=seed,
                )
                known = _updated(known, survivors, found)
            yield Verdicts(self.attack.name, self.attack.norm, eps, known)


def _clean_outcome(images: Tensor, labels: Tensor, prediction: Tensor) -> Outcome:
    zeros = torch.zeros_like(labels)
    return Outcome(images, prediction != labels, zeros.double(), zeros, zeros, prediction, prediction)


def _updated(known: Outcome, place: Tensor, found: Outcome) -> Outcome:
    """Return `known` with the samples at `place` replaced by what was found on them."""

    def put(name: str) -> Tensor:
        old: Tensor = getattr(known, name)
        return old.index_copy(0, place, getattr(found, name))

    return Outcome(**{name: put(name) for name in Outcome.__dataclass_fields__})


def curve_budgets(eps: float, given: Sequence[float] | None) -> tuple[float, ...]:
    """Return the grid of a curve: the given budgets, or the usual multiples of `eps`."""
    return tuple(given) if given else tuple(multiple * eps for multiple in CURVE_MULTIPLES)
