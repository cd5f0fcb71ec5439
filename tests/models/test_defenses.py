"""Defences in front of a classifier: what they compute, and that attacks see past them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.fft import dctn, idctn
from torch import nn

from ares_lightning.attacks import make_attack
from ares_lightning.models import Classifier, make_classifier, make_defense
from ares_lightning.models.defenses import DEFENSES
from ares_lightning.models.folding import fold_batchnorm

NAMES = list(DEFENSES)


def classifier(defense: nn.Module | None, in_chans: int = 3) -> Classifier:
    """A linear classifier into 3 classes on images of 12x10."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(in_chans * 120, 3))
    return Classifier(backbone, [0.0] * in_chans, [1.0] * in_chans, defense)


def photos(n: int = 24, in_chans: int = 3) -> torch.Tensor:
    """Smooth images, as JPEG expects them."""
    noise = torch.rand(n, in_chans, 4, 4, generator=torch.Generator().manual_seed(1))
    return F.interpolate(noise, (12, 10), mode="bilinear").clamp(0, 1)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_bit_depth_rounds_to_its_levels(bits):
    images = torch.rand(2, 3, 6, 5)
    levels = np.linspace(0, 1, 2**bits)
    nearest = levels[np.abs(images.numpy()[..., None] - levels).argmin(-1)]
    np.testing.assert_allclose(make_defense("bit_depth", bits=bits)(images).numpy(), nearest, atol=1e-7)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_jpeg_is_what_pillow_makes_of_the_same_pixels(in_chans):
    images = photos(3, in_chans)
    for image, compressed in zip(images, make_defense("jpeg", quality=50)(images), strict=True):
        pixels = image.mul(255).round().byte().permute(1, 2, 0).squeeze(2).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=50)
        expected = torch.from_numpy(np.array(Image.open(file))).reshape(12, 10, in_chans).permute(2, 0, 1)
        assert torch.equal(compressed.mul(255).round().byte(), expected)


