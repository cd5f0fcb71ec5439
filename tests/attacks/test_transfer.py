"""The momentum family against plain loops over one sample at a time, written from the papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from networks import Counting, SmallNet, predicted
from torch import Tensor

from ares_lightning.attacks.noise import sample_noise
from ares_lightning.attacks.pgd import BIM
from ares_lightning.attacks.transfer import DIM, MIM, SINIFGSM, TIM, TTA, VMIFGSM, resize_and_pad, smooth

EPS, STEPS = 0.06, 5
ALPHA = EPS / STEPS
SEED = 3


@pytest.fixture
def net() -> SmallNet:
    return SmallNet().double().eval()


@pytest.fixture
def labels(net, images) -> Tensor:
    return predicted(net, images)


def slope(net, image: Tensor, label: int, view=lambda x: x, target: int | None = None) -> Tensor:
    """The gradient of one sample's cross-entropy, or of its target's logit."""
    image = image.clone().requires_grad_()
    logits = net(view(image)[None])[0]
    loss = -logits.log_softmax(0)[label] if target is None else logits[target]
    return torch.autograd.grad(loss, image)[0]


def stepped(image: Tensor, clean: Tensor, velocity: Tensor, alpha: float = ALPHA, eps: float = EPS) -> Tensor:
    """A sign step, clipped to the L-inf ball and the box."""
    image = image + alpha * velocity.sign()
    return torch.minimum(torch.maximum(image, clean - eps), clean + eps).clamp(0, 1)


def unit(gradient: Tensor) -> Tensor:
    return gradient / gradient.abs().sum()


def draw(attack: str, number: int, sample_id: int, shape: tuple[int, ...]) -> Tensor:
    """The uniform numbers of a sample in the `number`-th draw of a run, in [-1, 1)."""
    like = torch.empty(0, dtype=torch.float64)
    return sample_noise("uniform", (SEED, attack, number), [sample_id], shape, like)[0]


def each(loop, images: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([loop(i, images[i], labels[i].item()) for i in range(len(images))])


def same(attack, net, images: Tensor, labels: Tensor, loop, **arguments) -> None:
    crafted = attack.craft(net, images, labels, seed=SEED, **arguments)
    torch.testing.assert_close(crafted, each(loop, images, labels), rtol=0, atol=1e-9)
    assert not torch.equal(crafted, images)


@pytest.mark.parametrize("momentum", [1.0, 0.4])
def test_mim_sums_gradients_of_unit_l1_norm(net, images, labels, momentum):
    def loop(_, clean, label):
        image, velocity = clean, torch.zeros_like(clean)
        for _ in range(STEPS):
            velocity = momentum * velocity + unit(slope(net, image, label))
            image = stepped(image, clean, velocity)
        return image

    same(MIM(eps=EPS, steps=STEPS, momentum=momentum), net, images, labels, loop)


def test_mim_steps_along_the_velocity_in_l2(net, images, labels):
    images = 0.3 + 0.4 * images  # the box is out of reach
    eps = 0.2

    def loop(_, clean, label):
        image, velocity = clean, torch.zeros_like(clean)
        for _ in range(STEPS):
            velocity = velocity + unit(slope(net, image, label))
            delta = image + eps / 2 * velocity / velocity.norm() - clean
            image = clean + delta * min(1, eps / delta.norm())
        return image

    same(MIM(norm="l2", eps=eps, steps=STEPS, step_size=eps / 2), net, images, labels, loop)


def test_mim_lowers_the_loss_of_targets(net, images, labels):
    targets = (labels + 3) % 10

    def loop(i, clean, _):
        image, velocity = clean, torch.zeros_like(clean)
        for _ in range(STEPS):
            velocity = velocity - unit(slope(net, image, targets[i].item()))
            image = stepped(image, clean, velocity)
        return image

    same(MIM(eps=EPS, steps=STEPS), net, images, labels, loop, targets=targets)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_without_momentum_mim_is_bim(norm, net, images, labels):
    settings = {"norm": norm, "eps": 0.4, "steps": STEPS, "step_size": 0.1}
    bim = BIM(**settings).craft(net, images, labels)
    torch.testing.assert_close(MIM(momentum=0, **settings).craft(net, images, labels), bim, rtol=0, atol=1e-9)


def test_samples_whose_gradients_differ_by_many_orders_do_not_touch_each_other(net, images, labels):
    """The norm is each sample's own: a neighbour with a huge loss changes nothing."""

    def scaled(logits, y):
        scale = torch.where(y == labels[0], 1e12, 1.0)
        return scale * F.cross_entropy(logits, y, reduction="none")

    for attack in (MIM, SINIFGSM, DIM, TIM, VMIFGSM):
        attack = attack(eps=EPS, steps=3)
        whole = attack.craft(net, images, labels, loss=scaled)
        plain = attack.craft(net, images, labels)
        torch.testing.assert_close(whole, plain, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scales", [1, 4])
def test_si_ni_fgsm_looks_ahead_and_averages_over_darker_copies(net, images, labels, scales):
    """With g summed from gradients of mean magnitude 1, as the published implementation does."""

    def loop(_, clean, label):
        image, velocity = clean, torch.zeros_like(clean)
        for _ in range(STEPS):
            ahead = (image + ALPHA * 0.9 * velocity).clamp(0, 1)
            copies = [slope(net, ahead, label, lambda x, i=i: x / 2**i) for i in range(scales)]
            velocity = 0.9 * velocity + unit(sum(copies) / scales) * clean.numel()
            image = stepped(image, clean, velocity)
        return image

    same(SINIFGSM(eps=EPS, steps=STEPS, scales=scales, momentum=0.9), net, images, labels, loop)


def diverse(draws: Tensor, probability: float, rate: float):
    """Resize and pad as the published implementations do, by interpolation to one size and padding."""

    def view(image: Tensor) -> Tensor:
        applies, size, top, left = draws.tolist()
        if applies > probability:
            return image
        height, width = (
            int(rate * full) + math.floor(size * max(full - int(rate * full), 1)) for full in image.shape[1:]
        )
        small = F.interpolate(image[None], (height, width), mode="bilinear", align_corners=False)[0]
        down, across = image.shape[1] - height, image.shape[2] - width
        up, before = math.floor(top * (down + 1)), math.floor(left * (across + 1))
        return F.pad(small, (before, across - before, up, down - up))

    return view


@pytest.mark.parametrize("size", [(6, 5), (32, 32), (9, 40)])
def test_images_are_resized_and_padded_as_by_interpolation(size):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 3, *size, generator=generator, dtype=torch.float64)
    draws = torch.rand(40, 4, generator=generator, dtype=torch.float64)
    batched = resize_and_pad(images, draws, 0.7, 0.6)
    expected = torch.stack([diverse(draws[i], 0.7, 0.6)(images[i]) for i in range(40)])
    torch.testing.assert_close(batched, expected, rtol=0, atol=1e-12)
    unchanged = (batched == images).flatten(1).all(1)
    assert torch.equal(unchanged, draws[:, 0] > 0.7)


