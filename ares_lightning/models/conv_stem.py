"""Convolutional stems in place of the patch embedding of ConvNeXt and ViT."""

from __future__ import annotations

from typing import Any

import timm
from timm.layers import LayerNorm2d
from torch import Tensor, nn

WIDTHS: dict[str, tuple[tuple[int, int], ...]] = {
    "convnext_tiny": ((48, 2), (96, 2)),
    "convnext_small": ((48, 2), (96, 2)),
    "convnext_base": ((64, 2), (96, 2), (128, 1)),
    "convnext_large": ((96, 2), (144, 2), (192, 1)),
    "vit_small_patch16_224": ((48, 2), (96, 2), (192, 2), (384, 2)),
    "vit_base_patch16_224": ((48, 2), (96, 2), (192, 2), (384, 2)),
}
"""Channels and stride of the stem's 3x3 convolutions."""


class ConvStem(nn.Module):
    """3x3 convolutions, each with layer norm and GELU; for a ViT a 1x1 convolution to its width ends it."""

    def __init__(self, in_chans: int, widths: tuple[tuple[int, int], ...], embed_dim: int | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for out_chans, stride in widths:
            layers += [nn.Conv2d(in_chans, out_chans, 3, stride, padding=1), LayerNorm2d(out_chans), nn.GELU()]
            in_chans = out_chans
        if embed_dim is not None:
            layers.append(nn.Conv2d(in_chans, embed_dim, 1))
        self.stem = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Return features [N, C, H / s, W / s], s the product of the strides."""
        features: Tensor = self.stem(images)
        return features


def with_conv_stem(name: str, in_chans: int = 3, **settings: Any) -> nn.Module:
    """Build the timm architecture `name` with a convolutional stem; names of parameters as in the published files.

    Singh et al. 2023, arXiv 2303.01870, section 4 and appendix; widths from the published code.
    """
    network: Any = timm.create_model(name, in_chans=in_chans, **settings)
    if name.startswith("convnext"):
        network.stem = ConvStem(in_chans, WIDTHS[name])
    else:
        network.patch_embed.proj = ConvStem(in_chans, WIDTHS[name], network.embed_dim)
    built: nn.Module = network
    return built
