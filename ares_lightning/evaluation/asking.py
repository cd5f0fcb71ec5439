"""Putting questions to a model: samples are dealt out, verdicts become rows, and survivors are dealt out anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from ares_lightning.attacks import Outcome
from ares_lightning.attacks.passes import Passes
from ares_lightning.attacks.verdict import NonFiniteLogitsError
from ares_lightning.data import Batch, ImageSet
from ares_lightning.evaluation.evaluators import Evaluator, Stage, Verdicts, lost_outcome
from ares_lightning.evaluation.progress import EvaluationProgress
from ares_lightning.evaluation.verdicts import SCHEMA, Ledger
from ares_lightning.evaluation.workers import Workers
from ares_lightning.models import ClassAnswers

PRECISIONS = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""The type of images, weights and verdicts; bf16 is that of the passes in which an attack searches."""
NUM_PACKED = 4
"""Batches handed to an attack at once, to repack survivors among them; an interruption costs as many."""


@dataclass(frozen=True, eq=False)
class Question:
    """An evaluator with a set that it is asked about; `fingerprint`: of all that decides a verdict on a model."""

    evaluator: Evaluator
    dataset: ImageSet
    fingerprint: str

    def left(self, rows: pa.Table, stage: Stage) -> list[int]:
        """Return the ids of the samples that still have to be put to a stage, given the rows so far."""
        done = rows["broken"].to_numpy()
        if stage.key is None:
            done = np.ones_like(done)
        else:
            attack, eps = stage.key
            done = done | (rows["attack"].to_numpy() == attack) & (rows["eps"].to_numpy() == eps)
        ids = self.dataset.sample_ids.numpy()
        left: list[int] = ids[~np.isin(ids, rows["sample_id"].to_numpy()[done])].tolist()
        return left


@dataclass(frozen=True, eq=False, kw_only=True)
class Asking:
    """A model under evaluation in this process, and where its verdicts go.

    net: gives every verdict; search_on: what an attack searches on in its place, a copy that is faster.
    model_fingerprint: of `net`. loader: makes batches of a set, `loader(dataset, batch_size=<images>)`. raises:
    what fails in an evaluator is raised, where it is else told in one line while the others go on.
    """

    net: nn.Module
    search_on: nn.Module
    model_fingerprint: str
    device: torch.device
    loader: Callable[..., Iterable[Batch]]
    batch_size: int
    precision: str
    seed: int
    eot: int
    ledger: Ledger
    save_images: bool
    workers: Workers
    progress: EvaluationProgress
    raises: bool = False

    def ask(self, question: Question, rows: pa.Table) -> tuple[pa.Table, str | None]:
        """Have all processes answer a question; return all its rows to the leader, and in one line what failed.

        rows: the answers so far, known to the leader.
        """
        self.progress.begin(question.evaluator, question.dataset.name, rows)
        failed: str | None = None
        for number, stage in enumerate(question.evaluator.stages):
            ids = self.workers.share(question.left(rows, stage) if self.workers.leads else [])
            if not ids:
                continue
            answers = self.workers.gather(self._put(question, number, stage, self.workers.mine(ids)))
            rows = pa.concat_tables([rows, *(table for table, _ in answers)])
            failed = self.workers.share(next((error for _, error in answers if error), None))
            if failed:
                break
        self.progress.end(len(question.dataset))
        return rows, failed

    def _put(self, question: Question, number: int, stage: Stage, ids: list[int]) -> tuple[pa.Table, str | None]:
        """Put samples to a stage, pack by pack; return the rows, and in one line what failed.

        What is wrong with the images, and with the disk, is raised.
        """
        tables = [SCHEMA.empty_table()]
        trouble = f"{question.fingerprint} {self.model_fingerprint} failed"
        try:
            for images, labels, sample_ids in self._packs(question.dataset, ids):
                if self.workers.add(trouble, 0):
                    break
                try:
                    answers = self._answers(question, stage, self.pixels(images), labels, sample_ids)
                    new = [self._rows(question, answer, labels, sample_ids) for answer in answers]
                    kept = self._kept(answers, new)
                except Exception as error:
                    if self.raises:
                        raise
                    self.workers.add(trouble, 1)
                    return pa.concat_tables(tables), told_in_one_line(error)
                self.ledger.append(pa.concat_tables(new), kept)
                self.progress.advance(question.evaluator, number, answers)
                tables += new
        finally:
            self.ledger.flush()
        return pa.concat_tables(tables), None

    def again(self, question: Question, stage: Stage, ids: list[int]) -> Iterator[tuple[Batch, list[Verdicts]]]:
        """Yield images in [0, 1], labels and ids of samples, with what a stage says of them; writes nothing."""
        for images, labels, sample_ids in self._packs(question.dataset, ids):
            pixels = self.pixels(images)
            yield (pixels, labels, sample_ids), self._answers(question, stage, pixels, labels, sample_ids)

    def pixels(self, images: Tensor) -> Tensor:
        """Return uint8 images as numbers in [0, 1], on the device and in the precision of the evaluation."""
        return images.to(self.device).to(PRECISIONS[self.precision]).div_(255)

    def _packs(self, dataset: ImageSet, ids: list[int]) -> Iterable[Batch]:
        places = torch.searchsorted(dataset.sample_ids, torch.tensor(ids, dtype=torch.int64))
        return self.loader(dataset.take(places), batch_size=NUM_PACKED * self.batch_size)

    def _answers(
        self, question: Question, stage: Stage, images: Tensor, labels: Tensor, sample_ids: Tensor
    ) -> list[Verdicts]:
        """Return a stage's verdicts; samples for which the logits are not finite are broken, with prediction -1."""
        asked, searched = (_answering(net, question.dataset, self.device) for net in (self.net, self.search_on))
        precision = "bf16" if self.precision == "bf16" else "fp32"
        passes = Passes(self.batch_size, precision, self.eot, None if self.search_on is self.net else searched)
        try:
            given = (images, labels.to(self.device), sample_ids)
            answers = list(stage.verdicts(asked, *given, self.seed, passes))
            _check_complete(type(stage).__name__, answers, len(sample_ids))
        except NonFiniteLogitsError as error:
            strange = torch.isin(sample_ids, torch.tensor(error.sample_ids))
            if not bool(strange.any()):
                raise
            rest = (~strange).nonzero().squeeze(1)
            found = self._answers(question, stage, images[rest.to(self.device)], labels[rest], sample_ids[rest])
            return [_with_lost(answer, images, rest, strange.nonzero().squeeze(1)) for answer in found]
        if question.dataset.has_several_labels:
            answers = [_by_any_label(answer, question.dataset, sample_ids) for answer in answers]
        return answers

    def _rows(self, question: Question, answer: Verdicts, labels: Tensor, sample_ids: Tensor) -> pa.Table:
        outcome, dataset = answer.outcome, question.dataset
        if answer.places is not None:
            places = answer.places.cpu()
            labels, sample_ids = labels[places], sample_ids[places]
        constants = {
            "evaluator": question.evaluator.name,
            "evaluator_fingerprint": question.fingerprint,
            "model_fingerprint": answer.model_fingerprint or self.model_fingerprint,
            "set": answer.of_set or dataset.name,
            "attack": answer.attack,
            "attack_fingerprint": question.evaluator.attack_fingerprint,
            "norm": answer.norm,
            "eps": answer.eps,
            "seed": self.seed,
            "precision": self.precision,
            "source_fingerprint": answer.source_fingerprint,
        }
        columns: dict[str, Any] = {key: [value] * len(labels) for key, value in constants.items()}
        columns |= {
            "sample_id": sample_ids.numpy(),
            "sample_name": [dataset.sample_name(i) for i in sample_ids.tolist()],
            "label": labels.numpy(),
            "target": [None] * len(labels) if answer.targets is None else answer.targets.cpu().numpy(),
        }
        tensors = ("clean_prediction", "adversarial_prediction", "broken", "distance", "forwards", "backwards")
        columns |= {name: getattr(outcome, name).cpu().numpy() for name in tensors}
        return pa.Table.from_pydict(columns, schema=SCHEMA)

    def _kept(
        self, answers: Sequence[Verdicts], rows_of: Sequence[pa.Table]
    ) -> list[tuple[pa.Table, np.ndarray[Any, Any]]]:
        """Return the rows of adversarial examples with the images, where those are wanted."""
        kept = []
        for answer, rows in zip(answers, rows_of, strict=True) if self.save_images else ():
            outcome = answer.outcome
            found = (outcome.broken & (outcome.distance > 0)).cpu()
            is_new = answer.places is None or bool((outcome.forwards > 0).any())
            if is_new and bool(found.any()):
                kept.append((rows.filter(found.numpy()), outcome.images.cpu()[found].float().numpy()))
        return kept


