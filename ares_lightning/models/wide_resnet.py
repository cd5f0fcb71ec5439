"""The pre-activation ResNets of CIFAR-10 robustness: ResNet-18 and Wide ResNets, with ReLU or SiLU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
PADDINGS = ("symmetric", "same")


class WideResNet(nn.Module):
    """Wide ResNet of pre-activation blocks, [N, C, H, W] to logits [N, num_classes].

    depth, width: 28-10, 34-10 and 70-16 are the usual pairs; depth − 4 is a multiple of 6.
    activation: `relu`, or `silu` as in Gowal et al. 2020 (arXiv 2010.03593, section 4.5).
    padding: `symmetric` as in TRADES' code and its heirs, or `same` as in that of Gowal et al., where a strided
        convolution pads at the bottom and the right alone.

    Names of parameters are those of TRADES' published files; `from_published` converts others.

    Raises ValueError for another depth, activation or padding.

    Zagoruyko & Komodakis 2016, arXiv 1605.07146, table 1.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        in_chans: int = 3,
        num_classes: int = 10,
        activation: str = "relu",
        padding: str = "symmetric",
    ) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"depth={depth}: expected 6 n + 4, such as 28, 34 or 70")
        if padding not in PADDINGS:
            raise ValueError(f"padding={padding}: expected one of {', '.join(PADDINGS)}")
        act, same = _activation(activation), padding == "same"
        self.num_classes, self.padding = num_classes, padding
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        chans = 16
        for stage in range(3):
            blocks = nn.Sequential()
            for block in range((depth - 4) // 6):
                stride = 2 if stage and not block else 1
                blocks.append(_WideBlock(chans, 16 * width * 2**stage, stride, act, same))
                chans = 16 * width * 2**stage
            self.add_module(f"block{stage + 1}", nn.ModuleDict({"layer": blocks}))
        self.bn1 = nn.BatchNorm2d(chans)
        self.act = act
        self.fc = nn.Linear(chans, num_classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images to logits."""
        features = self.conv1(images)
        for stage in (1, 2, 3):
            features = self.get_submodule(f"block{stage}.layer")(features)
        logits: Tensor = self.fc(self.act(self.bn1(features)).mean(dim=(2, 3)))
        return logits


class _WideBlock(nn.Module):
    """Two 3x3 convolutions, each after its norm and activation; a wider skip starts after the first activation."""

    def __init__(self, in_chans: int, out_chans: int, stride: int, act: nn.Module, same: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chans)
        self.shifted = same and stride > 1
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, stride, padding=0 if self.shifted else 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chans)
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False)
        self.act = act
        self.widens = in_chans != out_chans
        if self.widens:
            self.convShortcut = nn.Conv2d(in_chans, out_chans, 1, stride, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        active = self.act(self.bn1(features))
        skip = self.convShortcut(active) if self.widens else features
        inner = self.conv1(F.pad(active, (0, 1, 0, 1)) if self.shifted else active)
        out: Tensor = skip + self.conv2(self.act(self.bn2(inner)))
        return out


class PreActResNet18(nn.Module):
    """ResNet-18 of pre-activation blocks for small images, [N, C, H, W] to logits [N, num_classes].

    activation: `relu` or `silu`. active_skip: a wider skip starts after the activation, as in the paper, or at the
    block's input. final_norm: norm and activation before the mean over places. Names of parameters are the usual
    ones, and most do not tell these apart: of CIFAR-10's published files, that of Rice et al. 2020 (arXiv
    2002.11569) is as by default; for that of Wong et al. 2020 (arXiv 2001.03994) ARES 2.0 has active_skip false,
    and RobustBench, whose file is another, final_norm false as well.

    He et al. 2016, arXiv 1603.05027, section 4.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 10,
        activation: str = "relu",
        active_skip: bool = True,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        act = _activation(activation)
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        chans = 64
        for stage in range(4):
            blocks = nn.Sequential()
            for block in range(2):
                stride = 2 if stage and not block else 1
                blocks.append(_PreActBlock(chans, 64 * 2**stage, stride, act, active_skip))
                chans = 64 * 2**stage
            self.add_module(f"layer{stage + 1}", blocks)
        self.bn = nn.BatchNorm2d(chans) if final_norm else nn.Identity()
        self.act = act if final_norm else nn.Identity()
        self.linear = nn.Linear(chans, num_classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images to logits."""
        features = self.conv1(images)
        for stage in (1, 2, 3, 4):
            features = self.get_submodule(f"layer{stage}")(features)
        logits: Tensor = self.linear(self.act(self.bn(features)).mean(dim=(2, 3)))
        return logits


class _PreActBlock(nn.Module):
    def __init__(self, in_chans: int, out_chans: int, stride: int, act: nn.Module, active_skip: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chans)
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chans)
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False)
        self.act, self.active_skip = act, active_skip
        self.shortcut = nn.Sequential()
        if stride > 1 or in_chans != out_chans:
            self.shortcut.append(nn.Conv2d(in_chans, out_chans, 1, stride, bias=False))

    def forward(self, features: Tensor) -> Tensor:
        active = self.act(self.bn1(features))
        skip = self.shortcut(active if self.active_skip and len(self.shortcut) else features)
        out: Tensor = skip + self.conv2(self.act(self.bn2(self.conv1(active))))
        return out


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name}: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def from_published(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a published state dict of a Wide ResNet under the names of `WideResNet`.

    Files of Gowal et al. have names of their own; those of Carmon et al. 2019 (arXiv 1905.13736) and their heirs
    hold a `sub_block1` besides, which no forward pass uses.
    """
    return {_renamed(key): value for key, value in state_dict.items() if not key.startswith("sub_block1.")}


_OUTER = {"init_conv": "conv1", "batchnorm": "bn1", "logits": "fc"}
_INNER = {
    "batchnorm_0": "bn1",
    "conv_0": "conv1",
    "batchnorm_1": "bn2",
    "conv_1": "conv2",
    "shortcut": "convShortcut",
}


def _renamed(key: str) -> str:
    parts = key.split(".")
    if parts[0] == "layer":  # layer.<stage>.block.<block>.<module>.<parameter>
        _, stage, _, block, module, *rest = parts
        return ".".join([f"block{int(stage) + 1}.layer.{block}", _INNER[module], *rest])
    return ".".join([_OUTER.get(parts[0], parts[0]), *parts[1:]])
