"""One evaluation: every evaluator on every sample, each verdict written once, the summary at the end."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ares_lightning.attacks import Threat
from ares_lightning.attacks.passes import Passes
from ares_lightning.data import Batch, ImageSet
from ares_lightning.evaluation.evaluators import Evaluator, Verdicts
from ares_lightning.evaluation.metrics import summarise
from ares_lightning.evaluation.verdicts import Ledger
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
        parts = [evaluator.fingerprint(self.seed, self.precision) for evaluator in self.evaluators]
        parts += [model_fingerprint(net), self._set_fingerprint(), str(self.subset), str(self.threat)]
        return hashlib.blake2b(" ".join(parts).encode(), digest_size=6).hexdigest()

    def _set_fingerprint(self) -> str:
        """Return a hash of which images are asked about, and of the first of them as the network sees it."""
        ids = self.dataset.sample_ids.tolist()
        names = [self.dataset.sample_name(sample_id) for sample_id in ids]
        digest = hashlib.blake2b(repr((self.dataset.name, ids, names)).encode(), digest_size=8)
        digest.update(self.dataset.labels.numpy().tobytes())
        digest.update(self.dataset[0][0].numpy().tobytes())
        return digest.hexdigest()

    def run(self, net: nn.Module, run_dir: Path, device: torch.device) -> list[dict[str, Any]]:
        """Take the verdicts that `run_dir` does not hold yet, and return the summary rows.

        The network is put into eval mode and gives every verdict; searches run on a copy with its batch norms
        folded into the layers before them where that changes no logit but by rounding. Writes `verdicts/`,
        `examples.npz` and `summary.json`. A run that was stopped goes on where it was; verdicts of other models, as
        of an earlier stage of the same training, stay in the table and do not count.
        """
        for evaluator in self.evaluators:
            evaluator.check(self.dataset.labels, self.dataset.sample_ids)
        fingerprint = model_fingerprint(net)
        ledger = Ledger(run_dir / "verdicts")
        known = self._asked(ledger.read(), fingerprint)
        channels, height, width = self.dataset[0][0].shape
        folded = fold_batchnorm(net.eval().to(device, PRECISIONS[self.precision]), (channels, height, width))
        search_on = torch.compile(folded.network, dynamic=True) if self.compile else folded.network
        precision = "bf16" if self.precision == "bf16" else "fp32"
        passes = Passes(self.batch_size, precision, self.eot, None if search_on is net else search_on)
        examples = _Examples(self.dataset.classes)
        with _progress() as progress:
            if folded.num_folded or folded.kept:
                progress.console.print(f"for the search, {folded}", highlight=False)
            for evaluator in self.evaluators:
                self._ask(evaluator, net, passes, ledger, known, examples, progress, device, fingerprint)
                examples.write(run_dir / "examples.npz")
        current = {evaluator.fingerprint(self.seed, self.precision) for evaluator in self.evaluators}
        verdicts = self._asked(ledger.read(), fingerprint)
        verdicts = verdicts[verdicts["evaluator_fingerprint"].isin(current)]
        summary = summarise(verdicts, [e.name for e in self.evaluators], self.threat, self.subset)
        write_json(run_dir / "summary.json", summary)
        return summary

    def _asked(self, rows: pd.DataFrame, model: str) -> pd.DataFrame:
        """Return the rows about this model and these samples."""
        of_samples = rows["sample_id"].isin(self.dataset.sample_ids.tolist()) & (rows["set"] == self.dataset.name)
        return rows[of_samples & (rows["model_fingerprint"] == model)]

    def _ask(
        self,
        evaluator: Evaluator,
        net: nn.Module,
        passes: Passes,
        ledger: Ledger,
        known: pd.DataFrame,
        examples: _Examples,
        progress: Progress,
        device: torch.device,
        fingerprint: str,
    ) -> None:
        """Put one evaluator's verdicts on the undecided samples into the ledger, a part a batch."""
        own = evaluator.fingerprint(self.seed, self.precision)
        shared = {
            "evaluator": evaluator.name,
            "evaluator_fingerprint": own,
            "model_fingerprint": fingerprint,
            "attack_fingerprint": evaluator.attack_fingerprint,
        }
        decided = known[known["evaluator_fingerprint"] == own]
        task = progress.add_task(
            evaluator.name, total=len(self.dataset), completed=decided["sample_id"].nunique(), accuracy=""
        )
        robust = seen = 0
        packs = self.loader(
            self.dataset, skip=decided["sample_id"].unique().tolist(), batch_size=NUM_PACKED * self.batch_size
        )
        for images, labels, sample_ids in packs:
            pixels = images.to(device).to(PRECISIONS[self.precision]).div_(255)
            answers = list(evaluator.verdicts(net, pixels, labels.to(device), sample_ids, self.seed, passes))
            rows = [self._rows(shared, answer, labels, sample_ids) for answer in answers]
            ledger.append(pd.concat(rows, ignore_index=True))
            names = [self.dataset.sample_name(int(i)) for i in sample_ids]
            for answer in answers:
                if answer.attack != "noise" and Threat(str(answer.norm), answer.eps) == self.threat:
                    examples.add(answer, pixels, labels, names)
            robust += int((~answers[-1].outcome.broken).sum())
            seen += len(images)
            progress.update(task, advance=len(images), accuracy=f"{robust / seen:.1%}")

    def _rows(
        self, shared: Mapping[str, str | None], answer: Verdicts, labels: Tensor, sample_ids: Tensor
    ) -> pd.DataFrame:
        outcome = answer.outcome
        return pd.DataFrame(
            {
                **shared,
                "set": self.dataset.name,
                "sample_id": sample_ids.numpy(),
                "sample_name": [self.dataset.sample_name(int(i)) for i in sample_ids],
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
            }
        )


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


def write_json(path: Path, content: Sequence[Mapping[str, Any]]) -> None:
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
