"""One evaluation: every evaluator on every sample, each verdict written once, the summary at the end."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ares_lightning.attacks import Threat
from ares_lightning.attacks.passes import Passes
from ares_lightning.data import Batch, ImageError, ImageSet, subset_hash
from ares_lightning.data.datasets import Unreadable
from ares_lightning.evaluation.corruption_error import corruption_rows
from ares_lightning.evaluation.evaluators import Evaluator, SetsEvaluator, Verdicts
from ares_lightning.evaluation.metrics import summarise
from ares_lightning.evaluation.verdicts import Ledger
from ares_lightning.models import ClassAnswers
from ares_lightning.models.folding import fold_batchnorm

PRECISIONS = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""The type of images, weights and verdicts; bf16 is that of the passes in which an attack searches."""
NUM_PACKED = 4
"""Batches handed to an attack at once, to repack survivors among them; an interruption costs as many."""
NUM_EXAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is asked of a model, and under which conditions.

    evaluators: asked in this order; threat: the threat model of the headline; precision: `fp32` or `fp64`, or
    `bf16` for searches under bf16 autocast with verdicts in fp32; seed: of all noise; dataset: the images; subset:
    how they were chosen from their set, for the record; loader: makes batches of them in canonical order,
    `loader(dataset, skip=<sample ids>, batch_size=<images>)`; batch_size: images in one pass of the network;
    compile: by torch.compile, which takes a while and pays off in long evaluations; eot: draws of a randomised
    model in a clean prediction, attacks have their own.
    """

    evaluators: Sequence[Evaluator]
    threat: Threat
    dataset: ImageSet
    loader: Callable[..., Iterable[Batch]]
    batch_size: int
    subset: str | None = None
    precision: str = "fp32"
    seed: int = 0
    compile: bool = False
    eot: int = 1

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision}: expected one of {', '.join(PRECISIONS)}")

    def fingerprint(self, net: nn.Module) -> str:
        """Return a hash of the model, the set and every question: equal for the same evaluation."""
        parts = [self._fingerprint(evaluator, dataset) for evaluator, dataset in self.questions]
        parts += [str(len(dataset)) for _, dataset in self.questions]
        parts += [model_fingerprint(net), self._set_fingerprint(), str(self.subset), str(self.threat)]
        return hashlib.blake2b(" ".join(parts).encode(), digest_size=6).hexdigest()

    @property
    def questions(self) -> list[tuple[Evaluator, ImageSet]]:
        """Every evaluator with every set that it is asked about."""
        return [
            (evaluator, dataset)
            for evaluator in self.evaluators
            for dataset in evaluator.own_sets or (self.dataset,)
        ]

    @property
    def not_found(self) -> tuple[str, ...]:
        """Keys of the out-of-distribution sets that were looked for and are not there."""
        found = [evaluator.not_found for evaluator in self.evaluators if isinstance(evaluator, SetsEvaluator)]
        return tuple(key for keys in found for key in keys)

    def write_about(self, run_dir: Path, skipped: Mapping[str, str]) -> None:
        """Write `about.json`: which images were asked about and how they were prepared, and what was left out.

        skipped: why images could not be used, by sample name.
        """
        sets = {dataset.name: dataset for _, dataset in self.questions}
        hashes: dict[int, str] = {}
        for dataset in sets.values():
            hashes[id(dataset.source)] = hashes.get(id(dataset.source)) or subset_hash(dataset)
        about = {
            "sets": [
                {
                    "set": dataset.name,
                    "n": len(dataset),
                    "names_hash": hashes[id(dataset.source)],
                    "preparation": dataset.preparation,
                }
                for dataset in sets.values()
            ],
            "not_found": list(self.not_found),
            "skipped": dict(skipped),
        }
        write_json(run_dir / "about.json", about)

    def _fingerprint(self, evaluator: Evaluator, dataset: ImageSet) -> str:
        """Return a hash of everything that decides a verdict on a given model and sample."""
        parts = f"{evaluator.fingerprint(self.seed, self.precision)} {dataset.name} {_source_fingerprint(dataset)}"
        return hashlib.blake2b(parts.encode(), digest_size=8).hexdigest()

    def _set_fingerprint(self) -> str:
        """Return a hash of which images are asked about, and of the first of them as the network sees it."""
        ids = self.dataset.sample_ids.tolist()
        names = [self.dataset.sample_name(sample_id) for sample_id in ids]
        digest = hashlib.blake2b(repr((self.dataset.name, ids, names)).encode(), digest_size=8)
        digest.update(self.dataset.labels.numpy().tobytes())
        digest.update(self.dataset.example().numpy().tobytes())
        return digest.hexdigest()

    def run(self, net: nn.Module, run_dir: Path, device: torch.device) -> list[dict[str, Any]]:
        """Take the verdicts that `run_dir` does not hold yet, and return the summary rows.

        The network is put into eval mode and gives every verdict; searches run on a copy with its batch norms
        folded into the layers before them where that changes no logit but by rounding. Writes `verdicts/`,
        `examples.npz` and `summary.json`. A run that was stopped goes on where it was; verdicts of other models, as
        of an earlier stage of the same training, stay in the table and do not count.
        """
        for evaluator, dataset in self.questions:
            evaluator.check(dataset)
        fingerprint = model_fingerprint(net)
        ledger = Ledger(run_dir / "verdicts")
        known = self._asked(ledger.read(), fingerprint)
        channels, height, width = self.dataset.example().shape
        folded = fold_batchnorm(net.eval().to(device, PRECISIONS[self.precision]), (channels, height, width))
        search_on: nn.Module = folded.network
        if self.compile:
            search_on = torch.compile(search_on, dynamic=True)  # type: ignore[assignment]
        examples = _Examples(self.dataset.classes)
        with _progress() as progress:
            if folded.num_folded or folded.kept:
                progress.console.print(f"for the search, {folded}", highlight=False)
            tasks = {
                evaluator.name: progress.add_task(
                    evaluator.name, total=sum(map(len, evaluator.own_sets or (self.dataset,))), accuracy=""
                )
                for evaluator in self.evaluators
            }
            for evaluator, dataset in self.questions:
                asked, searched = _answering(net, dataset), _answering(search_on, dataset)
                precision = "bf16" if self.precision == "bf16" else "fp32"
                passes = Passes(self.batch_size, precision, self.eot, None if search_on is net else searched)
                self._ask(
                    evaluator,
                    dataset,
                    asked,
                    passes,
                    ledger,
                    known,
                    examples,
                    progress,
                    tasks[evaluator.name],
                    device,
                    fingerprint,
                )
                examples.write(run_dir / "examples.npz")
        verdicts = pd.concat(self._asked(ledger.read(), fingerprint).values())
        main = self.dataset.name
        subsets = {dataset.name: evaluator.subset for evaluator, dataset in self.questions if evaluator.own_sets}
        subsets[main] = self.subset
        summary = summarise(verdicts, self._order, self.threat, main, subsets)
        for evaluator in self.evaluators:
            if isinstance(evaluator, SetsEvaluator):
                own = verdicts[verdicts["evaluator"] == evaluator.name]
                summary += corruption_rows(evaluator.name, own, evaluator.subset)
        write_json(run_dir / "summary.json", summary)
        return summary

    @property
    def _order(self) -> list[tuple[str, str]]:
        """The names of evaluators and sets, in the order in which results are listed."""
        return [(evaluator.name, dataset.name) for evaluator, dataset in self.questions]

    def _asked(self, rows: pd.DataFrame, model: str) -> dict[str, pd.DataFrame]:
        """Return the rows that answer the questions about this model, by the fingerprint of the question."""
        rows = rows[rows["model_fingerprint"] == model]
        answers: dict[Any, pd.DataFrame] = dict(iter(rows.groupby("evaluator_fingerprint", sort=False)))
        asked = {}
        for evaluator, dataset in self.questions:
            key = self._fingerprint(evaluator, dataset)
            own = answers.get(key, rows.iloc[:0])
            asked[key] = own[own["sample_id"].isin(dataset.sample_ids.tolist())]
        return asked

    def _ask(
        self,
        evaluator: Evaluator,
        dataset: ImageSet,
        net: nn.Module,
        passes: Passes,
        ledger: Ledger,
        known: Mapping[str, pd.DataFrame],
        examples: _Examples,
        progress: Progress,
        task: TaskID,
        device: torch.device,
        fingerprint: str,
    ) -> None:
        """Put one evaluator's verdicts on the undecided samples into the ledger, a part a batch."""
        own = self._fingerprint(evaluator, dataset)
        shared = {
            "evaluator": evaluator.name,
            "evaluator_fingerprint": own,
            "model_fingerprint": fingerprint,
            "attack_fingerprint": evaluator.attack_fingerprint,
            "set": dataset.name,
        }
        decided = known[own]["sample_id"].unique()
        progress.update(task, advance=len(decided))
        robust = seen = 0
        packs = self.loader(dataset, skip=decided.tolist(), batch_size=NUM_PACKED * self.batch_size)
        for images, labels, sample_ids in packs:
            pixels = images.to(device).to(PRECISIONS[self.precision]).div_(255)
            answers = list(evaluator.verdicts(net, pixels, labels.to(device), sample_ids, self.seed, passes))
            if dataset.has_several_labels:
                answers = [_by_any_label(answer, dataset, sample_ids) for answer in answers]
            names = [dataset.sample_name(int(i)) for i in sample_ids]
            rows = [self._rows(shared, answer, labels, sample_ids, names) for answer in answers]
            ledger.append(pd.concat(rows, ignore_index=True))
            for answer in answers:
                if answer.attack != "noise" and Threat(str(answer.norm), answer.eps) == self.threat:
                    examples.add(answer, pixels, labels, names)
            robust += int((~answers[-1].outcome.broken).sum())
            seen += len(images)
            progress.update(task, advance=len(images), accuracy=f"{robust / seen:.1%}")

    def _rows(
        self,
        shared: Mapping[str, str | None],
        answer: Verdicts,
        labels: Tensor,
        sample_ids: Tensor,
        names: Sequence[str],
    ) -> pd.DataFrame:
        outcome = answer.outcome
        return pd.DataFrame(
            {
                **shared,
                "sample_id": sample_ids.numpy(),
                "sample_name": names,
                "label": labels.numpy(),
                "clean_prediction": outcome.clean_prediction.cpu().numpy(),
                "adversarial_prediction": outcome.adversarial_prediction.cpu().numpy(),
                "attack": answer.attack,
                "target": None if answer.targets is None else answer.targets.cpu().numpy(),
                "norm": answer.norm,
                "eps": answer.eps,
                "seed": self.seed,
                "precision": self.precision,
                "broken": outcome.broken.cpu().numpy(),
                "distance": outcome.distance.cpu().numpy(),
                "forwards": outcome.forwards.cpu().numpy(),
                "backwards": outcome.backwards.cpu().numpy(),
                "source_fingerprint": answer.source_fingerprint,
            }
        )


