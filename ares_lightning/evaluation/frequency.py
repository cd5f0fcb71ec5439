"""Accuracy over the frequencies that an image has left: what a classifier sees in coarse and in fine structure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ares_lightning.attacks.passes import Passes
from ares_lightning.evaluation.evaluators import Evaluator, Verdicts, clean_outcome

LAST_RADIUS, RADIUS_STEP = 4, 2
"""Of ARES-Bench's curve, whose images have 224 pixels (its published code): 112, 110, … 4, 55 radii."""
SMALL_SIDE = 64
"""Below this many pixels the radii go down to 1 in steps of 1, or there would be few of them."""


def low_pass_radii(side: int) -> tuple[int, ...]:
    """Return the radii of the curve for images of `side` pixels, from half of that down."""
    last, step = (1, 1) if side < SMALL_SIDE else (LAST_RADIUS, RADIUS_STEP)
    return tuple(range(side // 2, last - 1, -step))


def low_pass(images: Tensor, radius: int) -> Tensor:
    """Return images [N, C, H, W] without the frequencies beyond `radius` periods an image, clipped to [0, 1].

    An ideal filter in the Fourier domain (ARES-Bench, arXiv 2302.14301, its published code). From half the shorter
    side on nothing is taken away.
    """
    height, width = images.shape[-2:]
    if radius >= min(height, width) // 2:
        return images
    rows, columns = (
        torch.fft.fftfreq(side, 1 / side, device=images.device, dtype=torch.float64) for side in (height, width)
    )
    kept = rows[:, None].square() + columns.square() <= radius**2
    filtered: Tensor = torch.fft.ifft2(torch.fft.fft2(images) * kept).real
    return filtered.clamp_(0, 1)


@dataclass(frozen=True)
class FrequencyEvaluator(Evaluator):
    """Is the image classified rightly when only its low frequencies are left?

    of: the name of the set. radii: of the pass band in pixels, falling.
    """

    of: str = field(repr=False)
    radii: tuple[int, ...]

    def __post_init__(self) -> None:
        is_plain = all(type(radius) is int and radius >= 0 for radius in self.radii)
        if not is_plain or not self.radii or list(self.radii) != sorted(set(self.radii), reverse=True):
            raise ValueError(
                f"radii={list(self.radii)}: expected a falling list of whole numbers, such as [16,8,4]"
            )

    def verdicts(
        self, net: nn.Module, images: Tensor, labels: Tensor, sample_ids: Tensor, seed: int, passes: Passes
    ) -> Iterator[Verdicts]:
        """Yield the predictions at every radius, each as of a set of its own (1 F a radius)."""
        for radius in self.radii:
            outcome = clean_outcome(net, low_pass(images, radius), labels, sample_ids, seed, passes)
            yield Verdicts("none", None, 0.0, outcome, of_set=f"{self.of}/low_pass/{radius}")
