"""What a piece of work costs: operations, bytes and memory, counted as they are dispatched.

On the meta device, where shapes alone are known, nothing is computed and nothing is allocated.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten


@dataclass(frozen=True)
class Operation:
    """One that was dispatched: its floating point operations, and the bytes that it reads and writes.

    kind: by which rate of an accelerator it goes, `bf16`, `tf32` (float32 convolutions, torch's default) or `fp32`.
    """

    flops: int
    bytes: int
    kind: str


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, every operation is written down, and the memory of the tensors that they make.

    live: bytes of these tensors that are held now. peak: the most that were held since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    @property
    def flops(self) -> int:
        """Those of all operations."""
        return sum(operation.flops for operation in self.operations)

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
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        before = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in made:
            if tensor.untyped_storage()._cdata not in before:  # else it is a view, or written in place
                self._hold(tensor)
        if not (func.is_view or func._overloadpacket in _UNREAD):
            flops = formula(*args, **kwargs, out_val=out) if formula else 0
            is_convolution = func._overloadpacket in (_aten.convolution, _aten.convolution_backward)
            is_bf16 = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in given)
            kind = "bf16" if is_bf16 else "tf32" if is_convolution else "fp32"
            self.operations.append(Operation(flops, sum(map(_size, given + made)), kind))
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def count_flops(work: Callable[[], object]) -> int:
    """Return the floating point operations of the matrix products, convolutions and attention in `work()`.

    A multiplication and an addition are two. Counted is what is dispatched in eager mode, backwards included; code
    compiled by `torch.compile` runs uncompiled for it. A fused attention kernel that computes its scores again in
    the backward is counted with them.
    """
    with Trace() as trace:
        work()
    flops: int = trace.flops
    return flops


class AsOnCUDA(TorchFunctionMode):
    """Within it, tensors of the meta device are treated as those of a CUDA device are.

    Attention is fused, and under bf16 autocast the types are those of torch's page on torch.amp, "CUDA Ops that can
    autocast to float16" and "to float32".
    """

    def __init__(self, bf16: bool) -> None:
        super().__init__()
        self._bf16 = bf16
        self._copies: dict[int, Tensor] = {}

    def leave_autocast(self) -> None:
        """Let the copies of the weights in bf16 go, as the end of an autocast does."""
        self._copies = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self._bf16 and (name in _IN_BF16 or name in _IN_FP32):
            convert = self._to_bf16 if name in _IN_BF16 else _to_fp32
            args = tuple(map(convert, args))
            kwargs = {key: convert(value) for key, value in kwargs.items()}
        if func is F.scaled_dot_product_attention and _fuses_attention():
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _to_bf16(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(torch.bfloat16)
        return self._copies.setdefault(id(value), value.to(torch.bfloat16))


def without_memory(held: Any, modules: Iterable[nn.Module]) -> Any:
    """Return a copy of `held` whose modules have parameters and buffers on the meta device, without values."""
    twins: dict[int, Any] = {}
    for module in modules:
        twins |= {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()
        }
        twins |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in module.buffers()}
    return copy.deepcopy(held, twins)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, each counted once."""
    return sum(_size(tensor) for tensor in {id(each): each for each in tensors}.values())


def _size(tensor: Tensor) -> int:
    return int(tensor.nbytes)


def _fuses_attention() -> bool:
    """Return whether no context asks for attention by its formula."""
    enabled: bool = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    return enabled


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    fused = _aten._scaled_dot_product_flash_attention_for_cpu  # which keeps what those of CUDA keep
    out: Tensor = fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return out


def _to_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


_IN_BF16 = frozenset(
    (
        *("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        *("matmul", "__matmul__", "__rmatmul__", "mm", "mv", "bmm", "addmm", "addmv", "addbmm", "baddbmm"),
        *("einsum", "prelu", "scaled_dot_product_attention"),
    )
)
_IN_FP32 = frozenset(
    (
        *("layer_norm", "group_norm", "norm", "softmax", "log_softmax", "cross_entropy", "nll_loss", "kl_div"),
        *("exp", "log", "log1p", "expm1", "pow", "__pow__", "rsqrt", "reciprocal", "sum", "prod", "cumsum"),
        *("cosine_similarity", "mse_loss", "l1_loss", "smooth_l1_loss", "softplus", "dist"),
    )
)
_UNREAD = frozenset((_aten._unsafe_view, _aten.detach, _aten.empty, _aten.empty_like, _aten.empty_strided))
"""What gives out memory or names it anew, but touches none."""


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