def _source_fingerprint(dataset: ImageSet) -> str:
    """Return a hash of the whole set that samples are taken from: names, labels, first image as prepared."""
    if dataset.source not in _FINGERPRINTS:
        labels = dataset.source.labels.labels
        whole = replace(dataset, sample_ids=torch.arange(len(labels)), corruption=None)
        digest = hashlib.blake2b(f"{subset_hash(whole)} {whole.preparation}".encode(), digest_size=8)
        digest.update(labels.numpy().tobytes())
        digest.update(_first_image(whole))
        _FINGERPRINTS[dataset.source] = digest.hexdigest()
    return _FINGERPRINTS[dataset.source]


def _first_image(dataset: ImageSet) -> bytes:
    """Return the pixels of the first image, nothing where it cannot be read: whoever asks about it will be told."""
    try:
        sample = dataset[0]
    except ImageError:
        return b""
    return b"" if isinstance(sample, Unreadable) else sample[0].numpy().tobytes()


_FINGERPRINTS: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def _answering(net: nn.Module, dataset: ImageSet) -> nn.Module:
    """Return a network that answers among the classes of the set."""
    return net if dataset.outputs is None else ClassAnswers(net, dataset.outputs)


def _by_any_label(answer: Verdicts, dataset: ImageSet, sample_ids: Tensor) -> Verdicts:
    """Return clean verdicts on samples that have several right classes."""
    right = dataset.is_right(answer.outcome.clean_prediction, sample_ids)
    return replace(answer, outcome=replace(answer.outcome, broken=~right))


