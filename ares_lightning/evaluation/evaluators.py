"""Evaluators: each asks one question of a classifier and answers with a verdict for every sample."""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ares_lightning.attacks import Attack, Outcome
from ares_lightning.attacks.authorship import foreign_code
from ares_lightning.attacks.autoattack import AutoAttack
from ares_lightning.attacks.guard import Model, full_precision, guarded
from ares_lightning.attacks.noise import sample_noise
from ares_lightning.attacks.passes import Passes, predict
from ares_lightning.data import ImageSet
from ares_lightning.evaluation.corruption_error import corruption_rows

TARGETS = ("random", "least_likely")


@dataclass(frozen=True)
class Verdicts:
    """The outcome of one attack at one budget on one batch; no attack (`norm` None) means the clean images.

    outcome: of n samples; places: int64 [n], which of the batch they are, None where all.
    targets: int64 [n], the classes that a targeted attack aimed at.
    of_set: the name of the set, where the evaluator itself has made another of the images.
    model_fingerprint: of the model that is judged, where it is not the evaluation's own.
    source_fingerprint: of the model on which the images were crafted without feedback of the one that is judged.
    """

    attack: str
    norm: str | None
    eps: float
    outcome: Outcome
    targets: Tensor | None = None
    places: Tensor | None = None
    of_set: str | None = None
    model_fingerprint: str | None = None
    source_fingerprint: str | None = None


class Stage(ABC):
    """A part of a question, which is put to the samples that no part before it has broken."""

    @property
    def key(self) -> tuple[str, float] | None:
        """Attack and budget of a row that every sample gets in this part, None where any row shows it is done."""
        return None

    @abstractmethod
    def verdicts(
        self, net: nn.Module, images: Tensor, labels: Tensor, sample_ids: Tensor, seed: int, passes: Passes
    ) -> Iterator[Verdicts]:
        """Yield verdicts on images [N, C, H, W] in [0, 1], labels and sample_ids int64 [N].

        passes: how the network is called; hand in many of its batches at once, for survivors are repacked.
        """


@dataclass(frozen=True)
class Evaluator(Stage):
    """A named question; `name` stands in every row that it yields.

    A subclass is a frozen dataclass whose fields are its settings, with its attack, if it has one, as `attack`; it
    writes `verdicts`.
    """

    name: str
    subset: str | None = field(default=None, kw_only=True, repr=False)
    """How the images of `own_sets` were chosen, for the record."""

    @property
    def stages(self) -> Sequence[Stage]:
        """The parts of the question, one after the other; between them survivors are dealt out anew."""
        return (self,)

    def fingerprint(self, seed: int, precision: str) -> str:
        """Return a hash of everything that decides this evaluator's verdicts on a given model and sample."""
        parts = [self._identity(), str(self.attack_fingerprint), str(seed), precision, *foreign_code(type(self))]
        return hashlib.blake2b(" ".join(parts).encode(), digest_size=8).hexdigest()

    def _identity(self) -> str:
        """Return what, besides the attack, tells the evaluator from others."""
        return repr(self)

    @property
    def attack_fingerprint(self) -> str | None:
        """The fingerprint of the attack that is run, the one called `attack`, None where there is none."""
        attack: Attack | None = getattr(self, "attack", None)
        return None if attack is None else attack.fingerprint

    @property
    def own_sets(self) -> tuple[ImageSet, ...]:
        """The sets that are asked about instead of the evaluation's, none where it is that."""
        return ()

    def asked_of(self, model: str) -> Evaluator:
        """Return the evaluator as it is put to the model of this fingerprint."""
        return self

    @property
    def models(self) -> dict[str, str]:
        """Names of other models that are judged or crafted on, by their fingerprints."""
        return {}

    @property
    def source_fingerprint(self) -> str | None:
        """The fingerprint of the model that is crafted on, where the judged ones give no feedback."""
        return None

    def check(self, dataset: ImageSet) -> None:
        """Raise ValueError for a set that the question cannot be asked about, before any sample is."""
        if dataset.has_several_labels:
            raise ValueError(
                f"eval.{self.name}: the images of {dataset.name} have several right classes; it knows clean "
                "accuracy only"
            )

    def further_rows(self, verdicts: pd.DataFrame) -> list[dict[str, Any]]:
        """Return the summary rows, besides an accuracy at each set and budget, that follow from its `verdicts`."""
        return []


