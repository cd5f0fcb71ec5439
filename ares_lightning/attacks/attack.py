"""The frame that every attack shares: its two calls, the working set, and the verdict."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, overload

import torch
from torch import Tensor

from ares_lightning.attacks.authorship import foreign_code
from ares_lightning.attacks.guard import MODES, Model, full_precision, guarded
from ares_lightning.attacks.losses import LOSSES, Loss, Objective, as_objective
from ares_lightning.attacks.passes import Passes, is_broken
from ares_lightning.attacks.search import Search
from ares_lightning.attacks.threat import BALLS, Ball, Threat, parse_budget
from ares_lightning.attacks.verdict import Case, Outcome, predict_clean, take_verdict, transfer_verdict

DEFAULT_EPS = {"linf": 4 / 255, "l2": 2.0, "l1": 75.0}
"""The usual ImageNet budgets: ARES-Bench (arXiv 2302.14301) for L-inf, AdvXL (arXiv 2401.04727) for L2, L1."""


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """An attack: the same frozen object serves verdicts (`attack(…)`) and crafting (`attack.craft(…)`).

    norm: `linf`, `l2` or `l1`.
    eps: budget in units of the [0, 1] scale, a number or text such as "4/255"; None takes the usual ImageNet
        budget of the norm (L-inf 4/255, L2 2.0, L1 75). For a minimum-distance attack (`nearest`) None means no
        budget: any adversarial example counts, and the nearest is looked for; with a budget, a sample is done
        as soon as one within it is found.
    eot: draws of a randomised model (Athalye et al. 2018, arXiv 1802.00420): every gradient is the mean over them,
        and every prediction, in the search and in the verdict, is the class of the largest mean probability. The
        model's own numbers from torch's generators follow from `seed`, the attack's name and the sample ids of the
        call: shared by a batch as they are, only models that draw none have results independent of the batch.

    A subclass is a frozen dataclass whose fields are its settings; it writes `_run`. Its name is by default that of
    the class in lower case.

    Raises ValueError for a setting that makes no sense, with the key and its value.
    """

    name: ClassVar[str]
    kind: ClassVar[str] = "white-box"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    targeted: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = True
    nearest: ClassVar[bool] = False
    paper: ClassVar[str]

    norm: str = "linf"
    eps: float | str | None = None
    eot: int = 1

    def __init_subclass__(cls) -> None:
        if "name" not in vars(cls):
            cls.name = cls.__name__.lower()

    def __post_init__(self) -> None:
        if self.norm not in self.norms:
            raise ValueError(f"norm={self.norm}: {self.name} knows {', '.join(self.norms)}")
        eps = DEFAULT_EPS[self.norm] if self.eps is None and not self.nearest else self.eps
        object.__setattr__(self, "eps", None if eps is None else parse_budget(eps))
        check_count("eot", self.eot)

    @property
    def threat(self) -> Threat:
        """The threat model: norm and budget, which is infinite where `eps` is None."""
        return Threat(self.norm, math.inf if self.eps is None else float(self.eps))

    @property
    def ball(self) -> Ball:
        """The geometry of the norm."""
        return BALLS[self.norm]

    @property
    def fingerprint(self) -> str:
        """A hash of the name and every setting, the same in every process; of a file the content counts.

        So does the code of classes that are not part of this project.
        """
        identity = [*self._identity(), *foreign_code(type(self))]
        return hashlib.blake2b(json.dumps(identity).encode(), digest_size=8).hexdigest()

    def _identity(self) -> list[Any]:
        """Return what tells the attack from others, as plain values."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        numbers = {key: float(value) for key, value in settings.items() if type(value) is int}
        return [self.name, *sorted((settings | numbers).items())]

    def replace(self, **changes: Any) -> Self:
        """Return the attack with some settings changed; another norm needs its own `eps`, else ValueError."""
        if changes.get("norm", self.norm) != self.norm and "eps" not in changes:
            raise ValueError(f"norm={changes['norm']}: give its eps as well; {self.eps} was meant for {self.norm}")
        return dataclasses.replace(self, **changes)

    @abstractmethod
    def _run(self, search: Search) -> None:
        """Look for adversarial examples and hand the last iterates in by `search.finish`."""

    def take_up(self, search: Search) -> None:
        """Run on the samples that remain of a search, as one of several attacks."""
        search.begin(self.name, self._objective(), self.nearest)
        self._run(search)

    def _objective(self) -> Objective:
        """Return what the attack raises."""
        return as_objective(LOSSES["ce"])

    @overload
    def __call__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        targets: Tensor | None = None,
        victim: Mapping[str, Model],
        sample_ids: Tensor | Sequence[int] | None = None,
        seed: int = 0,
        eps: Tensor | Sequence[float] | None = None,
        batch_size: int | None = None,
        precision: str = "fp32",
        search_on: Model | None = None,
    ) -> dict[str, Outcome]: ...

    @overload
    def __call__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        targets: Tensor | None = None,
        victim: Model | None = None,
        sample_ids: Tensor | Sequence[int] | None = None,
        seed: int = 0,
        eps: Tensor | Sequence[float] | None = None,
        batch_size: int | None = None,
        precision: str = "fp32",
        search_on: Model | None = None,
    ) -> Outcome: ...

    def __call__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        targets: Tensor | None = None,
        victim: Model | Mapping[str, Model] | None = None,
        sample_ids: Tensor | Sequence[int] | None = None,
        seed: int = 0,
        eps: Tensor | Sequence[float] | None = None,
        batch_size: int | None = None,
        precision: str = "fp32",
        search_on: Model | None = None,
    ) -> Outcome | dict[str, Outcome]:
        """Find out which samples the attack breaks.

        model: maps images [N, C, H, W] in [0, 1] to logits [N, classes]; it comes back as it was.
        images: float32 or float64 in [0, 1]; labels: int64 [N].
        targets: int64 [N] makes the attack targeted: only a prediction of the target counts.
        victim: a model, or models by name: craft on `model` without feedback, once, and take the verdict on
            each victim; with names the result is one Outcome a name. FAB, DeepFool and FMN leave an image that
            `model` misclassifies as it is, for that is the nearest.
        sample_ids: [N] integers from which, with `seed`, all randomness of a sample follows; default 0 … N−1.
        eps: a budget for each sample, [N], in place of the attack's one; finite but for a minimum-distance attack.
        batch_size: images that one pass of the model with a backward takes at most (passes without take four
            times as many), by default all. Hand in many batches at once: survivors share as few passes as they can.
        precision: of the passes in the search, `fp32` (the images' own, with autocast and TF32 off) or `bf16`
            (autocast). What bf16 shows as broken is looked at again, and every verdict is taken, in the images'
            own precision.
        search_on: called by the search in place of `model`, which it equals but for rounding: a copy with its batch
            norms folded, or compiled. What it shows as broken is looked at again, and every verdict is taken, on
            `model`.

        Raises ValueError for images outside [0, 1], non-finite, or of another shape or dtype, for labels and
        targets out of range, for targets equal to labels, for logits that are not finite or look like
        probabilities, and for a model without gradients where the attack needs them.
        """
        images, labels, targets, ids = _checked(images, labels, targets, sample_ids)
        if labels.ndim != 1:
            raise ValueError(f"labels have shape {list(labels.shape)}; a verdict needs class labels [N]")
        if batch_size is not None:
            check_count("batch_size", batch_size)
        if victim is not None and search_on is not None:
            raise ValueError("search_on is given with victim=; hand it in as the model that crafts")
        if precision not in PRECISIONS or (precision == "bf16" and images.dtype != torch.float32):
            raise ValueError(f"precision={precision}: expected fp32, or bf16 with float32 images")
        self._check_targets(targets is not None)
        _check_values(images, labels, targets)
        passes = Passes(batch_size, precision, self.eot, search_on)
        case = Case(self.name, images, labels, targets, self._budgets(images, eps), ids, int(seed), passes)
        wants_logits = self.kind != "decision-based"
        if victim is not None:
            with guarded(model, images.device, case.key), full_precision(images.device):
                logits, _ = predict_clean(model, case, wants_logits)
                crafted = self._craft(model, case, self._objective(), logits)
            if isinstance(victim, Mapping):
                return {name: transfer_verdict(judge, case, crafted) for name, judge in victim.items()}
            return transfer_verdict(victim, case, crafted)
        fast = model if search_on is None else search_on
        device = images.device
        with guarded(model, device, case.key), guarded(fast, device, case.key), full_precision(device):
            logits, clean_prediction = predict_clean(model, case, wants_logits)
            attacked = (~is_broken(clean_prediction, labels, targets)).nonzero().squeeze(1)
            search = case.take(attacked).search(model, self.ball, feedback=True, logits=logits[attacked])
            if len(attacked):
                self.take_up(search)
                search.close()
            return take_verdict(model, case, search, attacked, clean_prediction)

    def craft(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        targets: Tensor | None = None,
        loss: Loss | None = None,
        sample_ids: Tensor | Sequence[int] | None = None,
        seed: int = 0,
        mode: str = "eval",
    ) -> Tensor:
        """Make an adversarial example of every sample and return the last iterates, [N, C, H, W].

        For training and transfer: one run (no restarts), nobody is dropped, and no verdict is taken. The loop never
        waits for the device, but for minimum-distance attacks, whose passes leave samples out. Arguments as in the
        call, besides:
        labels: int64 [N], or soft labels [N, classes] where the loss takes them.
        loss: another loss to raise, `(logits [N, classes], labels) -> [N]`.
        mode: `eval`, or `train` to differentiate the model in the mode it is in, dropout drawn and batch norms on
            the batch's statistics, their running ones untouched; then examples depend on the batch.

        Raises ValueError as the call does; the values of tensors that lie on an accelerator are not read.
        """
        if mode not in MODES:
            raise ValueError(f"mode={mode}: expected one of {', '.join(MODES)}")
        images, labels, targets, ids = _checked(images, labels, targets, sample_ids)
        self._check_targets(targets is not None)
        if self.nearest and labels.ndim == 2:
            raise ValueError(f"labels have shape {list(labels.shape)}; {self.name} needs class labels [N]")
        if images.device.type == "cpu":
            _check_values(images, labels, targets)
        objective = self._objective() if loss is None else as_objective(loss)
        passes = Passes(eot=self.eot)
        case = Case(self.name, images, labels, targets, self._budgets(images, None), ids, int(seed), passes)
        with guarded(model, images.device, case.key, mode):
            return self._craft(model, case, objective, None).images

    def _craft(self, model: Model, case: Case, objective: Objective, logits: Tensor | None) -> Search:
        search = case.search(model, self.ball, feedback=False, logits=logits)
        if len(case.images):
            search.begin(self.name, objective, self.nearest)
            self._run(search)
            search.close()
        return search

    def _check_targets(self, are_given: bool) -> None:
        """Raise ValueError for targets where the method has no targeted form, or none where it has no other."""
        if are_given and not self.targeted:
            raise ValueError(f"targets are given, but {self.name} knows no targeted form; see list_attacks()")
        if self.needs_targets and not are_given:
            raise ValueError(
                f"{self.name} knows a targeted form only; give targets=, the class that each image is to become"
            )

    def _budgets(self, images: Tensor, eps: Tensor | Sequence[float] | None) -> Tensor:
        """Return the budget of each sample, float64 [N]."""
        if eps is None:
            return torch.full((len(images),), self.threat.eps, dtype=torch.float64, device=images.device)
        budgets = torch.as_tensor(eps, dtype=torch.float64, device=images.device)
        if budgets.shape != (len(images),):
            raise ValueError(f"eps has shape {list(budgets.shape)}; expected [{len(images)}], one budget an image")
        allowed = budgets >= 0 if self.nearest else (budgets >= 0) & budgets.isfinite()
        if not bool(allowed.all()):
            raise ValueError(f"eps={float(budgets[~allowed][0])}: expected finite budgets of at least 0")
        return budgets


