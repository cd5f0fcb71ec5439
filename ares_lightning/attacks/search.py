"""The working set of an attack run: the samples still to be broken, and the passes spent on them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from ares_lightning.attacks.guard import Model
from ares_lightning.attacks.losses import Objective
from ares_lightning.attacks.noise import sample_noise
from ares_lightning.attacks.passes import Passes, call_model, check_logits, is_broken, predict, predicted_classes
from ares_lightning.attacks.threat import Ball

Index = slice | Tensor
View = Callable[[Tensor, Index], Tensor]
"""(images, their rows in the working set) -> what the model is shown instead; differentiated through."""


class Rows(SimpleNamespace):
    """Tensors that hold one row for each sample of the working set, by name."""

    def keep(self, index: Tensor) -> None:
        """Keep the rows of `index` of every tensor."""
        for name, tensor in vars(self).items():
            if isinstance(tensor, Tensor):
                setattr(self, name, tensor[index])


@dataclass(frozen=True)
class Passed:
    """What a pass showed of the samples that remain.

    loss: [n], or [n, k] where the objective has k values a sample. broken: bool [n], the image is misclassified
    (or is predicted as the target); all False where nobody asks, when crafting. gradient: of the loss,
    [n, C, H, W] or [n, k, C, H, W]; empty after a forward alone.
    """

    loss: Tensor
    broken: Tensor
    gradient: Tensor


class Search:
    """The working set of one attack run: which samples are left, and what was spent on them.

    `clean`, `labels`, `targets` and `eps` hold the samples still in the set; so do the tensors that an attack
    holds by `track`. A pass may shrink them all: with feedback, a sample leaves the set at the forward
    that shows it broken within its budget; without (crafting), all stay, and nothing waits for the device unless
    an attack leaves samples out of a pass.

    For a minimum-distance attack, `images` holds the nearest adversarial example within the budget that any
    pass has met, and a sample leaves only where the budget is finite.
    """

    def __init__(
        self,
        model: Model,
        clean: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        eps: Tensor,
        ball: Ball,
        sample_ids: Sequence[int],
        seed: int,
        feedback: bool,
        passes: Passes,
        logits: Tensor | None = None,
    ) -> None:
        self.feedback = feedback
        self.images = clean.clone()
        self.found = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
        self.forwards = torch.zeros(len(clean), dtype=torch.int64, device=clean.device)
        self.backwards = torch.zeros_like(self.forwards)
        self.ball = ball
        self.judge = model
        self.model = model if passes.search_on is None else passes.search_on
        self.passes, self.sample_ids, self.seed = passes, sample_ids, int(seed)
        self.rows = Rows(
            clean=clean,
            labels=labels,
            targets=targets,
            eps=eps,
            logits=logits,
            index=torch.arange(len(clean), device=clean.device),
            forwards=self.forwards.clone(),
            backwards=self.backwards.clone(),
            nearest=torch.full(eps.shape, torch.inf, dtype=torch.float64, device=clean.device),
        )
        self._tracked: list[weakref.ref[Rows]] = []

    def begin(self, name: str, objective: Objective, is_nearest: bool) -> None:
        """Start an attack on the samples that remain: its key of random numbers, its objective, its kind."""
        self.name, self.objective, self.is_nearest = name, objective, is_nearest
        self._num_draws = 0
        self._tracked = []

    def __len__(self) -> int:
        return len(self.rows.clean)

    @property
    def clean(self) -> Tensor:
        """Clean images [n, C, H, W]."""
        return self._tensor("clean")

    @property
    def labels(self) -> Tensor:
        """Labels [n], or soft labels [n, classes]."""
        return self._tensor("labels")

    @property
    def targets(self) -> Tensor | None:
        """Targets [n] of a targeted attack."""
        targets: Tensor | None = self.rows.targets
        return targets

    @property
    def eps(self) -> Tensor:
        """Budgets float64 [n]."""
        return self._tensor("eps")

    @property
    def nearest(self) -> Tensor:
        """Distance of the nearest adversarial example met so far, float64 [n]; inf where there is none."""
        return self._tensor("nearest")

    def _tensor(self, name: str) -> Tensor:
        tensor: Tensor = getattr(self.rows, name)
        return tensor

    def clean_logits(self) -> Tensor:
        """Return the logits of the clean images [n, classes]: one forward unless the caller knew them."""
        if self.rows.logits is None:
            self.rows.forwards += self.passes.eot
            self.rows.logits = predict(self.model, self.clean, self.passes)[0]
        return self._tensor("logits")

    def track(self, **tensors: Tensor | None) -> Rows:
        """Return a namespace of per-sample tensors that shrink with the working set for as long as it is held."""
        rows = Rows(**tensors)
        self._tracked = [tracked for tracked in self._tracked if tracked() is not None] + [weakref.ref(rows)]
        return rows

    def noise(self, kind: str, shape: tuple[int, ...], *key: object) -> Tensor:
        """Draw per-sample random numbers, "uniform" in [-1, 1) or "normal", [n, *shape].

        Every call without a `key` draws afresh; a `key` names the draw instead, as for restarts that may be
        taken up in any order.
        """
        if not key:
            self._num_draws += 1
            key = (self._num_draws,)
        return sample_noise(kind, (self.seed, self.name, *key), self.ids(), shape, self.clean)

    def ids(self) -> Sequence[int]:
        """Return the sample ids of the samples that remain."""
        if len(self) == len(self.sample_ids):
            return self.sample_ids
        return [self.sample_ids[i] for i in self.rows.index.tolist()]

    def gradient(
        self,
        images: Tensor,
        objective: Objective | None = None,
        *,
        aims: Tensor | None = None,
        where: Tensor | None = None,
        view: View | None = None,
        judge: bool = True,
    ) -> Passed:
        """Spend one forward and one backward; return loss, verdict and gradient of the samples that remain.

        objective: what is raised, in place of the attack's own; with k values a sample, one backward each. aims:
        [n, …], what is handed to it as the classes to be reached, by default the targets. where: bool [n], the
        samples to be passed; the others get zeros. view: what the model is shown instead of the images; judge:
        whether misclassification of that counts.

        Raises ValueError where the model gives no gradient with respect to its input.
        """
        return self._pass(images, objective, aims, where, view, judge, backward=True)

    def forward(
        self,
        images: Tensor,
        objective: Objective | None = None,
        *,
        aims: Tensor | None = None,
        where: Tensor | None = None,
        judge: bool = True,
    ) -> Passed:
        """Spend one forward; return loss and verdict of the samples that remain. Arguments as in `gradient`."""
        return self._pass(images, objective, aims, where, None, judge, backward=False)

    def finish(self, images: Tensor) -> None:
        """Hand in the last iterates of the samples that remain; the verdict is taken on them."""
        self.images[self.rows.index] = images

    def close(self) -> None:
        """Write down what was found and spent on the samples that remain."""
        self.found[self.rows.index] = self.rows.nearest.isfinite()
        self.forwards[self.rows.index] = self.rows.forwards
        self.backwards[self.rows.index] = self.rows.backwards

    def distance(self, images: Tensor) -> Tensor:
        """Return the norm of `images` − clean, float64 [n]."""
        return self.ball.distance(images, self.clean)

    def _pass(
        self,
        images: Tensor,
        objective: Objective | None,
        aims: Tensor | None,
        where: Tensor | None,
        view: View | None,
        judge: bool,
        backward: bool,
    ) -> Passed:
        images = images.detach()
        rows = None if where is None else where.nonzero().squeeze(1)
        num_rows = len(images) if rows is None else len(rows)
        if num_rows == 0:
            zeros = images.new_zeros(len(images))
            return Passed(zeros, zeros.bool(), torch.zeros_like(images) if backward else images.new_empty(0))
        counts = judge and (self.feedback or self.is_nearest)
        distance = self.distance(images) if counts and self.is_nearest else None
        worth = None if distance is None else (distance < self.nearest) & (distance <= self.eps)
        parts, passed = list(self.passes.parts(num_rows, backward)), []
        for part in parts:
            index: Index = part if rows is None else rows[part]
            passed.append(
                self._part(
                    images if len(parts) == 1 and rows is None else images[index],
                    index,
                    objective or self.objective,
                    aims if aims is not None else self.targets,
                    view,
                    counts,
                    None if worth is None else worth[index],
                    backward,
                )
            )
        if len(passed) == 1 and rows is None:
            loss, broken, gradient, _ = passed[0]
        else:
            losses, verdicts, gradients, _ = zip(*passed, strict=True)
            loss, broken = _joined(losses, rows, len(images)), _joined(verdicts, rows, len(images))
            gradient = _joined(gradients, rows, len(images)) if backward else images.new_empty(0)
        spent: Index = slice(None) if rows is None else rows
        self.rows.forwards[spent] += self.passes.eot
        if worth is not None and distance is not None:
            self._remember(images, distance, broken & worth)
        kept = None
        if counts and self.feedback:
            num_broken = sum(num for *_, num in passed)
            kept = self.leave(images, self._leaving(broken, worth, self.eps), num_broken) if num_broken else None
        if kept is not None:
            loss, broken, gradient = loss[kept], broken[kept], gradient[kept] if backward else gradient
        if backward and len(self):
            num_backwards = self.passes.eot * (1 if loss.ndim == 1 else loss.shape[1])
            if where is None:
                self.rows.backwards += num_backwards
            else:
                self.rows.backwards += num_backwards * (where if kept is None else where[kept])
        return Passed(loss, broken, gradient)

    def _part(
        self,
        images: Tensor,
        index: Index,
        objective: Objective,
        aims: Tensor | None,
        view: View | None,
        counts: bool,
        worth: Tensor | None,
        backward: bool,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Pass some rows at once; return loss, verdict, gradient, and how many of them are to leave."""
        labels, aims = self.labels[index], None if aims is None else aims[index]
        eot = self.passes.eot
        losses, scores, gradients = [], [], []
        broken, num_leaving = torch.zeros(len(images), dtype=torch.bool, device=images.device), 0
        for draw in range(eot):
            points = images.detach().requires_grad_() if backward else images
            with torch.set_grad_enabled(backward):
                logits = self._logits(points if view is None else view(points, index), labels)
                loss = objective(logits, labels, aims)
            losses.append(loss.detach())
            if counts:
                scores.append(logits.detach().softmax(1, dtype=torch.float64) if eot > 1 else logits.detach())
            if counts and draw == eot - 1:
                broken = self._judge(images, torch.stack(scores).mean(0) if eot > 1 else scores[0], index, worth)
                if self.feedback:  # the one wait for the device
                    num_leaving = int(self._leaving(broken, worth, self.eps[index]).sum())
                if eot == 1 and backward and num_leaving == len(images):
                    gradients.append(_no_gradient(images, loss))
                    break
            if backward:
                gradients.append(_differentiate(loss, points))
        return _mean(losses), broken, _mean(gradients) if backward else images.new_empty(0), num_leaving

    @staticmethod
    def _leaving(broken: Tensor, worth: Tensor | None, eps: Tensor) -> Tensor:
        """Return bool [n]: the broken samples that leave; of the nearest attacks, those within a finite budget."""
        return broken if worth is None else broken & worth & eps.isfinite()

    def _logits(self, images: Tensor, labels: Tensor) -> Tensor:
        bf16 = self.passes.precision == "bf16"
        with torch.autocast(images.device.type, torch.bfloat16) if bf16 else nullcontext():
            logits = call_model(self.model, images)
        check_logits(logits, labels, self.targets)
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def _judge(self, images: Tensor, scores: Tensor, index: Index, worth: Tensor | None) -> Tensor:
        """Return bool [n]: broken; where the passes are in doubt, what would count is looked at again."""
        targets = None if self.targets is None else self.targets[index]
        broken = is_broken(predicted_classes(scores), self.labels[index], targets)
        if self.passes.in_doubt:
            doubtful = (broken if worth is None else broken & worth).nonzero().squeeze(1)
            if len(doubtful):
                rows = torch.arange(len(self), device=images.device)[index][doubtful]
                self.rows.forwards[rows] += self.passes.eot
                prediction = predict(self.judge, images[doubtful], self.passes)[1]
                again = is_broken(prediction, self.labels[rows], None if targets is None else targets[doubtful])
                broken = broken.index_copy(0, doubtful, again)
        return broken

    def _remember(self, images: Tensor, distance: Tensor, better: Tensor) -> None:
        rows = better.nonzero().squeeze(1)
        self.images[self.rows.index[rows]] = images[rows]
        self.rows.nearest = torch.where(better, distance, self.rows.nearest)

    def leave(self, images: Tensor, broken: Tensor, num_broken: int) -> Tensor:
        """Drop the samples that are done with, now that some are broken; return the rows of the others."""
        leaving = self.done_with(broken)
        num_leaving = num_broken if leaving is broken else int(leaving.sum())
        order = leaving.argsort(stable=True)
        kept, gone = order[: len(self) - num_leaving], order[len(self) - num_leaving :]
        index = self.rows.index[gone]
        self.images[index], self.found[index] = images[gone], broken[gone]
        self.forwards[index], self.backwards[index] = self.rows.forwards[gone], self.rows.backwards[gone]
        for rows in (self.rows, *(tracked() for tracked in self._tracked)):
            if rows is not None:
                rows.keep(kept)
        return kept

    def done_with(self, broken: Tensor) -> Tensor:
        """Return bool [n]: the samples that leave when those of `broken` are."""
        return broken


