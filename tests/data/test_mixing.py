"""Mixup, cutmix and erasing: what they do to pixels and labels, and what their randomness belongs to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ares_lightning.data import BatchAugmentation

IDS = torch.arange(8)
NEIGHBOURS = [1, 0, 3, 2, 5, 4, 7, 6]


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(8, 3, 16, 12, generator=torch.Generator().manual_seed(0))
    return images, F.one_hot(torch.arange(8) % 5, 5).float()


def test_mixup_mixes_pixels_and_labels_by_the_same_share(batch):
    images, labels = batch
    mixed, soft = BatchAugmentation(mixup=0.8).mix(images, labels, 3)
    share = float(((mixed - images) / (images[NEIGHBOURS] - images)).median())
    assert 0 < share < 1
    torch.testing.assert_close(mixed, images * (1 - share) + images[NEIGHBOURS] * share)
    torch.testing.assert_close(soft, labels * (1 - share) + labels[NEIGHBOURS] * share, atol=1e-4, rtol=0)


def test_cutmix_pastes_a_rectangle_and_labels_follow_its_area(batch):
    images, labels = batch
    for step in range(5):
        mixed, soft = BatchAugmentation(cutmix=1.0).mix(images, labels, step)
        pasted = (mixed != images).any(1)
        assert torch.equal(pasted.expand(8, -1, -1), pasted[:1].expand(8, -1, -1))
        rows, columns = pasted[0].any(1).sum(), pasted[0].any(0).sum()
        assert int(pasted[0].sum()) == int(rows * columns), "a rectangle"
        assert mixed.masked_select(pasted[:, None]).equal(images[NEIGHBOURS].masked_select(pasted[:, None]))
        area = float(pasted[0].float().mean())
        torch.testing.assert_close(soft, labels * (1 - area) + labels[NEIGHBOURS] * area)


def test_with_both_each_step_takes_one(batch):
    augmentation = BatchAugmentation(mixup=0.8, cutmix=1.0)
    kinds = set()
    for step in range(20):
        mixed, _ = augmentation.mix(*batch, step)
        kinds.add(bool((mixed == batch[0]).any(1).any() or (mixed == batch[0][NEIGHBOURS]).any(1).any()))
    assert kinds == {True, False}


def test_the_odds_of_cutmix_are_the_switch_probability(batch):
    for switch_prob, alone in ((0.0, BatchAugmentation(mixup=0.8)), (1.0, BatchAugmentation(cutmix=1.0))):
        both = BatchAugmentation(mixup=0.8, cutmix=1.0, switch_prob=switch_prob)
        for step in range(20):
            mixed = both.mix(*batch, step)[0]
            pixels = (mixed == batch[0]) | (mixed == batch[0][NEIGHBOURS])
            assert bool(pixels.all()) == (alone.cutmix > 0)
    often = BatchAugmentation(mixup=0.8, cutmix=1.0, switch_prob=0.9)
    pasted = sum(bool((often.mix(*batch, step)[0] == batch[0]).any()) for step in range(200))
    assert 160 < pasted < 200


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}])
@pytest.mark.parametrize("copies", [1, 2])
def test_mixing_a_batch_is_mixing_its_halves(batch, settings, copies):
    images, labels = batch
    augmentation = BatchAugmentation(**settings, copies=copies)
    whole = augmentation.mix(images, labels, 4)
    halves = [augmentation.mix(images[part], labels[part], 4) for part in (slice(0, 4), slice(4, 8))]
    for one, two in zip(whole, zip(*halves, strict=True), strict=True):
        assert one.equal(torch.cat(two))
    assert not whole[0].equal(images)


@pytest.mark.parametrize("copies", [2, 3])
def test_an_image_is_never_mixed_with_its_own_copy(copies):
    ids = torch.arange(4).repeat_interleave(copies)
    labels = F.one_hot(ids, 4).float()
    _, soft = BatchAugmentation(mixup=0.8, copies=copies).mix(torch.rand(len(ids), 1, 4, 4), labels, 0)
    partners = soft - labels * soft
    assert partners.argmax(1).tolist() == torch.tensor([1, 0, 3, 2]).repeat_interleave(copies).tolist()
    assert ((soft > 0).sum(1) == 2).all()


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}])
@pytest.mark.parametrize(
    ("size", "copies", "alone"), [(7, 1, [6]), (1, 1, [0]), (5, 2, [4]), (7, 2, [5]), (3, 4, [0, 1, 2])]
)
def test_a_row_without_a_partner_keeps_its_pixels_and_its_label(batch, settings, size, copies, alone):
    images, labels = batch[0][:size], F.one_hot(torch.arange(size), 8).float()
    mixed, soft = BatchAugmentation(**settings, copies=copies).mix(images, labels, 0)
    assert mixed[alone].equal(images[alone])
    assert soft[alone].equal(labels[alone])
    others = [row for row in range(size) if row not in alone]
    assert ((soft[others] > 0).sum(1) == 2).all()


def test_mixed_batches_keep_their_channels_last(batch):
    images = batch[0].contiguous(memory_format=torch.channels_last)
    for settings in ({"mixup": 0.8}, {"cutmix": 1.0}):
        mixed, _ = BatchAugmentation(**settings).mix(images, batch[1], 0)
        assert mixed.is_contiguous(memory_format=torch.channels_last)


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


def test_copies_of_an_image_are_erased_differently_wherever_they_stand():
    images, ids = torch.zeros(4, 1, 8, 8), torch.tensor([7, 7, 3, 7])
    augmentation = BatchAugmentation(erasing=1.0)
    erased = augmentation.erase(images, ids, 0)
    assert len({image.numpy().tobytes() for image in erased}) == 4
    assert augmentation.erase(images[:3], ids[1:], 0).equal(erased[[0, 2, 1]])


@pytest.mark.parametrize(
    "settings",
    [{"mixup": -1}, {"cutmix": float("inf")}, {"erasing": 1.5}, {"switch_prob": -0.1}, {"mixup": "much"}],
)
def test_what_makes_no_sense_is_refused(settings):
    with pytest.raises(ValueError, match=rf"^{next(iter(settings))}="):
        BatchAugmentation(**settings)
