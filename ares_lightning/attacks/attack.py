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

from ares_lightning.attacks.guard import Model, full_precision, guarded
from ares_lightning.attacks.losses import LOSSES, Loss, Objective, as_objective, margin
from ares_lightning.attacks.search import Passes, Search, check_classes, check_logits, is_broken, predict
from ares_lightning.attacks.threat import BALLS, Ball, Threat, parse_budget

DEFAULT_EPS = {"linf": 4 / 255, "l2": 2.0, "l1": 75.0}
"""The usual ImageNet budgets: ARES-Bench (arXiv 2302.14301) for L-inf, AdvXL (arXiv 2401.04727) for L2, L1."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What an attack found out about N samples.

    images: [N, C, H, W], the adversarial example found, the clean image where none was.
    broken: bool [N], the prediction for `images`, taken in eval mode at the images' precision, is wrong (or is
        the target). A sample that is misclassified from the start is broken at distance 0 by no pass.
    distance: float64 [N], norm of `images` − clean.
    forwards, backwards: int64 [N], passes whose results the attack used for each sample, without the one
        clean and the one verdict forward.
    clean_prediction, adversarial_prediction: int64 [N], the classes predicted for the clean image and for `images`.
    """

    images: Tensor
    broken: Tensor
    distance: Tensor
    forwards: Tensor
    backwards: Tensor
    clean_prediction: Tensor
    adversarial_prediction: Tensor


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

    Raises ValueError for a setting that makes no sense, with the key and its value.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    targeted: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = True
    nearest: ClassVar[bool] = False
    paper: ClassVar[str]

    norm: str = "linf"
    eps: float | str | None = None
    eot: int = 1

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
        """A hash of the name and every setting, the same in every process; of a file the content counts."""
        return hashlib.blake2b(json.dumps(self._identity()).encode(), digest_size=8).hexdigest()

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
        eps: Tensor | None = None,
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
        eps: Tensor | None = None,
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
        eps: Tensor | None = None,
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
        budgets = self._budgets(images, eps)
        passes = Passes(batch_size, precision, self.eot, search_on)
        key, wants_logits = (int(seed), self.name, *ids), self.kind != "decision-based"
        if victim is not None:
            with guarded(model, images.device, key), full_precision(images.device):
                logits, _ = _predict_clean(model, images, labels, targets, ids, passes, wants_logits)
                rest = (budgets, ids, seed, self._objective(), passes, logits)
                crafted = self._craft(model, images, labels, targets, *rest)
            case = (crafted, images, labels, targets, budgets, ids, passes, key)
            if isinstance(victim, Mapping):
                return {name: _transfer_verdict(v, *case) for name, v in victim.items()}
            return _transfer_verdict(victim, *case)
        fast = model if search_on is None else search_on
        with guarded(model, images.device, key), guarded(fast, images.device, key), full_precision(images.device):
            logits, clean_prediction = _predict_clean(model, images, labels, targets, ids, passes, wants_logits)
            attacked = (~is_broken(clean_prediction, labels, targets)).nonzero().squeeze(1)
            search = Search(
                model,
                images[attacked],
                labels[attacked],
                None if targets is None else targets[attacked],
                budgets[attacked],
                self.ball,
                [ids[i] for i in attacked.tolist()],
                seed,
                feedback=True,
                passes=passes,
                logits=logits[attacked],
            )
            if len(attacked):
                self.take_up(search)
                search.close()
            return _verdict(model, search, attacked, images, labels, targets, budgets, clean_prediction, passes)

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
    ) -> Tensor:
        """Make an adversarial example of every sample and return the last iterates, [N, C, H, W].

        For training and transfer: one run (no restarts), nobody is dropped, and no verdict is taken. The loop never
        waits for the device, but for minimum-distance attacks, whose passes leave samples out. Arguments as in the
        call, besides:
        labels: int64 [N], or soft labels [N, classes] where the loss takes them.
        loss: another loss to raise, `(logits [N, classes], labels) -> [N]`.

        Raises ValueError as the call does; the values of tensors that lie on an accelerator are not read.
        """
        images, labels, targets, ids = _checked(images, labels, targets, sample_ids)
        self._check_targets(targets is not None)
        if self.nearest and labels.ndim == 2:
            raise ValueError(f"labels have shape {list(labels.shape)}; {self.name} needs class labels [N]")
        if images.device.type == "cpu":
            _check_values(images, labels, targets)
        objective = self._objective() if loss is None else as_objective(loss)
        budgets = self._budgets(images, None)
        passes = Passes(eot=self.eot)
        with guarded(model, images.device, (int(seed), self.name, *ids)):
            return self._craft(model, images, labels, targets, budgets, ids, seed, objective, passes).images

    def _craft(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        budgets: Tensor,
        ids: Sequence[int],
        seed: int,
        objective: Objective,
        passes: Passes,
        logits: Tensor | None = None,
    ) -> Search:
        case = (model, images, labels, targets, budgets, self.ball, ids, seed)
        search = Search(*case, feedback=False, passes=passes, logits=logits)
        if len(images):
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

    def _budgets(self, images: Tensor, eps: Tensor | None) -> Tensor:
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