def _joined(parts: tuple[Tensor, ...], rows: Tensor | None, num_rows: int) -> Tensor:
    whole = torch.cat(parts)
    return whole if rows is None else whole.new_zeros(num_rows, *whole.shape[1:]).index_copy(0, rows, whole)


def _mean(draws: list[Tensor]) -> Tensor:
    return draws[0] if len(draws) == 1 else torch.stack(draws).mean(0)


def _no_gradient(images: Tensor, loss: Tensor) -> Tensor:
    return torch.zeros_like(images) if loss.ndim == 1 else images.new_zeros(*loss.shape, *images.shape[1:])


def _differentiate(loss: Tensor, points: Tensor) -> Tensor:
    """Return the gradient of each sample's loss [n] or losses [n, k] with respect to the sample."""
    if not loss.requires_grad:
        raise ValueError(_NO_GRADIENT)
    ones = torch.ones_like(loss)
    weights = (ones,) if loss.ndim == 1 else tuple(torch.diag_embed(ones).unbind(1))
    gradients = []
    for k, weight in enumerate(weights):
        (gradient,) = torch.autograd.grad(
            loss, points, weight, retain_graph=k + 1 < len(weights), allow_unused=True
        )
        if gradient is None:
            raise ValueError(_NO_GRADIENT)
        gradients.append(gradient.nan_to_num(nan=0.0))
    return gradients[0] if loss.ndim == 1 else torch.stack(gradients, dim=1)


_NO_GRADIENT = (
    "the model gives no gradient with respect to its input; use an attack that needs none (see list_attacks())"
)
