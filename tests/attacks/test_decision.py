"""Boundary and Evolutionary: how near they come, what they spend, how they adapt, and where they start."""

from __future__ import annotations

import pytest
import torch
from networks import Counting, SmallNet, predicted
from test_pgd import linear_case
from torch import nn

from ares_lightning.attacks import make_attack
from ares_lightning.attacks.decision import Boundary, Evolutionary

NAMES = ["boundary", "evolutionary"]


@pytest.mark.parametrize(
    ("name", "shape", "queries", "factor"),
    [
        ("boundary", (1, 4, 3), 1000, 1.001),
        ("boundary", (3, 8, 8), 3000, 1.05),
        ("evolutionary", (1, 4, 3), 3000, 1.005),
        ("evolutionary", (3, 8, 8), 3000, 1.1),
    ],
)
def test_the_walk_ends_near_the_closest_adversarial_example(name, shape, queries, factor):
    net, images, labels, radius = linear_case(2, "l2", shape)
    outcome = make_attack(name, norm="l2", queries=queries)(net, images, labels)
    assert outcome.broken.all()
    ratio = outcome.distance / radius.amin(1)
    assert ratio.min() >= 1 - 1e-9
    assert ratio.max() <= factor


@pytest.mark.parametrize("name", NAMES)
def test_among_many_classes_the_walk_ends_near_the_closest_point_of_the_class_it_found(name):
    net, images, labels, radius = linear_case(10, "l2")
    outcome = make_attack(name, norm="l2", queries=3000)(net, images, labels)
    found = radius.gather(1, outcome.adversarial_prediction[:, None]).squeeze(1)
    assert (outcome.distance >= radius.amin(1) * (1 - 1e-9)).all()
    assert (outcome.distance <= 1.005 * found).all()


@pytest.mark.parametrize("name", NAMES)
def test_more_queries_never_end_farther_away(name):
    net, images, labels, _ = linear_case(10, "l2")
    distances = torch.stack(
        [make_attack(name, norm="l2", queries=queries)(net, images, labels).distance for queries in (50, 200, 800)]
    )
    assert (distances.diff(dim=0) <= 0).all()
    assert (distances[2] < distances[0]).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_sample_spends_its_queries_and_no_more(name, images):
    net = Counting(SmallNet().double().eval())
    labels = predicted(net, images)
    net.forwards = 0
    outcome = make_attack(name, norm="l2", queries=60)(net, images, labels)
    assert outcome.forwards.tolist() == [60] * len(images)
    assert net.forwards == (60 + 2) * len(images)
    assert net.backwards == 0


@pytest.mark.parametrize("name", NAMES)
def test_with_a_budget_a_sample_is_done_when_it_is_met(name, images):
    net = Counting(SmallNet().double().eval())
    labels = predicted(net, images)
    free = make_attack(name, norm="l2", queries=300)(net, images, labels)
    net.forwards = 0
    eps = free.distance.median().item() * 1.0001
    outcome = make_attack(name, norm="l2", eps=eps, queries=300)(net, images, labels)
    assert torch.equal(outcome.broken, free.distance <= eps)
    assert 0 < outcome.broken.sum() < len(images)
    assert outcome.distance.max() <= eps
    assert (outcome.forwards[outcome.broken] < 300).any()
    assert (outcome.forwards[~outcome.broken] == 300).all()
    assert net.forwards == outcome.forwards.sum() + 2 * len(images)