def _predict_clean(
    model: Model,
    images: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    ids: Sequence[int],
    passes: Passes,
    wants_logits: bool,
) -> tuple[Tensor, Tensor]:
    """Return logits [N, classes] and predicted classes [N], after a look at whether they are logits at all."""
    if not len(images):
        return images.new_empty(0, 0), torch.empty(0, dtype=torch.int64, device=images.device)
    logits, prediction = predict(model, images, passes)
    check_logits(logits, labels, targets)
    check_classes(logits, labels, targets)
    strange = (~logits.isfinite().all(1)).nonzero().squeeze(1).tolist()
    if strange:
        names = ", ".join(str(ids[i]) for i in strange[:MAX_NAMED]) + (" …" if len(strange) > MAX_NAMED else "")
        raise ValueError(
            f"the model gives logits that are not finite for {len(strange)} of {len(images)} clean images, "
            f"sample_ids {names}; mend the model, or leave these samples out"
        )
    sums = logits.double().sum(1)
    if wants_logits and bool((logits >= 0).all() & ((sums - 1).abs() < PROBABILITY_SLACK).all()):
        raise ValueError(
            "the model returns probabilities (every row is at least 0 and sums to 1); "
            "take its softmax off, for an attack needs logits"
        )
    return logits, prediction


MAX_NAMED = 5
PROBABILITY_SLACK = 1e-4


def _verdict(
    model: Model,
    search: Search,
    attacked: Tensor,
    images: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    budgets: Tensor,
    clean_prediction: Tensor,
    passes: Passes,
) -> Outcome:
    """Predict the images found for `attacked` once more; where they break nothing, the clean image is the result.

    `search` covers either the attacked samples or all N (images crafted for other models to judge).
    """
    everyone = len(search.images) == len(images)
    found = search.images[attacked] if everyone else search.images
    attacked_labels, attacked_targets = labels[attacked], None if targets is None else targets[attacked]
    adversarial, adversarial_prediction = images.clone(), clean_prediction.clone()
    if len(attacked):
        logits, prediction = predict(model, found, passes)
        if search.feedback and passes.eot == 1:
            rest = (attacked_labels, attacked_targets, budgets[attacked], logits, prediction, passes)
            _push_on(model, search, found, images[attacked], *rest)
        broken = is_broken(prediction, attacked_labels, attacked_targets)
        adversarial[attacked[broken]] = found[broken]
        adversarial_prediction[attacked[broken]] = prediction[broken]
    spent = slice(None) if everyone else attacked
    forwards, backwards = torch.zeros_like(clean_prediction), torch.zeros_like(clean_prediction)
    forwards[spent], backwards[spent] = search.forwards, search.backwards
    return Outcome(
        images=adversarial,
        broken=is_broken(adversarial_prediction, labels, targets),
        distance=search.ball.distance(adversarial, images),
        forwards=forwards,
        backwards=backwards,
        clean_prediction=clean_prediction,
        adversarial_prediction=adversarial_prediction,
    )


def _push_on(
    model: Model,
    search: Search,
    found: Tensor,
    clean: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    budgets: Tensor,
    logits: Tensor,
    prediction: Tensor,
    passes: Passes,
) -> None:
    """Push on the images `found`, where the budget leaves room, whose verdict rounding alone has turned.

    With other rows beside it in a pass, an image on the decision boundary may change sides: the verdict would
    depend on the batch. `found` and `prediction` are changed in place.
    """
    broken = is_broken(prediction, labels, targets)
    gap = margin(logits, labels if targets is None else targets).abs()
    lost = min(ROUNDING_ERRORS * torch.finfo(logits.dtype).eps, MOST_LOST) * logits.abs().amax(1)
    has_room = search.ball.distance(found, clean) < budgets * (1 - PUSHES[-1])
    undone = search.found & ~broken & has_room & (gap <= lost)
    for share in PUSHES:
        rows = undone.nonzero().squeeze(1)
        if not len(rows):
            return
        pushed = (found[rows] + share * (found[rows] - clean[rows])).clamp_(0, 1)
        found[rows] = search.ball.project(pushed, clean[rows], budgets[rows])
        prediction[rows] = predict(model, found[rows], passes)[1]
        undone = undone & ~is_broken(prediction, labels, targets)


ROUNDING_ERRORS = 1000
"""What a forward may lose to rounding, in units of the last place of its largest logit: its terms may be larger."""
MOST_LOST = 1e-3
"""The most that passes for rounding, as a share of the largest logit; 16-bit logits may lose more."""
PUSHES = (1e-5, 1e-4)
"""By what shares of its perturbation an image found is pushed on where rounding has undone its verdict."""


def _transfer_verdict(
    victim: Model,
    crafted: Search,
    images: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    budgets: Tensor,
    ids: Sequence[int],
    passes: Passes,
    key: tuple[object, ...],
) -> Outcome:
    with guarded(victim, images.device, key), full_precision(images.device):
        clean_prediction = _predict_clean(victim, images, labels, targets, ids, passes, wants_logits=False)[1]
        attacked = (~is_broken(clean_prediction, labels, targets)).nonzero().squeeze(1)
        return _verdict(victim, crafted, attacked, images, labels, targets, budgets, clean_prediction, passes)
