"""Corruptions on the fly: held against closed forms and against plain statements of what each does."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from photos import photo
from PIL import Image
from scipy import ndimage

from ares_lightning.data import Corruption, corrupt
from ares_lightning.data.corruptions import COMMON, EXTRA, ON_TINY_IMAGES, SEVERITIES, corruptions_for
from ares_lightning.data.textures import canny, frost_texture, plasma

EVERY = COMMON + EXTRA
DETERMINISTIC = (
    "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur",
    "saturate",
)  # fmt: skip
SETTINGS = {
    "gaussian_noise": {224: (0.08, 0.12, 0.18, 0.26, 0.38), 32: (0.04, 0.06, 0.08, 0.09, 0.10)},
    "shot_noise": {224: (60, 25, 12, 5, 3), 32: (500, 250, 100, 75, 50)},
    "impulse_noise": {224: (0.03, 0.06, 0.09, 0.17, 0.27), 32: (0.01, 0.02, 0.03, 0.05, 0.07)},
    "speckle_noise": {224: (0.15, 0.2, 0.35, 0.45, 0.6), 32: (0.06, 0.1, 0.12, 0.16, 0.2)},
}
"""The published ones, once more."""


def pixels(number: int = 0, size: int = 224) -> np.ndarray:
    return np.asarray(photo(number, size, size))


def psnr(clean: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / ((clean.astype(float) - other) ** 2).mean()))


def test_there_are_fifteen_and_four():
    assert (len(COMMON), len(EXTRA), len(set(EVERY))) == (15, 4, 19)
    assert corruptions_for(32) == corruptions_for(224) == COMMON
    assert corruptions_for(8) == ON_TINY_IMAGES


@pytest.mark.parametrize("size", [224, 32])
@pytest.mark.parametrize("name", EVERY)
def test_calls_are_equal_bit_for_bit_and_touch_nothing_else(name, size):
    before = pixels(0, size)
    given = before.copy()
    np.random.seed(1), random.seed(1)
    states = np.random.get_state()[1].copy(), random.getstate()
    for severity in (1, 5):
        one, two = (corrupt(given, name, severity, seed=3, sample_id=7) for _ in range(2))
        assert one.tobytes() == two.tobytes()
        assert (one.shape, one.dtype) == (given.shape, np.uint8)
        for seed, sample_id in ((4, 7), (3, 8)):
            other = corrupt(given, name, severity, seed=seed, sample_id=sample_id)
            assert (other.tobytes() == one.tobytes()) == (name in DETERMINISTIC)
    assert (given == before).all()
    assert (np.random.get_state()[1] == states[0]).all()
    assert random.getstate() == states[1]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (8, 8), (40, 33), (100, 130)])
def test_images_of_any_shape_and_grey_ones_are_corrupted(name, shape):
    colour = np.asarray(photo(1, shape[1], shape[0]))
    for image in (colour, colour[..., 0]):
        for severity in SEVERITIES:
            assert corrupt(np.ascontiguousarray(image), name, severity).shape == image.shape


# The published settings themselves do not always rise: more blur, but fewer shuffles (glass); a smaller shift and a
# rougher field (elastic); no saturation before too much; water before mud; less image under as much frost.
_FROST, _ELASTIC = {"frost": {3, 4}, "saturate": {2}}, {"elastic_transform": {1, 2, 3, 4}}
NOT_WORSE = {
    224: {"glass_blur": {1, 3}, "fog": {3}, "snow": {2}, **_FROST, **_ELASTIC},
    32: {"glass_blur": {1, 2, 4}, "spatter": {3}, **_FROST, **_ELASTIC},
}
"""Severities after which the next one may be as near to the clean image or nearer."""


@pytest.mark.parametrize("size", [224, 32])
@pytest.mark.parametrize("name", EVERY)
def test_images_get_worse_with_severity(name, size):
    mean = [
        np.mean([psnr(pixels(i, size), corrupt(pixels(i, size), name, severity, sample_id=i)) for i in range(12)])
        for severity in SEVERITIES
    ]
    for severity in range(1, 5):
        if severity not in NOT_WORSE[size].get(name, ()):
            assert mean[severity] < mean[severity - 1], mean
    if (name, size) not in (("elastic_transform", 224), ("elastic_transform", 32)):
        assert mean[4] < mean[0]


# --- noise has closed forms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [224, 32])
@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", SETTINGS)
def test_noise_has_the_mean_and_the_variance_of_its_closed_form(name, severity, size):
    level = 102
    x, setting = level / 255, SETTINGS[name][size][severity - 1]
    flat = np.full((size, size, 3), level, dtype=np.uint8)
    seen = np.stack([corrupt(flat, name, severity, sample_id=i) for i in range(4 if size == 224 else 200)]) / 255
    # The whole distribution after clipping and cutting off to whole levels, as in the published code.
    if name == "impulse_noise":
        values, weights = np.array([0, x, 1]), np.array([setting / 2, 1 - setting, setting / 2])
    elif name == "shot_noise":
        counts = np.arange(0, 40 * setting)
        logs = counts * np.log(x * setting) - x * setting - np.cumsum(np.log(np.maximum(counts, 1)))
        values, weights = np.floor(np.minimum(counts / setting, 1) * 255 + 1e-9) / 255, np.exp(logs)
    else:
        std = setting * (x if name == "speckle_noise" else 1)
        grid = np.linspace(-8, 8, 400_001)
        values = np.floor(np.clip(x + std * grid, 0, 1) * 255) / 255
        weights = np.exp(-(grid**2) / 2)
    weights = weights / weights.sum()
    mean = (values * weights).sum()
    variance = ((values - mean) ** 2 * weights).sum()
    fourth = ((values - mean) ** 4 * weights).sum()
    n = seen.size
    assert abs(seen.mean() - mean) < 5 * np.sqrt(variance / n) + 1e-4
    assert abs(seen.var() - variance) < 5 * np.sqrt((fourth - variance**2) / n) + 1e-4


def test_half_of_the_impulses_are_salt():
    flat = np.full((224, 224, 3), 100, dtype=np.uint8)
    seen = corrupt(flat, "impulse_noise", 5)
    salt, pepper = (seen == 255).mean(), (seen == 0).mean()
    assert salt == pytest.approx(0.135, abs=0.005)
    assert pepper == pytest.approx(0.135, abs=0.005)


# --- the others by a plain statement -----------------------------------------------------------------------------


def test_gaussian_blur_is_scipys_on_each_channel():
    image = pixels()
    expected = np.stack([ndimage.gaussian_filter(image[..., c] / 255, 3, mode="nearest") for c in range(3)], axis=2)
    assert abs(corrupt(image, "gaussian_blur", 3) - np.floor(expected * 255)).max() <= 1


def test_defocus_spreads_a_point_over_a_disk():
    image = np.zeros((101, 101, 3), dtype=np.uint8)
    image[49:52, 49:52] = 255
    seen = corrupt(image, "defocus_blur", 5)[..., 0].astype(float)
    rows, columns = np.nonzero(seen)
    assert np.hypot(rows - 50, columns - 50).max() <= 10 + 2 * np.sqrt(2)
    inner = seen[np.hypot(*np.mgrid[-50:51, -50:51]) < 8]
    assert abs(inner - 9 * 255 / 317 * 1.011).max() <= 1.1, "317 points; the published kernel has a sum of 1.011"


def test_motion_blur_smears_one_way_by_weights_that_fall():
    image = np.zeros((101, 101, 3), dtype=np.uint8)
    image[50, 50] = 255
    seen = corrupt(image, "motion_blur", 2)[..., 0]
    rows, columns = np.nonzero(seen)
    assert columns.max() == 50, "the kernel looks ahead, so light goes back"
    assert 50 - columns.min() >= 9
    assert abs(rows - 50).max() <= 50 - columns.min(), "up to 45 degrees"
    along = seen[rows, columns][np.argsort(-columns)]
    weights = np.exp(-(np.arange(31) ** 2) / (2 * 5**2))
    assert abs(along[:8].astype(float) - 255 * (weights / weights.sum())[:8]).max() <= 1
    assert int(seen.sum()) == pytest.approx(255, abs=20)


def test_glass_copies_pixels_from_at_most_that_far():
    ramp = np.tile(np.arange(100, dtype=np.uint8)[:, None, None] * 2, (1, 100, 3))
    seen = corrupt(ramp, "glass_blur", 1)[10:-10, 10:-10].astype(int)
    assert abs(seen - ramp[10:-10, 10:-10]).max() <= 2 * 2 * 2 + 2
    assert (seen != ramp[10:-10, 10:-10]).mean() > 0.2


def test_contrast_draws_towards_the_channels_mean():
    image = pixels()
    expected = (image / 255 - image.mean((0, 1)) / 255) * 0.1 + image.mean((0, 1)) / 255
    assert abs(corrupt(image, "contrast", 4) - np.floor(expected * 255)).max() <= 1


@pytest.mark.parametrize(("name", "severity"), [("brightness", 3), ("saturate", 1), ("saturate", 4)])
def test_brightness_and_saturation_are_changed_in_hsv(name, severity):
    image = pixels()
    image.setflags(write=False)
    image = image.copy()
    image[0, :3] = [[0, 0, 0], [90, 90, 90], [255, 255, 255]]  # black, grey and white have no hue: red is taken
    import colorsys

    expected = np.zeros((4, 224, 3))
    for row in range(4):
        for column in range(224):
            h, s, v = colorsys.rgb_to_hsv(*(image[row, column] / 255))
            if name == "brightness":
                v = min(v + 0.3, 1)
            else:
                s = min(max(s * {1: 0.3, 4: 5}[severity] + {1: 0, 4: 0.1}[severity], 0), 1)
            expected[row, column] = colorsys.hsv_to_rgb(h, s, v)
    assert abs(corrupt(image, name, severity)[:4].astype(float) - np.floor(expected * 255)).max() <= 1


def test_pixelate_and_jpeg_are_pillows():
    image = photo(0)
    small = image.resize((89, 89), Image.Resampling.BOX).resize((224, 224), Image.Resampling.BOX)
    assert corrupt(np.asarray(image), "pixelate", 3).tolist() == np.asarray(small).tolist()
    file = io.BytesIO()
    image.save(file, "JPEG", quality=10)
    assert corrupt(np.asarray(image), "jpeg_compression", 4).tolist() == np.asarray(Image.open(file)).tolist()


def test_elastic_moves_but_makes_no_new_levels():
    flat = np.full((224, 224, 3), 77, dtype=np.uint8)
    assert set(np.unique(corrupt(flat, "elastic_transform", 1))) <= {76, 77}
    assert psnr(pixels(), corrupt(pixels(), "elastic_transform", 3)) < 30


def test_zoom_keeps_the_middle_and_blurs_the_rim():
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    difference = abs(corrupt(noise, "zoom_blur", 5).astype(float) - noise).mean(2)
    assert difference[108:116, 108:116].mean() < difference[:20].mean()


def test_snow_and_frost_brighten_and_fog_takes_contrast():
    image = pixels() // 3
    for name in ("snow", "frost"):
        assert corrupt(image, name, 3).mean() > image.mean() + 20
    assert corrupt(pixels(), "fog", 3).std() < 0.6 * pixels().std()


def test_frost_is_said_to_be_drawn():
    assert Corruption("frost", 2).label == "frost_procedural"
    assert all(Corruption(name, 2).label == name for name in EVERY if name != "frost")
    pane = frost_texture(224, 200, np.random.RandomState(0))
    assert pane.shape == (224, 200, 3)
    assert 0.5 < pane.mean() < 0.7
    assert 0.08 < pane.std() < 0.2


def test_plasma_fills_the_unit_interval_and_smoothens_with_its_decay():
    rough, smooth = (plasma(64, decay, np.random.RandomState(0)) for decay in (1.2, 3))
    assert (rough.min(), rough.max(), smooth.shape) == (0, 1, (64, 64))
    assert abs(np.diff(smooth)).mean() < abs(np.diff(rough)).mean()


def test_edges_lie_on_the_rim_of_a_square():
    levels = np.zeros((40, 40))
    levels[10:30, 10:30] = 200
    edges = canny(levels, 50, 150)
    rows, columns = np.nonzero(edges)
    from_rim = np.minimum.reduce([abs(rows - 9.5), abs(rows - 29.5), abs(columns - 9.5), abs(columns - 29.5)])
    assert len(rows) >= 70
    assert from_rim.max() <= 1.5


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: corrupt(pixels(), "rain", 1), r"^corruption=rain: expected one of gaussian_noise"),
        (lambda: corrupt(pixels(), "fog", 6), r"^severity=6: expected a whole number from 1 to 5"),
        (lambda: Corruption("fog", 0), r"^severity=0"),
        (lambda: corrupt(pixels() / 255, "fog", 1), r"^pixels: expected uint8"),
        (lambda: corrupt(np.zeros((3, 4, 5, 3), np.uint8), "fog", 1), r"got uint8 \[3, 4, 5, 3\]"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
