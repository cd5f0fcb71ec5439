"""What an objective is, and the attack inside of it; they know no Lightning, so that they can be tested alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ares_lightning.attacks import Attack
from ares_lightning.attacks.attack import check_number
from ares_lightning.attacks.guard import MODES
from ares_lightning.attacks.losses import Loss, cross_entropy
from ares_lightning.attacks.pgd import BIM
from ares_lightning.training.objectives.auxiliary import AuxiliaryNorms

Logs = dict[str, Tensor]
LEAST_TEMPERATURE = 1e-3
"""Of those that logits are divided by."""
EPOCHS_PER_SEED, EPOCHS_PER_VIEW = 1_000_000, 100_000


class Objective(ABC):
    """Two calls a step: make the adversarial batch, then the loss on it; weight perturbations act in between.

    num_views: how many augmented views of each image a batch holds, one after the other.
    replays: how many steps in a row are made on one batch.
    wants_class_labels: whether soft labels, as of label smoothing, mixup and cutmix, have no meaning to it.
    differentiates_twice: whether its loss holds an input gradient, through which a compiled network has no
        backward.
    auxiliary: batch norms that are trained besides the network.
    """

    num_views: ClassVar[int] = 1
    wants_class_labels: ClassVar[bool] = False
    differentiates_twice: ClassVar[bool] = False
    replays: int = 1
    auxiliary: AuxiliaryNorms | None = None

    def craft(
        self,
        net: nn.Module,
        images: Tensor,
        labels: Tensor,
        step: int,
        *,
        epoch: int = 0,
        sample_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the images to train on, [N, C, H, W]; here the clean ones.

        net: the bare network; images: float in [0, 1]; labels: int64 [N] or soft [N, classes]; step: of the
        optimizer; epoch and sample_ids (int64 [N], default 0 … N−1): noise is keyed by them.
        """
        return images

    @abstractmethod
    def loss(
        self, net: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Logs]:
        """Return the loss to minimise and what else is worth logging, by name."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the objective carries from step to step on this process, for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` returned."""
        assert not state


@dataclass(frozen=True, kw_only=True)
class InnerAttack:
    """The attack of an objective, which may begin small; its noise is keyed by (seed, epoch, sample id).

    mode: `eval` or `train`, the mode of the network while it is attacked, as in `Attack.craft`; running statistics
        stay, where code that attacks in training mode (Wong et al., N-FGSM, GradAlign, ARD) lets them move.
    eps_warmup_epochs: the budget grows in equal parts over so many epochs, from none at all in the first
        (Debenedetti et al. 2023, arXiv 2209.07399: 10). Steps given as multiples of the budget grow with it.
    step_warmup_epochs: so do the steps alone (ARES, arXiv 2302.14301: 5); without steps there is the random start.

    Raises ValueError naming the setting.
    """

    attack: Attack
    seed: int = 0
    mode: str = "eval"
    eps_warmup_epochs: float = 0
    step_warmup_epochs: float = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"attack_mode={self.mode}: expected one of {', '.join(MODES)}")
        check_number("eps_warmup_epochs", self.eps_warmup_epochs)
        check_number("step_warmup_epochs", self.step_warmup_epochs)
        if self.attack.eps is None:
            raise ValueError(f"eps=None: training needs a budget; {self.attack.name} has none here")
        if self.step_warmup_epochs and not isinstance(self.attack, BIM):
            raise ValueError(
                f"step_warmup_epochs={self.step_warmup_epochs}: {self.attack.name} has no step_size; set 0"
            )

    def at(self, epoch: int) -> Attack:
        """Return the attack as it is in an epoch, counted from 0."""
        attack = self.attack
        if epoch < self.eps_warmup_epochs:
            attack = attack.replace(eps=attack.threat.eps * epoch / self.eps_warmup_epochs)
        if epoch < self.step_warmup_epochs and isinstance(attack, BIM):
            attack = attack.scale_step(epoch / self.step_warmup_epochs)
        return attack

    def craft(
        self,
        net: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        epoch: int,
        sample_ids: Tensor | None,
        loss: Loss | None = None,
        view: int = 0,
    ) -> Tensor:
        """Return the attack's last iterates; arguments as in `Attack.craft`. Every `view` has noise of its own."""
        attack, seed = self.at(epoch), epoch_seed(self.seed, epoch, view)
        if attack.threat.eps == 0:
            return images
        return attack.craft(net, images, labels, loss=loss, sample_ids=sample_ids, seed=seed, mode=self.mode)


def epoch_seed(seed: int, epoch: int, view: int = 0) -> int:
    """Return a seed of its own for every (seed, epoch) and view of an image."""
    return seed * EPOCHS_PER_SEED + view * EPOCHS_PER_VIEW + epoch


def log_probabilities(logits: Tensor) -> Tensor:
    """Return log softmax [N, classes], in float32 at least."""
    return F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) of each row, [N], differentiable in both."""
    return (log_p.exp() * (log_p - log_q)).sum(1)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of rows whose largest logit is at the label, or at the largest soft label."""
    classes = labels if labels.ndim == 1 else labels.argmax(1)
    return (logits.detach().argmax(1) == classes).float().mean()


def class_labels(name: str, labels: Tensor) -> Tensor:
    """Return `labels`, int64 [N]; raise ValueError for soft ones."""
    if labels.ndim != 1:
        raise ValueError(
            f"name={name}: its loss needs class labels; set aug.label_smoothing, aug.mixup and aug.cutmix to 0"
        )
    return labels


def ids_of(images: Tensor, sample_ids: Tensor | None) -> Sequence[int]:
    """Return sample ids as a list, by default 0 … N−1."""
    return range(len(images)) if sample_ids is None else sample_ids.tolist()


def input_gradient(net: nn.Module, images: Tensor, labels: Tensor, *, create_graph: bool = False) -> Tensor:
    """Return ∇CE of each image [N, C, H, W]; with `create_graph` it can be differentiated.

    Attention is then computed by its formula, since the fused kernels have no second derivative.
    """
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if create_graph else nullcontext():
        points = images.detach().requires_grad_()
        loss = cross_entropy(net(points), labels).sum()
        (gradient,) = torch.autograd.grad(loss, points, create_graph=create_graph)
    return gradient
