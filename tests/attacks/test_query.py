"""NES, SPSA and N-Attack: what their estimates converge to, what they break, and what they spend."""

from __future__ import annotations

import pytest
import torch
from networks import Counting, SmallNet, predicted
from test_pgd import EPS, linear_case

from ares_lightning.attacks import accuracy_over_queries, make_attack

NAMES = {"nes": ("linf", "l2", "l1"), "spsa": ("linf", "l2"), "nattack": ("linf", "l2")}
CASES = [(name, norm) for name, norms in NAMES.items() for norm in norms]


def square_of_the_margin(logits, labels):
    """A loss that is quadratic in the images where the model is linear, up to which pairs of probes are exact."""
    return (logits[:, 1] - logits[:, 0] + 3).square()


def gradients(net, images, loss):
    images = images.clone().requires_grad_()
    return torch.autograd.grad(loss(net(images), None).sum(), images)[0].flatten(1)


def test_a_nes_estimate_converges_to_the_gradient():
    net, images, labels, _ = linear_case(2, "l2")
    expected = gradients(net, images, square_of_the_margin)
    cosines = []
    for samples in (10, 100, 1000, 10_000):
        attack = make_attack("nes", norm="l2", eps=0.1, samples=samples, queries=samples + 1, probe_size=0.01)
        moved = attack.craft(net, images, labels, loss=square_of_the_margin) - images
        cosines.append(torch.cosine_similarity(moved.flatten(1), expected).mean().item())
    assert cosines == sorted(cosines)
    assert cosines[-1] > 0.998


def test_the_first_step_of_spsa_has_the_signs_of_the_gradient():
    net, images, labels, _ = linear_case(2, "linf")
    expected = gradients(net, images, square_of_the_margin)
    attack = make_attack("spsa", eps=0.1, samples=4000, queries=4001, step_size=0.02)
    moved = (attack.craft(net, images, labels, loss=square_of_the_margin) - images).flatten(1)
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.02), rtol=1e-5, atol=0)
    clear = expected.abs() > 0.2 * expected.abs().amax(1, keepdim=True)
    assert (moved.sign() == expected.sign())[clear].double().mean() > 0.99


@pytest.mark.parametrize(("name", "norm"), [(name, norm) for name, norm in CASES if name != "nattack"])
def test_estimates_ascend_where_the_box_cuts_every_probe(name, norm):
    """Black and white pixels can be probed on one side only."""
    net, images, labels, _ = linear_case(2, norm)
    corners = (torch.rand(images.shape, generator=torch.Generator().manual_seed(4)) < 0.5).double()
    attack = make_attack(name, norm=norm, eps=EPS[norm], samples=500, queries=501)
    before = square_of_the_margin(net(corners), labels)
    after = square_of_the_margin(net(attack.craft(net, corners, labels, loss=square_of_the_margin)), labels)
    assert (after > before).all()


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_samples_are_broken_well_beyond_their_radius_and_never_below(name, norm):
    net, images, labels, radius = linear_case(10, norm)
    radius, target = radius.min(1)
    attack = make_attack(name, norm=norm, loss="margin", queries=2000, samples=20)
    assert attack(net, images, labels, eps=1.5 * radius).broken.all()
    assert attack(net, images, labels, targets=target, eps=1.5 * radius).broken.all()
    assert not attack(net, images, labels, eps=0.999 * radius).broken.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("queries", "spent"), [(21, 21), (40, 21), (41, 41), (47, 41)])
