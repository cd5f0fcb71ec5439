import hashlib
import re
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import photos
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from processes import run
from torch import Tensor

from ares_lightning.data import ImageError, RobustDataModule
from ares_lightning.data.datasets import Drawn

CONF = Path(__file__).parents[2] / "conf" / "data"


def make(name: str = "digits", **changes: Any) -> RobustDataModule:
    usual: dict[str, Any] = {"img_size": 8, "in_chans": 1, "batch_size": 64, "eval_batch_size": 100, "num_val": 180}
    if name == "cifar10":
        usual |= {"img_size": 32, "in_chans": 3, "batch_size": 4, "num_val": 4}
    return RobustDataModule(name=name, **{"num_workers": 0} | usual | changes)


def epoch_of_images(data: RobustDataModule, epoch: int) -> dict[int, bytes]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return {
        sample_id: image.numpy().tobytes()
        for images, _, sample_ids in loader
        for image, sample_id in zip(images, sample_ids.tolist(), strict=True)
    }


def test_loaders_cover_their_sets():
    data = make()
    assert data.num_classes == 10
    assert data.classes == tuple("0123456789")
    for loader, part in ((data.val_dataloader(), data.val_set), (data.test_dataloader(), data.test_set)):
        ids = torch.cat([sample_ids for _, _, sample_ids in loader])
        assert ids.equal(part.sample_ids)
        assert torch.cat([labels for _, labels, _ in loader]).equal(part.labels)
    batches = list(data.train_dataloader())
    assert [len(images) for images, _, _ in batches] == [64] * (1257 // 64)
    assert len({i for _, _, ids in batches for i in ids.tolist()}) == 64 * (1257 // 64)


def test_training_set_smaller_than_a_batch_is_one_batch():
    assert [len(labels) for _, labels, _ in make(batch_size=2000).train_dataloader()] == [1257]


def test_augmentation_does_not_depend_on_batch_size_or_workers(make_tree):
    root = make_tree({"train": 10, "test": 1})
    plain = epoch_of_images(make("cifar10", root=root, batch_size=4), epoch=2)
    assert len(plain) == 16
    assert plain == epoch_of_images(make("cifar10", root=root, batch_size=8), epoch=2)
    assert plain == epoch_of_images(make("cifar10", root=root, batch_size=4, num_workers=2), epoch=2)
    assert plain != epoch_of_images(make("cifar10", root=root, batch_size=4), epoch=3)


def test_persistent_workers_see_the_epoch(make_tree):
    root = make_tree({"train": 10, "test": 1})
    loader = make("cifar10", root=root, num_workers=2).train_dataloader()
    single = make("cifar10", root=root).train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        single.sampler.set_epoch(epoch)
        for batch, expected in zip(loader, single, strict=True):
            assert all(a.equal(b) for a, b in zip(batch, expected, strict=True))


BROKEN_OFF = """
from ares_lightning.data import RobustDataModule
sizes = {"img_size": 8, "in_chans": 1, "batch_size": 64, "eval_batch_size": 16, "num_val": 180}
data = RobustDataModule(name="digits", num_workers=2, **sizes)
batches = iter(data.evaluation_loader(data.test_set))
next(batches)
raise RuntimeError("in the middle of an epoch")
"""


def test_a_program_that_fails_among_batches_ends():
    done = run("-c", BROKEN_OFF, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("RuntimeError: in the middle of an epoch")


def test_iterating_leaves_the_global_random_state_alone():
    data = make()
    state = torch.get_rng_state()
    next(iter(data.train_dataloader())), next(iter(data.test_dataloader()))
    assert torch.get_rng_state().equal(state)


def test_a_part_of_a_set_is_evaluated_in_its_order_with_its_ids():
    data = make()
    part = data.test_set.take(range(1, len(data.test_set), 2))
    ids = torch.cat([ids for _, _, ids in data.evaluation_loader(part, batch_size=7)])
    assert ids.tolist() == data.test_set.sample_ids[1::2].tolist()
    assert list(data.evaluation_loader(data.test_set.take([]))) == []


def test_evaluation_of_training_images_is_not_augmented(make_tree):
    data = make("cifar10", root=make_tree({"train": 10, "test": 1}))
    images = torch.cat([images for images, _, _ in data.evaluation_loader(data.train_set)])
    assert images.equal(torch.stack([data.train_set[i][0] for i in range(16)]))


def test_ranks_share_the_sets_without_overlap():
    seen: dict[str, list[int]] = {"train": [], "val": []}
    for rank in range(2):
        data = make()
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2, current_epoch=0)  # type: ignore[assignment]
        seen["train"] += [i for _, _, ids in data.train_dataloader() for i in ids.tolist()]
        seen["val"] += [i for _, _, ids in data.val_dataloader() for i in ids.tolist()]
    assert len(seen["train"]) == len(set(seen["train"])) == 2 * (628 // 64) * 64
    assert sorted(seen["val"]) == data.val_set.sample_ids.tolist()


class Recorder(L.LightningModule):
    """Keeps the sample ids each epoch brings."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs: dict[int, list[int]] = {}

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        self.epochs.setdefault(self.current_epoch, []).extend(batch[2].tolist())
        return self.weight * batch[0].float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_lightning_keeps_the_sampler_and_tells_it_the_epoch(tmp_path):
    recorder, data = Recorder(), make(batch_size=1000)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(recorder, data)
    for epoch, ids in recorder.epochs.items():
        loader = make(batch_size=1000).train_dataloader()
        loader.sampler.set_epoch(epoch)
        assert ids == next(iter(loader))[2].tolist()
    assert recorder.epochs[0] != recorder.epochs[1]


def test_lightning_resumes_in_mid_epoch_with_the_batches_that_were_still_to_come(tmp_path):
    def fit(name: str, checkpoint: str | None = None, **limits: Any) -> Recorder:
        recorder = Recorder()
        saver = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = L.Trainer(
            accelerator="cpu", logger=False, callbacks=[saver], enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, **{"max_epochs": 3} | limits,
        )  # fmt: skip
        trainer.fit(recorder, make(batch_size=300), ckpt_path=checkpoint, weights_only=True)
        return recorder

    whole = fit("whole")
    assert [len(ids) for ids in whole.epochs.values()] == [1200] * 3
    for step, epoch in ((2, 0), (4, 1), (6, 1), (7, 1)):
        resumed = fit(f"from{step}", str(tmp_path / "whole" / f"step={step}.ckpt"))
        done = (step - 4 * epoch) * 300
        assert resumed.epochs.get(epoch, []) == whole.epochs[epoch][done:]
        for later in range(epoch + 1, 3):
            assert resumed.epochs[later] == whole.epochs[later]


def test_sample_ids_stay_on_the_cpu():
    data = make()
    batch = next(iter(data.test_dataloader()))
    images, labels, sample_ids = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert (images.device.type, labels.device.type, sample_ids.device.type) == ("meta", "meta", "cpu")


def test_broken_image_is_one_line_from_a_worker_too(make_tree):
    root = make_tree({"train": 4, "test": 2})
    data = make("cifar10", root=root, num_workers=2)
    (root / "test" / "cat" / "0001.jpg").write_bytes(b"")
    with pytest.raises(
        ImageError, match=r"^\S+/test/cat/0001\.jpg: cannot be decoded .* remove the file$"
    ) as error:
        list(data.test_dataloader())
    traceback.clear_frames(error.tb)  # frees the iterator now; the garbage collector would wait 5 s for its workers


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", 0), ("batch_size", 2.5), ("eval_batch_size", -1), ("num_workers", -1), ("num_workers", "2"),
        ("num_val", 0), ("num_val", 1437), ("img_size", 0), ("in_chans", 2), ("num_classes", 7), ("root", None),
    ],
)  # fmt: skip
def test_value_that_makes_no_sense_is_named(key, value):
    name = "cifar10" if key == "root" else "digits"
    with pytest.raises(ValueError, match=rf"^data\.{key}={'null' if value is None else value}: ") as error:
        make(name, **{key: value})
    assert "\n" not in str(error.value)


def test_digits_are_augmented_where_that_is_asked_for():
    plain, augmented = make(), make(randaugment="rand-m9-mstd0.5-inc1", color_jitter=0.4, mean=(0.3,))
    unlike = [not plain.train_set[Drawn(i, 0)][0].equal(augmented.train_set[Drawn(i, 0)][0]) for i in range(50)]
    assert sum(unlike) > 40
    assert all(plain.train_set[Drawn(i, 0)][0].equal(plain.train_set[i][0]) for i in range(50))
    assert next(iter(augmented.train_dataloader()))[0].shape == (64, 1, 8, 8)


def test_views_of_an_image_are_neighbours_that_differ(make_tree):
    data = make("cifar10", root=make_tree({"train": 10, "test": 1}), batch_size=4, num_views=2)
    images, _, sample_ids = next(iter(data.train_dataloader()))
    assert len(images) == 8
    assert sample_ids[::2].equal(sample_ids[1::2])
    assert any(not one.equal(two) for one, two in zip(images[::2], images[1::2], strict=True))
    assert data.steps_per_epoch(0) == 4


# --- sizes of images and batches that change with the epoch -------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"batch_size": 100}, [12, 12, 12]),
        ({"batch_size": {0: 100, 1: 300}}, [12, 4, 4]),
        ({"batch_size": {0: 100, 2: 2000}, "replays": 3}, [36, 36, 3]),
    ],
)
def test_steps_of_an_epoch_are_the_batches_that_its_loader_gives(settings, expected):
    data = make(**settings)
    assert [data.steps_per_epoch(epoch) for epoch in range(3)] == expected
    assert data.varies == isinstance(settings["batch_size"], dict)
    for epoch in range(3):
        data.trainer = SimpleNamespace(global_rank=0, world_size=1, current_epoch=epoch)  # type: ignore[assignment]
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        assert [len(labels) for _, labels, _ in loader] == [min(data.batch_size_at(epoch), 1257)] * expected[epoch]
    data.trainer = SimpleNamespace(global_rank=0, world_size=2, current_epoch=0)  # type: ignore[assignment]
    assert data.steps_per_epoch(0) == expected[0] // 2


def test_one_batch_size_does_not_vary():
    assert not make(batch_size={0: 64}).varies
    assert not make(batch_size={0: 64, 3: 64}).varies


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.batch_size", {1: 64}, "its epochs must be whole numbers that begin with 0 and rise"),
        ("data.batch_size", {0: 64, 3: 32, 2: 8}, "its epochs must be whole numbers that begin with 0 and rise"),
        ("data.batch_size", {"0": 64}, "its epochs must be whole numbers that begin with 0 and rise"),
        ("data.batch_size", {}, "its epochs must be whole numbers that begin with 0 and rise"),
        ("data.batch_size", {0: 64, 2: 0}, "each epoch must be given a whole number, 1 or more"),
        ("data.batch_size", {0: None}, "each epoch must be given a whole number, 1 or more"),
        ("aug.resolution", {2: 32}, "its epochs must be whole numbers that begin with 0 and rise"),
        ("aug.resolution", {0: 32, 2: "64"}, "each epoch must be given a whole number, 1 or more"),
        ("aug.resolution", 64, r"must be null or a mapping {epoch: side}; see data.img_size"),
    ],
)
def test_phases_that_make_no_sense_are_named(key, value, message, make_tree):
    usual = {"root": make_tree({"train": 4, "val": 1}), "img_size": 32, "in_chans": 3, "num_val": 2}
    with pytest.raises(ValueError, match=rf"^{re.escape(f'{key}={value}')}: {message}$"):
        make("imagefolder", **usual | {key.partition(".")[2]: value})


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_images_of_one_size_have_no_other_resolution(name):
    with pytest.raises(
        ValueError, match=r"^aug\.resolution={0: 32}: only training images of imagefolder and imagenet"
    ):
        make(name, resolution={0: 32})


class SizesRecorder(L.LightningModule):
    """Keeps, by epoch, the size and a digest of the pixels of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: dict[int, list[tuple[tuple[int, ...], str]]] = {}

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        digest = hashlib.sha256(batch[0].contiguous().numpy().tobytes()).hexdigest()
        self.batches.setdefault(self.current_epoch, []).append((tuple(batch[0].shape), digest))
        return self.weight * batch[0].float().mean()

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        assert batch[0].shape[2:] == (32, 32)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_goes_through_its_phases_and_resumes_in_the_middle_of_one(tmp_path, workers):
    for number in range(20):
        for split in ("train", "val"):
            photos.save(tmp_path / "images" / split / "ab"[number % 2] / f"{number:02d}.jpg", number)
    phases = {"resolution": {0: 16, 1: 24, 3: 32}, "batch_size": {0: 8, 1: 5, 3: 2}, "randaugment": "rand-m9"}

    def fit(name: str, checkpoint: str | None = None) -> SizesRecorder:
        recorder = SizesRecorder()
        data = make(
            "imagefolder", root=tmp_path / "images", img_size=32, in_chans=3, num_val=4, num_workers=workers,
            replays=2, **phases,
        )  # fmt: skip
        assert data.varies
        savers = [
            ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1),
            ModelCheckpoint(tmp_path / name, filename="{epoch}", save_on_train_epoch_end=False, save_top_k=-1),
        ]
        trainer = L.Trainer(
            accelerator="cpu", logger=False, callbacks=savers, enable_progress_bar=False, max_epochs=5,
            enable_model_summary=False, default_root_dir=tmp_path, reload_dataloaders_every_n_epochs=1,
        )  # fmt: skip
        trainer.fit(recorder, data, ckpt_path=checkpoint, weights_only=True)
        assert [data.steps_per_epoch(epoch) for epoch in range(5)] == [4, 6, 6, 16, 16]
        return recorder

    whole = fit("whole").batches
    assert {epoch: [shape for shape, _ in batches] for epoch, batches in whole.items()} == {
        0: [(8, 3, 16, 16)] * 4,
        1: [(5, 3, 24, 24)] * 6,
        2: [(5, 3, 24, 24)] * 6,
        3: [(2, 3, 32, 32)] * 16,
        4: [(2, 3, 32, 32)] * 16,
    }
    starts = {0: 0, 1: 4, 2: 10, 3: 16}
    middles = {"step=2": (0, 2), "step=13": (2, 3), "step=21": (3, 5)}  # of a phase, and of a batch's replays
    ends = {"epoch=0": (0, 4), "epoch=2": (2, 6)}
    for name, (epoch, done) in middles.items() if workers else (middles | ends).items():
        assert name.startswith("epoch") or name == f"step={starts[epoch] + done}"
        resumed = fit(f"from-{name}", str(tmp_path / "whole" / f"{name}.ckpt")).batches
        assert resumed.get(epoch, []) == whole[epoch][done:]
        assert {later: resumed[later] for later in range(epoch + 1, 5)} == {
            later: whole[later] for later in range(epoch + 1, 5)
        }


@pytest.mark.parametrize("workers", [0, 2])
def test_resolution_alone_needs_no_new_loader(tmp_path, workers):
    for number in range(8):
        for split in ("train", "val"):
            photos.save(tmp_path / split / "ab"[number % 2] / f"{number:02d}.jpg", number)
    data = make(
        "imagefolder", root=tmp_path, img_size=32, in_chans=3, num_val=2, batch_size=3, num_workers=workers,
        resolution={0: 16, 1: 24, 2: 32},
    )  # fmt: skip
    assert not data.varies
    loader, shapes = data.train_dataloader(), []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        shapes.append({tuple(images.shape) for images, _, _ in loader})
    assert shapes == [{(3, 3, 16, 16)}, {(3, 3, 24, 24)}, {(3, 3, 32, 32)}]
    assert {tuple(images.shape[1:]) for images, _, _ in data.val_dataloader()} == {(3, 32, 32)}


def test_image_of_another_size_shows_at_construction(make_tree):
    with pytest.raises(ImageError, match=r"is 40x40 pixels where data\.img_size=32"):
        make("cifar10", root=make_tree({"train": 4, "test": 1}, size=40))


@pytest.mark.parametrize("name", ["digits", "cifar10", "imagefolder"])
def test_config_fits_the_module(name, make_tree):
    config: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))  # type: ignore[assignment]
    for key in ("mean", "std"):
        assert len(config.pop(key)) == config["in_chans"]
    assert config.pop("threat").keys() == {"norm", "eps"}
    assert config.pop("epochs")["default"] > 0
    config.pop("subset_after_training")
    if config.pop("preprocess"):
        config["img_size"] = 224
    if name != "digits":
        classes = tuple(f"class{i}" for i in range(10))
        config |= {"root": make_tree({"train": 2, "test": 1}, classes), "num_val": 10, "num_workers": 0}
    data = RobustDataModule(**config)
    assert data.num_classes == 10
    assert data.test_set[0][0].shape == (config["in_chans"], config["img_size"], config["img_size"])


def test_digits_mean_and_std_are_those_of_the_training_images():
    config = OmegaConf.load(CONF / "digits.yaml")
    data = make()
    pixels = torch.stack([data.train_set[i][0] for i in range(len(data.train_set))]).double() / 255
    assert list(config.mean) == pytest.approx([pixels.mean().item()], abs=5e-5)
    assert list(config.std) == pytest.approx([pixels.std(correction=0).item()], abs=5e-5)
