"""The working set of an attack run: the samples still to be broken, and the passes spent on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ares_lightning.attacks.guard import Model
from ares_lightning.attacks.losses import Loss
from ares_lightning.attacks.noise import sample_noise


class Search:
    """The working set of one attack run: which samples are left, and what was spent on them.

    `clean`, `labels` and `targets` hold the samples still in the set. With feedback, a sample leaves the set at
    the forward pass that shows it broken; without (crafting), all stay and nothing waits for the device.
    """

    def __init__(
        self,
        model: Model,
        clean: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        sample_ids: Sequence[int],
        noise_key: tuple[object, ...],
        loss: Loss,
        feedback: bool,
    ) -> None:
        self.clean, self.labels, self.targets = clean, labels, targets
        self.feedback = feedback
        self.images = clean.clone()
        self.forwards = torch.zeros(len(clean), dtype=torch.int64, device=clean.device)
        self.backwards = torch.zeros_like(self.forwards)
        self._model, self._loss = model, loss
        self._sample_ids, self._noise_key = sample_ids, noise_key
        self._index = torch.arange(len(clean), device=clean.device)
        self._num_forwards = self._num_backwards = self._num_draws = 0

    def __len__(self) -> int:
        return len(self.clean)

    def noise(self, kind: str, shape: tuple[int, ...]) -> Tensor:
        """Draw fresh per-sample random numbers, "uniform" in [-1, 1) or "normal", [N, *shape]."""
        self._num_draws += 1
        ids = self._sample_ids
        if len(self) < len(ids):
            ids = [ids[i] for i in self._index.tolist()]
        return sample_noise(kind, (*self._noise_key, self._num_draws), ids, shape, self.clean)

    def gradient(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return (images, gradient of the loss) for the samples that remain after one forward and one backward.

        The loss is to be raised: for targeted attacks its sign is turned. Both tensors are empty when the last
        sample has broken. Raises ValueError where the model gives no gradient with respect to its input.
        """
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            logits = self._forward(images)
            if self.targets is None:
                loss = self._loss(logits, self.labels)
            else:
                loss = -self._loss(logits, self.targets)
            total = loss.sum()
        if loss.shape != (len(images),):
            raise ValueError(f"the loss has shape {list(loss.shape)}; expected one value a sample, [{len(images)}]")
        kept = self._leave(logits, images) if self.feedback else None
        if not len(self):
            return images.detach()[:0], images.detach()[:0]
        gradient = torch.autograd.grad(total, images, allow_unused=True)[0] if total.requires_grad else None
        if gradient is None:
            raise ValueError(
                "the model gives no gradient with respect to its input; "
                "use an attack that needs none (see list_attacks())"
            )
        self._num_backwards += 1
        gradient = gradient.nan_to_num(nan=0.0)
        images = images.detach()
        return (images, gradient) if kept is None else (images[kept], gradient[kept])

    def check(self, images: Tensor) -> None:
        """Spend one forward to let the samples that `images` break leave the working set."""
        self._leave(self._forward(images), images)

    def finish(self, images: Tensor) -> None:
        """Hand in the last iterates of the samples that remain; the verdict is taken on them."""
        self._record(self._index, images)

    def _forward(self, images: Tensor) -> Tensor:
        logits = self._model(images)
        check_logits(logits, self.labels, self.targets)
        self._num_forwards += 1
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def _leave(self, logits: Tensor, images: Tensor) -> Tensor | None:
        """Drop the broken samples; return the positions of the others, None where nothing was broken."""
        broken = is_broken(predicted_classes(logits), self.labels, self.targets)
        num_broken = int(broken.sum())  # the one wait for the device in an iteration
        if num_broken == 0:
            return None
        order = broken.argsort(stable=True)
        kept, gone = order[: len(self) - num_broken], order[len(self) - num_broken :]
        self._record(self._index[gone], images.detach()[gone])
        self._index, self.clean, self.labels = self._index[kept], self.clean[kept], self.labels[kept]
        if self.targets is not None:
            self.targets = self.targets[kept]
        return kept

    def _record(self, index: Tensor, images: Tensor) -> None:
        self.images[index] = images
        self.forwards[index] = self._num_forwards
        self.backwards[index] = self._num_backwards


def predicted_classes(logits: Tensor) -> Tensor:
    """Return the predicted classes [N]; −1, which is no class, where a logit is NaN."""
    return logits.argmax(1).where(~logits.isnan().any(1), -1)


def is_broken(prediction: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """Return bool [N]: the prediction is wrong, or, where targets are given, is the target."""
    return prediction != labels if targets is None else prediction == targets


def check_logits(logits: Tensor, labels: Tensor, targets: Tensor | None) -> None:
    """Hold the model's output and the labels to each other; values are read on the CPU only, where it is free."""
    if logits.ndim != 2 or len(logits) != len(labels):
        raise ValueError(f"the model returned shape {list(logits.shape)}; expected logits [{len(labels)}, classes]")
    if labels.ndim == 2 and labels.shape != logits.shape:
        raise ValueError(f"soft labels have shape {list(labels.shape)}; the logits {list(logits.shape)}")
    if logits.device.type == "cpu":
        check_classes(logits, labels, targets)


def check_classes(logits: Tensor, labels: Tensor, targets: Tensor | None) -> None:
    """Raise ValueError where labels or targets name a class that the model does not have."""
    for name, classes in (("labels", labels), ("targets", targets)):
        if classes is not None and classes.ndim == 1 and int(classes.max()) >= logits.shape[1]:
            raise ValueError(f"{name} hold {int(classes.max())}; the model has {logits.shape[1]} classes")
