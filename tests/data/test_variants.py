"""Every out-of-distribution set as a miniature tree in its published layout, of real photographs.

What is right is stated here once more, from the sets' own descriptions, without the code under test.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from photos import photo, save
from PIL import Image

from ares_lightning.data import VARIANTS, ImageError, ImageSet, Preprocessing, Wishes, load_image_sets
from ares_lightning.data.variants import RULES, THREE_D, find_variant
from ares_lightning.models import ClassAnswers

TENCH, GOLDFISH, SHARK, OSTRICH, JUNCO, TABBY = (
    "n01440764", "n01443537", "n01484850", "n01518878", "n01534433", "n02123045"
)  # fmt: skip
LABEL = {TENCH: 0, GOLDFISH: 1, SHARK: 2, OSTRICH: 9, JUNCO: 13, TABBY: 281}
IN_A = {"n01498041": 6, "n01531178": 11, JUNCO: 13}
"""The first three of ImageNet-A's 200 classes: stingray, goldfinch, junco."""
IN_R = {GOLDFISH: 1, SHARK: 2, "n01494475": 4}
"""The first three of ImageNet-R's: goldfish, great white shark, hammerhead."""


def load(key: str, root: Path, **changes) -> ImageSet:
    wishes = {"img_size": 224, "in_chans": 3, "training": False} | changes
    return load_image_sets(key, root, Wishes(**wishes)).test


def right_outputs(test: ImageSet) -> dict[str, set[int]]:
    """Return, by name, which of the network's outputs make a sample right when they are the largest.

    They are found by asking the set, with each output the largest in turn.
    """
    num = test.source.labels.num_outputs
    logits = torch.eye(num)
    network: torch.nn.Module = torch.nn.Identity()
    if test.outputs is not None:
        network = ClassAnswers(network, test.outputs)
    predictions = network(logits).argmax(1)
    counts = torch.ones(num, dtype=torch.bool) if test.outputs is None else test.outputs >= 0
    return {
        test.sample_name(i): set(
            (test.is_right(predictions, torch.full((num,), i)) & counts).nonzero().flatten().tolist()
        )
        for i in test.sample_ids.tolist()
    }


def test_each_entry_says_what_one_has_to_know():
    for key, variant in VARIANTS.items():
        assert variant.key == key
        assert variant.network in ("imagenet", "cifar10", "cifar100")
        assert variant.rule in RULES
        assert variant.transform in ("val", "stored", "objectnet")
        assert variant.metric in ("accuracy", "mce")
        assert variant.source.startswith("https://")
        assert variant.title, variant.citation


# --- one class a folder ------------------------------------------------------------------------------------------

V2 = {
    "imagenet_v2": "imagenetv2-matched-frequency-format-val",
    "imagenet_v2_threshold": "imagenetv2-threshold0.7-format-val",
    "imagenet_v2_top": "imagenetv2-top-images-format-val",
}


@pytest.mark.parametrize("key", V2)
@pytest.mark.parametrize("style", ["plain", "padded", "wnid"])
def test_v2_takes_the_number_for_the_class(key, style, tmp_path):
    """Folder 10 is class 10; in the alphabet it would be the third of these."""
    expected = {}
    for number, (wnid, label) in enumerate([(TENCH, 0), (GOLDFISH, 1), ("n01530575", 10), (TABBY, 281)]):
        folder = {"plain": str(label), "padded": f"{label:04d}", "wnid": wnid}[style]
        save(tmp_path / V2[key] / folder / "abc.jpeg", number)
        expected[f"{folder}/abc.jpeg"] = {label}
    assert right_outputs(load(key, tmp_path)) == expected
    assert right_outputs(load(key, tmp_path / V2[key])) == expected


def test_v2_refuses_a_number_that_is_no_class(tmp_path):
    save(tmp_path / "1000" / "abc.jpeg", 0)
    with pytest.raises(ValueError, match=r"1000/ is neither a number from 0 to 999 nor a class of ImageNet"):
        load("imagenet_v2", tmp_path)


@pytest.mark.parametrize(
    ("key", "folder", "chosen"), [("imagenet_a", "imagenet-a", IN_A), ("imagenet_r", "imagenet-r", IN_R)]
)
def test_a_and_r_are_answered_among_their_200_classes(key, folder, chosen, tmp_path):
    for number, wnid in enumerate(chosen):
        save(tmp_path / folder / wnid / "0.jpg", number)
    (tmp_path / folder / "README.txt").write_text("as published")
    test = load(key, tmp_path)
    assert right_outputs(test) == {f"{wnid}/0.jpg": {label} for wnid, label in chosen.items()}
    assert len(test.classes) == 200
    assert int((test.outputs >= 0).sum()) == 200
    logits = torch.zeros(1, 1000)
    outside = next(i for i in range(1000) if test.outputs[i] < 0)
    logits[0, [outside, next(iter(chosen.values()))]] = torch.tensor([9.0, 1.0])
    assert ClassAnswers(torch.nn.Identity(), test.outputs)(logits).argmax() == test.labels[0], (
        "the others do not count"
    )