def told_in_one_line(error: Exception) -> str:
    """Return the kind of an error and what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _check_complete(kind: str, answers: Sequence[Verdicts], num_samples: int) -> None:
    """Raise ValueError unless a stage, of the class `kind`, has answered for every sample, in every field."""
    told = torch.zeros(num_samples, dtype=torch.bool)
    for answer in answers:
        places = torch.arange(num_samples) if answer.places is None else answer.places.cpu()
        for name in Outcome.__dataclass_fields__:
            num_given = len(getattr(answer.outcome, name))
            if num_given != len(places):
                raise ValueError(
                    f"{kind}.verdicts yields an outcome with {num_given} {name} for {len(places)} samples; yield "
                    "one for each"
                )
        told[places] = True
    if not answers or not bool(told.all()):
        raise ValueError(
            f"{kind}.verdicts yields verdicts on {int(told.sum())} of {num_samples} samples; yield one for each"
        )


def _answering(net: nn.Module, dataset: ImageSet, device: torch.device) -> nn.Module:
    """Return a network that answers among the classes of the set."""
    return net if dataset.outputs is None else ClassAnswers(net, dataset.outputs).to(device)


def _with_lost(answer: Verdicts, images: Tensor, rest: Tensor, strange: Tensor) -> Verdicts:
    """Return an answer about some samples, at the places `rest`, with those at `strange` as broken beside them."""
    outcome, lost = answer.outcome, lost_outcome(images[strange])
    places = torch.cat([rest if answer.places is None else rest[answer.places.cpu()], strange])
    both = {name: torch.cat([getattr(outcome, name), getattr(lost, name)]) for name in Outcome.__dataclass_fields__}
    targets = None if answer.targets is None else torch.cat([answer.targets, lost.clean_prediction])
    return replace(answer, outcome=Outcome(**both), places=places, targets=targets)


def _by_any_label(answer: Verdicts, dataset: ImageSet, sample_ids: Tensor) -> Verdicts:
    """Return clean verdicts on samples that have several right classes."""
    right = dataset.is_right(answer.outcome.clean_prediction, sample_ids)
    return replace(answer, outcome=replace(answer.outcome, broken=~right))
