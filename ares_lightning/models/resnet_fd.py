"""ResNet-152 with feature denoising: a non-local mean at the end of each stage."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}
EXPANSION = 4


class DenoisingResNet(nn.Module):
    """ResNet of bottlenecks, padded as TensorFlow's SAME, with a denoising block after each stage.

    Takes images [N, 3, H, W] in RGB, turns them to BGR, and returns logits [N, num_classes]. layers:
    blocks of each stage, ResNet-152's by default. activation: `gelu` as in the published PyTorch code of
    ARES-Bench, or `relu` as in the paper's own. Names of parameters follow the published file.

    Xie et al. 2019, arXiv 1812.03411, sections 4 and 6 (Gaussian non-local means with embedding).
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        layers: tuple[int, ...] = (3, 8, 36, 3),
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation}: expected one of {', '.join(ACTIVATIONS)}")
        self.num_classes = num_classes
        self.act = ACTIVATIONS[activation]()
        self.conv0 = nn.Conv2d(in_chans, 64, 7, 2, bias=False)
        self.bn0 = nn.BatchNorm2d(64)
        chans = 64
        for stage, num_blocks in enumerate(layers):
            width = 64 * 2**stage
            blocks: list[nn.Module] = []
            for block in range(num_blocks):
                stride = 2 if stage and not block else 1
                blocks.append(_Bottleneck(chans, width, stride, self.act))
                chans = EXPANSION * width
            self.add_module(f"group{stage}", nn.Sequential(*blocks, NonLocalMean(chans)))
        self.num_stages = len(layers)
        self.linear = nn.Linear(chans, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits."""
        features = self.act(self.bn0(self.conv0(_padded(images.flip(1), 7, 2))))
        features = F.max_pool2d(_padded(features, 3, 2), 3, 2)
        for stage in range(self.num_stages):
            features = self.get_submodule(f"group{stage}")(features)
        logits: Tensor = self.linear(features.mean(dim=(2, 3)))
        return logits


class NonLocalMean(nn.Module):
    """x + BN(conv(Σ_j softmax_j(θ(x_i) · φ(x_j) / √C) x_j)): every place becomes a mean over those like it.

    Xie et al. 2019, arXiv 1812.03411, equation 2 and figure 4; θ and φ halve the channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.embedding_theta = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.embedding_phi = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, features: Tensor) -> Tensor:
        """Denoise features [N, C, H, W]."""
        theta, phi, value = (
            x.flatten(2).transpose(1, 2)
            for x in (self.embedding_theta(features), self.embedding_phi(features), features)
        )
        mean = F.scaled_dot_product_attention(theta, phi, value, scale=features.shape[1] ** -0.5)
        denoised: Tensor = features + self.bn(self.conv(mean.transpose(1, 2).reshape(features.shape)))
        return denoised


class _Bottleneck(nn.Module):
    def __init__(self, in_chans: int, width: int, stride: int, act: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, EXPANSION * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(EXPANSION * width)
        self.act, self.stride = act, stride
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or in_chans != EXPANSION * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_chans, EXPANSION * width, 1, stride, bias=False), nn.BatchNorm2d(EXPANSION * width)
            )

    def forward(self, features: Tensor) -> Tensor:
        inner = self.act(self.bn1(self.conv1(features)))
        inner = self.act(self.bn2(self.conv2(_padded(inner, 3, self.stride))))
        out: Tensor = self.act(self.bn3(self.conv3(inner)) + self.downsample(features))
        return out


def _padded(features: Tensor, size: int, stride: int) -> Tensor:
    """Pad with zeros as TensorFlow's SAME does: the odd pixel goes to the bottom and the right."""
    down, across = (max(size - (side % stride or stride), 0) for side in features.shape[2:])
    return F.pad(features, (across // 2, across - across // 2, down // 2, down - down // 2))
