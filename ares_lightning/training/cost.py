"""What a training step costs: its floating point operations, counted as they are dispatched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ares_lightning.counting import count_flops, without_memory
from ares_lightning.training.objectives import Objective


@dataclass(frozen=True)
class StepCost:
    """forward: FLOPs of one forward of one image in eval mode (F); step: those of a whole training step, in F for
    each image."""

    forward: int
    step: float

    def __str__(self) -> str:
        return f"{self.step:.1f} F an image, F = {self.forward / 1e9:.3g} GFLOP"


def step_cost(net: nn.Module, objective: Objective, images: Tensor, labels: Tensor) -> StepCost:
    """Count a training step (crafting, loss, backward) on images [N, C, H, W] with labels [N] or [N, classes].

    Nothing is computed: shapes alone go through a copy of the network without memory, on the meta device, where
    attention is counted unfused. Network, gradients and random state stay as they are.

    Raises RuntimeError for a network or an objective that looks at values, which are not there.
    """
    twin, objective = without_memory((net, objective), [net, *networks_of(objective)])
    images, labels = images.to("meta"), labels.to("meta")

    def step() -> None:
        adversarial = objective.craft(twin, images, labels, 0)
        objective.loss(twin, images, adversarial, labels, 0)[0].backward()  # type: ignore[no-untyped-call]

    flops = count_flops(step)
    twin.eval()
    with torch.no_grad():
        forward = count_flops(lambda: twin(images))
    return StepCost(forward // len(images), flops / forward)


def networks_of(objective: Objective) -> list[nn.Module]:
    """Return the networks and layers that an objective holds, such as a teacher."""
    return [held for held in vars(objective).values() if isinstance(held, nn.Module)]
