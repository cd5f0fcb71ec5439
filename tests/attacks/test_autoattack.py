"""AutoAttack: the official settings, each member on what is left, and nothing lost on the way."""

from __future__ import annotations

import pytest
import torch
from contract import BriefAutoAttack
from networks import Counting, SmallNet, predicted

from ares_lightning.attacks import make_attack
from ares_lightning.attacks.autoattack import AutoAttack

EPS = {"linf": 0.02, "l2": 0.1, "l1": 0.5}


def settings(version: str, norm: str) -> list[tuple[str, dict[str, object]]]:
    attack = make_attack("autoattack", version=version, norm=norm, eps=EPS[norm])
    shown = ("steps", "restarts", "num_targets", "queries")
    return [(m.name, {key: getattr(m, key) for key in shown if hasattr(m, key)}) for m in attack.members]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_members_are_those_of_the_official_versions(norm):
    apgd_t = ("apgd_t", {"steps": 100, "num_targets": 9})
    fab_t = ("fab_t", {"steps": 100, "restarts": 1, "num_targets": 9})
    square = ("square", {"queries": 5000, "restarts": 1})
    assert settings("standard", norm) == [("apgd_ce", {"steps": 100, "restarts": 1}), apgd_t, fab_t, square]
    assert settings("plus", norm) == [
        ("apgd_ce", {"steps": 100, "restarts": 5}),
        ("apgd_dlr", {"steps": 100, "restarts": 5}),
        ("fab", {"steps": 100, "restarts": 5}),
        square,
        apgd_t,
        fab_t,
    ]
    assert settings("rand", norm) == [
        ("apgd_ce", {"steps": 100, "restarts": 1}),
        ("apgd_dlr", {"steps": 100, "restarts": 1}),
    ]


def test_changing_version_or_norm_changes_what_depends_on_it():
    rand = AutoAttack(version="rand")
    assert rand.eot == 20
    assert {attack.eot for attack in rand.members} == {20}
    assert rand.replace(version="standard") == AutoAttack()
    assert rand.replace(eps=0.1).eot == 20
    assert rand.replace(version="plus", eot=3).eot == 3
    assert AutoAttack(eot=8).replace(version="plus").eot == 8
    assert AutoAttack().replace(norm="l1", eps=12).members == AutoAttack(norm="l1", eps=12).members


def test_l1_has_five_restarts_and_five_targets():
    assert settings("standard", "l1")[:2] == [
        ("apgd_ce", {"steps": 100, "restarts": 5}),
        ("apgd_t", {"steps": 100, "num_targets": 5}),
    ]


def test_every_member_attacks_at_the_ensembles_budget_and_the_default_is_not_that_of_mnist():
    attack = make_attack("autoattack")
    assert attack.threat.eps == 4 / 255
    for eps in (1 / 255, 8 / 255):
        assert {member.threat.eps for member in attack.replace(eps=eps).members} == {eps}


def test_version_rand_averages_over_twenty_draws():
    assert make_attack("autoattack", version="rand").eot == 20
    assert make_attack("autoattack", version="rand", eot=7).eot == 7
    assert make_attack("autoattack").eot == 1
    with pytest.raises(ValueError, match="version=custom: expected one of standard, plus, rand"):
        make_attack("autoattack", version="custom")


@pytest.mark.parametrize("version", ["standard", "plus"])
@pytest.mark.parametrize("norm", EPS)
def test_the_ensemble_breaks_what_any_member_breaks_and_counts_every_pass(norm, version):
    images = torch.rand(30, 3, 6, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    net = Counting(SmallNet().double().eval())
    labels = predicted(net, images)
    attack = BriefAutoAttack(norm=norm, eps=EPS[norm], version=version)
    net.forwards = net.backwards = 0
    outcome = attack(net, images, labels)
    assert net.forwards == outcome.forwards.sum() + 2 * len(images)
    assert net.backwards >= outcome.backwards.sum()
    alone = [member(net, images, labels) for member in attack.members]
    assert torch.equal(outcome.broken, torch.stack([one.broken for one in alone]).any(0))
    survivors = ~outcome.broken
    assert 0 < survivors.sum() < 25
    forwards = torch.stack([one.forwards for one in alone]).sum(0)
    assert torch.equal(outcome.forwards[survivors], forwards[survivors])
    first = alone[0].broken
    assert torch.equal(outcome.images[first], alone[0].images[first])


def test_crafting_makes_one_run_of_the_first_member(images):
    net = SmallNet().double()
    labels = predicted(net, images)
    crafted = make_attack("autoattack", eps=0.1).craft(net, images, labels)
    assert crafted.shape == images.shape
    assert (predicted(net, crafted) != labels).any()