@pytest.mark.parametrize(("key", "chosen"), [("imagenet_200_a", IN_A), ("imagenet_200_r", IN_R)])
def test_imagenet_200_are_validation_images_with_their_own_ids(key, chosen, tmp_path):
    for number, wnid in enumerate([*chosen, TENCH, "n01496331"]):
        save(tmp_path / "val" / wnid / f"{wnid}.JPEG", number)
    test = load(key, tmp_path)
    assert right_outputs(test) == {f"val/{wnid}/{wnid}.JPEG": {label} for wnid, label in chosen.items()}
    whole = load("imagenet", tmp_path)
    assert {test.sample_name(i) for i in test.sample_ids.tolist()} == {
        whole.sample_name(i) for i in test.sample_ids.tolist()
    }


@pytest.mark.parametrize(
    ("key", "folder"),
    [
        ("imagenet_sketch", "sketch"),
        ("imagenet_stylized", "stylized-imagenet/val"),
        ("imagenet_stylized", "Stylized-ImageNet"),
    ],
)
def test_sketch_and_stylized_have_all_classes(key, folder, tmp_path):
    for number, wnid in enumerate(LABEL):
        save(tmp_path / folder / wnid / "sketch_1.JPEG", number)
    answers = right_outputs(load(key, tmp_path))
    assert {Path(name).parts[-2]: right for name, right in answers.items()} == {w: {i} for w, i in LABEL.items()}


# --- ObjectNet ---------------------------------------------------------------------------------------------------

MAPPINGS = {
    "folder_to_objectnet_label.json": {
        "alarm_clock": "Alarm clock", "backpack": "Backpack", "bicycle": "Bicycle", "air_freshener": "Air freshener"
    },
    "objectnet_to_imagenet_1k.json": {
        "Alarm clock": "analog clock; digital clock",
        "Backpack": "backpack, back pack, knapsack, packsack, rucksack, haversack",
        "Bicycle": "mountain bike, all-terrain bike, off-roader; bicycle-built-for-two, tandem bicycle, tandem",
    },
}  # fmt: skip
OBJECTS = {"alarm_clock": {409, 530}, "backpack": {414}, "bicycle": {671, 444}}
"""The labels of these names in ImageNet: analog clock 409, digital clock 530, backpack 414, mountain bike 671,
bicycle-built-for-two 444."""


@pytest.fixture
def objectnet(tmp_path) -> Path:
    for number, name in enumerate(MAPPINGS["folder_to_objectnet_label.json"]):
        save(tmp_path / "objectnet-1.0" / "images" / name / f"{number}.png", number, 80, 100)
    for name, content in MAPPINGS.items():
        path = tmp_path / "objectnet-1.0" / "mappings" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize("key", ["objectnet", "objectnet_113"])
def test_objectnet_knows_which_outputs_are_an_object(objectnet, key):
    test = load(key, objectnet)
    answers = {Path(name).parts[-2]: right for name, right in right_outputs(test).items()}
    assert answers == OBJECTS, "objects that ImageNet lacks are left out"


def test_the_two_scoring_rules_of_objectnet_differ_in_what_an_unmapped_output_means(objectnet):
    logits = torch.zeros(1, 1000)
    logits[0, [0, 530]] = torch.tensor([2.0, 1.0])  # first a tench, then a digital clock
    clock = {}
    for key in ("objectnet", "objectnet_113"):
        test = load(key, objectnet)
        prediction = ClassAnswers(torch.nn.Identity(), test.outputs)(logits).argmax(1)
        clock[key] = bool(test.is_right(prediction, torch.tensor([0])))
    assert clock == {"objectnet": False, "objectnet_113": True}


def test_objectnets_border_is_cut_off_and_the_rest_resized_to_the_crop(tmp_path, objectnet):
    path = objectnet / "objectnet-1.0" / "images" / "alarm_clock" / "0.png"
    image = photo(3, 84, 64)
    framed = image.copy()
    framed.paste((255, 0, 0), (0, 0, 84, 2)), framed.paste((255, 0, 0), (0, 62, 84, 64))
    framed.paste((255, 0, 0), (0, 0, 2, 64)), framed.paste((255, 0, 0), (82, 0, 84, 64))
    framed.save(path)
    inner = image.crop((2, 2, 82, 62)).resize((298, 224), 3).crop((37, 0, 261, 224))  # bicubic is 3
    seen = load("objectnet", objectnet)[0][0].permute(1, 2, 0).numpy().astype(int)
    assert abs(seen - np.asarray(inner).astype(int)).max() <= 1