def test_no_more_queries_are_spent_than_allowed(name, queries, spent, images):
    net = Counting(SmallNet().double().eval())
    labels = predicted(net, images)
    net.forwards = 0
    outcome = make_attack(name, eps=1e-6, queries=queries, samples=20)(net, images, labels)
    assert not outcome.broken.any()
    assert outcome.forwards.tolist() == [spent] * len(images)
    assert net.forwards == (spent + 2) * len(images)
    assert net.backwards == 0
    net.forwards = 0
    make_attack(name, eps=1e-6, queries=queries, samples=20).craft(net, images, labels)
    assert net.forwards == (spent - 1) * len(images)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_costs_what_it_took_to_break_it(name, images):
    net = Counting(SmallNet().double().eval())
    labels = predicted(net, images)
    net.forwards = 0
    attack = make_attack(name, eps=0.1, queries=401, samples=20)
    outcome = attack(net, images, labels)
    assert 0 < outcome.broken.sum() < len(images)
    assert net.forwards == outcome.forwards.sum() + 2 * len(images)
    early = outcome.broken & (outcome.forwards < 401)
    assert early.any()
    assert (outcome.forwards[~outcome.broken] == 401).all()


@pytest.mark.parametrize("name", NAMES)
def test_one_run_tells_the_accuracy_at_every_smaller_number_of_queries(name, images):
    net = SmallNet().double().eval()
    labels = predicted(net, images)
    labels[:3] = (labels[:3] + 1) % 10
    attack = make_attack(name, eps=0.1, queries=401, samples=20)
    outcome = attack(net, images, labels)
    budgets = [0, 21, 61, 201, 401]
    curve = accuracy_over_queries(outcome, budgets)
    assert curve.dtype == torch.float64
    assert curve[0] == 0.75
    assert (curve.diff() <= 0).all()
    assert curve[-1] == 1 - outcome.broken.double().mean()
    for queries, accuracy in zip(budgets[1:], curve[1:], strict=True):
        short = attack.replace(queries=queries)(net, images, labels)
        in_steps = short.broken & (short.forwards < queries)  # the last query is one for the last iterate
        assert torch.equal(in_steps, outcome.broken & (outcome.forwards < queries))
        assert abs(1 - short.broken.double().mean() - accuracy) <= 1 / len(images)


def test_only_the_order_of_the_losses_within_a_batch_of_queries_moves_nattack(images):
    """Shifted and scaled losses are the same losses: they are normalised for every sample."""
    net = SmallNet().double()
    labels = predicted(net, images)
    attack = make_attack("nattack", eps=0.1, queries=61, samples=20)

    def loss(logits, labels):
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    plain = attack.craft(net, images, labels, loss=loss)
    scaled = attack.craft(net, images, labels, loss=lambda logits, labels: 7 + 30 * loss(logits, labels))
    torch.testing.assert_close(plain, scaled, rtol=0, atol=1e-9)
    assert (plain - images).abs().amax((1, 2, 3)).min() > 0


def test_losses_that_are_not_finite_move_no_image_out_of_the_box(images):
    net = SmallNet().double()
    labels = predicted(net, images)
    for name in NAMES:
        crafted = make_attack(name, eps=0.1, queries=41, samples=20).craft(
            net, images, labels, loss=lambda logits, _: logits[:, 0].sqrt().log()
        )
        assert crafted.min() >= 0
        assert crafted.max() <= 1


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("nes", {"queries": 50}, "queries=50: expected more than samples=50"),
        ("nes", {"samples": 7}, "samples=7: expected an even number"),
        ("nes", {"samples": 0}, "samples=0"),
        ("nes", {"probe_size": 0}, "probe_size=0"),
        ("nes", {"step_size": -1}, "step_size=-1"),
        ("nes", {"momentum": 1}, "momentum=1"),
        ("nes", {"loss": "hinge"}, "loss=hinge"),
        ("spsa", {"norm": "l1"}, "norm=l1: spsa knows linf, l2"),
        ("spsa", {"step_size": "x"}, "step_size=x"),
        ("nattack", {"samples": 1}, "samples=1"),
        ("nattack", {"deviation": 0}, "deviation=0"),
        ("nattack", {"step_size": -0.1}, r"step_size=-0\.1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(name, settings, message):
    with pytest.raises(ValueError, match=message):
        make_attack(name, **settings)
