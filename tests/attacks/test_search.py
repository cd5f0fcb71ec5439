"""The working set: parts, budgets of each sample, bf16 that never has the last word, randomised models."""

from __future__ import annotations

import pytest
import torch
from contract import CASES, COLUMNS, EPS, TARGETED_ONLY, cheap
from networks import Counting, SmallNet, predicted
from torch import multiprocessing, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ares_lightning.attacks import make_attack
from ares_lightning.attacks.threat import BALLS


class Recording(nn.Module):
    """Notes the size of every batch, and whether a backward may follow."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.sizes: list[tuple[int, bool]] = []

    def forward(self, images):
        self.sizes.append((len(images), images.requires_grad))
        return self.net(images)


def test_passes_take_no_more_rows_than_asked_for_and_survivors_are_repacked():
    images = torch.rand(50, 3, 6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    net = Recording(SmallNet().double().eval())
    labels = predicted(net, images)
    net.sizes.clear()
    outcome = make_attack("pgd", eps=0.03, steps=10)(net, images, labels, batch_size=8)
    assert max(size for size, backward in net.sizes if backward) <= 8
    assert 8 < max(size for size, backward in net.sizes if not backward) <= 32
    assert 0 < (~outcome.broken).sum() < 25
    calls = sum(backward for _, backward in net.sizes)
    assert calls <= 10 + outcome.forwards.sum() / 8, "an iteration takes no more parts than it must"


@pytest.mark.parametrize("name", ["pgd", "apgd_ce", "apgd_t", "fab_t", "square", "autoattack"])
def test_every_sample_may_have_its_own_budget(name, images):
    net = SmallNet().double()
    labels = predicted(net, images)
    budgets = torch.linspace(0.005, 0.08, len(images), dtype=torch.float64)
    attack = cheap(name)
    together = attack(net, images, labels, eps=budgets)
    assert (together.distance <= budgets + 1e-9).all()
    for i in range(len(images)):
        one = attack.replace(eps=budgets[i].item())(net, images[i : i + 1], labels[i : i + 1], sample_ids=[i])
        for column in COLUMNS:
            torch.testing.assert_close(getattr(one, column)[0], getattr(together, column)[i], rtol=0, atol=1e-12)
    for wrong, message in [
        (budgets[:3], r"eps has shape \[3\]; expected \[12\]"),
        (-budgets, r"eps=-0\.005: expected finite budgets"),
        (budgets / 0, "eps=inf: expected finite budgets"),
    ]:
        if attack.nearest and "inf" in message:
            continue
        with pytest.raises(ValueError, match=message):
            attack(net, images, labels, eps=wrong)
    listed = attack(net, images, labels, eps=budgets.tolist())
    assert torch.equal(listed.images, together.images)


def test_what_bf16_shows_broken_leaves_only_when_full_precision_confirms_it():
    class Coarse(nn.Module):
        """Says under autocast that everything is misclassified, and counts its honest passes."""

        def __init__(self):
            super().__init__()
            self.net = SmallNet().eval()
            self.honest = 0

        def forward(self, x):
            logits = self.net(x)
            if torch.is_autocast_enabled("cpu"):
                return -logits.float()
            self.honest += len(x)
            return logits

    images = torch.rand(12, 3, 6, 5, generator=torch.Generator().manual_seed(1))
    net = Coarse()
    labels = predicted(net.net, images)
    net.honest = 0
    outcome = make_attack("pgd", eps=1e-6, steps=5)(net, images, labels, precision="bf16")
    assert not outcome.broken.any()
    assert net.honest == (2 + 5) * len(images)
    assert (outcome.forwards == 10).all(), "the looks that confirm nothing are counted"


class Randomised(nn.Module):
    """A linear classifier of two classes that adds noise to its logits."""

    def __init__(self, deviation: float):
        super().__init__()
        self.deviation = deviation
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        score = images.flatten(1).mean(1) - 0.5
        noise = self.deviation * torch.randn(len(images), dtype=images.dtype)
        return torch.stack([-score, score + noise], 1)


def test_draws_of_a_randomised_model_are_averaged_in_gradient_and_verdict():
    images = torch.full((4, 1, 4, 4), 0.55, dtype=torch.float64)
    labels = torch.ones(4, dtype=torch.int64)
    net = Randomised(0.5)
    torch.manual_seed(0)
    attack = make_attack("pgd", eps=0.02, steps=3, eot=400)
    outcome = attack(net, images, labels)
    assert not outcome.broken.any(), "one lucky draw is no adversarial example"
    assert net.calls == 400 * (3 + 2)
    assert (outcome.forwards == 400 * 3).all()
    assert (outcome.backwards == 400 * 3).all()
    assert attack.replace(eps=0.2)(net, images, labels).broken.all()
    single = make_attack("pgd", eps=0.02, steps=40)(net, images, labels)
    assert single.forwards.max() < 40, "with one draw the noise breaks it"


def test_draws_of_a_randomised_model_follow_the_seed():
    images = torch.full((8, 1, 4, 4), 0.55, dtype=torch.float64)
    labels = torch.ones(8, dtype=torch.int64)
    net, attack = Randomised(0.1), make_attack("pgd", eps=0.02, steps=5)

    def found(seed, noise):
        torch.manual_seed(noise)
        return attack(net, images, labels, seed=seed).forwards.tolist()

    assert found(0, 1) == found(0, 2)
    assert len({tuple(found(seed, 1)) for seed in range(4)}) > 1


@pytest.mark.parametrize(("name", "norm"), [case for case in CASES if case[1] != "linf"])
def test_rounding_takes_no_image_past_a_tiny_budget(name, norm):
    eps = {"l2": 2e-3, "l1": 0.05}[norm]
    images = torch.rand(2, 3, 96, 112, generator=torch.Generator().manual_seed(8))
    net = SmallNet().eval()
    labels = predicted(net, images)
    targets = (labels + 1) % 10 if name in TARGETED_ONLY else None
    made = cheap(name, norm=norm, eps=eps).craft(net, images, labels, targets=targets)
    assert BALLS[norm].distance(made, images).max() <= eps * (1 + 1e-5)


def run_shard(rank: int, folder: str) -> None:
    """Attack every second sample with every attack, and save the outcomes."""
    torch.set_num_threads(1)
    images, labels, net = shard_case()
    ids = torch.arange(rank, len(images), 2)
    found = {}
    for name, norm in CASES:
        targets = (labels[ids] + 1) % 10 if name in TARGETED_ONLY else None
        outcome = cheap(name, norm=norm, eps=EPS[norm] / 4)(
            net, images[ids], labels[ids], targets=targets, sample_ids=ids, seed=3
        )
        found[name, norm] = {column: getattr(outcome, column) for column in COLUMNS}
    torch.save(found, f"{folder}/{rank}.pt")


def shard_case():
    images = torch.rand(10, 3, 6, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    net = SmallNet().double()
    return images, predicted(net, images), net


def test_two_processes_find_what_one_does(tmp_path):
    multiprocessing.spawn(run_shard, (str(tmp_path),), nprocs=2)
    shards = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    images, labels, net = shard_case()
    for name, norm in CASES:
        targets = (labels + 1) % 10 if name in TARGETED_ONLY else None
        whole = cheap(name, norm=norm, eps=EPS[norm] / 4)(net, images, labels, targets=targets, seed=3)
        for column in COLUMNS:
            for rank in (0, 1):
                torch.testing.assert_close(
                    shards[rank][name, norm][column], getattr(whole, column)[rank::2], rtol=0, atol=1e-12
                )


def test_counting_holds_for_parts(images):
    net = Counting(SmallNet().double().eval())
    labels = predicted(net, images)
    net.forwards = 0
    outcome = make_attack("apgd_ce", eps=1e-7, steps=9)(net, images, labels, batch_size=5)
    assert net.forwards == outcome.forwards.sum() + 2 * len(images)
    assert net.backwards == outcome.backwards.sum() == 9 * len(images)


@pytest.mark.parametrize(("name", "steps"), [("pgd", 5), ("fmn", 5), ("fab_t", 3)])
def test_what_the_search_model_shows_broken_is_judged_by_the_model_itself(name, steps, images):
    right, wrong = SmallNet().double(), SmallNet(seed=5).double()
    labels = predicted(right, images)
    outcome = make_attack(name, eps=0.05, steps=steps)(right, images, labels, search_on=wrong, batch_size=5)
    assert torch.equal(outcome.broken, predicted(right, outcome.images) != labels)
    assert outcome.broken.any()
    same = make_attack(name, eps=0.05, steps=steps)(right, images, labels)
    copy = make_attack(name, eps=0.05, steps=steps)(right, images, labels, search_on=SmallNet().double())
    assert torch.equal(copy.images, same.images)
    assert torch.equal(copy.backwards, same.backwards)
    assert right.training
    assert wrong.training
    with pytest.raises(ValueError, match="search_on is given with victim="):
        make_attack(name)(right, images, labels, search_on=wrong, victim=right)


def test_an_iteration_waits_for_the_device_once(images, monkeypatch):
    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            self.count += function in waits or function is torch.ops.aten.equal.default
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr("ares_lightning.attacks.passes.check_classes", lambda *_: None)
    net = SmallNet().double()
    labels = predicted(net, images)
    for name, key in [("pgd", "steps"), ("mim", "steps"), ("apgd_ce", "steps"), ("square", "queries")]:
        counts = []
        for steps in (10, 30):
            with Waits() as waits:
                make_attack(name, eps=1e-6, **{key: steps})(net, images, labels)
            counts.append(waits.count)
        assert counts[1] - counts[0] == 20, name
    counts = []
    for steps in (10, 30):
        with Waits() as waits:
            make_attack("pgd", eps=0.1, steps=steps).craft(net, images, labels)
        counts.append(waits.count)
    assert counts[0] == counts[1], "crafting never waits in its loop"
