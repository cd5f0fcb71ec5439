"""The small residual network for CIFAR, which timm lacks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ResNet20(nn.Module):
    """ResNet-20 for small images, shortcuts of option A (He et al. 2016, arXiv 1512.03385, section 4.2).

    in_chans, num_classes: of the data; any image size from 4x4 on.
    """

    def __init__(self, in_chans: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(_Block(16, 16) for _ in range(3)))
        self.layer2 = nn.Sequential(_Block(16, 32), _Block(32, 32), _Block(32, 32))
        self.layer3 = nn.Sequential(_Block(32, 64), _Block(64, 64), _Block(64, 64))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images [N, in_chans, H, W] to logits [N, num_classes]."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


class _Block(nn.Module):
    """Two 3x3 convolutions; where the width grows, the shortcut takes every other pixel and pads with zeros."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__()
        self.stride, self.padding = (1, 0) if in_chans == out_chans else (2, (out_chans - in_chans) // 2)
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chans)
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)
