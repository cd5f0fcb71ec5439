"""CW, DeepFool and FMN: distances held to closed forms and to each other, budgets, pass counts."""

from __future__ import annotations

import pytest
import torch
from networks import Counting, Linear, SmallNet, predicted
from test_pgd import linear_case

from ares_lightning.attacks.minimal import CW, FMN, DeepFool
from ares_lightning.attacks.threat import BALLS

NORMS = ["linf", "l2", "l1"]
EVERY = [FMN(norm=norm) for norm in NORMS] + [
    DeepFool(),
    DeepFool(norm="linf"),
    CW(search_steps=5, steps=60, step_size=0.05),
]


def ratios(attack, net, images, labels, radius, targets=None):
    """Found over least distance of each sample, after a look that all were broken."""
    outcome = attack(net, images, labels, targets=targets)
    assert outcome.broken.all()
    ratio = outcome.distance / radius
    assert ratio.min() > 1 - 1e-9, "nothing is nearer than the nearest"
    return ratio


@pytest.mark.parametrize(("norm", "bound"), [("linf", 1.001), ("l2", 1.001), ("l1", 1.001)])
@pytest.mark.parametrize("shape", [(1, 4, 3), (3, 8, 9)])
def test_fmn_reaches_the_nearest_boundary_of_a_ten_class_linear_model(norm, bound, shape):
    net, images, labels, radius = linear_case(10, norm, shape=shape, n=64)
    nearest, target = radius.min(1)
    assert ratios(FMN(norm=norm), net, images, labels, nearest).median() < bound
    assert (ratios(FMN(norm=norm), net, images, labels, nearest, target) < 1.5).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_deepfool_finds_the_nearest_boundary_of_a_linear_model_in_one_step(norm, num_classes):
    net, images, labels, radius = linear_case(num_classes, norm, n=64)
    nearest, target = radius.min(1)
    attack = DeepFool(norm=norm)
    expected = 1.02 * nearest.clamp(min=1e-4) / nearest
    torch.testing.assert_close(ratios(attack, net, images, labels, nearest), expected)
    outcome = attack(net, images, labels)
    assert torch.equal(outcome.adversarial_prediction, target)
    assert outcome.forwards.tolist() == [2] * 64
    assert outcome.backwards.tolist() == [num_classes - 1] * 64
    targeted = attack(net, images, labels, targets=target)
    assert targeted.backwards.tolist() == [1] * 64
    torch.testing.assert_close(targeted.distance, outcome.distance)


def test_deepfool_looks_at_the_classes_that_lead_the_clean_logits():
    net, images, labels, radius = linear_case(10, "l2", n=64)
    runner_up = net(images).detach().scatter(1, labels[:, None], -float("inf")).argmax(1)
    outcome = DeepFool(num_classes=2)(net, images, labels)
    expected = 1.02 * radius.gather(1, runner_up[:, None]).squeeze(1)
    direct = outcome.forwards == 2  # one step was enough: no other class came before
    assert direct.sum() > 32
    assert (outcome.backwards[direct] == 1).all()
    torch.testing.assert_close(outcome.distance[direct], expected[direct])


