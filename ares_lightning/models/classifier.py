"""Classifiers: normalisation as the first layer, then a timm architecture fitted to the data."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import timm
import torch
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ares_lightning.models.cnn import CNN

SMALL_IMAGE = 64
"""Up to this size ResNets keep the resolution in their stem, as is usual on CIFAR (He et al. 2016, section 4.2)."""


class Normalize(nn.Module):
    """Subtract `mean` and divide by `std`, one value a channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images [N, C, H, W]."""
        return (images - self.mean) / self.std


class Classifier(nn.Module):
    """A network from pixels in [0, 1], [N, C, H, W], to logits [N, classes]."""

    def __init__(self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Classify images in [0, 1]."""
        logits: Tensor = self.backbone(self.normalize(images))
        return logits


def make_classifier(
    name: str,
    *,
    in_chans: int,
    num_classes: int,
    img_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    **settings: Any,
) -> Classifier:
    """Build `cnn` or any timm architecture by name, with random weights, fitted to images of `img_size` pixels.

    Up to 64 pixels a ResNet takes a 3x3 stem of stride 1 without pooling. A ViT is built at `img_size` and,
    unless `patch_size` is given, with patches of 4 up to 32 pixels, 8 up to 64, and its own above. `settings`
    go to the architecture.

    Raises ValueError for an unknown name, naming the nearest known ones, and for settings it does not take.
    """
    if not len(mean) == len(std) == in_chans:
        raise ValueError(f"mean={list(mean)}, std={list(std)}: expected {in_chans} values each, one a channel")
    if name == "cnn":
        backbone: nn.Module = _built(name, CNN, in_chans, num_classes, **settings)
    else:
        backbone = _timm_backbone(name, in_chans, num_classes, img_size, settings)
    return Classifier(backbone, mean, std)


def _timm_backbone(
    name: str, in_chans: int, num_classes: int, img_size: int, settings: dict[str, Any]
) -> nn.Module:
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = get_close_matches(architecture, timm.list_models(), n=3)
        remedy = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise ValueError(f"name={name}: timm {timm.__version__} has no such architecture; {remedy}")
    if _is_vit(architecture) and img_size <= SMALL_IMAGE:
        settings = {"patch_size": 4 if img_size <= 32 else 8, **settings}
    settings = {"in_chans": in_chans, "num_classes": num_classes, **settings}
    try:
        backbone = _built(name, timm.create_model, name, **{"img_size": img_size, **settings})
    except ValueError as error:
        if "unexpected keyword argument 'img_size'" not in str(error):
            raise
        backbone = _built(name, timm.create_model, name, **settings)  # convolutional: takes any size
    if isinstance(backbone, ResNet) and img_size <= SMALL_IMAGE:
        _keep_resolution(backbone, in_chans)
    return backbone


def _is_vit(architecture: str) -> bool:
    entry = timm.model_entrypoint(architecture)
    return bool(entry.__module__ == VisionTransformer.__module__)


def _keep_resolution(resnet: Any, in_chans: int) -> None:
    """Replace the stem, which would shrink the image to a quarter, by one 3x3 convolution of stride 1."""
    resnet.conv1 = nn.Conv2d(in_chans, resnet.bn1.num_features, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    resnet.maxpool = nn.Identity()


def _built(name: str, build: Any, *args: Any, **settings: Any) -> nn.Module:
    try:
        network: nn.Module = build(*args, **settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise _unbuildable(name, error) from error
    return network


def _unbuildable(name: str, error: Exception) -> ValueError:
    return ValueError(f"name={name}: the architecture cannot be built so: {error}")
