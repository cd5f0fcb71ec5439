"""One evaluation: every evaluator on every sample, each verdict written once, the summary at the end."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from ares_lightning.atomic import replacing
from ares_lightning.attacks import Threat
from ares_lightning.data import Batch, ImageSet
from ares_lightning.evaluation.about import about_evaluators, about_run, about_sets
from ares_lightning.evaluation.asking import PRECISIONS, Asking, Question, told_in_one_line
from ares_lightning.evaluation.evaluators import Evaluator, SetsEvaluator
from ares_lightning.evaluation.examples import write_examples
from ares_lightning.evaluation.fingerprints import model_fingerprint, set_fingerprint, source_fingerprint
from ares_lightning.evaluation.progress import EvaluationProgress
from ares_lightning.evaluation.sanity import Check, Probes, SanityAttack, run_checks, sanity_report, take_probes
from ares_lightning.evaluation.summary import summarise
from ares_lightning.evaluation.verdicts import SCHEMA, Ledger
from ares_lightning.evaluation.workers import Workers
from ares_lightning.models.folding import fold_batchnorm


@dataclass(frozen=True)
class Failure:
    """A question that an evaluator could not answer, and in one line why."""

    evaluator: str
    set: str
    error: str


@dataclass(frozen=True)
class Results:
    """What an evaluation has found out: rows of summary.json, questions that failed, the verdict rows.

    checks: whether that can be believed. skipped: why images could not be used, by sample name.
    """

    summary: list[dict[str, Any]] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    verdicts: pa.Table = field(default_factory=SCHEMA.empty_table)
    checks: list[Check] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is asked of a model, and under which conditions.

    evaluators: asked in this order; threat: the threat model of the headline; precision: `fp32` or `fp64`, or
    `bf16` for searches under bf16 autocast with verdicts in fp32; seed: of all noise; dataset: the images; subset:
    how they were chosen from their set, for the record; loader: makes batches of a set in canonical order,
    `loader(dataset, batch_size=<images>)`; batch_size: images in one pass of the network; name: of the model;
    compile: by torch.compile, which takes a while and pays off in long evaluations; eot: draws of a random model
    in a clean prediction, attacks have their own; save_images: keep adversarial images; raises: what fails in an
    evaluator is raised at once; left_out: evaluators of a suite that lack what they need, for the record.
    """

    evaluators: Sequence[Evaluator]
    threat: Threat
    dataset: ImageSet
    loader: Callable[..., Iterable[Batch]]
    batch_size: int
    subset: str | None = None
    precision: str = "fp32"
    seed: int = 0
    name: str = "model"
    compile: bool = False
    eot: int = 1
    save_images: bool = False
    raises: bool = False
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision}: expected one of {', '.join(PRECISIONS)}")

    def fingerprint(self, net: nn.Module) -> str:
        """Return a hash of the model, the set and every question: equal for the same evaluation."""
        return self._fingerprint_for(model_fingerprint(net))

    def _fingerprint_for(self, model: str) -> str:
        questions = self.asked_of(model).questions
        parts = [question.fingerprint for question in questions]
        parts += [f"{len(question.dataset)} {question.evaluator.subset}" for question in questions]
        parts += [model, set_fingerprint(self.dataset), str(self.subset), str(self.threat)]
        return hashlib.blake2b(" ".join(parts).encode(), digest_size=6).hexdigest()

    def asked_of(self, model: str) -> Evaluation:
        """Return the evaluation as it is put to the model of this fingerprint."""
        return replace(self, evaluators=[evaluator.asked_of(model) for evaluator in self.evaluators])

    @property
    def questions(self) -> list[Question]:
        """Every evaluator with every set that it is asked about."""
        return [
            Question(evaluator, dataset, self._fingerprint(evaluator, dataset))
            for evaluator in self.evaluators
            for dataset in evaluator.own_sets or (self.dataset,)
        ]

    @property
    def not_found(self) -> tuple[str, ...]:
        """Keys of the out-of-distribution sets that were looked for and are not there, and what was left out."""
        found = [evaluator.not_found for evaluator in self.evaluators if isinstance(evaluator, SetsEvaluator)]
        return (*self.left_out, *(key for keys in found for key in keys))

    @property
    def models(self) -> dict[str, str]:
        """Names of the models that are judged or crafted on, by their fingerprints."""
        names: dict[str, str] = {}
        for evaluator in self.evaluators:
            names |= evaluator.models
        return names

    def check(self) -> None:
        """Raise ValueError for a set that an evaluator cannot be asked about."""
        for question in self.questions:
            question.evaluator.check(question.dataset)

    def check_ledger(self, run_dir: Path, net: nn.Module, *, others: bool) -> None:
        """Raise ValueError where the verdicts in `run_dir` are those of other settings than these.

        others: whether those of other models may lie there, as of an earlier stage of the same training.
        """
        own, ledger = model_fingerprint(net), Ledger(run_dir / "verdicts")
        rows, set_aside = ledger.read()
        for part in set_aside:
            print(_set_aside(part))
        direct = rows.filter(rows["source_fingerprint"].is_null())
        models = sorted(set(direct["model_fingerprint"].to_pylist()) - {own})
        if models and not others:
            raise ValueError(
                f"run_dir={run_dir}: holds verdicts of model {models[0]}, this one is {own}; give another run_dir"
            )
        rows = rows.filter(rows["model_fingerprint"].to_numpy() == own)
        names = ("evaluator", "set", "source_fingerprint", "evaluator_fingerprint")
        there = set(zip(*(rows[name].to_pylist() for name in names), strict=True))
        for question in self.asked_of(own).questions:
            name, of_set, now = question.evaluator.name, question.dataset.name, question.fingerprint
            asked = (name, of_set, question.evaluator.source_fingerprint)
            before = {fingerprint for *key, fingerprint in there if tuple(key) == asked} - {now}
            if before:
                raise ValueError(
                    f"run_dir={run_dir}: holds verdicts of eval.{name} on {of_set} under other settings, of "
                    f"fingerprint {min(before)}, these have {now}; give another run_dir"
                )

    def run(
        self,
        net: nn.Module,
        run_dir: Path,
        device: torch.device,
        workers: Workers | None = None,
        skipped: Mapping[str, str] | None = None,
    ) -> Results:
        """Take the verdicts that `run_dir` does not hold yet; return what follows from all of them, to the leader.

        The network is put into eval mode and gives every verdict; searches run on a copy with its batch norms
        folded into the layers before them where that changes no logit but by rounding. Writes `verdicts/`,
        `examples.npz`, `about.json` and `summary.json`. A run that was stopped goes on where it was; verdicts of
        other models, as of an earlier stage of the same training, stay in the table and do not count. An evaluator
        that fails is told of in the results, and the others go on.

        workers: this process among those that share the work. skipped: why images could not be used, by sample
        name, as the loaders of this process write it down.
        """
        started, workers = time.time(), workers or Workers()
        results, asking, answered = self.ask(net, run_dir, device, workers)
        all_skipped = {name: why for each in workers.gather(dict(skipped or {})) for name, why in each.items()}
        checks: list[Check] = []
        if workers.leads:
            write_examples(run_dir / "examples.npz", asking, answered, self.threat)
            probes = self._probed(asking, results.failed)
            facts = {
                "model_fingerprint": asking.model_fingerprint,
                "fingerprint": self._fingerprint_for(asking.model_fingerprint),
                "device": _device_name(device),
                "world_size": workers.world_size,
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
                "seconds": round(time.time() - started, 3),
            }
            about = {
                "run": about_run(net, **facts),
                "models": self.asked_of(asking.model_fingerprint).models | {asking.model_fingerprint: self.name},
                "sets": about_sets(self.questions),
                "not_found": list(self.not_found),
                "skipped": all_skipped,
                "evaluators": about_evaluators(answered),
                "failed": [asdict(failure) for failure in results.failed],
            }
            own = results.verdicts["model_fingerprint"].to_numpy() == asking.model_fingerprint
            judged = (self.threat, self.dataset.name, probes, self.eot, self.dataset.has_several_labels)
            checks = run_checks(results.verdicts.filter(own).to_pandas(), results.summary, about, *judged)
            write_json(run_dir / "about.json", about)
            write_json(run_dir / "sanity.json", sanity_report(checks, asking.model_fingerprint, probes))
            write_json(run_dir / "summary.json", results.summary)
        workers.share(None)  # nobody leaves before the leader is done
        return replace(results, checks=checks, skipped=all_skipped)

    @torch.inference_mode(False)
    def ask(
        self,
        net: nn.Module,
        run_dir: Path,
        device: torch.device,
        workers: Workers | None = None,
        show: bool = True,
    ) -> tuple[Results, Asking, list[tuple[Question, pa.Table]]]:
        """Do what `run` does but write verdicts alone; return besides who asked, and each question's rows."""
        self.check()
        workers = workers or Workers()
        fingerprint = model_fingerprint(net)
        if not workers.share(workers.gather(fingerprint) == [fingerprint] * workers.world_size):
            raise ValueError("the processes have different weights; they must load the same checkpoint")
        images = run_dir / "images" if self.save_images else None
        ledger = Ledger(run_dir / "verdicts", workers.rank, images)
        channels, height, width = self.dataset.example().shape
        folded = fold_batchnorm(net.eval().to(device, PRECISIONS[self.precision]), (channels, height, width))
        search_on: nn.Module = folded.network
        if self.compile:
            search_on = torch.compile(search_on, dynamic=True)  # type: ignore[assignment]
        questions = self.asked_of(fingerprint).questions
        answered: list[tuple[Question, pa.Table]] = []
        failed: list[Failure] = []
        total = sum(len(question.dataset) for question in questions)
        with EvaluationProgress(total, workers, show) as progress:
            known = SCHEMA.empty_table()
            if workers.leads:
                known, set_aside = ledger.read()
                for part in set_aside:
                    progress.say(_set_aside(part))
            if folded.num_folded or folded.kept:
                progress.say(f"for the search, {folded}")
            asking = Asking(
                net=net,
                search_on=search_on,
                model_fingerprint=fingerprint,
                device=device,
                loader=self.loader,
                batch_size=self.batch_size,
                precision=self.precision,
                seed=self.seed,
                eot=self.eot,
                ledger=ledger,
                save_images=self.save_images,
                workers=workers,
                progress=progress,
                raises=self.raises,
            )
            for question in questions:
                rows, error = asking.ask(question, _answers(known, question, fingerprint))
                if error is None:
                    answered.append((question, rows))
                else:
                    failed.append(Failure(question.evaluator.name, question.dataset.name, error))
                    progress.say(f"eval.{question.evaluator.name} failed on {question.dataset.name}: {error}")
        verdicts = pa.concat_tables([SCHEMA.empty_table(), *(rows for _, rows in answered)])
        summary = (
            summarise(answered, fingerprint, self.threat, self.dataset.name, self.subset) if workers.leads else []
        )
        return Results(summary, failed, verdicts), asking, answered

    def _probed(self, asking: Asking, failed: list[Failure]) -> Probes | None:
        """Return what was measured on the model, where that is asked for; what fails is added to `failed`."""
        subset = next((e.own_sets[0] for e in self.evaluators if isinstance(e, SanityAttack)), None)
        if subset is None:
            return None
        for images, labels, _ids in asking.loader(subset, batch_size=len(subset)):
            given = (asking.net, asking.pixels(images), labels.to(asking.device), self.threat)
            try:
                return take_probes(*given, seed=self.seed, batch_size=self.batch_size)
            except Exception as error:
                if self.raises:
                    raise
                failed.append(Failure("sanity", self.dataset.name, told_in_one_line(error)))
        return None

    def _fingerprint(self, evaluator: Evaluator, dataset: ImageSet) -> str:
        """Return a hash of everything that decides a verdict on a given model and sample."""
        parts = f"{evaluator.fingerprint(self.seed, self.precision)} {dataset.name} {source_fingerprint(dataset)}"
        return hashlib.blake2b(parts.encode(), digest_size=8).hexdigest()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _set_aside(part: Path) -> str:
    return f"{part}: could not be read and was set aside under this name; its samples are asked again"


def _answers(rows: pa.Table, question: Question, model: str) -> pa.Table:
    """Return the rows that answer a question about a model; of images crafted on others those on all models."""
    own = (rows["model_fingerprint"].to_numpy() == model) | rows["source_fingerprint"].is_valid().to_numpy()
    asked = rows["evaluator_fingerprint"].to_numpy() == question.fingerprint
    return rows.filter(own & asked & np.isin(rows["sample_id"].to_numpy(), question.dataset.sample_ids.numpy()))


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is there as a whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
