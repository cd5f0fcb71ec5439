"""Transfer: examples crafted on one model without feedback are put to every model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ares_lightning.attacks import Attack
from ares_lightning.attacks.guard import Model, full_precision, guarded
from ares_lightning.attacks.passes import Passes, predict
from ares_lightning.attacks.verdict import NonFiniteLogitsError
from ares_lightning.evaluation.evaluators import Evaluator, Verdicts, clean_outcome, lost_outcome
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

        A sample for which a model gives logits that are not finite counts as broken for it, with prediction -1;
        where that is the model which is crafted on, the others are shown the clean image.

        Raises ValueError naming the model which returns probabilities.
        """
        judges: dict[str, Model] = {self.own: net}
        for other in self.others:
            judges[other.name] = other.network.to(images.device, images.dtype)
        try:
            answers = list(self._judged(judges, images, labels, sample_ids, seed, passes))
        except NonFiniteLogitsError:
            finite = [_is_finite(model, images, passes).tolist() for model in judges.values()]
            patterns = list(zip(*finite, strict=True))  # for each sample, which models give finite logits
            answers = []
            for pattern in sorted(set(patterns)):
                same = [place for place, own in enumerate(patterns) if own == pattern]
                places = torch.tensor(same, device=images.device)
                answering = {name: judges[name] for name, is_one in zip(judges, pattern, strict=True) if is_one}
                batch = (images[places], labels[places], sample_ids[torch.tensor(same)])
                lost = [name for name in judges if name not in answering]
                given = self._judged(answering, *batch, seed, passes, lost)
                answers += [replace(answer, places=places) for answer in given]
        yield from answers

    def _judged(
        self,
        judges: Mapping[str, Model],
        images: Tensor,
        labels: Tensor,
        sample_ids: Tensor,
        seed: int,
        passes: Passes,
        lost: Sequence[str] = (),
    ) -> Iterator[Verdicts]:
        """Yield the verdicts of models with finite logits, and of those that are `lost` without asking them."""
        source = judges.get(self.source)
        if source is not None and self.source == self.own and passes.search_on is not None:
            source = passes.search_on
        fingerprints: dict[str, str | None] = {other.name: other.fingerprint for other in self.others}
        unattacked = {name: lost_outcome(images) for name in lost}
        if source is None:
            for name, model in judges.items():
                unattacked[name] = clean_outcome(model, images, labels, sample_ids, seed, passes)
        for attack in self.attacks:
            found = dict(unattacked)
            if source is not None:
                try:
                    found |= attack(
                        source,
                        images,
                        labels,
                        victim=judges,
                        sample_ids=sample_ids,
                        seed=seed,
                        batch_size=passes.batch_size,
                        precision=passes.precision,
                    )
                except NonFiniteLogitsError:
                    raise
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


def _is_finite(model: Model, images: Tensor, passes: Passes) -> Tensor:
    """Return for which clean images a model gives finite logits, bool [N]."""
    with guarded(model, images.device, ("finite",)), full_precision(images.device):
        return predict(model, images, passes)[0].isfinite().all(1)
