"""A perceptron of fully connected layers, which sees no neighbourhood of pixels: a network of one's own.

python train.py --config-dir examples/conf model=mlp model.settings.depth=3
"""

from torch import Tensor, nn


class MLP(nn.Module):
    """`depth` hidden layers of `width` units with layer norm and GELU, then one linear layer."""

    def __init__(self, in_chans: int, num_classes: int, img_size: int, width: int = 256, depth: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        size = in_chans * img_size**2
        for _ in range(depth):
            layers += [nn.Linear(size, width), nn.LayerNorm(width), nn.GELU()]
            size = width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(size, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images [N, C, H, W] to logits [N, num_classes]."""
        logits: Tensor = self.head(self.layers(images))
        return logits