class _Examples:
    """A few adversarial examples for the report: the first found of each class, then others."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.classes = classes
        self._first: dict[int, dict[str, Any]] = {}
        self._others: list[dict[str, Any]] = []
        self._of: Verdicts | None = None

    def add(self, verdicts: Verdicts, clean: Tensor, labels: Tensor, names: Sequence[str]) -> None:
        if self._of is None:
            self._of = verdicts
        if (verdicts.attack, verdicts.norm, verdicts.eps) != (self._of.attack, self._of.norm, self._of.eps):
            return
        outcome = verdicts.outcome
        for place in (outcome.broken & (outcome.distance > 0)).nonzero().squeeze(1).tolist():
            label = int(labels[place])
            is_first = label not in self._first
            if len(self._first if is_first else self._others) == NUM_EXAMPLES:
                continue
            example = {
                "clean": clean[place].float().cpu().numpy(),
                "adversarial": outcome.images[place].float().cpu().numpy(),
                "label": label,
                "clean_prediction": int(outcome.clean_prediction[place]),
                "adversarial_prediction": int(outcome.adversarial_prediction[place]),
                "sample_name": names[place],
            }
            if is_first:
                self._first[label] = example
            else:
                self._others.append(example)

    def write(self, path: Path) -> None:
        if self._of is None or not self._first:
            return
        examples = [self._first[label] for label in sorted(self._first)] + self._others
        examples = examples[:NUM_EXAMPLES]
        columns = {key: np.stack([np.asarray(example[key]) for example in examples]) for key in examples[0]}
        scalars = {"attack": self._of.attack, "norm": self._of.norm, "eps": self._of.eps}
        with open(path, "wb") as file:
            np.savez(file, **columns, **scalars, classes=np.asarray(self.classes))  # type: ignore[arg-type]


def model_fingerprint(net: nn.Module) -> str:
    """Return a hash of a network's weights and structure, the same on every device."""
    digest = hashlib.blake2b(repr(net).encode(), digest_size=8)
    for name, value in net.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is there as a whole or not at all."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, path)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("accuracy {task.fields[accuracy]}"),
        TimeRemainingColumn(),
    )
