import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from torch import Tensor

from ares_lightning.data import ImageError, RobustDataModule

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


def test_iterating_leaves_the_global_random_state_alone():
    data = make()
    state = torch.get_rng_state()
    next(iter(data.train_dataloader())), next(iter(data.test_dataloader()))
    assert torch.get_rng_state().equal(state)


def test_evaluation_goes_on_where_it_stopped():
    data = make()
    done = data.test_set.sample_ids[::2].tolist()
    ids = torch.cat([ids for _, _, ids in data.evaluation_loader(data.test_set, skip=done, batch_size=7)])
    assert ids.tolist() == data.test_set.sample_ids[1::2].tolist()
    assert list(data.evaluation_loader(data.test_set, skip=data.test_set.sample_ids.tolist())) == []


def test_evaluation_of_training_images_is_not_augmented(make_tree):
    data = make("cifar10", root=make_tree({"train": 10, "test": 1}))
    images = torch.cat([images for images, _, _ in data.evaluation_loader(data.train_set)])
    assert images.equal(torch.stack([data.train_set[i][0] for i in range(16)]))


def test_ranks_share_the_sets_without_overlap():
    seen: dict[str, list[int]] = {"train": [], "val": []}
    for rank in range(2):
        data = make()
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)  # type: ignore[assignment]
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


def test_digits_are_not_augmented_without_a_word():
    with pytest.raises(ValueError, match=r"^aug\.randaugment=rand-m9: digits are not augmented"):
        make(randaugment="rand-m9")


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
