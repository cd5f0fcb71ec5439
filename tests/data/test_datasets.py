import hashlib
import json
import pickle
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10

from ares_lightning.data import ImageError, ImageSets, OwnSets, Wishes, load_image_sets
from ares_lightning.data.datasets import Drawn


def load(name: str, root: str | Path | None = None, **changes: Any) -> ImageSets:
    usual: dict[str, Any] = {"img_size": 32, "in_chans": 3, "num_val": 4, "split_seed": 0, "seed": 0}
    if name == "digits":
        usual |= {"img_size": 8, "in_chans": 1, "num_val": 180}
    return load_image_sets(name, root, Wishes(**usual | changes))


# --- digits -------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns_images_in_its_order():
    sets, bunch = load("digits"), sklearn_digits()
    assert [len(part) for part in sets] == [1257, 180, 360]
    for part in sets:
        image, label, sample_id = part[7]
        assert image.dtype == torch.uint8
        assert image.shape == (1, 8, 8)
        assert image[0].tolist() == np.round(bunch.images[sample_id] * 255 / 16).tolist()
        assert label == bunch.target[sample_id] == part.labels[7]
    assert sets.test.name == "digits"
    assert sets.test.classes == tuple("0123456789")
    assert sets.test.sample_name(42) == "digits/00042"


def test_split_is_disjoint_complete_and_stratified():
    sets = load("digits")
    ids = torch.cat([part.sample_ids for part in sets])
    assert sorted(ids.tolist()) == list(range(1797))
    share = torch.bincount(torch.cat([part.labels for part in sets])) / 1797
    for part in sets:
        assert (part.labels.bincount() - share * len(part)).abs().max() <= 1.5
        assert part.sample_ids.tolist() == sorted(part.sample_ids.tolist())


