"""Is the image classified rightly however it is turned (Engstrom et al. 2019, arXiv 1712.02779: grid search)?

python evaluate.py --config-dir examples/conf ckpt=runs/<name>/<run id> eval=[clean,rotations]
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torchvision.transforms.v2.functional import InterpolationMode, rotate

from ares_lightning.attacks.passes import Passes
from ares_lightning.evaluation.evaluators import Evaluator, Verdicts, clean_outcome, with_found


@dataclass(frozen=True)
class Rotations(Evaluator):
    """The worst of `num_angles` angles, evenly from -degrees to degrees, for each image: num_angles + 1 F."""

    degrees: float = 30.0
    num_angles: int = 13

    def verdicts(
        self, net: nn.Module, images: Tensor, labels: Tensor, sample_ids: Tensor, seed: int, passes: Passes
    ) -> Iterator[Verdicts]:
        """Yield one verdict a sample: broken if it is at any angle."""
        outcome = clean = clean_outcome(net, images, labels, sample_ids, seed, passes)
        for i in range(self.num_angles):
            angle = self.degrees * (2 * i / (self.num_angles - 1) - 1)
            turned = rotate(images, angle, InterpolationMode.BILINEAR)
            seen = clean_outcome(net, turned, labels, sample_ids, seed, passes)
            new = (seen.broken & ~outcome.broken).nonzero().squeeze(1)
            outcome = with_found(outcome, new, seen, new)
        outcome = replace(outcome, clean_prediction=clean.clean_prediction)
        yield Verdicts("rotation", None, 0.0, outcome)