PRECISIONS = ("fp32", "bf16")


def check_count(key: str, value: object) -> None:
    """Raise ValueError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key}={value}: expected a whole number of at least 1")


def check_number(key: str, value: Any, least: float = 0.0) -> float:
    """Return a finite number of at least `least`; raise ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        raise ValueError(f"{key}={value}: expected a number of at least {least:g}")
    return value


def _checked(
    images: Tensor, labels: Tensor, targets: Tensor | None, sample_ids: Tensor | Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor | None, Sequence[int]]:
    """Return the arguments as plain tensors that autograd may save, after looking at their types and shapes."""
    if images.ndim != 4:
        raise ValueError(f"images have shape {list(images.shape)}; expected [N, C, H, W]")
    if images.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images are {images.dtype}; expected float32 or float64 in [0, 1]")
    if labels.ndim not in (1, 2) or len(labels) != len(images):
        raise ValueError(f"labels have shape {list(labels.shape)}; expected [{len(images)}] for as many images")
    if labels.ndim == 1 and labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}; expected int64")
    if targets is not None and (targets.shape != (len(images),) or targets.dtype != torch.int64):
        raise ValueError(f"targets are {targets.dtype} {list(targets.shape)}; expected int64 [{len(images)}]")
    ids = range(len(images)) if sample_ids is None else sample_ids
    ids = [int(i) for i in (ids.tolist() if isinstance(ids, Tensor) else ids)]
    if len(ids) != len(images):
        raise ValueError(f"sample_ids hold {len(ids)} entries; expected {len(images)}, one an image")
    labels = _ordinary(labels.to(images.device))
    targets = None if targets is None else _ordinary(targets.to(images.device))
    return _ordinary(images), labels, targets, ids


def _ordinary(tensor: Tensor) -> Tensor:
    """Return the tensor without its history, and as a copy that autograd may save if inference mode made it."""
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor.detach()


def _check_values(images: Tensor, labels: Tensor, targets: Tensor | None) -> None:
    if not len(images):
        return
    low, high = torch.stack(torch.aminmax(images)).tolist()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"images lie in [{low:.6g}, {high:.6g}]; expected finite values in [0, 1]")
    if targets is not None and labels.ndim == 1 and bool((targets == labels).any()):
        raise ValueError("targets equal the labels of some samples; expected another class for each")
    for name, classes in (("labels", labels), ("targets", targets)):
        if classes is not None and classes.ndim == 1 and int(classes.min()) < 0:
            raise ValueError(f"{name} hold {int(classes.min())}; expected classes from 0 on")
