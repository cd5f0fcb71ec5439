"""Files as they come: broken ones are named or skipped and listed, odd ones are read as everyone reads them."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
from photos import photo, save
from PIL import ExifTags, Image

from ares_lightning.data import ImageError, RobustDataModule, Wishes, load_image_sets
from ares_lightning.data.check import main
from ares_lightning.data.images import MAX_PIXELS, Preprocessing

NUM_IMAGES, NUM_BROKEN = 300, 30


def bomb() -> bytes:
    """A PNG of few bytes that says it has more pixels than are allowed."""
    file = io.BytesIO()
    Image.new("1", (20_000, MAX_PIXELS // 20_000 + 1)).save(file, "PNG")
    return file.getvalue()


def truncated(number: int) -> bytes:
    file = io.BytesIO()
    photo(number, 60, 50).save(file, "JPEG")
    return file.getvalue()[: len(file.getvalue()) // 2]


BROKEN = {
    "truncated": truncated(0),
    "empty": b"",
    "text": b"this is no image",
    "bomb": bomb(),
    "page": b"<html><body>404 Not Found</body></html>",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """300 images in class folders, of which 30 cannot be used; returns the root and their names, in order."""
    root = tmp_path_factory.mktemp("files")
    names = []
    for number in range(NUM_IMAGES):
        name = f"val/class{number % 3}/{number:04d}.jpg"
        names.append(name)
        save(root / name, number, 40, 36)
        save(root / name.replace("val", "train"), number + 1000, 40, 36)
    broken = sorted(random.Random(0).sample(names, NUM_BROKEN))
    for place, name in enumerate(broken):
        (root / name).write_bytes(list(BROKEN.values())[place % len(BROKEN)])
    return root, broken


def make(root: Path, **changes) -> RobustDataModule:
    settings = {"img_size": 32, "in_chans": 3, "batch_size": 16, "eval_batch_size": 16, "num_val": 6} | changes
    return RobustDataModule(name="imagefolder", root=root, **{"num_workers": 0} | settings)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_skipped_and_listed(folder, workers):
    root, broken = folder
    data = make(root, on_error="skip", num_workers=workers)
    ids = [i for _, _, ids in data.evaluation_loader(data.test_set) for i in ids.tolist()]
    assert len(ids) == NUM_IMAGES - NUM_BROKEN
    assert sorted(data.skipped) == broken
    assert {data.test_set.sample_name(i) for i in ids}.isdisjoint(broken)
    assert all(str(root / name) in message for name, message in data.skipped.items())
    assert sum("pixels, more than" in message for message in data.skipped.values()) == NUM_BROKEN // len(BROKEN)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_without_skip_the_first_is_named(folder, workers):
    root, broken = folder
    data = make(root, num_workers=workers)
    with pytest.raises(ImageError) as error:
        for _ in data.evaluation_loader(data.test_set):
            pass
    assert str(error.value).startswith(str(root / broken[0]))
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_epoch_of_training_ends_without_the_broken_ones(tmp_path):
    for number in range(40):
        save(tmp_path / "train" / "ab"[number % 2] / f"{number:02d}.jpg", number)
        save(tmp_path / "val" / "ab"[number % 2] / f"{number:02d}.jpg", number)
    for number in range(0, 40, 8):
        (tmp_path / "train" / "a" / f"{number:02d}.jpg").write_bytes(list(BROKEN.values())[number // 8])
    data = make(tmp_path, on_error="skip", num_val=2)
    seen = [i for _, _, ids in data.train_dataloader() for i in ids.tolist()]
    assert {data.train_set.sample_name(i) for i in seen}.isdisjoint(data.skipped)
    assert 3 <= len(data.skipped) <= 5


def test_a_training_batch_without_an_image_is_an_error(tmp_path):
    for number in range(8):
        save(tmp_path / "train" / "ab"[number % 2] / f"{number}.jpg", number)
        save(tmp_path / "val" / "ab"[number % 2] / f"{number}.jpg", number)
    data = make(tmp_path, on_error="skip", num_val=2, batch_size=2)
    for number in range(8):
        (tmp_path / "train" / "ab"[number % 2] / f"{number}.jpg").write_bytes(b"")
    with pytest.raises(ImageError, match=r"^data\.on_error=skip: not one image of a batch can be read; .*\.jpg"):
        list(data.train_dataloader())
    with pytest.raises(ImageError, match=r"^data\.on_error=skip: not one image of imagefolder can be read"):
        data.train_set.example()


def test_another_word_for_on_error_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^data\.on_error=ignore: expected one of raise, skip"):
        make(tmp_path, on_error="ignore")


# --- files that are odd but good ---------------------------------------------------------------------------------


def read(tmp_path: Path, name: str, image: Image.Image, **options) -> np.ndarray:
    path = tmp_path / "val" / "a" / name
    path.parent.mkdir(parents=True)
    image.save(path, **options)
    wishes = Wishes(img_size=32, in_chans=3, training=False, preprocessing=Preprocessing(32))
    return load_image_sets("imagefolder", tmp_path, wishes).test[0][0].permute(1, 2, 0).numpy()


def test_a_wrong_extension_does_not_matter(tmp_path):
    image = photo(1, 32, 32)
    assert read(tmp_path, "png.jpg", image, format="PNG").tolist() == np.asarray(image).tolist()


def test_an_orientation_in_the_exif_data_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = photo(1, 32, 32)
    assert read(tmp_path, "turned.png", image, exif=exif).tolist() == np.asarray(image).tolist()


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    levels = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    seen = read(tmp_path, "deep.png", Image.fromarray(levels))
    assert abs(seen[..., 0].astype(float) - levels / 257).max() <= 0.5
    assert (seen[..., 0] == seen[..., 2]).all()


def test_cmyk_becomes_rgb_and_one_pixel_a_whole_image(tmp_path):
    assert read(tmp_path, "print.jpg", photo(1, 32, 32).convert("CMYK")).shape == (32, 32, 3)
    assert (read(tmp_path / "one", "dot.png", Image.new("RGB", (1, 1), (9, 8, 7))) == [9, 8, 7]).all()


def test_a_very_long_image_is_not_blown_up(tmp_path):
    """At 256 pixels of the shorter side this one would have 2 GB."""
    path = tmp_path / "val" / "a" / "long.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (12_000, 4), (1, 2, 3)).save(path)
    wishes = Wishes(img_size=224, in_chans=3, training=False)
    assert load_image_sets("imagefolder", tmp_path, wishes).test[0][0].shape == (3, 224, 224)


# --- the check beforehand ----------------------------------------------------------------------------------------


def test_the_check_lists_what_cannot_be_used_and_counts_what_is_odd(folder, tmp_path, capsys):
    root, broken = folder
    assert main([str(root / "val"), "--workers", "2"]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{NUM_IMAGES} images, {NUM_BROKEN} cannot be used\n")
    assert [line.split(": ")[0].strip() for line in out.splitlines()[1 : NUM_BROKEN + 1]] == [
        name.removeprefix("val/") for name in broken
    ]
    assert "data.on_error=skip" in out
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo(1).save(tmp_path / "a.jpg", exif=exif)
    photo(1).save(tmp_path / "b.jpg", format="PNG")
    photo(1).convert("CMYK").save(tmp_path / "c.jpg")
    photo(1).convert("L").save(tmp_path / "d.jpg")
    photo(1, 20, 40).save(tmp_path / "e.jpg")
    assert main([str(tmp_path), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    for words in (
        "is to be turned",
        "is PNG in spite of",
        "has mode CMYK",
        "is grey, e.g. d.jpg",
        "has a side below 32",
    ):
        assert f"1 {words}" in out


@pytest.mark.parametrize(
    ("arguments", "message"), [(["gone"], "gone: is no folder"), ([".", "--workers", "0"], "--workers=0")]
)
def test_the_check_says_what_it_cannot_do(arguments, message, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(message)