def test_split_depends_on_its_seed_alone():
    before = load("digits", split_seed=3)
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    again = load("digits", split_seed=3, seed=5)
    assert all(a.sample_ids.equal(b.sample_ids) for a, b in zip(before, again, strict=True))
    assert torch.get_rng_state().equal(states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    assert not load("digits", split_seed=4).test.sample_ids.equal(before.test.sample_ids)
    assert load("digits").test.sample_ids[:8].tolist() == [6, 13, 19, 24, 25, 29, 41, 42]  # for ever


def test_size_of_the_validation_set_leaves_the_test_set_alone():
    assert load("digits", num_val=50).test.sample_ids.equal(load("digits").test.sample_ids)


def test_digits_come_in_rgb_for_networks_that_want_it():
    image, _, _ = load("digits", in_chans=3).test[0]
    assert image.shape == (3, 8, 8)
    assert image[0].equal(image[2])


# --- CIFAR-10 -----------------------------------------------------------------------------------------------


def test_cifar_folders_are_read_in_the_order_of_their_paths(make_tree):
    root = make_tree({"train": 6, "test": 3})
    sets = load("cifar10", root)
    assert [len(part) for part in sets] == [8, 4, 6]
    assert sets.val.labels.bincount().tolist() == [2, 2]
    assert sets.test.classes == ("cat", "dog")
    names = [sets.test.sample_name(i) for i in range(6)]
    assert names == sorted(path.relative_to(root).as_posix() for path in (root / "test").rglob("*.jpg"))
    image, label, sample_id = sets.test[4]
    assert (label, sample_id, names[4]) == (1, 4, "test/dog/0001.jpg")
    with Image.open(root / names[4]) as file:
        assert image.permute(1, 2, 0).numpy().tolist() == np.asarray(file).tolist()
    held_out = {sets.val.sample_name(i) for i in sets.val.sample_ids.tolist()}
    assert len(held_out) == 4
    assert held_out.isdisjoint(sets.train.sample_name(i) for i in sets.train.sample_ids.tolist())
    assert all(name.startswith("train/") for name in held_out)


def test_only_visible_files_with_an_image_extension_count_in_any_case(make_tree):
    root = make_tree({"train": 6, "test": 1})
    folder = root / "test" / "cat"
    (folder / "0000.jpg").rename(folder / "0000.JPEG")
    (folder / "notes.txt").write_text("not an image")
    (folder / "._0000.jpg").write_text("what a Mac leaves behind")
    (root / "test" / ".cache").mkdir()
    assert [load("cifar10", root).test.sample_name(i) for i in range(2)] == [
        "test/cat/0000.JPEG",
        "test/dog/0000.jpg",
    ]


@pytest.fixture
def published_cifar(tmp_path, monkeypatch):
    """A miniature of torchvision's layout, with torchvision's list of md5 sums changed to fit."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    noise = np.random.default_rng(0)

    def write(name: str, content: dict[str, Any]) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch() -> dict[str, Any]:
        return {"data": noise.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": list(range(10))}

    names = [f"data_batch_{i}" for i in range(1, 6)]
    monkeypatch.setattr(CIFAR10, "train_list", [[name, write(name, batch())] for name in names])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", write("test_batch", batch())]])
    meta = write("batches.meta", {"label_names": [f"class{i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": meta})
    return tmp_path


def test_torchvisions_cifar_layout_is_recognised(published_cifar):
    sets = load("cifar10", published_cifar, num_val=10)
    assert [len(part) for part in sets] == [40, 10, 10]
    assert sets.val.labels.tolist().count(3) == 1
    image, label, sample_id = sets.test[7]
    reference = CIFAR10(published_cifar, train=False)
    assert image.permute(1, 2, 0).numpy().tolist() == reference.data[7].tolist()
    assert (label, sample_id, sets.test.sample_name(7)) == (7, 7, "test/00007")


def test_foreign_pickle_in_torchvisions_layout_is_never_opened(published_cifar):
    (published_cifar / "cifar-10-batches-py" / "test_batch").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match=r"^data\.root=.*md5 is not the published one; download") as error:
        load("cifar10", published_cifar)
    assert "\n" not in str(error.value)


# --- image folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("splits", "expected"), [(("val",), "val"), (("validation",), "validation"), (("val", "test"), "test")]
)
def test_test_set_is_test_else_val_and_never_the_held_out_set(make_tree, splits, expected):
    sets = load("imagefolder", make_tree({"train": 5} | dict.fromkeys(splits, 2)), num_val=2)
    assert sets.test.sample_name(0) == f"{expected}/cat/0000.jpg"
    assert sets.val.sample_name(0) == "train/cat/0000.jpg"
    assert sets.val.labels.tolist() == [0, 1]


def test_evaluation_keeps_the_central_square(tmp_path):
    for split in ("train", "val"):
        for class_name in ("a", "b"):
            (tmp_path / split / class_name).mkdir(parents=True)
            pixels = np.zeros((64, 128, 3), dtype=np.uint8)
            pixels[:, 32:96] = 200
            Image.fromarray(pixels).save(tmp_path / split / class_name / "0.png")
    sets = load("imagefolder", tmp_path, img_size=28, num_val=1)
    image, _, _ = sets.test[0]  # 64x128 -> 32x64 -> the central 28x28, which lies in the bright part
    assert image.shape == (3, 28, 28)
    assert (image == 200).all()
    assert sets.train[Drawn(0, 0)][0].shape == (3, 28, 28)


def test_very_long_image_can_be_cut(make_tree):
    root = make_tree({"train": 3, "val": 1})
    for path in root.rglob("*.jpg"):
        Image.new("RGB", (400, 3), "red").save(path)
    assert load("imagefolder", root).train[Drawn(0, 0)][0].shape == (3, 32, 32)


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_the_channels_asked_for(make_tree, mode, in_chans):
    root = make_tree({"train": 3, "test": 1})
    grey = np.full((32, 32), 255 if mode == "1" else 153, dtype=np.uint8)  # in PIL's palette of 216 colours
    grey[:16] = 0 if mode == "1" else 51
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
    file = root / "test" / "cat" / ("0000.jpg" if mode == "CMYK" else "0000.png")
    (root / "test" / "cat" / "0000.jpg").unlink()
    image.save(file)
    pixels, _, _ = load("cifar10", root, in_chans=in_chans).test[0]
    assert pixels.shape == (in_chans, 32, 32)
    assert pixels.dtype == torch.uint8
    assert (pixels - torch.from_numpy(grey).int()).abs().max() <= 4


# --- augmentation -------------------------------------------------------------------------------------------


def test_augmentation_belongs_to_seed_epoch_and_sample(make_tree):
    root = make_tree({"train": 8, "test": 1})
    sets = load("cifar10", root, seed=1)
    images = [sets.train[Drawn(0, epoch)][0] for epoch in range(6)]
    assert len({image.numpy().tobytes() for image in images}) > 3
    assert images[2].equal(load("cifar10", root, seed=1).train[Drawn(0, 2)][0])
    assert images[2].equal(sets.train.take([3, 0])[Drawn(1, 2)][0])
    others = [load("cifar10", root, seed=2).train[Drawn(0, epoch)][0] for epoch in range(6)]
    assert any(not a.equal(b) for a, b in zip(images, others, strict=True))


def test_cifar_augmentation_is_a_shift_by_up_to_four_and_a_flip(make_tree):
    sets = load("cifar10", make_tree({"train": 8, "test": 1}))
    image = sets.train[0][0]
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    shifts = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    allowed = {view.contiguous().numpy().tobytes() for shift in shifts for view in (shift, shift.flip(2))}
    assert all(sets.train[Drawn(0, epoch)][0].contiguous().numpy().tobytes() in allowed for epoch in range(20))


def test_plain_position_and_held_out_sets_are_not_augmented(make_tree):
    sets = load("cifar10", make_tree({"train": 8, "test": 1}))
    assert sets.train[0][0].equal(sets.train[0][0])
    for part in (sets.val, sets.test, load("digits").train):
        assert all(part[Drawn(1, epoch)][0].equal(part[1][0]) for epoch in range(4))


# --- mistakes -----------------------------------------------------------------------------------------------


def refuse(message: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load(*args, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["cifar10", "imagefolder"])
def test_root_that_is_no_folder_of_images_is_refused(name, tmp_path):
    refuse(r"^data\.root=null: .*set data\.root to the folder that holds train/<class>", name)
    refuse(r"^data\.root=.*/absent: does not exist; set data\.root", name, tmp_path / "absent")
    refuse(r"^data\.root=.*: is empty; set data\.root", name, tmp_path)
    (tmp_path / "file.zip").write_text("")
    refuse(r"^data\.root=.*/file\.zip: is a file; set data\.root", name, str(tmp_path / "file.zip"))
    for i in range(7):
        (tmp_path / f"n{i}").mkdir()
    refuse(r"needs train/<class>/.*it holds file\.zip, n0, n1, n2, n3 and 3 more", name, tmp_path)


def test_unknown_name_lists_the_known_ones():
    refuse(r"^data\.name=mnist: .*known: digits, cifar10, cifar100, imagefolder, imagenet", "mnist")


def test_split_without_class_folders_is_refused(make_tree):
    root = make_tree({"train": 2})
    (root / "test").mkdir()
    refuse(r"test/ has no class folders; it holds nothing; sort", "cifar10", root)
    (root / "test" / "0.jpg").write_text("")
    refuse(r"test/ has no class folders; it holds 0\.jpg; sort", "imagefolder", root)


def test_class_without_images_is_refused(make_tree):
    root = make_tree({"train": 2, "test": 1})
    (root / "test" / "cat" / "0000.jpg").unlink()
    refuse(r"^data\.root=.*test/cat/ has no images", "cifar10", root)


def test_differing_classes_are_named(make_tree):
    root = make_tree({"train": 2, "test": 1})
    (root / "test" / "dog").rename(root / "test" / "dogs")
    refuse(r"^data\.root=.*train/ and test/ must have the same class folders; 2 .*: dog, dogs", "cifar10", root)


@pytest.mark.parametrize("num_val", [0, 4, 10])
def test_validation_set_must_leave_training_images(make_tree, num_val):
    root = make_tree({"train": 2, "test": 1})
    refuse(rf"^data\.num_val={num_val}: must lie between 1 and 3", "cifar10", root, num_val=num_val)


def test_other_image_size_is_refused(make_tree, published_cifar):
    refuse(r"^data\.img_size=16: the images of digits are 8x8 pixels; set data\.img_size=8", "digits", img_size=16)
    refuse(r"^data\.img_size=16: the images of cifar10 are 32x32", "cifar10", published_cifar, img_size=16)
    sets = load("cifar10", make_tree({"train": 3, "test": 1}, size=40))
    with pytest.raises(
        ImageError, match=r"test/cat/0000\.jpg: is 40x40 pixels where data\.img_size=32; resize the images to 32x32"
    ):
        sets.test[0]


@pytest.mark.parametrize("content", ["truncated", "text", "nothing", "gone"])
def test_image_that_cannot_be_decoded_names_its_path(make_tree, content):
    root = make_tree({"train": 3, "test": 1})
    path = root / "test" / "dog" / "0000.jpg"
    sets = load("cifar10", root)
    data = path.read_bytes()
    if content == "gone":
        path.unlink()
    else:
        path.write_bytes({"truncated": data[: len(data) // 2], "text": b"hello", "nothing": b""}[content])
    with pytest.raises(ImageError, match=rf"^{path}: cannot be decoded \(.+\); replace or remove the file$"):
        sets.test[1]


# --- own sets -----------------------------------------------------------------------------------------------


class Blank(Dataset):
    """One black image, of the classes that are given."""

    def __init__(self, classes: Any = None) -> None:
        self.classes = classes

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> Any:
        return Image.new("L", (8, 8)), 0


class Unusual(Blank):
    """Gives another thing than a pair, or fails where that is an error."""

    def __init__(self, sample: Any) -> None:
        super().__init__()
        self.sample = sample

    def __getitem__(self, i: int) -> Any:
        if isinstance(self.sample, Exception):
            raise self.sample
        return self.sample


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_names_of_classes_come_in_any_kind_of_list(kind):
    train, test = OwnSets(train=Blank(kind(["cat", "dog"])), test=Blank(("cat", "dog"))).sources("own", 8)
    assert train.labels.classes == test.labels.classes == ("cat", "dog")
    with pytest.raises(ValueError, match=r"data\.test: its \.classes are not those of data\.train"):
        OwnSets(train=Blank(kind(["cat", "cow"])), test=Blank(("cat", "dog"))).sources("own", 8)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"image": 0, "label": 0}, r"is a dict of 2; have Unusual return \(image, label\)"),
        ((0, 0, "more"), r"is a tuple of 3; have Unusual return \(image, label\)"),
        (0, r"is a int; have Unusual return \(image, label\)"),
        (OSError("no\nfile"), r"cannot be read \(OSError: no file\); mend Unusual"),
    ],
)
def test_a_sample_of_an_own_set_that_is_no_pair_is_named(sample, message):
    with pytest.raises(ImageError, match=f"^data.test: sample 0 {message}$"):
        OwnSets(test=Unusual(sample)).sources("own", 8)


def test_a_large_root_of_an_own_set_is_hashed_once_and_never_held_in_memory(tmp_path):
    root, size = tmp_path / "images.h5", 2**26
    with root.open("wb") as file:
        file.write(b"head")
        file.truncate(size)
    whole = hashlib.blake2b(root.read_bytes(), digest_size=8).hexdigest()
    _, source = OwnSets(test=Blank(), settings={"test": {"root": str(root), "split": "test"}}).sources("own", 8)
    tracemalloc.start()
    try:
        identity = source.identity
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert json.loads(identity) == [{"split": "test"}, whole]
    assert peak < size / 16
    root.unlink()
    assert source.identity == identity
