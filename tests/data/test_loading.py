from itertools import chain

import pytest
import torch

from ares_lightning.data import ImageSet, ShardedSampler, Wishes, collate, load_image_sets, select_subset


def positions(size: int, *, shuffle: bool, world_size: int, epoch: int = 0, seed: int = 0) -> list[list[int]]:
    """The positions each rank sees."""
    shards = []
    for rank in range(world_size):
        sampler = ShardedSampler(size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size)
        sampler.set_epoch(epoch)
        pairs = list(sampler)
        assert len(pairs) == len(sampler)
        assert {pair_epoch for _, pair_epoch in pairs} <= {epoch}
        shards.append([position for position, _ in pairs])
    return shards


@pytest.mark.parametrize(("size", "world_size"), [(10, 1), (10, 2), (10, 3), (2, 4), (0, 2)])
def test_evaluation_shards_cover_every_sample_once(size, world_size):
    shards = positions(size, shuffle=False, world_size=world_size)
    assert sorted(chain(*shards)) == list(range(size))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize(("size", "world_size"), [(10, 1), (10, 2), (10, 3), (11, 4)])
def test_training_shards_are_equal_and_repeat_nothing(size, world_size):
    shards = positions(size, shuffle=True, world_size=world_size)
    assert {len(shard) for shard in shards} == {size // world_size}
    assert len(set(chain(*shards))) == size // world_size * world_size


def test_training_order_depends_on_seed_and_epoch_only():
    order = positions(100, shuffle=True, world_size=1, epoch=3, seed=1)[0]
    torch.manual_seed(5)
    assert order == positions(100, shuffle=True, world_size=1, epoch=3, seed=1)[0]
    assert order != positions(100, shuffle=True, world_size=1, epoch=4, seed=1)[0]
    assert order != positions(100, shuffle=True, world_size=1, epoch=3, seed=2)[0]
    even, odd = positions(100, shuffle=True, world_size=2, epoch=3, seed=1)
    assert order[0::2] == even
    assert order[1::2] == odd


def test_batch_is_uint8_images_and_int64_labels_and_ids(digits):
    images, labels, sample_ids = collate([digits[i] for i in (3, 1)])
    assert (images.dtype, labels.dtype, sample_ids.dtype) == (torch.uint8, torch.int64, torch.int64)
    assert images.shape == (2, 1, 8, 8)
    assert sample_ids.tolist() == digits.sample_ids[[3, 1]].tolist()
    assert labels.tolist() == digits.labels[[3, 1]].tolist()


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return load_image_sets("digits", None, Wishes(img_size=8, in_chans=1, num_val=180)).test


def test_no_subset_is_the_whole_set(digits):
    assert select_subset(digits, None) is digits


def test_first_takes_the_first_in_canonical_order(digits):
    subset = select_subset(digits, "first:5")
    assert subset.sample_ids.equal(digits.sample_ids[:5])
    assert subset[4][1:] == digits[4][1:]
    assert len(select_subset(digits, "first:360")) == 360


def test_random_is_drawn_by_its_seed_and_kept_in_canonical_order(digits):
    subset = select_subset(digits, "random:50@3")
    ids = subset.sample_ids.tolist()
    assert len(set(ids)) == 50
    assert ids == sorted(ids)
    assert set(ids) < set(digits.sample_ids.tolist())
    assert ids == select_subset(digits, "random:50@3").sample_ids.tolist()
    assert ids != select_subset(digits, "random:50@4").sample_ids.tolist()
    assert set(ids) < set(select_subset(digits, "random:100@3").sample_ids.tolist())


def test_sample_ids_and_names_survive_subsets(digits):
    subset = select_subset(select_subset(digits, "random:50@3"), "first:10")
    by_id = {sample_id: image for image, _, sample_id in (digits[i] for i in range(len(digits)))}
    for image, _, sample_id in (subset[i] for i in range(10)):
        assert image.equal(by_id[sample_id])
        assert subset.sample_name(sample_id) == f"digits/{sample_id:05d}"


@pytest.mark.parametrize(
    "spec",
    ["first:0", "first:-1", "first:361", "first:", "random:0@1", "random:361@0", "random:5", "last:5", "", "5"],
)
def test_subset_that_makes_no_sense_is_refused(digits, spec):
    with pytest.raises(
        ValueError, match=r"must be null \(all\), first:n, random:n@seed, .* with n from 1 to 360"
    ) as error:
        select_subset(digits, spec)
    assert str(error.value).startswith(f"subset={spec}: ")
