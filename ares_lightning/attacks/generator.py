"""Cross-domain attack: a trained network makes the adversarial example in one forward."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ares_lightning.attacks.attack import Attack
from ares_lightning.attacks.search import Search
from ares_lightning.attacks.transfer import smooth

KERNEL_SIZE, KERNEL_SPAN = 3, 1.0
"""The Gaussian of one pixel that smooths what the generator gives (the published evaluation)."""
LEAST_SIZE = 5
"""Height and width with which every reflection in the generator has enough to reflect."""
GENERATOR_ROWS = 32
"""Images in one forward of the generator, which works at their full size."""
NUM_CHANNELS, WIDTHS = 3, (64, 128, 256)
"""Channels of the images, and of the features at full, half and quarter size."""


@dataclass(frozen=True, kw_only=True)
class CDA(Attack):
    """Cross-domain attack: a generator's image, smoothed by a Gaussian and projected into ball ∩ box.

    The generator needs neither labels nor the attacked model, which spends no pass; one forward of the generator,
    trained for L-inf, makes each example. Untargeted only.

    generator: path of a file of its weights, such as the published ones (github.com/Muzammal-Naseer/CDA), read with
        `weights_only`. A call raises ValueError without it, and where the file is missing or of another network.

    Naseer et al. 2019, arXiv 1905.11736, section 3.
    """

    name: ClassVar[str] = "cda"
    kind: ClassVar[str] = "transfer"
    targeted: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 1905.11736"

    generator: str | None = None

    def _identity(self) -> list[Any]:
        """Return the settings with the content of the generator's file in place of its path."""
        path = None if self.generator is None else Path(self.generator)
        content = None if path is None or not path.is_file() else hashlib.blake2b(path.read_bytes()).hexdigest()
        return [("generator", content) if item[0] == "generator" else item for item in super()._identity()]

    def _run(self, search: Search) -> None:
        clean = search.clean
        if clean.shape[1] != NUM_CHANNELS:
            raise ValueError(f"images have {clean.shape[1]} channels; the generator of cda takes {NUM_CHANNELS}")
        if min(clean.shape[2:]) < LEAST_SIZE:
            size = f"{clean.shape[2]} x {clean.shape[3]}"
            raise ValueError(f"images are {size}; the generator of cda takes {LEAST_SIZE} pixels a side or more")
        network = load_generator(self.generator).to(clean, non_blocking=True)
        made = torch.cat([network(part) for part in torch.split(clean, GENERATOR_ROWS)])
        search.finish(self.ball.project(smooth(made, KERNEL_SIZE, KERNEL_SPAN), clean, search.eps))


def load_generator(path: str | None) -> ResNetGenerator:
    """Read a generator, in eval mode and frozen, from a state dict with or without `module.` before its keys.

    Raises ValueError, in one line, where there is no such file or it holds something else.
    """
    remedy = "expected a file of weights of CDA's ResNet generator, as published at github.com/Muzammal-Naseer/CDA"
    if path is None:
        raise ValueError(f"generator=None: cda needs a trained generator; {remedy}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"generator={path}: no such file; {remedy}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"generator={path}: cannot be read ({type(error).__name__}); {remedy}") from None
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ValueError(f"generator={path}: holds no plain state dict; {remedy}")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    network = ResNetGenerator(len({key.split(".")[0] for key in state if key.startswith("resblock")}))
    own = network.state_dict()
    strange = sorted(
        key
        for key in own.keys() | state.keys()
        if key not in own or key not in state or own[key].shape != state[key].shape
    )
    if strange:
        raise ValueError(f"generator={path}: does not fit at {strange[0]} ({len(strange)} keys in all); {remedy}")
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


class ResNetGenerator(nn.Module):
    """Image [N, 3, H, W] to image in [0, 1] of the same size: two strided layers, residual blocks, and back up.

    The published generators have 6 blocks, those for small images 2. Names and order of the sub-modules follow the
    published files. Sizes that are no multiple of 4 come out larger and are cut at the top and right, as there.
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        low, middle, high = WIDTHS
        self.block1 = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(NUM_CHANNELS, low, 7, bias=False), nn.BatchNorm2d(low), nn.ReLU()
        )
        self.block2 = _strided(nn.Conv2d(low, middle, 3, 2, padding=1, bias=False))
        self.block3 = _strided(nn.Conv2d(middle, high, 3, 2, padding=1, bias=False))
        self.num_blocks = num_blocks
        for i in range(num_blocks):
            self.add_module(f"resblock{i + 1}", _ResidualBlock(high))
        self.upsampl1 = _strided(nn.ConvTranspose2d(high, middle, 3, 2, padding=1, output_padding=1, bias=False))
        self.upsampl2 = _strided(nn.ConvTranspose2d(middle, low, 3, 2, padding=1, output_padding=1, bias=False))
        self.blockf = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(low, NUM_CHANNELS, 7))

    def forward(self, images: Tensor) -> Tensor:
        """Return the images that the network makes."""
        height, width = images.shape[2:]
        features = self.block3(self.block2(self.block1(images)))
        for i in range(self.num_blocks):
            features = self.get_submodule(f"resblock{i + 1}")(features)
        made: Tensor = self.blockf(self.upsampl2(self.upsampl1(features)))[:, :, -height:, :width]
        return (made.tanh() + 1) / 2


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout(),
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, features: Tensor) -> Tensor:
        residual: Tensor = self.block(features)
        return features + residual


def _strided(convolution: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU())