def test_objectnet_without_its_mappings_is_refused(objectnet):
    (objectnet / "objectnet-1.0" / "mappings" / "objectnet_to_imagenet_1k.json").unlink()
    with pytest.raises(ValueError, match=r"mappings/objectnet_to_imagenet_1k\.json cannot be read; it comes with"):
        load("objectnet", objectnet)


# --- corruptions -------------------------------------------------------------------------------------------------

SETS_OF_CORRUPTIONS = {
    "imagenet_c": ("imagenet-c", ("gaussian_noise", "jpeg_compression", "spatter")),
    "imagenet_c_bar": ("imagenet_c_bar", ("cocentric_sine_waves", "sparkles")),
    "imagenet_3dcc": ("ImageNet-3DCC", (THREE_D[0], "z_motion_blur")),
}


@pytest.mark.parametrize("key", SETS_OF_CORRUPTIONS)
@pytest.mark.parametrize("archive", ["", "noise"])
def test_sets_of_corruptions_have_a_folder_for_each_and_its_severities(key, archive, tmp_path):
    folder, names = SETS_OF_CORRUPTIONS[key]
    for name in names:
        for severity in range(1, 6):
            for number, wnid in enumerate((TENCH, TABBY)):
                path = tmp_path / folder / archive / name / str(severity) / wnid / "ILSVRC2012_val_00000001.JPEG"
                save(path, 10 * severity + number, 224, 224)
    for name in names:
        test = load(key, tmp_path, corruption=name, severity=3)
        assert test.name == f"{key}/{name}/3"
        answers = right_outputs(test)
        assert {Path(path).parts[-2]: right for path, right in answers.items()} == {TENCH: {0}, TABBY: {281}}
        assert all(Path(path).parts[-4:-2] == (name, "3") for path in answers)
    assert test.preparation == "as stored at 224 px, else resized to it (bicubic)"
    with pytest.raises(
        ValueError, match=rf"^data\.corruption: {names[0]} at severity 6 is not there; .* has {names[0]}"
    ):
        load(key, tmp_path, corruption=names[0], severity=6)
    with pytest.raises(
        ValueError, match=r"^data\.corruption: .* give data\.corruption and data\.severity, or eval=ood"
    ):
        load(key, tmp_path)


@pytest.mark.parametrize("name", ["imagenet", "imagenet_a"])
def test_a_corruption_of_what_is_no_set_of_them_is_refused(name, tmp_path):
    save(tmp_path / "n01498041" / "a.png", 0)
    with pytest.raises(
        ValueError, match=rf"^data\.corruption=fog: {name} is no published set of corruptions; eval="
    ):
        load(name, tmp_path, corruption="fog", severity=1)


def test_stored_images_are_not_resized(tmp_path):
    path = tmp_path / "imagenet-c" / "fog" / "1" / TENCH / "a.png"
    save(path, 1, 224, 224)
    image = load("imagenet_c", tmp_path, corruption="fog", severity=1)[0][0]
    assert image.permute(1, 2, 0).numpy().tolist() == np.asarray(photo(1, 224, 224)).tolist()
    assert load("imagenet_c", tmp_path, corruption="fog", severity=1, img_size=96)[0][0].shape == (3, 96, 96)


@pytest.mark.parametrize(
    ("key", "folder", "classes"), [("cifar10_c", "CIFAR-10-C", 10), ("cifar100_c", "CIFAR-100-C", 100)]
)
def test_cifars_arrays_hold_the_severities_one_after_the_other(key, folder, classes, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / folder).mkdir()
    images = rng.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    labels = np.tile(rng.integers(0, classes, 10), 5).astype(np.uint8)
    np.save(tmp_path / folder / "fog.npy", images)
    np.save(tmp_path / folder / "labels.npy", labels)
    test = load(key, tmp_path, corruption="fog", severity=4, img_size=32)
    assert len(test.classes) == classes
    assert (
        torch.stack([test[i][0] for i in range(10)]).permute(0, 2, 3, 1).numpy().tolist() == images[30:40].tolist()
    )
    assert test.labels.tolist() == labels[:10].tolist()
    np.save(tmp_path / folder / "fog.npy", images[:49])
    with pytest.raises(ValueError, match=r"fog\.npy is uint8 \[49, 32, 32, 3\] with 50 labels"):
        load(key, tmp_path, corruption="fog", severity=4, img_size=32)


# --- ImageNet-Hard -----------------------------------------------------------------------------------------------


