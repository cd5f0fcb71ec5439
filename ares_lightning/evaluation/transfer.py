"""Transfer: examples crafted on one model without feedback are put to every model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ares_lightning.attacks import Attack
from ares_lightning.attacks.guard import Model, full_precision, guarded
from ares_lightning.attacks.passes import Passes, predict
from ares_lightning.attacks.verdict import NonFiniteLogitsError
from ares_lightning.evaluation.evaluators import Evaluator, Verdicts
from ares_lightning.evaluation.summary import accuracy_row


@dataclass(frozen=True, eq=False)
class OtherModel:
    """A model beside the one that is evaluated: its name, the network, the fingerprint of that."""

    name: str
    network: nn.Module
    fingerprint: str


@dataclass(frozen=True)
class TransferEvaluator(Evaluator):
    """Which models do the examples fool that are crafted on one of them?

    attacks: each makes its examples of a batch once, for all models to judge. own: the name of the model that is
    evaluated. others: the models beside it. source: the name of the one that is crafted on. own_fingerprint: of the
    model that is evaluated, known once there is one.
    """

    attacks: tuple[Attack, ...]
    own: str
    others: tuple[OtherModel, ...] = field(repr=False, compare=False)
    source: str
    own_fingerprint: str = ""

    def asked_of(self, model: str) -> TransferEvaluator:
        """Return the evaluator with the fingerprint of the model that is evaluated.

        Raises ValueError where that is one of the others.
        """
        for other in self.others:
            if other.fingerprint == model:
                raise ValueError(f"eval.{self.name}.models: {other.name} is the evaluated model; leave it out")
        return replace(self, own_fingerprint=model)

    @property
    def models(self) -> dict[str, str]:
        """Names of all models by their fingerprints."""
        return {self.own_fingerprint: self.own} | {other.fingerprint: other.name for other in self.others}

    @property
    def source_fingerprint(self) -> str:
        """The fingerprint of the model that is crafted on."""
        return next(fingerprint for fingerprint, name in self.models.items() if name == self.source)

    def _identity(self) -> str:
        attacks = [attack.fingerprint for attack in self.attacks]
        return f"{self.name} {attacks} {self.source_fingerprint} {sorted(self.models)}"

    def verdicts(
        self, net: nn.Module, images: Tensor, labels: Tensor, sample_ids: Tensor, seed: int, passes: Passes
    ) -> Iterator[Verdicts]:
        """Yield the verdict of every model on the examples of every attack; the evaluated one's has the passes.

        Raises ValueError naming the model whose logits are not finite, or which returns probabilities.
        """
        judges: dict[str, Model] = {self.own: net}
        for other in self.others:
            judges[other.name] = other.network.to(images.device, images.dtype)
        fingerprints: dict[str, str | None] = {other.name: other.fingerprint for other in self.others}
        is_own = self.source == self.own
        source = passes.search_on if is_own and passes.search_on is not None else judges[self.source]
        for attack in self.attacks:
            try:
                found = attack(
                    source,
                    images,
                    labels,
                    victim=judges,
                    sample_ids=sample_ids,
                    seed=seed,
                    batch_size=passes.batch_size,
                    precision=passes.precision,
                )
            except NonFiniteLogitsError as error:
                name = _first_not_finite(judges, images, passes)
                raise ValueError(f"{name}: {error}") from error
            except ValueError as error:
                raise ValueError(f"{self.source}: {error}") from error
            for name, outcome in found.items():
                if name != self.own:  # the examples were made once
                    nothing = torch.zeros_like(outcome.forwards)
                    outcome = replace(outcome, forwards=nothing, backwards=nothing)
                yield Verdicts(
                    attack.name,
                    attack.norm,
                    attack.threat.eps,
                    outcome,
                    model_fingerprint=fingerprints.get(name),
                    source_fingerprint=self.source_fingerprint,
                )

    def further_rows(self, verdicts: pd.DataFrame) -> list[dict[str, Any]]:
        """Return `transfer_accuracy` of every model under every attack, with the names of source and model."""
        rows = []
        for attack in self.attacks:
            for fingerprint, name in self.models.items():
                is_meant = (verdicts["attack"] == attack.name) & (verdicts["model_fingerprint"] == fingerprint)
                group = verdicts[is_meant]
                row = accuracy_row(
                    *(self.name, "transfer_accuracy", ~group["broken"], group),
                    *(self.subset, attack.name, attack.threat.eps),
                )
                names = {"source": self.source, "model": name}
                rows.append({**row, **names, "attack_fingerprint": attack.fingerprint})
        return rows


def _first_not_finite(models: Mapping[str, Model], images: Tensor, passes: Passes) -> str:
    """Return the name of the first model that gives logits that are not finite for clean images."""
    for name, model in models.items():
        with guarded(model, images.device, ("finite",)), full_precision(images.device):
            if not bool(predict(model, images, passes)[0].isfinite().all()):
                return name
    raise AssertionError("every model gives finite logits")
