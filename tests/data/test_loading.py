from itertools import chain
from typing import Any

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
from ares_lightning.data.datasets import Drawn
from ares_lightning.data.phases import Phases


def shards(
    size: int, world_size: int, *, shuffle: bool = True, epoch: int = 0, seed: int = 0, **settings: Any
) -> Any:
    """What each rank sees."""
    seen = []
    for rank in range(world_size):
        sampler = ShardedSampler(size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size, **settings)
        sampler.set_epoch(epoch)
        seen.append(list(sampler))
        assert len(seen[-1]) == len(sampler)
    return seen


def positions(size: int, world_size: int, **settings: Any) -> list[list[int]]:
    """The positions that each rank trains on."""
    return [[drawn.position for drawn in shard] for shard in shards(size, world_size, **settings)]


def steps(size: int, world_size: int, batch_size: int, **settings: Any) -> list[list[Drawn]]:
    """What all ranks together see in each step, one rank after the other."""
    of_ranks = shards(size, world_size, batch_size=batch_size, **settings)
    rows = batch_size * settings.get("num_views", 1)
    cut = [[shard[begin : begin + rows] for begin in range(0, len(shard), rows)] for shard in of_ranks]
    return [list(chain(*step)) for step in zip(*cut, strict=True)]


@pytest.mark.parametrize(("size", "world_size"), [(10, 1), (10, 2), (10, 3), (2, 4), (0, 2)])
def test_evaluation_shards_cover_every_sample_once(size, world_size):
    of_ranks = shards(size, world_size, shuffle=False)
    assert sorted(chain(*of_ranks)) == list(range(size))
    assert max(map(len, of_ranks)) - min(map(len, of_ranks)) <= 1


@pytest.mark.parametrize(("size", "world_size", "batch_size"), [(10, 1, 3), (10, 2, 2), (10, 3, 1), (11, 4, 1)])
def test_training_shards_are_whole_batches_and_repeat_nothing(size, world_size, batch_size):
    of_ranks = positions(size, world_size, batch_size=batch_size)
    num_steps = size // (world_size * batch_size)
    assert {len(shard) for shard in of_ranks} == {num_steps * batch_size}
    assert len(set(chain(*of_ranks))) == num_steps * batch_size * world_size


@pytest.mark.parametrize(("size", "world_size", "share"), [(7, 2, 3), (7, 1, 7), (3, 2, 1), (1, 2, 0), (0, 1, 0)])
def test_a_set_smaller_than_a_step_is_shared_out_equally(size, world_size, share):
    of_ranks = positions(size, world_size, batch_size=8)
    assert [len(shard) for shard in of_ranks] == [share] * world_size
    assert list(chain(*of_ranks)) == list(chain(*positions(size, 1, batch_size=8)))[: share * world_size]


def test_training_order_depends_on_seed_and_epoch_only():
    (order,) = positions(100, 1, epoch=3, seed=1)
    torch.manual_seed(5)
    assert [order] == positions(100, 1, epoch=3, seed=1)
    assert [order] == positions(100, 1, epoch=3, seed=1, batch_size=10)
    assert [order] != positions(100, 1, epoch=4, seed=1)
    assert [order] != positions(100, 1, epoch=3, seed=2)


