"""Networks fitted to the data."""

from __future__ import annotations

import pytest
import torch

from ares_lightning.models import make_classifier
from ares_lightning.models.classifier import as_classifier

FACTS = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}


@pytest.mark.parametrize("img_size", [8, 32, 64, 224])
@pytest.mark.parametrize("name", ["cnn", "resnet18", "resnet50", "vit_tiny_patch16_224", "vit_small_patch16_224"])
def test_architectures_fit_the_images(name, img_size):
    net = make_classifier(name, in_chans=3, num_classes=7, img_size=img_size, **FACTS).eval()
    with torch.no_grad():
        logits = net(torch.rand(2, 3, img_size, img_size))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


def test_small_images_keep_their_resolution_in_a_resnet_and_take_patch_4_in_a_vit():
    small = make_classifier("resnet18", in_chans=1, num_classes=10, img_size=32, mean=[0], std=[1]).backbone
    assert small.conv1.weight.shape == (64, 1, 3, 3)
    assert small.conv1.stride == (1, 1)
    assert isinstance(small.maxpool, torch.nn.Identity)
    large = make_classifier("resnet18", in_chans=3, num_classes=10, img_size=224, **FACTS).backbone
    assert large.conv1.weight.shape == (64, 3, 7, 7)
    for img_size, patch in ((8, 4), (32, 4), (64, 8), (224, 16)):
        net = make_classifier("vit_tiny_patch16_224", in_chans=3, num_classes=10, img_size=img_size, **FACTS)
        assert net.backbone.patch_embed.patch_size == (patch, patch)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_the_kin_of_the_vit_take_patch_4_on_digits(name):
    net = make_classifier(name, in_chans=1, num_classes=10, img_size=8, mean=[0], std=[1])
    assert net.backbone.patch_embed.patch_size == (4, 4)
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_normalisation_is_the_first_layer():
    net = make_classifier("cnn", in_chans=3, num_classes=10, img_size=8, **FACTS).eval()
    images = torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(FACTS[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(net(images), net.backbone((images - mean) / std))
    assert not any(key.startswith("normalize") for key in net.state_dict()), "weights stay loadable elsewhere"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet19", {}, "name=resnet19: timm .* did you mean resnet18"),
        ("resnet18", {"wdth": 3}, "name=resnet18: the architecture cannot be built"),
        ("cnn", {"wdth": 3}, "name=cnn: the architecture cannot be built"),
        ("swin_tiny_patch4_window7_224", {"window_size": "x"}, "name=swin_tiny_patch4_window7_224"),
    ],
)
def test_what_cannot_be_built_is_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        make_classifier(name, in_chans=3, num_classes=10, img_size=32, **FACTS, **settings)


def test_mean_and_std_have_a_value_for_each_channel():
    with pytest.raises(ValueError, match="expected 1 values"):
        make_classifier("cnn", in_chans=1, num_classes=10, img_size=8, **FACTS)


def test_a_network_that_returns_more_than_logits_is_refused():
    class WithFeatures(torch.nn.Flatten):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(images), images

    with pytest.raises(ValueError, match=r"name=mine: returns a tuple; expected a Tensor, logits \[N, 4\]"):
        as_classifier("mine", WithFeatures(), 1, 4, 2, mean=[0], std=[1])
