"""What every attack of the catalogue must keep, whatever it is asked: shared by the tests and the proof."""

from __future__ import annotations

import functools
import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from networks import SmallNet, predicted
from torch import Tensor, nn

from ares_lightning.attacks import Attack, Outcome, list_attacks, make_attack
from ares_lightning.attacks.autoattack import AutoAttack
from ares_lightning.attacks.generator import ResNetGenerator
from ares_lightning.attacks.threat import BALLS

ROWS = {row.name: row for row in list_attacks()}
CASES = [(row.name, norm) for row in ROWS.values() for norm in row.norms]
COLUMNS = ("images", "broken", "distance", "forwards", "backwards", "clean_prediction", "adversarial_prediction")
TARGETED_ONLY = {"tta"}
WEAK = {"noise", "cda", "tta"}
"""Attacks of which nothing can be expected in these tests: noise, an untrained generator, a hard task."""
EPS = {"linf": 0.1, "l2": 0.6, "l1": 3.0}

CHEAP: dict[str, dict[str, Any]] = {
    "fgsm": {},
    "bim": {"steps": 6},
    "pgd": {"steps": 6, "restarts": 2},
    "mim": {"steps": 6},
    "apgd_ce": {"steps": 10},
    "apgd_dlr": {"steps": 10},
    "apgd_t": {"steps": 10, "num_targets": 3},
    "fab": {"steps": 6, "restarts": 2},
    "fab_t": {"steps": 6, "num_targets": 3},
    "cw": {"steps": 30, "search_steps": 3, "step_size": 0.05},
    "deepfool": {"steps": 10},
    "fmn": {"steps": 20},
    "dim": {"steps": 6, "diversity_prob": 0.5},
    "tim": {"steps": 6, "diversity_prob": 0.5, "kernel_size": 3},
    "si_ni_fgsm": {"steps": 4, "scales": 2},
    "vmi_fgsm": {"steps": 4, "num_neighbors": 2},
    "sgm": {"steps": 6},
    "tta": {"steps": 8, "kernel_size": 3},
    "cda": {},
    "square": {"queries": 60},
    "nes": {"queries": 101, "samples": 10},
    "spsa": {"queries": 101, "samples": 10},
    "nattack": {"queries": 101, "samples": 20},
    "boundary": {"queries": 100},
    "evolutionary": {"queries": 120},
    "autoattack": {},
    "noise": {"draws": 5},
}
"""Settings with which an attack takes a moment on images of a few pixels."""

LONG = {"cw", "fab_t", "square", "nes", "spsa", "nattack", "boundary", "evolutionary", "autoattack"}
"""Attacks whose default settings take seconds."""

AXES: dict[str, list[Any]] = {
    "case": CASES,
    "dtype": [torch.float32, torch.float64],
    "num_classes": [2, 3, 4, 10, 1000],
    "size": [(6, 5), (5, 9)],
    "n": [0, 1, 17],
    "targeted": [False, True],
}


def every_combination() -> list[tuple[Any, ...]]:
    """All combinations of the axes."""
    return list(itertools.product(*AXES.values()))


def every_pair() -> list[tuple[Any, ...]]:
    """Few combinations in which every two values of two axes meet, chosen greedily."""
    values = list(AXES.values())
    pairs = list(itertools.combinations(range(len(values)), 2))
    open_pairs = {(i, j, a, b) for i, j in pairs for a in range(len(values[i])) for b in range(len(values[j]))}
    others = list(itertools.product(*(range(len(axis)) for axis in values[1:])))
    chosen = []

    def gain(row: tuple[int, ...]) -> int:
        return sum((i, j, row[i], row[j]) in open_pairs for i, j in pairs)

    for case in range(len(CASES)):
        while any((0, j, case, b) in open_pairs for j in range(1, len(values)) for b in range(len(values[j]))):
            best = max(((case, *other) for other in others), key=gain)
            open_pairs -= {(i, j, best[i], best[j]) for i, j in pairs}
            chosen.append(tuple(axis[k] for axis, k in zip(values, best, strict=True)))
    return chosen


class BriefAutoAttack(AutoAttack):
    """AutoAttack with fewer steps, targets and queries, which would be too few to bear its name elsewhere."""

    name = "autoattack"

    @property
    def members(self) -> tuple[Attack, ...]:
        """The members with cheap settings."""
        return tuple(cheap(attack.name, norm=self.norm, eps=self.eps) for attack in super().members)


def cheap(name: str, **settings: Any) -> Attack:
    """The attack with settings that take a moment."""
    if name == "autoattack":
        return BriefAutoAttack(**settings)
    if name == "cda":
        settings["generator"] = untrained_generator()
    return make_attack(name, **CHEAP[name], **settings)


