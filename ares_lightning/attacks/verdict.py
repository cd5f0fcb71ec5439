"""The verdicts of an attack: the look at the clean images before it, and the last look after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ares_lightning.attacks.guard import Model, full_precision, guarded
from ares_lightning.attacks.losses import margin
from ares_lightning.attacks.passes import Passes, check_classes, check_logits, is_broken, predict
from ares_lightning.attacks.search import Search
from ares_lightning.attacks.threat import SLACK, Ball

MAX_NAMED = 5
PROBABILITY_SLACK = 1e-4
ROUNDING_ERRORS = 1000
"""What a forward may lose to rounding, in units of the last place of its largest logit: its terms may be larger."""
MOST_LOST = 1e-3
"""The most that passes for rounding, as a share of the largest logit; 16-bit logits may lose more."""
OUTSIDE = 1e-7
"""By how much, on the [0, 1] scale, rounding in float32 may take an image past its L-inf budget, with room."""
PUSHES = (1e-5, 1e-4)
"""By what shares of its perturbation an image found is pushed on where rounding has undone its verdict."""


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


@dataclass(frozen=True, eq=False)
class Case:
    """What an attack, by its name, is asked about: N samples with their budgets, and how models are called."""

    name: str
    images: Tensor
    labels: Tensor
    targets: Tensor | None
    budgets: Tensor
    ids: Sequence[int]
    seed: int
    passes: Passes

    @property
    def key(self) -> tuple[object, ...]:
        """What the random numbers of a randomised model follow from."""
        return (self.seed, self.name, *self.ids)

    def take(self, rows: Tensor) -> Case:
        """Return the case of some samples alone."""
        return replace(
            self,
            images=self.images[rows],
            labels=self.labels[rows],
            targets=None if self.targets is None else self.targets[rows],
            budgets=self.budgets[rows],
            ids=[self.ids[i] for i in rows.tolist()],
        )

    def search(self, model: Model, ball: Ball, feedback: bool, logits: Tensor | None) -> Search:
        """Return the working set of all samples."""
        samples = (self.images, self.labels, self.targets, self.budgets)
        return Search(model, *samples, ball, self.ids, self.seed, feedback, self.passes, logits)


class NonFiniteLogitsError(ValueError):
    """A model gives logits that are not finite for some clean images, those of `sample_ids`."""

    def __init__(self, sample_ids: Sequence[int], message: str) -> None:
        super().__init__(message)
        self.sample_ids = sample_ids


def predict_clean(model: Model, case: Case, wants_logits: bool) -> tuple[Tensor, Tensor]:
    """Return logits [N, classes] and predicted classes [N], after a look at whether they are logits at all."""
    images = case.images
    if not len(images):
        return images.new_empty(0, 0), torch.empty(0, dtype=torch.int64, device=images.device)
    logits, prediction = predict(model, images, case.passes)
    check_logits(logits, case.labels, case.targets)
    check_classes(logits, case.labels, case.targets)
    strange = (~logits.isfinite().all(1)).nonzero().squeeze(1).tolist()
    if strange:
        names = ", ".join(str(case.ids[i]) for i in strange[:MAX_NAMED]) + " …" * (len(strange) > MAX_NAMED)
        raise NonFiniteLogitsError(
            [case.ids[i] for i in strange],
            f"the model gives logits that are not finite for {len(strange)} of {len(images)} clean images, "
            f"sample_ids {names}; mend the model, or leave these samples out",
        )
    sums = logits.double().sum(1)
    if wants_logits and bool((logits >= 0).all() & ((sums - 1).abs() < PROBABILITY_SLACK).all()):
        raise ValueError(
            "the model returns probabilities (every row is at least 0 and sums to 1); "
            "take its softmax off, for an attack needs logits"
        )
    return logits, prediction


def take_verdict(model: Model, case: Case, search: Search, attacked: Tensor, clean_prediction: Tensor) -> Outcome:
    """Predict the images found for `attacked` once more; where they break nothing, the clean image is the result.

    `search` covers either the attacked samples or all N (images crafted for other models to judge).
    """
    everyone = len(search.images) == len(case.images)
    found = search.images[attacked] if everyone else search.images
    adversarial, adversarial_prediction = case.images.clone(), clean_prediction.clone()
    if len(attacked):
        asked = case.take(attacked)
        logits, prediction = predict(model, found, case.passes)
        if search.feedback and case.passes.eot == 1:
            _push_on(model, asked, search, found, logits, prediction)
        broken = is_broken(prediction, asked.labels, asked.targets)
        _check_kept(asked, search.ball.distance(found, asked.images), found, broken)
        adversarial[attacked[broken]] = found[broken]
        adversarial_prediction[attacked[broken]] = prediction[broken]
    spent = slice(None) if everyone else attacked
    forwards, backwards = torch.zeros_like(clean_prediction), torch.zeros_like(clean_prediction)
    forwards[spent], backwards[spent] = search.forwards, search.backwards
    return Outcome(
        images=adversarial,
        broken=is_broken(adversarial_prediction, case.labels, case.targets),
        distance=search.ball.distance(adversarial, case.images),
        forwards=forwards,
        backwards=backwards,
        clean_prediction=clean_prediction,
        adversarial_prediction=adversarial_prediction,
    )


def _check_kept(case: Case, distance: Tensor, found: Tensor, broken: Tensor) -> None:
    """Raise ValueError where an example that counts has left its budget, or the box, by more than rounding."""
    within = distance <= case.budgets * (1 + SLACK[found.dtype]) + OUTSIDE
    inside = ((found >= 0) & (found <= 1)).flatten(1).all(1)
    if not bool((~broken | (within & inside)).all()):
        raise ValueError(
            f"{case.name}: hands in examples outside of the budget or of [0, 1]; take them back by "
            "self.ball.project(images, search.clean, search.eps)"
        )


def transfer_verdict(victim: Model, case: Case, crafted: Search) -> Outcome:
    """Take the verdict on a model that the images were not crafted on."""
    device = case.images.device
    with guarded(victim, device, case.key), full_precision(device):
        clean_prediction = predict_clean(victim, case, wants_logits=False)[1]
        attacked = (~is_broken(clean_prediction, case.labels, case.targets)).nonzero().squeeze(1)
        return take_verdict(victim, case, crafted, attacked, clean_prediction)


def _push_on(model: Model, case: Case, search: Search, found: Tensor, logits: Tensor, prediction: Tensor) -> None:
    """Push on the images `found`, where the budget leaves room, whose verdict rounding alone has turned.

    With other rows beside it in a pass, an image on the decision boundary may change sides: the verdict would
    depend on the batch. `found` and `prediction` are changed in place.
    """
    clean, labels, targets = case.images, case.labels, case.targets
    gap = margin(logits, labels if targets is None else targets).abs()
    lost = min(ROUNDING_ERRORS * torch.finfo(logits.dtype).eps, MOST_LOST) * logits.abs().amax(1)
    has_room = search.ball.distance(found, clean) < case.budgets * (1 - PUSHES[-1])
    undone = search.found & ~is_broken(prediction, labels, targets) & has_room & (gap <= lost)
    for share in PUSHES:
        rows = undone.nonzero().squeeze(1)
        if not len(rows):
            return
        pushed = (found[rows] + share * (found[rows] - clean[rows])).clamp_(0, 1)
        found[rows] = search.ball.project(pushed, clean[rows], case.budgets[rows])
        prediction[rows] = predict(model, found[rows], case.passes)[1]
        undone = undone & ~is_broken(prediction, labels, targets)
