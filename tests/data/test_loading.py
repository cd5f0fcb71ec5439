from itertools import chain

import pytest
import torch

from ares_lightning.data import (
    ImageLoader,
    ImageSet,
    ShardedSampler,
    Wishes,
    collate,
    load_image_sets,
    select_subset,
)


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


# --- repeated augmentation, and going on in mid-epoch ------------------------------------------------------------


def pairs(
    world_size: int, repeats: int, epoch: int = 0, start: int = 0, size: int = 20
) -> list[list[tuple[int, int]]]:
    shards = []
    for rank in range(world_size):
        sampler = ShardedSampler(size, shuffle=True, seed=0, rank=rank, world_size=world_size, repeats=repeats)
        sampler.set_epoch(epoch)
        sampler.start = start
        shards.append(list(sampler))
    return shards


def test_repeats_are_other_draws_on_other_ranks_and_an_epoch_stays_as_long():
    shards = pairs(2, 2, epoch=5)
    assert [len(shard) for shard in shards] == [10, 10]
    for one, two in zip(*shards, strict=True):
        assert one[0] == two[0], "the copies of an image are on different ranks at the same time"
        assert (one[1], two[1]) == (10, 11), "and are augmented differently, in no other epoch so"
    order = positions(20, shuffle=True, world_size=1, epoch=5)[0]
    assert [position for position, _ in shards[0]] == order[:10]


@pytest.mark.parametrize("repeats", [1, 3])
def test_ranks_together_see_the_same_whatever_their_number(repeats):
    together = [list(chain(*zip(*pairs(world_size, repeats), strict=True))) for world_size in (1, 2, 4)]
    assert together[0] == together[1] == together[2]


def test_the_rest_of_an_epoch_is_the_rest_whatever_the_number_of_ranks():
    whole = pairs(1, 1, epoch=3)[0]
    for world_size in (1, 2, 4):
        rest = list(chain(*zip(*pairs(world_size, 1, epoch=3, start=8), strict=True)))
        assert rest == whole[8:]


def loader(
    digits: ImageSet, batch_size: int = 32, rank: int = 0, world_size: int = 1, workers: int = 0
) -> ImageLoader:
    sampler = ShardedSampler(len(digits), shuffle=True, seed=0, rank=rank, world_size=world_size)
    return ImageLoader(digits, batch_size, sampler=sampler, num_workers=workers, drop_last=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_with_the_batches_that_were_still_to_come(digits, workers):
    first = loader(digits, workers=workers)
    whole = []
    for epoch in range(2):
        first.sampler.set_epoch(epoch)
        whole.append([ids.tolist() for _, _, ids in first])
    assert whole[0] != whole[1]
    stopped = loader(digits, workers=workers)
    stopped.sampler.set_epoch(1)
    batches = iter(stopped)
    assert [next(batches)[2].tolist() for _ in range(4)] == whole[1][:4]
    state = stopped.state_dict()
    resumed = loader(digits)
    resumed.load_state_dict(state)
    assert [ids.tolist() for _, _, ids in resumed] == whole[1][4:]
    assert [ids.tolist() for _, _, ids in resumed] == whole[1], "the next time from the beginning"
    assert len(resumed) == len(whole[1])
    resumed.sampler.set_epoch(0)
    assert [ids.tolist() for _, _, ids in resumed] == whole[0]


def test_a_loader_goes_on_over_other_ranks_if_a_step_stays_as_large(digits):
    stopped = loader(digits, batch_size=32)
    batches = iter(stopped)
    done = [next(batches)[2].tolist() for _ in range(3)]
    shares = []
    for rank in range(2):
        resumed = loader(digits, batch_size=16, rank=rank, world_size=2)
        resumed.load_state_dict(stopped.state_dict())
        shares.append([ids.tolist() for _, _, ids in resumed])
    rest = [sorted(one + two) for one, two in zip(*shares, strict=True)]
    assert rest == [sorted(ids.tolist()) for _, _, ids in batches]
    assert len(done) + len(rest) == len(stopped)
    with pytest.raises(
        ValueError, match=r"^data\.batch_size=8: the checkpoint was made in mid-epoch with 32 images"
    ):
        loader(digits, batch_size=8).load_state_dict(stopped.state_dict())


def test_batches_have_their_channels_last(digits):
    images = torch.randint(0, 256, (4, 9, 7, 3), dtype=torch.uint8)
    stacked, _, _ = collate([(image.permute(2, 0, 1), 0, 0) for image in images])
    assert stacked.is_contiguous(memory_format=torch.channels_last)
    assert stacked.equal(images.permute(0, 3, 1, 2))
    (batch, _, _), *_ = loader(digits, workers=2)
    assert batch.dtype == torch.uint8
    assert batch.is_contiguous(memory_format=torch.channels_last)
