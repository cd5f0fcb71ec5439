"""Mixup, cutmix and erasing: what they do to pixels and labels, and what their randomness belongs to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ares_lightning.data import BatchAugmentation

IDS = torch.arange(8)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(8, 3, 16, 12, generator=torch.Generator().manual_seed(0))
    return images, F.one_hot(torch.arange(8) % 5, 5).float()


def test_mixup_mixes_pixels_and_labels_by_the_same_share(batch):
    images, labels = batch
    mixed, soft = BatchAugmentation(mixup=0.8).mix(images, labels, 3)
    share = float(((mixed - images) / (images.flip(0) - images)).median())
    assert 0 < share < 1
    torch.testing.assert_close(mixed, images * (1 - share) + images.flip(0) * share)
    torch.testing.assert_close(soft, labels * (1 - share) + labels.flip(0) * share, atol=1e-4, rtol=0)


def test_cutmix_pastes_a_rectangle_and_labels_follow_its_area(batch):
    images, labels = batch
    for step in range(5):
        mixed, soft = BatchAugmentation(cutmix=1.0).mix(images, labels, step)
        pasted = (mixed != images).any(1)
        assert torch.equal(pasted.expand(8, -1, -1), pasted[:1].expand(8, -1, -1))
        rows, columns = pasted[0].any(1).sum(), pasted[0].any(0).sum()
        assert int(pasted[0].sum()) == int(rows * columns), "a rectangle"
        assert mixed.masked_select(pasted[:, None]).equal(images.flip(0).masked_select(pasted[:, None]))
        area = float(pasted[0].float().mean())
        torch.testing.assert_close(soft, labels * (1 - area) + labels.flip(0) * area)


def test_with_both_each_step_takes_one(batch):
    augmentation = BatchAugmentation(mixup=0.8, cutmix=1.0)
    kinds = set()
    for step in range(20):
        mixed, _ = augmentation.mix(*batch, step)
        kinds.add(bool((mixed == batch[0]).any(1).any() or (mixed == batch[0].flip(0)).any(1).any()))
    assert kinds == {True, False}


def test_mixing_belongs_to_seed_and_step(batch):
    one = BatchAugmentation(mixup=0.8, seed=1)
    torch.manual_seed(0)
    first = one.mix(*batch, 3)[0]
    state = torch.get_rng_state()
    assert one.mix(*batch, 3)[0].equal(first)
    assert torch.get_rng_state().equal(state)
    assert not one.mix(*batch, 4)[0].equal(first)
    assert not BatchAugmentation(mixup=0.8, seed=2).mix(*batch, 3)[0].equal(first)


def test_erasing_puts_noise_into_a_rectangle_of_each_image_and_leaves_the_rest(batch):
    images, before = batch[0], batch[0].clone()
    erased = BatchAugmentation(erasing=1.0).erase(images, IDS, 0)
    assert images.equal(before)
    assert erased.min() >= 0
    assert erased.max() <= 1
    for one, other in zip(images, erased, strict=True):
        hit = (one != other).any(0)
        share = float(hit.float().mean())
        assert 0.01 < share < 0.45
        assert int(hit.sum()) == int(hit.any(1).sum() * hit.any(0).sum())
    assert BatchAugmentation(erasing=0.0).erase(images, IDS, 0) is images


def test_erasing_belongs_to_the_sample_and_hits_its_share():
    images, ids = torch.zeros(400, 1, 8, 8), torch.arange(400)
    erased = BatchAugmentation(erasing=0.25, seed=1).erase(images, ids, 2)
    apart = BatchAugmentation(erasing=0.25, seed=1).erase(images[100:200], ids[100:200], 2)
    assert erased[100:200].equal(apart)
    share = (erased.flatten(1) > 0).any(1).float().mean()
    assert 0.17 < share < 0.33
    assert not BatchAugmentation(erasing=0.25, seed=1).erase(images, ids, 3).equal(erased)


@pytest.mark.parametrize("settings", [{"mixup": -1}, {"cutmix": float("inf")}, {"erasing": 1.5}])
def test_what_makes_no_sense_is_refused(settings):
    with pytest.raises(ValueError, match=rf"^{next(iter(settings))}="):
        BatchAugmentation(**settings)