def two_classes_apart(shape, away):
    """A two-class linear model whose boundary runs through grey, images off it by `away`, and the way across."""
    net = Linear(shape, 2)
    net.bias.data = -0.5 * net.weight.data.sum(1)
    normal = (net.weight[1] - net.weight[0]).detach()
    noise = torch.rand(64, normal.numel(), generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 0.5
    labels = torch.arange(64) % 2
    side = (2 * labels - 1)[:, None]
    images = 0.5 + away(noise, normal, side)
    return net, images.clamp(0, 1).view(64, *shape), labels, -side * normal


def test_carlini_and_wagner_bisect_each_samples_const():
    def away(noise, normal, side):
        across = noise - (noise @ normal / normal.norm() ** 2)[:, None] * normal
        return 0.1 * across + side * torch.linspace(0.1, 0.6, 64)[:, None] * normal / normal.norm()

    net, images, labels, _ = two_classes_apart((3, 4, 5), away)
    assert torch.equal(predicted(net, images), labels)
    assert images.min() > 0
    assert images.max() < 1
    radius = torch.linspace(0.1, 0.6, 64).double()
    ratio = ratios(CW(steps=200), net, images, labels, radius)
    assert ratio.median() < 1.005
    assert ratio.max() < 1.03


def least_distance_in_the_box(net, images, labels, step, norm):
    """Bisect the budget at which the best point of ball ∩ box reaches the other of two classes."""
    far = images + 1e4 * step.view_as(images)
    low = torch.zeros(len(images), dtype=torch.float64)
    high = torch.full_like(low, images[0].numel())
    for _ in range(60):
        middle = (low + high) / 2
        crossed = predicted(net, BALLS[norm].project(far, images, middle)) != labels
        low, high = torch.where(crossed, low, middle), torch.where(crossed, middle, high)
    return high


@pytest.mark.parametrize("attack", EVERY, ids=lambda attack: f"{attack.name}-{attack.norm}")
def test_the_nearest_is_found_where_the_box_bars_the_straight_way(attack):
    net, images, labels, step = two_classes_apart(
        (1, 4, 3), lambda noise, normal, side: 1.6 * noise + 0.4 * side * normal
    )
    far = (labels * 2 - 1) * (net(images).detach() @ torch.tensor([-1.0, 1.0]).double()) > 0.3
    images, labels, step = images[far], labels[far], step[far]
    assert ((images == 0) | (images == 1)).double().mean() > 0.3
    radius = least_distance_in_the_box(net, images, labels, step, attack.norm)
    attack = attack.replace(steps=300, search_steps=9) if attack.name == "cw" else attack
    ratio = ratios(attack, net, images, labels, radius)
    assert ratio.median() < 1.02
    assert ratio.max() < 1.03


@pytest.mark.parametrize("attack", EVERY, ids=lambda attack: f"{attack.name}-{attack.norm}")
def test_without_a_budget_every_sample_keeps_its_nearest_adversarial_example(attack, images):
    net = Counting(SmallNet().double().eval())
    images = 0.05 + 0.9 * images
    labels = predicted(net, images)
    outcome = attack(net, images, labels)
    assert outcome.broken.all()
    assert torch.equal(predicted(net.net, outcome.images), outcome.adversarial_prediction)
    assert net.backwards == outcome.backwards.sum()
    crafted = attack.craft(net.net, images, labels)
    torch.testing.assert_close(crafted, outcome.images, rtol=0, atol=1e-12)
    targets = (labels + 1) % 10
    targeted = attack(net, images, labels, targets=targets)
    assert torch.equal(targeted.adversarial_prediction[targeted.broken], targets[targeted.broken])
    assert targeted.broken.sum() > 6
    assert targeted.distance[targeted.broken].median() > outcome.distance.median(), "any class is nearer than one"


@pytest.mark.parametrize("attack", EVERY, ids=lambda attack: f"{attack.name}-{attack.norm}")
def test_with_a_budget_a_sample_is_done_once_it_is_broken_within_it(attack, images):
    net = SmallNet().double().eval()
    images = 0.05 + 0.9 * images
    labels = predicted(net, images)
    free = attack(net, images, labels)
    eps = free.distance.median().item() * 1.05
    outcome = attack.replace(eps=eps)(net, images, labels)
    assert outcome.distance.max() <= eps * (1 + 1e-9)
    assert torch.equal(outcome.broken, free.distance <= eps)
    assert outcome.broken.sum() < 12
    assert torch.equal(outcome.images[~outcome.broken], images[~outcome.broken])
    assert (outcome.forwards <= free.forwards)[free.distance < eps].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_deepfool_steps_no_further_than_the_budget(norm, dtype):
    net, images, labels, radius = linear_case(10, norm, n=64)
    nearest = radius.amin(1)
    far = nearest > 1e-3
    net, images, labels, nearest = net.to(dtype), images[far].to(dtype), labels[far], nearest[far]
    attack = DeepFool(norm=norm)
    assert attack(net, images, labels, eps=1.01 * nearest).broken.all(), "its overshoot alone would be 1.02"
    assert not attack.replace(steps=3)(net, images, labels, eps=0.999 * nearest).broken.any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_deepfool_does_not_stop_on_a_curved_boundary(norm):
    class Ball(torch.nn.Module):
        """Class 1 inside of a sphere around grey."""

        def forward(self, images):
            inside = 1.0 - (images - 0.5).flatten(1).square().sum(1)
            return torch.stack([torch.zeros_like(inside), inside], 1)

    images = torch.rand(32, 1, 4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    labels = predicted(Ball(), images)
    assert labels.unique().tolist() == [0, 1]
    outcome = DeepFool(norm=norm, overshoot=0)(Ball(), images, labels)
    assert outcome.broken.all()
    assert outcome.forwards.max() < 20


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("attack", EVERY, ids=lambda attack: f"{attack.name}-{attack.norm}")
def test_a_nearest_example_that_other_rows_in_a_pass_would_undo_is_pushed_on(attack, targeted, images):
    class Wavering(torch.nn.Module):
        """Leans, by rounding errors, towards the label where no gradient is asked for."""

        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, images):
            logits = self.net(images)
            lean = torch.zeros_like(logits) if torch.is_grad_enabled() else 20 * torch.finfo(logits.dtype).eps
            return logits + lean * logits.abs().amax() * torch.nn.functional.one_hot(labels[:1], logits.shape[1])

    net = Wavering(SmallNet().eval())
    images = (0.05 + 0.9 * images).float()
    labels = predicted(net.net, images)
    same = labels == labels[0]
    images, labels = images[same], labels[same]
    targets = (labels + 1) % 10 if targeted else None
    outcome = attack(net, images, labels, targets=targets)
    free = attack(net.net, images, labels, targets=targets)
    assert free.broken.any()
    assert torch.equal(outcome.broken, free.broken)
    torch.testing.assert_close(outcome.distance, free.distance, rtol=2e-3, atol=0)


def test_crafting_leaves_an_image_clean_where_nothing_is_found(images):
    net = Linear((3, 6, 5), 2)
    net.bias.data = torch.tensor([1e3, 0.0], dtype=torch.float64)
    labels = torch.zeros(12, dtype=torch.int64)
    for attack in (FMN(steps=5), DeepFool(steps=5), CW(steps=5, search_steps=2)):
        assert torch.equal(attack.craft(net, images, labels), images)


def test_fmn_costs_a_forward_more_than_its_steps(images):
    net = Counting(SmallNet().double().eval())
    labels = predicted(net, images)
    net.forwards = 0
    outcome = FMN(steps=30)(net, images, labels)
    assert net.forwards == (31 + 2) * 12
    assert net.backwards == 30 * 12
    assert outcome.forwards.tolist() == [31] * 12
    assert outcome.backwards.tolist() == [30] * 12


def test_deepfool_spends_nothing_on_a_sample_that_has_crossed(images):
    net = Counting(SmallNet().double().eval())
    labels = predicted(net, images)
    net.forwards = 0
    outcome = DeepFool()(net, images, labels)
    assert net.forwards == outcome.forwards.sum() + 2 * 12
    assert (outcome.backwards == 9 * outcome.forwards // 2).all()
    assert outcome.forwards.min() < outcome.forwards.max() < 20


def test_carlini_and_wagner_cost_at_most_a_forward_more_than_the_steps_of_each_run(images):
    net = Counting(SmallNet().double().eval())
    labels = predicted(net, images)
    net.forwards = 0
    outcome = CW(steps=50, search_steps=4)(net, images, labels)
    assert net.forwards == outcome.forwards.sum() + 2 * 12
    assert outcome.forwards.max() <= 4 * 51
    assert outcome.backwards.max() <= 4 * 50
    assert outcome.forwards.min() < 4 * 50, "runs without progress end early"


@pytest.mark.parametrize(
    ("attack", "settings", "message"),
    [
        (CW, {"search_steps": 0}, "search_steps=0"),
        (CW, {"steps": 0}, "steps=0"),
        (CW, {"step_size": 0}, "step_size=0"),
        (CW, {"const": -1}, "const=-1"),
        (CW, {"norm": "linf"}, "norm=linf: cw knows l2"),
        (DeepFool, {"steps": 0}, "steps=0"),
        (DeepFool, {"num_classes": 1}, "num_classes=1"),
        (DeepFool, {"overshoot": -0.1}, r"overshoot=-0\.1"),
        (FMN, {"steps": 0}, "steps=0"),
        (FMN, {"step_size": "fast"}, "step_size=fast"),
        (FMN, {"shrinkage": 1}, "shrinkage=1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(attack, settings, message):
    with pytest.raises(ValueError, match=message):
        attack(**settings)