class Remembering(nn.Module):
    """Keeps what it predicted in every pass."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.predictions = net, []

    def forward(self, images):
        logits = self.net(images)
        self.predictions.append(logits.argmax(1))
        return logits


def success(attack, queries):
    """Which queries were adversarial, [queries, n], on a linear model."""
    net, images, labels, _ = linear_case(10, "l2", (3, 8, 8))
    net = Remembering(net)
    attack(net, images, labels)
    return torch.stack(net.predictions[1 : queries + 1]) != labels


def test_both_steps_of_boundary_settle_at_their_share_of_successes():
    late = success(Boundary(queries=1000, source_step=0.5, orthogonal_step=0.5), 1000)[500:].double()
    on_sphere = torch.arange(500) % 5 == 0
    assert 0.4 < late[on_sphere].mean() < 0.6
    assert 0.2 < late[~on_sphere].mean() < 0.3
    assert ((late[~on_sphere].mean(0) - 0.25).abs() < 0.1).all(), "for every sample"


def test_the_step_of_evolutionary_settles_at_a_fifth_of_successes():
    late = success(Evolutionary(queries=2000, source_step=0.1), 2000)[1000:].double()
    assert ((late.mean(0) - 0.2).abs() < 0.06).all()


class Watched(Evolutionary):
    """Keeps the state of its walk and the mutations."""

    name = "evolutionary"

    def _begin(self, search, rows):
        super()._begin(search, rows)
        rows.variance[:, 0] *= 9
        object.__setattr__(self, "mutations", [])
        object.__setattr__(self, "rows", rows)

    def _propose(self, search, rows, query):
        images = super()._propose(search, rows, query)
        self.mutations.append(rows.mutation)
        return images


def test_a_mutation_takes_a_twentieth_of_the_coordinates_in_proportion_to_their_variances():
    net, images, labels, _ = linear_case(10, "l2", (2, 8, 10))
    attack = Watched(queries=200, covariance_rate=1e-9)
    attack(net, images, labels)
    mutations = torch.stack(attack.mutations)
    changed = mutations != 0
    assert (changed.flatten(2).sum(2) == 2 * 8 * 10 // 20).all()
    share = changed[:, :, 0].sum() / changed.sum()
    assert 0.88 < share < 0.91, "0.9, less a little as none is drawn twice"
    deviation = mutations.transpose(1, 2)[:, 0][changed[:, :, 0]].std()
    assert 2.95 < deviation < 3.05


def test_the_covariance_of_evolutionary_learns_from_what_succeeds():
    net, images, labels, _ = linear_case(10, "l2", (2, 8, 10))
    attack = Watched(queries=400, covariance_rate=0.05)
    attack(net, images, labels)
    variance = attack.rows.variance
    assert (variance.flatten(1).amin(1) < 0.5).all()
    assert not torch.equal(variance[0], variance[1])


def test_large_images_are_perturbed_in_a_coarser_space():
    net, images, labels, _ = linear_case(2, "l2", (3, 12, 20))
    attack = Watched(queries=300, search_size=7)
    outcome = attack(net, images, labels)
    assert attack.mutations[0].shape[1:] == (3, 7, 7)
    assert outcome.broken.all()
    start = make_attack("evolutionary", norm="l2", queries=12)(net, images, labels)
    assert (outcome.distance < start.distance).all()


class Roughness(nn.Module):
    """Tells rough images (class 1) from smooth ones (class 0)."""

    def forward(self, images):
        rough = (images[..., 1:] - images[..., :-1]).abs().mean((1, 2, 3)) - 0.1
        return torch.stack([-rough, rough], dim=1)


@pytest.mark.parametrize("name", NAMES)
def test_the_class_of_uniform_noise_finds_a_start_as_well(name):
    images = torch.rand(6, 3, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.ones(6, dtype=torch.int64)
    outcome = make_attack(name, norm="l2", queries=100)(Roughness(), images, labels)
    assert outcome.broken.all()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_gives_classes_only_will_do(name, images):
    net = SmallNet().double().eval()
    labels = predicted(net, images)
    attack = make_attack(name, norm="l2", queries=60)
    outcome = attack(lambda x: torch.nn.functional.one_hot(net(x).argmax(1), 10).double(), images, labels)
    expected = attack(net, images, labels)
    assert torch.equal(outcome.images, expected.images)
    assert torch.equal(outcome.forwards, expected.forwards)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_without_a_start_is_not_broken(name, images):
    labels = torch.zeros(12, dtype=torch.int64)
    always = torch.tensor([1.0, -1.0], dtype=torch.float64)
    outcome = make_attack(name, norm="l2", queries=50)(lambda x: always.expand(len(x), 2), images, labels)
    assert not outcome.broken.any()
    assert torch.equal(outcome.images, images)
    assert outcome.forwards.tolist() == [50] * 12


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("boundary", {"queries": 0}, "queries=0"),
        ("boundary", {"norm": "linf"}, "norm=linf: boundary knows l2"),
        ("boundary", {"source_step": 0}, "source_step=0: expected a number between 0 and 1"),
        ("boundary", {"orthogonal_step": 1}, "orthogonal_step=1"),
        ("evolutionary", {"deviation": -1}, "deviation=-1"),
        ("evolutionary", {"path_decay": 1}, "path_decay=1"),
        ("evolutionary", {"covariance_rate": 2}, "covariance_rate=2"),
        ("evolutionary", {"search_size": 0}, "search_size=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(name, settings, message):
    with pytest.raises(ValueError, match=message):
        make_attack(name, **settings)
