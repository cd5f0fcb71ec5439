"""Classifiers: normalisation as the first layer, then an architecture fitted to the data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

import timm
import torch
from timm.models.resnet import ResNet
from timm.models.xcit import Xcit
from torch import Tensor, nn

from ares_lightning.models.cnn import CNN
from ares_lightning.models.conv_stem import WIDTHS, with_conv_stem
from ares_lightning.models.resnet20 import ResNet20
from ares_lightning.models.resnet_fd import DenoisingResNet
from ares_lightning.models.t2t_vit import T2TViT
from ares_lightning.models.wide_resnet import PreActResNet18, WideResNet

SMALL_IMAGE = 64
"""Up to this size ResNets keep the resolution in their stem, as is usual on CIFAR (He et al. 2016, section 4.2)."""


_XCIT_P16 = partial(Xcit, patch_size=16, depth=12, eta=1.0, tokens_norm=True)

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "cnn": CNN,
    "t2t_vit_t_14": partial(T2TViT, embed_dim=384, depth=14, num_heads=6),
    "t2t_vit_t_19": partial(T2TViT, embed_dim=448, depth=19, num_heads=7),
    "t2t_vit_t_24": partial(T2TViT, embed_dim=512, depth=24, num_heads=8),
    "resnet152_fd": DenoisingResNet,
    "xcit_medium_12_p16_224": partial(_XCIT_P16, embed_dim=512, num_heads=8),
    "xcit_large_12_p16_224": partial(_XCIT_P16, embed_dim=768, num_heads=16),
    **{f"{name}_convstem": partial(with_conv_stem, name) for name in WIDTHS},
    "resnet20": ResNet20,
    "preact_resnet18": PreActResNet18,
    "wide_resnet": WideResNet,
    "wide_resnet28_10": partial(WideResNet, depth=28, width=10),
    "wide_resnet34_10": partial(WideResNet, depth=34, width=10),
    "wide_resnet70_16": partial(WideResNet, depth=70, width=16),
}
"""What timm lacks, by name."""


ACTIVATIONS = ("relu", "gelu", "silu")


class Normalize(nn.Module):
    """Subtract `mean` and divide by `std`, one value a channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def extra_repr(self) -> str:
        """Show mean and std, which are no part of the state dict."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images [N, C, H, W]."""
        return (images - self.mean) / self.std


class Classifier(nn.Module):
    """A network from pixels in [0, 1], [N, C, H, W], to logits [N, classes].

    defense: what is done to the pixels before they are normalised, from pixels to pixels.
    settings: with which arguments the architecture was built.
    """

    def __init__(
        self,
        backbone: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        defense: nn.Module | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.defense = defense
        self.settings = dict(settings or {})
        self.normalize = Normalize(mean, std)
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Classify images in [0, 1]."""
        if self.defense is not None:
            images = self.defense(images)
        logits: Tensor = self.backbone(self.normalize(images))
        return logits


class ClassAnswers(nn.Module):
    """A network that answers among the classes of a set: the largest of the outputs that stand for a class counts.

    outputs: int64 [outputs of the network], the class of each, −1 for those that do not count; every class has one.

    Raises ValueError in the forward pass for a network with another number of outputs.
    """

    outputs: Tensor
    chosen: Tensor
    classes: Tensor

    def __init__(self, network: nn.Module, outputs: Tensor) -> None:
        super().__init__()
        self.network = network
        self.num_classes = int(outputs.max()) + 1
        self.register_buffer("outputs", outputs, persistent=False)
        counting = outputs >= 0
        self.register_buffer("chosen", counting.nonzero().squeeze(1), persistent=False)
        self.register_buffer("classes", outputs[counting], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the classes' logits [N, classes] for images [N, C, H, W]."""
        logits: Tensor = self.network(images)
        if logits.shape[1] != len(self.outputs):
            raise ValueError(
                f"the network has {logits.shape[1]} outputs where the set is about {len(self.outputs)} classes; "
                "evaluate a network that was trained on these"
            )
        chosen = logits[:, self.chosen]
        empty = logits.new_full((len(logits), self.num_classes), -torch.inf)
        return empty.scatter_reduce(1, self.classes.expand_as(chosen), chosen, "amax")


def make_classifier(
    name: str,
    *,
    in_chans: int,
    num_classes: int,
    img_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    activation: str | None = None,
    defense: nn.Module | None = None,
    **settings: Any,
) -> Classifier:
    """Build one of ARCHITECTURES or any of timm's by name, with random weights, fitted to images of `img_size`
    pixels.

    Up to 64 pixels a ResNet takes a 3x3 stem of stride 1 without pooling. What has an image size is built at
    `img_size`, and a ViT and its kin take, unless `patch_size` is given, patches of 4 up to 32 pixels, 8 up to 64,
    and their own above. `activation` is one of ACTIVATIONS in place of the architecture's own; `settings` go to the
    architecture. Weights lie in channels_last, the layout that convolutions work in.

    Raises ValueError for an unknown name, naming the nearest known ones, for settings it does not take, and for
    images that it cannot take.
    """
    if activation is not None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation}: expected null or one of {', '.join(ACTIVATIONS)}")
        settings[_word_for_activation(name)] = activation
    backbone, settings = _backbone(name, in_chans, num_classes, img_size, settings)
    shape = (in_chans, num_classes, img_size)
    return as_classifier(name, backbone, *shape, mean=mean, std=std, defense=defense, settings=settings)


