"""The skip gradient method: momentum steps along gradients that prefer a network's skip connections."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import ClassVar

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from ares_lightning.attacks.guard import Model
from ares_lightning.attacks.search import Search
from ares_lightning.attacks.threat import parse_budget
from ares_lightning.attacks.transfer import MIM

JOINS = {"AddBackward0": 0.2, "CatBackward0": 0.5}
"""Where a branch meets its skip connection, by autograd's names, and the paper's decay: ResNets add, DenseNets
concatenate (arXiv 2002.05990, section 4.1)."""


@dataclass(frozen=True, kw_only=True)
class SGM(MIM):
    """Skip gradient method: MIM whose gradients are decayed in the residual branches of the model (k F + k B).

    The derivative of a block z + f(z) is taken as 1 + residual_decay · f′(z); forward values are the model's own.
    The blocks are found in the autograd graph of each pass (see `decay_residual_branches`), so that every residual
    network will do, plain functions too, and no hook is put on the model. Every iterate counts. A model without
    skip connections leaves plain `mim`, and a compiled one hides them: both are warned of.

    residual_decay: γ in [0, 1]; None takes 0.2 where branches are added and 0.5 where they are concatenated. 1 is
        `mim`. Other settings as in `mim`; momentum=0 is the paper's SGM without momentum.

    Wu et al. 2020, arXiv 2002.05990, equation 5.
    """

    name: ClassVar[str] = "sgm"
    kind: ClassVar[str] = "transfer"
    paper: ClassVar[str] = "arXiv 2002.05990"

    residual_decay: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.residual_decay is not None:
            decay = parse_budget(self.residual_decay, "residual_decay")
            if decay > 1:
                raise ValueError(f"residual_decay={decay}: expected a factor from 0 to 1, such as 0.2")
            object.__setattr__(self, "residual_decay", decay)

    def _run(self, search: Search) -> None:
        model = search.model
        search.model = decayed = _Decayed(model, self.residual_decay)
        try:
            super()._run(search)
        finally:
            search.model = model
        if not decayed.num_branches:
            warnings.warn(
                "sgm found no skip connection in the model and did what mim does; attack a residual network or a "
                "DenseNet, and hand it in before torch.compile",
                stacklevel=4,  # the caller of `attack(…)` or `attack.craft(…)`
            )


class _Decayed:
    """A model whose gradients are decayed in its residual branches."""

    def __init__(self, model: Model, decay: float | None) -> None:
        self.model, self.decay, self.num_branches = model, decay, 0

    def __call__(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        if images.requires_grad and logits.requires_grad:
            self.num_branches = decay_residual_branches(logits, images, self.decay)
        return logits


def decay_residual_branches(outputs: Tensor, images: Tensor, decay: float | None) -> int:
    """Have a backward from `outputs` to `images` decayed in every residual branch; return the number of branches.

    A branch is what is joined to a value with a shorter history, that is, computed by fewer operations from the
    images: in a sum the longer of the operands, since what projects the skip path is less than the branch; in a
    concatenation every operand computed from the shortest one, so that the parallel paths of an Inception block are
    none. The hooks are on the graph of this one pass and go with it.

    decay: the factor; None takes that of `JOINS`.
    """
    source = get_gradient_edge(images).node
    graph = _topological(get_gradient_edge(outputs).node, source)
    bit = {node: 1 << i for i, node in enumerate(graph)}
    history = {source: bit.get(source, 0)}  # the operations that a value was computed by, as a set of bits
    num_branches = 0
    for node in graph:
        operands = {i: parent for i, (parent, _) in enumerate(node.next_functions) if parent in history}
        if node is source or not operands:
            continue
        history[node] = reduce(or_, (history[parent] for parent in operands.values()), bit[node])
        if node.name() not in JOINS:
            continue
        skip = min(operands.values(), key=lambda parent: history[parent].bit_count())
        branches = [
            i for i, parent in operands.items() if _is_branch(node, history[parent], history[skip], bit[skip])
        ]
        if branches:
            node.register_hook(_scaling(branches, JOINS[node.name()] if decay is None else decay))
            num_branches += len(branches)
    return num_branches


def _is_branch(join: Node, history: int, skip_history: int, skip: int) -> bool:
    if history.bit_count() == skip_history.bit_count():
        return False
    return join.name() == "AddBackward0" or bool(history & skip)


def _topological(sink: Node, source: Node) -> list[Node]:
    """Return the nodes between `source` and `sink`, each after those that it was computed from."""
    order: list[Node] = []
    entered: set[Node] = set()
    stack = [(sink, False)]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif node not in entered:
            entered.add(node)
            stack.append((node, True))
            if node is not source:
                stack.extend((parent, False) for parent, _ in node.next_functions if parent is not None)
    return order


def _scaling(
    branches: list[int], decay: float
) -> Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Return a hook that scales the gradients a node hands to some of its inputs."""

    def hook(grad_inputs: tuple[Tensor, ...], _: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(
            gradient * decay if i in branches and gradient is not None else gradient
            for i, gradient in enumerate(grad_inputs)
        )

    return hook
