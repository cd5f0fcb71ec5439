"""A small convolutional network for small images; it learns the digits adversarially in seconds on a laptop."""

from __future__ import annotations

from timm.layers import create_act_layer
from torch import Tensor, nn


class CNN(nn.Module):
    """Three 3x3 convolutions with batch norm, 2x2 pooling after the second, global average, one linear layer.

    in_chans, num_classes: of the data; any image size from 2x2 on. width: channels of the first layer, doubled
    for the other two. activation: any name that timm knows, e.g. `relu`, `gelu` or `silu`.
    """

    def __init__(self, in_chans: int, num_classes: int, width: int = 48, activation: str = "relu") -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_layer(in_chans, width, activation),
            *_layer(width, 2 * width, activation),
            nn.MaxPool2d(2),
            *_layer(2 * width, 2 * width, activation),
        )
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images [N, C, H, W] to logits [N, num_classes]."""
        logits: Tensor = self.head(self.features(images).mean(dim=(2, 3)))
        return logits


def _layer(in_chans: int, out_chans: int, activation: str) -> list[nn.Module]:
    return [
        nn.Conv2d(in_chans, out_chans, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_chans),
        create_act_layer(activation, inplace=activation == "relu"),
    ]