def as_classifier(
    name: str,
    backbone: nn.Module,
    in_chans: int,
    num_classes: int,
    img_size: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    defense: nn.Module | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Classifier:
    """Return a network with its normalisation before it, once it has classified two images.

    Raises ValueError for a normalisation of other channels, for images that it cannot take, and for other outputs.
    """
    if not len(mean) == len(std) == in_chans:
        raise ValueError(f"mean={list(mean)}, std={list(std)}: expected {in_chans} values each, one a channel")
    classifier = Classifier(backbone, mean, std, defense, settings).to(memory_format=torch.channels_last)
    _check_forward(name, classifier, torch.zeros(2, in_chans, img_size, img_size), num_classes)
    return classifier


def _word_for_activation(name: str) -> str:
    """Return what an architecture calls the argument: timm's are built with `act_layer`."""
    build = ARCHITECTURES.get(name.partition(".")[0], timm.create_model)
    return "activation" if "activation" in inspect.signature(build).parameters else "act_layer"


def _backbone(
    name: str, in_chans: int, num_classes: int, img_size: int, settings: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network; return it with the settings that it took."""
    architecture = name.partition(".")[0]
    if architecture not in ARCHITECTURES and not timm.is_model(architecture):
        near = get_close_matches(architecture, [*ARCHITECTURES, *timm.list_models()], n=3)
        remedy = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise ValueError(f"name={name}: timm {timm.__version__} has no such architecture; {remedy}")
    build = ARCHITECTURES.get(architecture) or partial(timm.create_model, name)
    settings = {"img_size": img_size, "in_chans": in_chans, "num_classes": num_classes, **settings}
    if img_size <= SMALL_IMAGE and not architecture.startswith(_OWN_PATCHES):
        settings = {"patch_size": 4 if img_size <= 32 else 8, **settings}
    try:
        backbone, settings = _fitted(build, settings)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"name={name}: the architecture cannot be built so: {reason}") from error
    if isinstance(backbone, ResNet) and img_size <= SMALL_IMAGE:
        _keep_resolution(backbone, in_chans)
    return backbone, settings


_OWN_PATCHES = ("swin", "convnext")
"""Architectures that begin with patches of 4 and merge them, so that theirs fit small images as they are."""


def _fitted(build: Callable[..., nn.Module], settings: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Build an architecture; one that has no patches or image size is built without."""
    try:
        return build(**settings), settings
    except TypeError as error:
        for key in ("patch_size", "img_size"):
            if f"unexpected keyword argument '{key}'" in str(error) and key in settings:
                return _fitted(build, {k: value for k, value in settings.items() if k != key})
        raise


@torch.no_grad()
def _check_forward(name: str, classifier: Classifier, images: Tensor, num_classes: int) -> None:
    try:
        logits: object = classifier.eval()(images)
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"name={name}: cannot take images of {images.shape[-1]} pixels: {reason}") from error
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"name={name}: returns a {type(logits).__name__}; expected a Tensor, logits [N, {num_classes}]"
        )
    if logits.shape != (len(images), num_classes):
        raise ValueError(
            f"name={name}: returns shape {list(logits.shape)}; expected logits of {num_classes} classes"
        )
    classifier.train()


def _keep_resolution(resnet: Any, in_chans: int) -> None:
    """Replace the stem, which would shrink the image to a quarter, by one 3x3 convolution of stride 1."""
    resnet.conv1 = nn.Conv2d(in_chans, resnet.bn1.num_features, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    resnet.maxpool = nn.Identity()
