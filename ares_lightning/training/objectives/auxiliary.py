"""A second set of batch norms, for images that are distributed otherwise."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class AuxiliaryNorms(nn.Module):
    """Copies of a network's batch norms, which take the originals' places while they are asked for.

    The network keeps its modules and names: what is evaluated and exported is the network with its own norms.

    Xie et al. 2020 (AdvProp), arXiv 1911.09665, section 3.2.

    Raises ValueError for a network without batch norms.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self._net = (net,)  # in a tuple, so that it is no module of this one
        self._names = [name for name, module in net.named_modules() if isinstance(module, _BatchNorm)]
        if not self._names:
            raise ValueError("split_bn=true: the network has no batch norms to split")
        self.norms = nn.ModuleList(copy.deepcopy(net.get_submodule(name)) for name in self._names)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the network use these norms inside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        own = map(self._net[0].get_submodule, self._names)  # asked for anew: SyncBN replaces the modules
        for one, other in zip(own, self.norms, strict=True):
            one._parameters, other._parameters = other._parameters, one._parameters
            one._buffers, other._buffers = other._buffers, one._buffers


def through(norms: AuxiliaryNorms | None) -> AbstractContextManager[None]:
    """Return the context in which the network uses `norms`, if there are any."""
    return nullcontext() if norms is None else norms.in_place()
