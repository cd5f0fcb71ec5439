"""Preprocessing held against torchvision's transforms and timm's; RandAugment keyed by the sample."""

from __future__ import annotations

import random

import numpy as np
import pytest
import timm
from photos import photo
from timm.data import create_transform, resolve_model_data_config
from torchvision.transforms import v2

from ares_lightning.data import Preprocessing, ares_preprocessing
from ares_lightning.data.images import RandAugmented, ResizedCropAndFlip, crop_and_flip
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
    augment = RandAugmented(ResizedCropAndFlip(64), "rand-m9-mstd0.5", 64, (0.5, 0.5, 0.5))
    image = photo(1)
    random.seed(1), np.random.seed(1)
    states = random.getstate(), np.random.get_state()[1].copy()
    draws = [np.asarray(augment(image, random.Random(key))).tobytes() for key in (1, 2, 1)]
    assert draws[0] == draws[2] != draws[1]
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    plain = ResizedCropAndFlip(64)
    assert any(
        np.asarray(augment(image, random.Random(key))).tobytes()
        != np.asarray(plain(image, random.Random(key))).tobytes()
        for key in range(3)
    )


def test_randaugment_of_grey_images():
    augment = RandAugmented(crop_and_flip, "rand-m9-mstd0.5", 32, (0.5,))
    for key in range(30):
        assert augment(photo(1, 32, 32).convert("L"), random.Random(key)).mode == "L"


def test_another_notation_is_refused():
    with pytest.raises(ValueError, match=r"^aug\.randaugment=strong: is not in timm's notation"):
        RandAugmented(crop_and_flip, "strong", 32, (0.5,) * 3)
