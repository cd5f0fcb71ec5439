"""What the catalogue says of its attacks, the page that shows it, and the fingerprint that tells attacks apart."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract import ROWS, TARGETED_ONLY, BriefAutoAttack, cheap

from ares_lightning.attacks import make_attack
from ares_lightning.attacks.__main__ import PASSES, catalogue

PAGE = Path(__file__).parents[2] / "docs" / "attacks.md"


def unbreakable(images):
    """Logits of 12 classes, of which the first leads by far."""
    weight = torch.randn(images[0].numel(), 12, generator=torch.Generator().manual_seed(0), dtype=images.dtype)
    return images.flatten(1) @ weight + 100 * torch.eye(12, dtype=images.dtype)[0]


def test_the_page_shows_the_catalogue_as_it_is():
    done = subprocess.run(
        [sys.executable, "-m", "ares_lightning.attacks"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == catalogue()
    assert catalogue() in PAGE.read_text(), (
        "python -m ares_lightning.attacks prints what belongs into docs/attacks.md"
    )


@pytest.mark.filterwarnings("ignore:sgm found no skip connection")
@pytest.mark.parametrize("name", [name for name in ROWS if name != "autoattack"])
def test_a_survivor_costs_what_the_catalogue_says(name, images):
    norm = ROWS[name].norms[0]
    attack = cheap(name, norm=norm, eps=0.1)
    labels = torch.zeros(len(images), dtype=torch.int64)
    targets = labels + 1 if name in TARGETED_ONLY else None
    outcome = attack(unbreakable, images, labels, targets=targets)
    assert not outcome.broken.any()
    settings = {field.name: getattr(attack, field.name) for field in dataclasses.fields(attack)}
    for formula, spent in zip(PASSES[name], (outcome.forwards, outcome.backwards), strict=True):
        said = eval(formula.removeprefix("≤ "), settings)
        assert (spent <= said if formula.startswith("≤ ") else spent == said).all()
    assert set(PASSES) == set(ROWS)


def test_autoattack_costs_what_the_page_says():
    """At most, for L-inf, L2 and ten classes: the sum over its members."""
    spent = [0, 0]
    for member in make_attack("autoattack").members:
        settings = {field.name: getattr(member, field.name) for field in dataclasses.fields(member)}
        for i, formula in enumerate(PASSES[member.name]):
            spent[i] += eval(formula.removeprefix("≤ "), settings.copy())
    assert f"at most {spent[0]:,} forwards and {spent[1]:,} backwards" in " ".join(PAGE.read_text().split())


def test_the_fingerprint_is_that_of_the_settings_however_they_were_written():
    fingerprint = make_attack("pgd", eps="8/255", step_size="2/255").fingerprint
    assert re.fullmatch("[0-9a-f]{16}", fingerprint)
    assert make_attack("pgd", eps=8 / 255, step_size=2 / 255).fingerprint == fingerprint
    assert make_attack("pgd", eps=1).fingerprint == make_attack("pgd", eps=1.0).fingerprint
    assert make_attack("nes", momentum=0).fingerprint == make_attack("nes", momentum=0.0).fingerprint
    for change in ({"steps": 21}, {"eps": 0.03}, {"eot": 2}, {"random_start": False}, {"loss": "margin"}):
        assert make_attack("pgd", eps="8/255", step_size="2/255").replace(**change).fingerprint != fingerprint
    assert make_attack("apgd_ce").fingerprint != make_attack("apgd_dlr").fingerprint, "which have the same settings"
    assert len({make_attack(name).fingerprint for name in ROWS}) == len(ROWS)


def test_the_fingerprint_is_the_same_in_every_process():
    """Known by heart, so that another version of Python, of torch or of this project cannot change it unnoticed."""
    assert make_attack("pgd", eps="8/255", steps=20).fingerprint == "dfac3da6acfab3fb"
    assert make_attack("autoattack", eps="8/255").fingerprint == "752607c1b3794d8b"


def test_the_fingerprint_of_an_ensemble_covers_its_members():
    assert BriefAutoAttack().fingerprint != make_attack("autoattack").fingerprint
    versions = [make_attack("autoattack", version=version) for version in ("standard", "plus", "rand")]
    assert len({attack.fingerprint for attack in versions}) == 3