@functools.cache
def untrained_generator() -> str:
    """The path of the weights of a small generator for cda."""
    path = Path(tempfile.mkdtemp()) / "generator.pth"
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        torch.save(ResNetGenerator(num_blocks=2).state_dict(), path)
    return str(path)


def check_outcome(
    case: tuple[str, str],
    dtype: torch.dtype,
    num_classes: int,
    size: tuple[int, int],
    n: int,
    targeted: bool,
    device: str = "cpu",
) -> None:
    """Run an attack on a small network and hold its outcome to the contract."""
    name, norm = case
    targeted = name in TARGETED_ONLY or (targeted and ROWS[name].targeted)
    eps = EPS[norm]
    net = SmallNet(num_classes=num_classes).to(device, dtype)
    images = torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(n), dtype=dtype).to(device)
    original = images.clone()
    labels = predicted(net, images) if n else torch.empty(0, dtype=torch.int64, device=device)
    misclassified = n // 2 if n > 1 and not targeted else None
    if misclassified is not None:
        labels[misclassified] = (labels[misclassified] + 1) % num_classes
    targets = (labels + 1) % num_classes if targeted else None
    outcome = cheap(name, norm=norm, eps=eps)(net, images, labels, targets=targets)
    assert torch.equal(images, original), "the caller's images were written to"
    assert outcome.images.shape == images.shape
    assert outcome.images.dtype == dtype
    assert outcome.images.device == images.device
    assert outcome.broken.shape == outcome.distance.shape == (n,)
    assert outcome.forwards.dtype == outcome.backwards.dtype == torch.int64
    assert net.training
    if not n:
        return
    slack = 6e-8 if norm == "linf" else eps * (1e-5 if dtype == torch.float32 else 1e-9)
    assert outcome.images.min() >= 0
    assert outcome.images.max() <= 1
    assert outcome.distance.max() <= eps + slack
    torch.testing.assert_close(outcome.distance, BALLS[norm].distance(outcome.images, images))
    prediction = predicted(net, outcome.images)
    assert torch.equal(outcome.broken, prediction == targets if targeted else prediction != labels)
    assert torch.equal(outcome.adversarial_prediction, prediction)
    assert torch.equal(outcome.clean_prediction, predicted(net, images))
    assert torch.equal(outcome.images[~outcome.broken], images[~outcome.broken])
    if not ROWS[name].needs_gradients:
        assert not outcome.backwards.any()
    if misclassified is not None:
        assert outcome.broken[misclassified]
        assert torch.equal(outcome.images[misclassified], images[misclassified])
        assert outcome.forwards[misclassified] == outcome.backwards[misclassified] == 0
        assert outcome.distance[misclassified] == 0


def call(attack: Attack, net: nn.Module, images: Tensor, labels: Tensor, **arguments: Any) -> Outcome:
    """Call an attack, with targets where it knows no other way."""
    if attack.name in TARGETED_ONLY:
        arguments["targets"] = (labels + 1) % 10
    return attack(net, images, labels, **arguments)


def check_cuts(case: tuple[str, str], sizes: tuple[int, ...], device: str = "cpu") -> None:
    """Hold every column of an outcome, in float64, to that of the same samples shuffled and cut into batches."""
    name, norm = case
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(23, 3, 6, 5, generator=generator, dtype=torch.float64).to(device)
    net = SmallNet().to(device, torch.float64)
    labels = predicted(net, images)
    attack = cheap(name, norm=norm, eps=EPS[norm] / 4)
    ids = torch.arange(100, 123)
    whole = call(attack, net, images, labels, sample_ids=ids, seed=4)
    assert 0 < whole.broken.sum() < 23 or name in WEAK
    order = torch.randperm(23, generator=generator)
    for size in sizes:
        parts = [
            call(attack, net, images[part], labels[part], sample_ids=ids[part], seed=4, batch_size=4)
            for part in order.split(size)
        ]
        for column in COLUMNS:
            joined = torch.cat([getattr(part, column) for part in parts])[order.argsort()]
            torch.testing.assert_close(joined, getattr(whole, column), rtol=0, atol=1e-12)


def check_defaults(name: str) -> None:
    """Run an attack as its name gives it, in the first of its norms."""
    norm = ROWS[name].norms[0]
    settings = {"generator": untrained_generator()} if name == "cda" else {}
    attack = make_attack(name, norm=norm, **settings)
    assert (attack.name, attack.threat.norm) == (name, norm)
    assert attack.threat.eps > 0
    images = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(1))
    net = SmallNet()
    labels = predicted(net, images)
    targets = (labels + 1) % 10 if name in TARGETED_ONLY else None
    assert attack(net, images, labels, targets=targets).images.shape == images.shape
