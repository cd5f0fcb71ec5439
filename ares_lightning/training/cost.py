"""What a training step costs: its floating point operations, counted as they are dispatched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ares_lightning.training.objectives import Objective

_aten = torch.ops.aten


@dataclass(frozen=True)
class StepCost:
    """forward: FLOPs of one forward of one image in eval mode (F); step: those of a whole training step, in F for
    each image."""

    forward: int
    step: float

    def __str__(self) -> str:
        return f"{self.step:.1f} F an image, F = {self.forward / 1e9:.3g} GFLOP"


def count_flops(work: Callable[[], object]) -> int:
    """Return the floating point operations of the matrix products, convolutions and attention in `work()`.

    A multiplication and an addition are two. Counted is what is dispatched in eager mode, backwards included; code
    compiled by `torch.compile` runs uncompiled for it. A fused attention kernel that computes its scores again in
    the backward is counted with them.
    """
    counter = _Counter()
    with counter:
        work()
    return counter.flops


def step_cost(net: nn.Module, objective: Objective, images: Tensor, labels: Tensor) -> StepCost:
    """Count a training step (crafting, loss, backward) on images [N, C, H, W] with labels [N] or [N, classes].

    Nothing is computed: shapes alone go through a copy of the network without memory, on the meta device, where
    attention is counted unfused. Network, gradients and random state stay as they are.

    Raises NotImplementedError for an objective that looks at values, which are not there.
    """
    twin, objective = _without_memory(net), copy.deepcopy(objective)
    images, labels = images.to("meta"), labels.to("meta")

    def step() -> None:
        adversarial = objective.craft(twin, images, labels, 0)
        objective.loss(twin, images, adversarial, labels, 0)[0].backward()  # type: ignore[no-untyped-call]

    flops = count_flops(step)
    twin.eval()
    with torch.no_grad():
        forward = count_flops(lambda: twin(images))
    return StepCost(forward // len(images), flops / forward)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None:
            with self:  # in inference mode, what consists of others arrives whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


def _convolution_backward(
    gradient: Tensor, images: Tensor, weight: Tensor, *settings: Any, out_val: tuple[Tensor | None, ...]
) -> int:
    """Each of the two gradients takes as many operations as the forward; torch's formula forgets the groups."""
    transposed, output_mask = settings[4], settings[7]
    positions, num_gradients = (images if transposed else gradient).shape[2:], int(sum(output_mask[:2]))
    return 2 * len(images) * prod(positions) * weight.numel() * num_gradients


def _matrix_vector(matrix: Tensor, vector: Tensor, out_val: Tensor) -> int:
    return 2 * matrix.numel()


_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten.convolution_backward: _convolution_backward,
    _aten.mv: _matrix_vector,
    _aten.dot: _matrix_vector,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}


def _without_memory(net: nn.Module) -> nn.Module:
    """Return a copy of a network on the meta device, which never copies a value."""
    twins: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in net.parameters()
    }
    twins.update({id(buffer): torch.empty_like(buffer, device="meta") for buffer in net.buffers()})
    return copy.deepcopy(net, twins)
