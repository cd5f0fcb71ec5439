"""Preprocessing held against torchvision's transforms and timm's; RandAugment keyed by the sample."""

from __future__ import annotations

import random

import numpy as np
import pytest
import timm
from photos import photo
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torchvision.transforms import v2

from ares_lightning.data import Preprocessing, ares_preprocessing
from ares_lightning.data.images import Augmentation, resized_crop_and_flip, shift_and_flip, unchanged
from ares_lightning.models.preprocessing import own_preprocessing


@pytest.mark.parametrize("size", [(300, 224), (224, 311), (640, 427), (100, 90), (257, 256)])
def test_the_fixed_preprocessing_is_that_of_the_benchmark(size):
    image = photo(1, *size)
    pipeline = v2.Compose([v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)])
    assert np.array_equal(np.asarray(ares_preprocessing(224)(image)), np.asarray(pipeline(image)))
    assert str(ares_preprocessing(224)) == "resize 256 (bicubic), crop 224"


@pytest.mark.parametrize(
    "name",
    [
        "resnet50.a1_in1k", "resnet50.tv_in1k", "vit_base_patch16_384.augreg_in21k_ft_in1k",
        "convnext_base.fb_in22k_ft_in1k_384", "vit_base_patch16_siglip_224.webli", "swin_base_patch4_window7_224",
    ],
)  # fmt: skip
def test_a_models_own_preprocessing_is_timms(name):
    own = own_preprocessing(name, None, "timm")
    with __import__("torch").device("meta"):
        model = timm.create_model(name)
    config = resolve_model_data_config(model)
    transform = create_transform(**config)
    transform.transforms = transform.transforms[:-2]  # without ToTensor and Normalize
    prepare = Preprocessing(own.img_size, own.resize, own.interpolation, squash=own.squash)
    for size in ((500, 375), (333, 500)):
        image = photo(1, *size)
        assert np.array_equal(np.asarray(prepare(image)), np.asarray(transform(image)))
    if own.squash:
        assert str(prepare).startswith(f"squash to {own.resize} ")


def test_whose_preprocessing_is_taken():
    assert own_preprocessing("resnet50", "tv_in1k", "resnet50_normal")[:3] == (224, 256, "bilinear")
    assert own_preprocessing("swin_base_patch4_window7_224", "ARES_Swin_base.pth", "swinb_at") is None
    assert own_preprocessing("cnn", None, "cnn") is None
    assert own_preprocessing("resnet50", None, "timm", img_size=96)[:2] == (96, 101), "0.95 of it are cropped"


def test_a_crop_that_is_neither_central_nor_squashing_is_refused():
    name = next(n for n in timm.list_pretrained() if timm.get_pretrained_cfg(n).crop_mode == "border")
    with pytest.raises(ValueError, match=r"wants crop_mode=border; use data\.preprocess=ares"):
        own_preprocessing(name, None, "timm")


def test_randaugment_belongs_to_the_sample_and_leaves_the_global_state_alone():
    augment = Augmentation(resized_crop_and_flip, 64, "rand-m9-mstd0.5")
    image = photo(1)
    random.seed(1), np.random.seed(1)
    states = random.getstate(), np.random.get_state()[1].copy()
    draws = [np.asarray(augment(image, random.Random(key))).tobytes() for key in (1, 2, 1)]
    assert draws[0] == draws[2] != draws[1]
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    plain = Augmentation(resized_crop_and_flip, 64)
    assert any(
        np.asarray(augment(image, random.Random(key))).tobytes()
        != np.asarray(plain(image, random.Random(key))).tobytes()
        for key in range(3)
    )


def test_randaugment_of_grey_images():
    augment = Augmentation(shift_and_flip, 32, "rand-m9-mstd0.5", mean=(0.5,))
    for key in range(30):
        assert augment(photo(1, 32, 32).convert("L"), random.Random(key)).mode == "L"


def test_another_notation_is_refused():
    with pytest.raises(ValueError, match=r"^aug\.randaugment=strong: is not in timm's notation"):
        Augmentation(shift_and_flip, 32, "strong")


def test_strongest_randaugment_runs_for_every_image():
    augment = Augmentation(unchanged, 8, "rand-m10-n15-inc1", mean=(0.3,))
    for key in range(50):
        image = augment(photo(key, 8, 8).convert("L"), random.Random(key))
        assert (image.mode, image.size) == ("L", (8, 8))


def test_posterising_to_no_bits_is_black():
    settings = "rand-m10-n1-p1-inc1"
    augment = Augmentation(unchanged, 32, settings)
    images = [np.asarray(augment(photo(1, 32, 32), random.Random(key))) for key in range(60)]
    assert any((image == 0).all() for image in images)


@pytest.mark.parametrize("randaugment", [None, "rand-m9-mstd0.5"])
def test_the_side_of_a_call_is_that_of_the_image(randaugment):
    augment = Augmentation(resized_crop_and_flip, 64, randaugment)
    for key in range(10):
        assert augment(photo(1), random.Random(key)).size == (64, 64)
        assert augment(photo(1), random.Random(key), 48).size == (48, 48)
        own = Augmentation(resized_crop_and_flip, 48, randaugment)
        assert augment(photo(1), random.Random(key), 48) == own(photo(1), random.Random(key)), "translation too"


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_colour_jitter_stays_within_torchvisions_range_and_belongs_to_the_sample(mode):
    grey = Image.new(mode, (8, 8), 100 if mode == "L" else (100, 100, 100))
    augment = Augmentation(unchanged, 8, color_jitter=0.4)
    values = [int(np.asarray(augment(grey, random.Random(key))).flat[0]) for key in range(300)]
    assert 60 <= min(values) < 64, "of one colour, only brightness shows: 1 - 0.4"
    assert 136 < max(values) <= 140
    assert values[:20] == [int(np.asarray(augment(grey, random.Random(key))).flat[0]) for key in range(20)]
    image = photo(1, 32, 32).convert(mode)
    jittered = [np.asarray(augment(image, random.Random(key))) for key in range(5)]
    assert len({pixels.tobytes() for pixels in jittered}) == 5
    for pixels in jittered:
        assert np.corrcoef(pixels.ravel(), np.asarray(image).ravel())[0, 1] > 0.9, "the same image still"
    assert Augmentation(unchanged, 8)(image, random.Random(0)) is image


def test_colour_jitter_changes_what_timms_does():
    jitter = create_transform(32, is_training=True, color_jitter=0.4, auto_augment=None).transforms
    (found,) = [transform for transform in jitter if type(transform).__name__ == "ColorJitter"]
    assert (found.brightness, found.contrast, found.saturation) == ((0.6, 1.4),) * 3
    assert found.hue is None
    beside = create_transform(32, is_training=True, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1")
    assert not any(type(transform).__name__ == "ColorJitter" for transform in beside.transforms)


@pytest.mark.parametrize("strength", [-0.1, float("nan"), "much", True])
def test_a_colour_jitter_that_makes_no_sense_is_refused(strength):
    with pytest.raises(ValueError, match=rf"^aug\.color_jitter={strength}: expected a number, 0 or more"):
        Augmentation(unchanged, 8, color_jitter=strength)