def test_sizes_and_places_cover_their_range_and_rounding_stays_inside():
    draws = torch.rand(4000, 4, generator=torch.Generator().manual_seed(0))
    draws[:2], draws[2:4] = 0, 1  # a float32 draw may round up to 1
    draws[:, 0] = 0
    shown = resize_and_pad(torch.ones(4000, 1, 20, 20), draws, 1.0, 0.85)
    rows = (shown[:, 0] > 0.5).any(2)
    heights, tops = rows.sum(1), rows.float().argmax(1)
    assert set(heights.tolist()) == {17, 18, 19}
    for height in (17, 18, 19):
        assert set(tops[heights == height].tolist()) == set(range(20 - height + 1))
    assert (shown.sum((1, 2, 3)).round() == heights**2).all()


def test_dim_takes_each_gradient_through_its_own_resize(net, images, labels):
    def loop(i, clean, label):
        draws = (draw("dim", 1, i, (STEPS, 4)) + 1) / 2
        image, velocity = clean, torch.zeros_like(clean)
        for step in range(STEPS):
            velocity = velocity + unit(slope(net, image, label, diverse(draws[step], 0.6, 0.5)))
            image = stepped(image, clean, velocity)
        return image

    attack = DIM(eps=EPS, steps=STEPS, diversity_prob=0.6, resize_rate=0.5)
    same(attack, net, images, labels, loop)


