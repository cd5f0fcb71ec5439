"""Evaluators: each asks one question of a classifier and answers with a verdict for every sample."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ares_lightning.attacks import Attack, Outcome
from ares_lightning.attacks.guard import full_precision, guarded
from ares_lightning.attacks.search import Passes, predict


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
        self, net: nn.Module, images: Tensor, labels: Tensor, sample_ids: Tensor, seed: int, passes: Passes
    ) -> Iterator[Verdicts]:
        """Yield verdicts on images [N, C, H, W] in [0, 1], labels and sample_ids int64 [N].

        passes: how the network is called; hand in many of its batches at once, for survivors are repacked.
        """


@dataclass(frozen=True)
class CleanEvaluator(Evaluator):
    """Is the clean image classified rightly?"""

    def verdicts(
        self, net: nn.Module, images: Tensor, labels: Tensor, sample_ids: Tensor, seed: int, passes: Passes
    ) -> Iterator[Verdicts]:
        """Yield the clean predictions as verdicts at budget 0 (1 F)."""
        yield Verdicts("none", None, 0.0, clean_outcome(net, images, labels, passes))


@dataclass(frozen=True)
class AttackEvaluator(Evaluator):
    """Does the attack break the sample within its budget?"""

    attack: Attack

    def verdicts(
        self, net: nn.Module, images: Tensor, labels: Tensor, sample_ids: Tensor, seed: int, passes: Passes
    ) -> Iterator[Verdicts]:
        """Yield the attack's verdicts."""
        outcome = self.attack(
            net,
            images,
            labels,
            sample_ids=sample_ids,
            seed=seed,
            batch_size=passes.batch_size,
            precision=passes.precision,
        )
        yield Verdicts(self.attack.name, self.attack.norm, self.attack.threat.eps, outcome)


def clean_outcome(net: nn.Module, images: Tensor, labels: Tensor, passes: Passes) -> Outcome:
    """Return what the clean images show: misclassified samples are broken at distance 0."""
    with guarded(net, images.device), full_precision(images.device):
        prediction = predict(net, images, Passes(passes.batch_size))[1]
    zeros = torch.zeros_like(labels)
    return Outcome(images, prediction != labels, zeros.double(), zeros, zeros, prediction, prediction)


def with_found(known: Outcome, place: Tensor, found: Outcome, rows: Tensor) -> Outcome:
    """Return `known` with its samples at `place` replaced by those of `found` at `rows`."""

    def put(name: str) -> Tensor:
        old: Tensor = getattr(known, name)
        return old.index_copy(0, place, getattr(found, name)[rows])

    return Outcome(**{name: put(name) for name in Outcome.__dataclass_fields__})