def test_random_resize_pad_shrinks_and_places_each_image_by_its_own_draw():
    images = torch.rand(400, 3, 20, 30)
    torch.manual_seed(0)
    moved = make_defense("random_resize_pad")(images)
    same = (moved == images).flatten(1).all(1)
    assert 50 < same.sum() < 110  # a fifth: 80 ± 3.75 standard deviations of 8
    found = set()
    for image, result in zip(images[~same], moved[~same], strict=True):
        for crop in (0.1, 0.08, 0.06, 0.04, 0.02):
            height, width = int((1 - crop) * 20), int((1 - crop) * 30)
            small = F.interpolate(image[None], (height, width), mode="bicubic").clamp(0, 1)[0]
            for row in (0, (20 - height) // 2, 20 - height):
                for column in (0, (30 - width) // 2, 30 - width):
                    expected = torch.zeros(3, 20, 30)
                    expected[:, row : row + height, column : column + width] = small
                    if torch.allclose(expected, result, atol=1e-6):
                        found.add((height, row, column))
                        break
                else:
                    continue
                break
            else:
                continue
            break
        else:
            pytest.fail("an image is at no place that a draw could have put it")
    assert {row for _, row, _ in found} == {0, 1, 2}
    assert {column for _, _, column in found} == {0, 1, 2, 3}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_a_defence_keeps_shape_type_and_box(name, dtype, n):
    images = torch.rand(n, 3, 12, 10, dtype=dtype)
    for form in (images, images.to(memory_format=torch.channels_last)):
        with torch.inference_mode():
            result = make_defense(name)(form)
        assert result.shape == images.shape
        assert result.dtype == dtype
        assert bool(((result >= 0) & (result <= 1)).all())


@pytest.mark.parametrize("name", ["bit_depth", "jpeg"])
def test_gradients_pass_as_if_the_defence_were_not_there(name):
    images = photos(2).requires_grad_()
    upstream = torch.rand(2, 3, 12, 10)
    (gradient,) = torch.autograd.grad(make_defense(name)(images), images, upstream)
    assert torch.equal(gradient, upstream)


def test_gradients_of_the_random_one_are_those_of_its_draw():
    images = torch.rand(4, 1, 10, 10, dtype=torch.float64).mul(0.5).add(0.25).requires_grad_()
    defense = make_defense("random_resize_pad", prob=1)

    def drawn(images):
        torch.manual_seed(3)
        return defense(images)

    assert torch.autograd.gradcheck(drawn, images)


class _Blind(nn.Module):
    """A bit-depth reduction without a gradient of its own: what a defence should not be evaluated with."""

    def forward(self, images):
        return torch.round(images * 15) / 15


def test_an_attack_breaks_what_is_defended_by_rounding():
    images = photos()
    for defense in (make_defense("bit_depth"), make_defense("jpeg")):
        net = classifier(defense)
        labels = net(images).argmax(1)
        attack = make_attack("pgd", norm="linf", eps=0.1, steps=20, random_start=False)
        assert attack(net, images, labels).broken.float().mean() > 0.9
        if defense.name == "bit_depth":
            assert not attack(classifier(_Blind()), images, labels).broken.any()


def test_random_draws_follow_from_the_seed_and_leave_the_callers_alone():
    net, images = classifier(make_defense("random_resize_pad", prob=1)), photos()
    labels = net(images).argmax(1)
    attack = make_attack("pgd", norm="linf", eps=0.02, steps=5, eot=4)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    outcomes = [attack(net, images, labels, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(outcomes[0].images, outcomes[1].images)
    assert not torch.equal(outcomes[0].images, outcomes[2].images)


def test_the_weights_of_a_defended_classifier_are_those_of_the_plain_one():
    plain, defended = classifier(None), classifier(make_defense("jpeg", quality=30))
    assert plain.state_dict().keys() == defended.state_dict().keys()
    assert "quality=30" in repr(defended)
    assert repr(plain) != repr(defended)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("jpg", {}, r"name=jpg: expected one of bit_depth, jpeg, random_resize_pad"),
        ("jpeg", {"bits": 4}, r"bits=4: not a setting of jpeg; expected quality"),
        ("jpeg", {"quality": 0}, r"quality=0: expected a whole number from 1 to 100"),
        ("bit_depth", {"bits": 2.5}, r"bits=2\.5: expected a whole number from 1 to 8"),
        ("random_resize_pad", {"prob": 1.2}, r"prob=1\.2: expected a number from 0 to 1"),
        ("random_resize_pad", {"crops": [0.1, 1.0]}, r"crops=\[0\.1, 1\.0\]: expected shares"),
    ],
)
def test_a_bad_setting_is_told_in_one_line(name, settings, message):
    with pytest.raises(ValueError, match=message):
        make_defense(name, **settings)


def test_jpeg_refuses_images_that_are_neither_grey_nor_rgb():
    with pytest.raises(ValueError, match="images have 4 channels; JPEG takes 1 or 3"):
        make_defense("jpeg")(torch.rand(1, 4, 8, 8))


LUMINANCE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
"""The quantisation table of the standard (ITU-T T.81, table K.1), which is that of quality 50."""


def test_jpeg_rounds_the_cosine_transform_of_each_block_to_multiples_of_the_table():
    noise = torch.rand(20, 1, 5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    images = F.interpolate(noise, (16, 24), mode="bilinear")

    def blocks(images):
        return images.mul(255).round().numpy().reshape(20, 2, 8, 3, 8).swapaxes(2, 3)

    levels = dctn(blocks(images) - 128, axes=(-2, -1), norm="ortho") / LUMINANCE
    expected = (idctn(levels.round() * LUMINANCE, axes=(-2, -1), norm="ortho") + 128).round().clip(0, 255)
    difference = np.abs(blocks(make_defense("jpeg", quality=50)(images)) - expected).max((-2, -1))
    clear = np.abs(levels % 1 - 0.5).min((-2, -1)) > 0.01  # libjpeg, which transforms in integers, breaks near ties
    assert clear.mean() > 0.7
    assert difference[clear].max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name):
    defense, images = make_defense(name), photos(5)
    torch.manual_seed(0)
    expected = defense(images)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(defense(images), expected)


def test_more_draws_make_stronger_adversarial_examples_against_the_random_one():
    net, images = classifier(make_defense("random_resize_pad", prob=1, crops=[0.5, 0.3, 0.1])), photos()
    labels = classifier(None)(images).argmax(1)
    kept = {}
    for eot in (1, 16):
        attack = make_attack("pgd", norm="linf", eps=0.1, steps=10, eot=eot, random_start=False)
        crafted = attack.craft(net, images, labels)
        torch.manual_seed(9)
        with torch.no_grad():
            kept[eot] = torch.stack([net(crafted).softmax(1) for _ in range(200)]).mean(0)[range(24), labels].mean()
    assert kept[16] < kept[1] - 0.01


@pytest.mark.parametrize("name", NAMES)
def test_batch_norms_behind_a_defence_are_folded(name):
    facts = {"in_chans": 3, "num_classes": 4, "img_size": 12, "mean": [0.5] * 3, "std": [0.2] * 3}
    net = make_classifier("cnn", **facts, defense=make_defense(name), width=4).eval()
    before = torch.get_rng_state()
    assert fold_batchnorm(net, (3, 12, 12)).num_folded == 3
    assert torch.equal(torch.get_rng_state(), before)