def blurred(gradient: Tensor, size: int) -> Tensor:
    """A Gaussian whose edge is at three standard deviations, summed pixel by pixel."""
    half = size // 2
    weight = {i: math.exp(-0.5 * (3 * i / half) ** 2) for i in range(-half, half + 1)}
    total = sum(weight.values()) ** 2
    out = torch.zeros_like(gradient)
    _, height, width = gradient.shape
    for y in range(height):
        for x in range(width):
            for i in range(max(-half, -y), min(half, height - 1 - y) + 1):
                for j in range(max(-half, -x), min(half, width - 1 - x) + 1):
                    out[:, y, x] += weight[i] * weight[j] / total * gradient[:, y + i, x + j]
    return out


@pytest.mark.parametrize("size", [3, 5, 15])
def test_smoothing_is_a_gaussian_that_ends_at_three_standard_deviations(size):
    images = torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.stack([blurred(image, size) for image in images])
    torch.testing.assert_close(smooth(images, size, 3.0), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("probability", [0, 0.7])
def test_tim_smooths_the_gradients_of_dim(net, images, labels, probability):
    def loop(i, clean, label):
        draws = (draw("tim", 1, i, (STEPS, 4)) + 1) / 2
        image, velocity = clean, torch.zeros_like(clean)
        for step in range(STEPS):
            gradient = slope(net, image, label, diverse(draws[step], probability, 0.5))
            velocity = velocity + unit(blurred(gradient, 5))
            image = stepped(image, clean, velocity)
        return image

    attack = TIM(eps=EPS, steps=STEPS, diversity_prob=probability, resize_rate=0.5, kernel_size=5)
    same(attack, net, images, labels, loop)


def test_vmi_fgsm_tunes_by_neighbours_drawn_around_each_iterate(net, images, labels):
    neighbors, radius = 3, 1.5 * EPS

    def loop(i, clean, label):
        image, velocity, variance, number = clean, torch.zeros_like(clean), torch.zeros_like(clean), 0
        for step in range(STEPS):
            gradient = slope(net, image, label)
            velocity = velocity + unit(gradient + variance)
            if step + 1 < STEPS:
                around = []
                for _ in range(neighbors):
                    number += 1
                    shift = radius * draw("vmi_fgsm", number, i, tuple(clean.shape))
                    around.append(slope(net, (image + shift).clamp(0, 1), label))
                variance = sum(around) / neighbors - gradient
            image = stepped(image, clean, velocity)
        return image

    attack = VMIFGSM(eps=EPS, steps=STEPS, num_neighbors=neighbors)
    same(attack, net, images, labels, loop)


def test_tta_sums_the_smoothed_gradients_of_the_target_logit(net, images, labels):
    targets = (labels + 1) % 10

    def loop(i, clean, label):
        draws = (draw("tta", 1, i, (STEPS, 4)) + 1) / 2
        image, velocity = clean, torch.zeros_like(clean)
        for step in range(STEPS):
            view = diverse(draws[step], 0.7, 0.5)
            velocity = velocity + blurred(slope(net, image, label, view, target=targets[i].item()), 5)
            image = stepped(image, clean, velocity, alpha=2 / 255, eps=16 / 255)
        return image

    same(TTA(steps=STEPS, resize_rate=0.5), net, images, labels, loop, targets=targets)


def test_tta_is_targeted_only(net, images, labels):
    attack = TTA(steps=2)
    for way in (attack, attack.craft):
        with pytest.raises(ValueError, match="tta knows a targeted form only; give targets="):
            way(net, images, labels)
    assert (attack.threat.norm, attack.threat.eps) == ("linf", 16 / 255)
    assert TTA(norm="l2").threat.eps == 2.0
    assert TTA().steps == 300


def test_tta_reaches_targets(net, images, labels):
    targets = (labels + 1) % 10
    outcome = TTA(eps=0.5, steps=40)(net, images, labels, targets=targets)
    assert outcome.broken.float().mean() > 0.5
    assert (outcome.adversarial_prediction[outcome.broken] == targets[outcome.broken]).all()


@pytest.mark.parametrize(
    ("attack", "passes"),
    [
        (MIM(eps=1e-6, steps=7), 7),
        (SINIFGSM(eps=1e-6, steps=7, scales=3), 7 * 3),
        (DIM(eps=1e-6, steps=7), 7),
        (TIM(eps=1e-6, steps=7), 7),
        (TIM(eps=1e-6, steps=7, diversity_prob=0), 7),
        (VMIFGSM(eps=1e-6, steps=7, num_neighbors=3), 7 + 6 * 3),
        (TTA(eps=1e-6, steps=7), 7),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_passes_are_those_of_the_docstring(attack, passes, images):
    net = Counting(SmallNet().double().eval())
    labels = predicted(net, images)
    targets = (labels + 1) % 10
    net.forwards = 0
    outcome = attack(net, images, labels, targets=targets)
    assert not outcome.broken.any()
    assert (net.forwards, net.backwards) == ((passes + 2) * len(images), passes * len(images))
    assert outcome.forwards.tolist() == outcome.backwards.tolist() == [passes] * len(images)
    net.forwards = net.backwards = 0
    attack.craft(net, images, labels, targets=targets)
    assert (net.forwards, net.backwards) == (passes * len(images), passes * len(images))


@pytest.mark.parametrize("attack", [MIM(eps=0.1), TIM(eps=0.1, diversity_prob=0), VMIFGSM(eps=0.1, steps=5)])
def test_samples_leave_once_an_iterate_breaks_them(attack, net, images, labels):
    outcome = attack(net, images, labels)
    early = outcome.broken & (outcome.forwards < outcome.forwards.max())
    assert early.any()
    assert (outcome.backwards[early] == outcome.forwards[early] - 1).all()


@pytest.mark.parametrize("attack", [MIM, SINIFGSM, DIM, TIM, VMIFGSM, TTA])
def test_one_crafted_batch_serves_many_victims(attack, images):
    surrogate = Counting(SmallNet(seed=0).double())
    victims = {"near": SmallNet(seed=0).double(), "far": SmallNet(seed=7).double()}
    labels = predicted(surrogate, images)
    targets = (labels + 1) % 10 if attack is TTA else None
    attack = attack(eps=0.2, steps=3)
    crafted = attack.craft(surrogate, images, labels, targets=targets)
    surrogate.forwards = 0
    outcomes = attack(surrogate, images, labels, targets=targets, victim=victims)
    assert surrogate.forwards == outcomes["far"].forwards.sum() + len(images), "the clean logits are looked at"
    for name, victim in victims.items():
        prediction = predicted(victim, crafted)
        if targets is None:
            wrong = (predicted(victim, images) != labels) | (prediction != labels)
        else:
            wrong = (predicted(victim, images) == targets) | (prediction == targets)
        assert torch.equal(outcomes[name].broken, wrong)


@pytest.mark.parametrize(
    ("attack", "settings", "message"),
    [
        (MIM, {"momentum": -1}, "momentum=-1"),
        (MIM, {"steps": 0}, "steps=0"),
        (MIM, {"loss": "hinge"}, "loss=hinge: expected one of ce, margin, logit"),
        (SINIFGSM, {"scales": 0}, "scales=0"),
        (DIM, {"diversity_prob": 1.2}, r"diversity_prob=1\.2"),
        (DIM, {"resize_rate": 1.1}, r"resize_rate=1\.1: expected a share of at most 1"),
        (DIM, {"resize_rate": 0}, "resize_rate=0"),
        (TIM, {"kernel_size": 4}, "kernel_size=4: expected an odd number"),
        (VMIFGSM, {"num_neighbors": 0}, "num_neighbors=0"),
        (VMIFGSM, {"neighborhood": "far"}, "neighborhood=far"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(attack, settings, message):
    with pytest.raises(ValueError, match=message):
        attack(**settings)