@pytest.mark.parametrize("settings", [{}, {"repeats": 2}, {"num_views": 2}, {"repeats": 3, "num_views": 2}])
def test_an_update_sees_the_same_however_many_processes_share_its_batch(settings):
    alone = steps(100, 1, 24, epoch=2, **settings)
    assert len(alone) == 4
    for world_size in (2, 4):
        assert steps(100, world_size, 24 // world_size, epoch=2, **settings) == alone
    micro_batches = steps(100, 1, 12, epoch=2, **settings)
    assert [one + two for one, two in zip(micro_batches[::2], micro_batches[1::2], strict=True)] == alone


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


def test_repeats_are_neighbours_in_other_draws_and_an_epoch_stays_as_long():
    (shard,) = shards(20, 1, epoch=5, repeats=2)
    assert len(shard) == 20
    for one, two in zip(shard[::2], shard[1::2], strict=True):
        assert one.position == two.position
        assert (one.draw, two.draw) == (10, 11), "and in no other epoch so"
    (order,) = positions(20, 1, epoch=5)
    assert [drawn.position for drawn in shard[::2]] == order[:10]


def test_views_are_neighbours_in_other_draws_beside_the_batch_size():
    for world_size in (1, 2):
        plain = positions(20, world_size, epoch=5, batch_size=5)
        for shard, order in zip(shards(20, world_size, epoch=5, batch_size=5, num_views=3), plain, strict=True):
            assert [drawn.position for drawn in shard] == [position for position in order for _ in range(3)]
            assert {drawn.draw for drawn in shard} == {15, 16, 17}
    draws = [drawn.draw for drawn in shards(4, 1, repeats=2, num_views=2, epoch=1)[0]]
    assert draws == [4, 5, 6, 7] * 2


def test_the_side_of_the_images_travels_with_their_position():
    sides = Phases("aug.resolution", {0: 128, 2: 160, 5: 224})
    seen = [{drawn.side for drawn in shards(8, 1, epoch=epoch, sides=sides)[0]} for epoch in range(7)]
    assert seen == [{128}, {128}, {160}, {160}, {160}, {224}, {224}]


def loader(
    digits: ImageSet, batch_size: int = 32, rank: int = 0, world_size: int = 1, workers: int = 0, replays: int = 1,
    num_views: int = 1,
) -> ImageLoader:  # fmt: skip
    sampler = ShardedSampler(
        len(digits), shuffle=True, seed=0, rank=rank, world_size=world_size, batch_size=batch_size,
        num_views=num_views,
    )  # fmt: skip
    return ImageLoader(digits, batch_size, sampler=sampler, num_workers=workers, replays=replays)


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
    rest = [one + two for one, two in zip(*shares, strict=True)]
    assert rest == [ids.tolist() for _, _, ids in batches]
    assert len(done) + len(rest) == len(stopped)
    with pytest.raises(
        ValueError, match=r"^data\.batch_size=8: the checkpoint was made in mid-epoch with 32 images"
    ):
        loader(digits, batch_size=8).load_state_dict(stopped.state_dict())


@pytest.mark.parametrize("workers", [0, 2])
def test_each_batch_is_replayed_and_a_loader_goes_on_in_the_middle_of_that(digits, workers):
    plain = [ids.tolist() for _, _, ids in loader(digits)]
    first = loader(digits, workers=workers, replays=3)
    whole = [ids.tolist() for _, _, ids in first]
    assert whole == [ids for ids in plain for _ in range(3)]
    assert len(first) == len(whole) == 3 * len(plain)
    for done in (0, 1, 2, 3, 7, len(whole)):
        stopped = loader(digits, replays=3)
        batches = iter(stopped)
        for _ in range(done):
            next(batches)
        resumed = loader(digits, workers=workers, replays=3)
        resumed.load_state_dict(stopped.state_dict())
        assert [ids.tolist() for _, _, ids in resumed] == whole[done:]
        assert [ids.tolist() for _, _, ids in resumed] == whole, "the next time from the beginning"
    with pytest.raises(ValueError, match=r"^adv\.replays=2: the checkpoint was made in mid-epoch with 3; "):
        loader(digits, replays=2).load_state_dict(first.state_dict())


def test_views_come_on_top_of_the_batch_size(digits):
    viewed = loader(digits, num_views=2)
    plain = [ids.tolist() for _, _, ids in loader(digits)]
    assert [ids.tolist() for _, _, ids in viewed] == [[i for i in ids for _ in range(2)] for ids in plain]
    batches = iter(viewed)
    next(batches)
    resumed = loader(digits, num_views=2)
    resumed.load_state_dict(viewed.state_dict())
    assert [ids[::2].tolist() for _, _, ids in resumed] == plain[1:]


def test_batches_have_their_channels_last(digits):
    images = torch.randint(0, 256, (4, 9, 7, 3), dtype=torch.uint8)
    stacked, _, _ = collate([(image.permute(2, 0, 1), 0, 0) for image in images])
    assert stacked.is_contiguous(memory_format=torch.channels_last)
    assert stacked.equal(images.permute(0, 3, 1, 2))
    (batch, _, _), *_ = loader(digits, workers=2)
    assert batch.dtype == torch.uint8
    assert batch.is_contiguous(memory_format=torch.channels_last)