@dataclass(frozen=True)
class CleanEvaluator(Evaluator):
    """Is the clean image classified rightly?"""

    def check(self, dataset: ImageSet) -> None:
        """Ask about every set."""

    def verdicts(
        self, net: nn.Module, images: Tensor, labels: Tensor, sample_ids: Tensor, seed: int, passes: Passes
    ) -> Iterator[Verdicts]:
        """Yield the clean predictions as verdicts at budget 0 (1 F)."""
        yield Verdicts("none", None, 0.0, clean_outcome(net, images, labels, sample_ids, seed, passes))


@dataclass(frozen=True)
class SetsEvaluator(CleanEvaluator):
    """Are the images of other sets classified rightly, corrupted ones or out-of-distribution ones?

    sets: asked in this order; the first is the data's own test set, undisturbed.
    not_found: sets that were looked for and are not there, for the record.
    """

    sets: tuple[ImageSet, ...] = field(repr=False, compare=False)
    not_found: tuple[str, ...] = field(default=(), repr=False, compare=False)

    def further_rows(self, verdicts: pd.DataFrame) -> list[dict[str, Any]]:
        """Return the means over the corruptions of each set of them."""
        return corruption_rows(self.name, verdicts, self.subset)

    @property
    def own_sets(self) -> tuple[ImageSet, ...]:
        """The sets."""
        return self.sets


class _TargetFile:
    """A CSV file with the columns sample_id and target, read once."""

    def __init__(self, path: str) -> None:
        self.path = path
        if not Path(path).is_file():
            known = ", ".join(TARGETS)
            raise ValueError(f"targets={path}: expected null, {known} or a CSV file with columns sample_id, target")
        content = Path(path).read_bytes()
        self.digest = hashlib.blake2b(content, digest_size=8).hexdigest()
        columns = ["sample_id", "target"]
        try:
            table = pd.read_csv(io.BytesIO(content))[columns]
        except (ValueError, KeyError):
            raise ValueError(f"targets={path}: is no CSV file with columns sample_id and target") from None
        if table.dtypes.ne("int64").any() or (table["target"] < 0).any():
            raise ValueError(f"targets={path}: expected whole numbers in columns sample_id and target")
        if not table["sample_id"].is_unique:
            raise ValueError(f"targets={path}: names a sample_id twice; expected one target a sample")
        self._targets = table.set_index("sample_id")["target"]

    def of(self, labels: Tensor, sample_ids: Tensor) -> Tensor:
        """Return the target of each sample, int64 [N]; raise ValueError where it is missing or the label."""
        given = self._targets.reindex(sample_ids.tolist())
        if given.isna().any():
            raise ValueError(f"targets={self.path}: has no row for sample_id {given.index[given.isna()][0]}")
        targets = torch.tensor(given.astype("int64").to_numpy(), device=labels.device)
        same = (targets == labels).nonzero().squeeze(1)
        if len(same):
            name = int(sample_ids[int(same[0])])
            raise ValueError(f"targets={self.path}: gives sample_id {name} its own label; expected another class")
        return targets