def jpeg(number: int) -> io.BytesIO:
    file = io.BytesIO()
    photo(number, 90, 70).save(file, "JPEG")
    return file


def write_hard(root: Path, broken: bool = False) -> list[list[int]]:
    rights = [[0, 281], [9], [1, 2, 3], [710], [281]]
    rows = []
    for number, right in enumerate(rights):
        content = b"nothing" if broken and number == 3 else jpeg(number).getvalue()
        rows.append({"image": {"bytes": content, "path": f"{number}.jpg"}, "label": right, "origin": "imagenet"})
    (root / "data").mkdir(parents=True)
    for part, some in enumerate((rows[:3], rows[3:])):
        path = root / "data" / f"validation-0000{part}-of-00002.parquet"
        pd.DataFrame(some).to_parquet(path, row_group_size=2)
    return rights


def test_hard_has_lists_of_right_answers(tmp_path):
    rights = write_hard(tmp_path / "imagenet-hard")
    test = load("imagenet_hard", tmp_path)
    assert [right for _, right in sorted(right_outputs(test).items())] == [set(right) for right in rights]
    assert test.sample_name(4) == "data/validation-00001-of-00002.parquet/00001"
    for number in (4, 0, 2, 3, 1):
        alone = np.asarray(Preprocessing(224, 256)(Image.open(jpeg(number))))
        assert test[number][0].permute(1, 2, 0).numpy().tolist() == alone.tolist()


def test_a_damaged_file_of_hard_is_an_image_error_or_told_at_once(tmp_path):
    write_hard(tmp_path)
    path = tmp_path / "data" / "validation-00000-of-00002.parquet"
    test = load("imagenet_hard", tmp_path)
    content = bytearray(path.read_bytes())
    content[200:2000] = bytes(1800)
    path.write_bytes(bytes(content))
    with pytest.raises(ImageError, match=r"00000-of-00002\.parquet"):
        [test[i] for i in range(3)]
    pd.DataFrame({"image": [{"bytes": b"", "path": ""}], "label": [[]]}).to_parquet(path)
    with pytest.raises(ValueError, match=r"00000-of-00002\.parquet is no readable Parquet file with the columns"):
        load("imagenet_hard", tmp_path)


def test_what_is_another_set_is_refused(tmp_path):
    save(tmp_path / "n01498041" / "0.jpg", 0)
    save(tmp_path / TENCH / "0.jpg", 0)
    with pytest.raises(
        ValueError, match=rf"1 of 2 folders are none of the 200 classes of imagenet_a: {TENCH}; it is"
    ):
        load("imagenet_a", tmp_path)
    save(tmp_path / "fog" / "1" / TENCH / "0.jpg", 0)
    with pytest.raises(ValueError, match=r"1/n01440764/0\.jpg lies deeper than <class>/<image>; it is another set"):
        load("imagenet_v2", tmp_path / "fog")
    save(tmp_path / "in" / "val" / "n01496331" / "0.jpg", 0)
    with pytest.raises(ValueError, match=r"none of the images there is of a class of imagenet_200_a"):
        load("imagenet_200_a", tmp_path / "in")


def test_a_broken_image_of_hard_names_file_and_row(tmp_path):
    write_hard(tmp_path, broken=True)
    with pytest.raises(ImageError, match=r"00001-of-00002\.parquet/00000: cannot be decoded"):
        load("imagenet_hard", tmp_path)[3]


# --- where sets are looked for -----------------------------------------------------------------------------------


def test_a_set_is_found_by_any_spelling_of_its_name_and_in_a_folder_of_its_own_name(tmp_path):
    save(tmp_path / "ImageNet_A" / "imagenet-a" / "n01498041" / "0.jpg", 0)
    assert find_variant(VARIANTS["imagenet_a"], tmp_path, itself=False) == tmp_path / "ImageNet_A" / "imagenet-a"
    assert find_variant(VARIANTS["imagenet_r"], tmp_path) is None


def test_nothing_is_taken_for_a_set_that_has_another_name(tmp_path):
    save(tmp_path / "val" / TENCH / "0.jpg", 0)
    save(tmp_path / TENCH / "0.jpg", 0)
    found: Callable[[str], Path | None] = lambda key: find_variant(VARIANTS[key], tmp_path, itself=False)  # noqa: E731
    assert [key for key in VARIANTS if found(key)] == []


def test_a_folder_without_the_set_says_what_is_wanted(tmp_path):
    (tmp_path / "something").mkdir()
    with pytest.raises(
        ValueError, match=r"ImageNet-A needs <wnid>/\* there, or in a folder called imagenet-a; it holds"
    ):
        load("imagenet_a", tmp_path)
