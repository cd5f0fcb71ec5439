"""Folding batch norm into the layer before it, for as long as an evaluation lasts."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, fx, nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""What a batch norm is folded into. Subclasses may compute something else from their weight and are left alone."""

NUM_PROBES = 4
TOLERANCE = 1e-9
"""Largest difference of float64 logits, relative to the largest logit, between a network and its folded copy."""


@dataclass(frozen=True, eq=False)
class Folded:
    """A network without the batch norms that could be folded away, and what became of each of them.

    network: the folded copy, or, where nothing could be folded, the very network that was given.
    num_folded: batch norms folded. kept: reason by name of each batch norm that was not.
    """

    network: nn.Module
    num_folded: int
    kept: dict[str, str]

    def __str__(self) -> str:
        """Return one line for a log."""
        line = f"{self.num_folded} of {self.num_folded + len(self.kept)} batch norms folded"
        reasons = Counter(self.kept.values())
        return line + "".join(f"; {count} kept: {reason}" for reason, count in reasons.items())


def fold_batchnorm(network: nn.Module, image_shape: tuple[int, int, int]) -> Folded:
    """Fold every batch norm of an eval-mode network that directly follows a convolution or linear layer into it.

    With W, b of the layer and γ, β, mean, var of the batch norm: W ← W·γ/√(var + eps) for each output channel
    and b ← (b − mean)·γ/√(var + eps) + β, in float64, then in the layer's own dtype. Values and gradients
    with respect to the input stay the same within rounding; memory layout, device and the code of every
    module stay as they are, and so does `network`.

    A trace by torch.fx, which holds for every input, tells which layers follow each other. Then the float64
    logits of the network and of its folded copy are compared on random images of `image_shape` (C, H, W) in
    [0, 1]. A network that cannot be traced, or that fails the comparison, comes back unfolded, with the reason.

    Rounding decides at the decision boundary: of the nearest adversarial examples that one of the two networks has,
    a few are none for the other, so that a verdict on `network` takes a forward of `network`.
    """
    norms = [name for name, module in network.named_modules() if type(module) in NORMS]
    if not norms:
        return Folded(network, 0, {})
    device = next(itertools.chain(network.parameters(), network.buffers())).device
    forked = [device] if device.type == "cuda" else []
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(forked):
        try:
            layers, kept = _plan(copy.deepcopy(network), norms)
        except Exception as error:  # whatever a module does when it is copied, or shown a symbol for the images
            return _unfolded(network, norms, f"the network cannot be traced ({_line(error)})")
        if not layers:
            return Folded(network, 0, kept)
        try:
            difference = _difference(network, layers, image_shape, device)
        except Exception as error:  # such as a forward that casts to float32, or a device without float64
            return _unfolded(network, norms, f"the float64 comparison does not run ({_line(error)})")
        if not difference <= TOLERANCE:
            return _unfolded(network, norms, f"folding would change the logits by {difference:.1e} of the largest")
        return Folded(_fold(copy.deepcopy(network), layers), len(layers), kept)


def _unfolded(network: nn.Module, norms: list[str], reason: str) -> Folded:
    return Folded(network, 0, dict.fromkeys(norms, reason))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class _Tracer(fx.Tracer):
    """Looks into modules only where there are batch norms inside."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether the module is taken as a whole."""
        return type(m) in NORMS or not any(type(module) in NORMS for module in m.modules())


def _plan(network: nn.Module, norms: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return, by name of the batch norm, the name of the layer to fold it into, or the reason to keep it."""
    whole = nn.Sequential(network)  # calls the network as everybody does, with images alone
    names = {module: name for name, module in network.named_modules()}
    uses: Counter[nn.Module] = Counter()
    calls: dict[nn.Module, fx.Node] = {}
    for node in _Tracer().trace(whole).nodes:
        if node.op == "call_module":
            module = whole.get_submodule(str(node.target))
            uses.update(module.modules())
            calls[module] = node
        elif node.op == "get_attr":  # a weight that is used by itself
            uses[whole.get_submodule(str(node.target).rpartition(".")[0])] += 1
    called = {node: module for module, node in calls.items()}
    layers, kept = {}, {}
    for name in norms:
        norm: Any = network.get_submodule(name)
        before = calls[norm].args[0] if norm in calls else None
        layer = called.get(before) if isinstance(before, fx.Node) else None
        if not uses[norm]:
            kept[name] = "not used"
        elif uses[norm] > 1:
            kept[name] = "used more than once"
        elif norm.training:
            kept[name] = "in training mode"
        elif norm.running_mean is None or norm.running_var is None:
            kept[name] = "without running statistics"
        elif layer is None or type(layer) not in LAYERS:
            kept[name] = "not directly after a convolution or linear layer"
        elif uses[layer] > 1 or len(calls[layer].users) > 1:
            kept[name] = "after a layer that is used elsewhere too"
        elif _has_hooks(norm) or _has_hooks(layer):
            kept[name] = "with hooks on it or on the layer before it"
        else:
            layers[name] = names[layer]
    return layers, kept


def _has_hooks(module: nn.Module) -> bool:
    return any(
        getattr(module, kind)
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


def _difference(
    network: nn.Module, layers: dict[str, str], image_shape: tuple[int, int, int], device: torch.device
) -> float:
    """Return the largest difference of the float64 logits, before and after, relative to the largest logit."""
    before = copy.deepcopy(network).double()
    after = _fold(copy.deepcopy(before), layers)
    torch.manual_seed(0)
    images = torch.rand(NUM_PROBES, *image_shape, dtype=torch.float64, device=device)
    logits = []
    for net in (before, after):
        torch.manual_seed(0)  # a randomised network draws the same both times
        with torch.autocast(device.type, enabled=False):
            logits.append(net(images))
    return float((logits[1] - logits[0]).abs().max() / logits[0].abs().max())


def _fold(network: nn.Module, layers: dict[str, str]) -> nn.Module:
    """Fold the batch norms in place; return the network."""
    instead: dict[nn.Module, nn.Module] = {}
    for name, layer_name in layers.items():
        norm: Any = network.get_submodule(name)
        layer: Any = network.get_submodule(layer_name)
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -norm.running_mean.double()
        if layer.bias is not None:
            shift = shift + layer.bias.double()
        shift = shift * scale
        if norm.bias is not None:
            shift = shift + norm.bias.double()
        weight: Tensor = layer.weight
        scaled = weight.double() * scale.view(-1, *[1] * (weight.ndim - 1))
        layer.weight = nn.Parameter(scaled.to(weight.dtype), weight.requires_grad)
        layer.bias = nn.Parameter(shift.to(weight.dtype), weight.requires_grad)
        instead[norm] = _rest(norm)
    for parent in list(network.modules()):
        for child_name, child in list(parent._modules.items()):  # named_children() names a shared module once
            if child in instead:
                setattr(parent, child_name, instead[child])
    return network


def _rest(norm: nn.Module) -> nn.Module:
    """Return what a batch norm does besides: nothing, or the activation that timm has put into the same module."""
    rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
    return rest.train(norm.training)