@dataclass(frozen=True)
class AttackEvaluator(Evaluator):
    """Does the attack break the sample within its budget?

    targets: None, any wrong class counts; `random`, a wrong class drawn for each sample from seed and sample id;
        `least_likely`, the one with the smallest clean logit; or the path of a CSV file with the columns sample_id
        and target. Then that class alone counts, and what is misclassified from the start is broken without an
        attack. The classes cost one forward more.

    Raises ValueError for targets that the attack cannot use, and for a file that lacks a sample.
    """

    attack: Attack = field(repr=False)
    targets: str | None = None
    given: _TargetFile | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.targets not in (None, *TARGETS):
            object.__setattr__(self, "given", _TargetFile(str(self.targets)))
        if self.targets is None and self.attack.needs_targets:
            name, known = self.attack.name, ", ".join(TARGETS)
            raise ValueError(f"targets=null: {name} knows a targeted form only; expected {known} or a CSV file")
        if self.targets is not None and not self.attack.targeted:
            raise ValueError(f"targets={self.targets}: {self.attack.name} knows no targeted form; expected null")

    @property
    def key(self) -> tuple[str, float]:
        """The attack and its budget."""
        return self.attack.name, self.attack.threat.eps

    @property
    def stages(self) -> Sequence[Stage]:
        """The members of AutoAttack, one after the other, else the attack as a whole."""
        if not isinstance(self.attack, AutoAttack):
            return (self,)
        return [replace(self, attack=member) for member in self.attack.members]

    def _identity(self) -> str:
        """Return what, besides the attack, tells the evaluator from others; of a file the content counts."""
        return repr(self) if self.given is None else f"{self.name} {self.given.digest}"

    def check(self, dataset: ImageSet) -> None:
        """Raise ValueError for a sample that the file of targets lacks, or whose own label it gives."""
        super().check(dataset)
        if self.given is not None:
            self.given.of(dataset.labels, dataset.sample_ids)

    def verdicts(
        self, net: nn.Module, images: Tensor, labels: Tensor, sample_ids: Tensor, seed: int, passes: Passes
    ) -> Iterator[Verdicts]:
        """Yield the attack's verdicts."""

        def attack(images: Tensor, labels: Tensor, ids: Tensor, targets: Tensor | None = None) -> Outcome:
            return self.attack(
                net,
                images,
                labels,
                targets=targets,
                sample_ids=ids,
                seed=seed,
                batch_size=passes.batch_size,
                precision=passes.precision,
                search_on=passes.search_on,
            )

        targets = None
        if self.targets is None:
            outcome = attack(images, labels, sample_ids)
        else:
            draws = Passes(passes.batch_size, eot=self.attack.eot)
            logits, prediction = _predict_clean(net, images, sample_ids, seed, draws)
            targets = self._classes(logits, labels, sample_ids, seed)
            right = (prediction == labels).nonzero().squeeze(1)
            found = attack(images[right], labels[right], sample_ids[right.to(sample_ids.device)], targets[right])
            everyone = torch.arange(len(right), device=right.device)
            outcome = with_found(_unattacked(images, labels, prediction), right, found, everyone)
            outcome = replace(outcome, clean_prediction=prediction)
        yield Verdicts(self.attack.name, self.attack.norm, self.attack.threat.eps, outcome, targets)

    def _classes(self, logits: Tensor, labels: Tensor, sample_ids: Tensor, seed: int) -> Tensor:
        """Return a wrong class of each sample, int64 [N]."""
        if self.given is not None:
            return self.given.of(labels, sample_ids)
        if self.targets == "least_likely":
            return logits.scatter(1, labels[:, None], torch.inf).argmin(1)
        draw = sample_noise("uniform", (seed, "targets"), sample_ids.tolist(), (1,), logits.double()).squeeze(1)
        other = ((draw + 1) / 2 * (logits.shape[1] - 1)).long()
        return other + (other >= labels)


def clean_outcome(
    net: Model, images: Tensor, labels: Tensor, sample_ids: Tensor, seed: int, passes: Passes
) -> Outcome:
    """Return what the clean images show: misclassified samples are broken at distance 0."""
    return _unattacked(images, labels, _predict_clean(net, images, sample_ids, seed, passes)[1])


def lost_outcome(images: Tensor) -> Outcome:
    """Return what is said of images that leave the model without a prediction: broken at distance 0."""
    zeros = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    return Outcome(images, zeros == 0, zeros.double(), zeros, zeros, zeros - 1, zeros - 1)


def _predict_clean(
    net: Model, images: Tensor, sample_ids: Tensor, seed: int, passes: Passes
) -> tuple[Tensor, Tensor]:
    with guarded(net, images.device, (seed, "clean", *sample_ids.tolist())), full_precision(images.device):
        return predict(net, images, passes)


def _unattacked(images: Tensor, labels: Tensor, prediction: Tensor) -> Outcome:
    zeros = torch.zeros_like(labels)
    return Outcome(images, prediction != labels, zeros.double(), zeros, zeros, prediction, prediction)


def take_outcome(outcome: Outcome, rows: Tensor) -> Outcome:
    """Return the outcome of some of the samples."""
    return Outcome(**{name: getattr(outcome, name)[rows] for name in Outcome.__dataclass_fields__})


def with_found(known: Outcome, place: Tensor, found: Outcome, rows: Tensor) -> Outcome:
    """Return `known` with its samples at `place` replaced by those of `found` at `rows`."""

    def put(name: str) -> Tensor:
        old: Tensor = getattr(known, name)
        return old.index_copy(0, place, getattr(found, name)[rows])

    return Outcome(**{name: put(name) for name in Outcome.__dataclass_fields__})
