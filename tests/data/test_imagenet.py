"""ImageNet in its published layouts. Labels are held against lists that do not come from the code under test."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from photos import save
from scipy.io import savemat

from ares_lightning.data import ImageSets, Wishes, load_image_sets, select_subset, subset_hash
from ares_lightning.data.imagenet import class_names, wnids

TENCH = "n01440764"
KNOWN = {"n01440764": 0, "n01443537": 1, "n01518878": 9, "n02123045": 281, "n03908714": 710, "n15075141": 999}
"""Some WordNet ids and their labels, as in the lists that everyone uses: tench 0, goldfish 1, ostrich 9, tabby 281,
pencil sharpener 710, toilet tissue 999."""


def load(name: str, root: Path, training: bool = False, **changes) -> ImageSets:
    return load_image_sets(name, root, Wishes(img_size=32, in_chans=3, training=training, **changes))


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def write_val(root: Path, per_class: int = 1) -> dict[str, int]:
    """Write validation images of the known classes; return the label of each by the path below the root."""
    labels = {}
    for place, wnid in enumerate(KNOWN):
        for copy in range(per_class):
            number = 1 + place + copy * len(KNOWN)
            save(root / "val" / wnid / val_name(number), number)
            labels[f"val/{wnid}/{val_name(number)}"] = KNOWN[wnid]
    return labels


def test_the_thousand_classes_are_in_the_usual_order():
    assert len(set(wnids())) == 1000
    assert {wnid: wnids().index(wnid) for wnid in KNOWN} == KNOWN
    assert [class_names()[place] for place in (0, 1, 9, 281, 999)] == [
        "tench", "goldfish", "ostrich", "tabby", "toilet tissue"
    ]  # fmt: skip


def test_labels_of_a_part_are_places_among_the_thousand(tmp_path):
    expected = write_val(tmp_path)
    test = load("imagenet", tmp_path).test
    assert {test.sample_name(i): int(test.source.labels.labels[i]) for i in range(len(test))} == expected
    assert test.source.labels.num_outputs == len(test.classes) == 1000
    assert [test[i][1] for i in range(len(test))] == test.labels.tolist() == sorted(KNOWN.values())


def test_the_folder_of_the_classes_itself_is_a_test_set(tmp_path):
    write_val(tmp_path)
    assert load("imagenet", tmp_path / "val").test.labels.tolist() == sorted(KNOWN.values())


def test_training_images_are_found_where_they_are_wanted(tmp_path):
    write_val(tmp_path)
    for place, wnid in enumerate(KNOWN):
        for copy in range(3):
            save(tmp_path / "train" / wnid / f"{wnid}_{copy}.JPEG", 100 + place)
    sets = load("imagenet", tmp_path, training=True, num_val=6)
    assert sorted(sets.val.labels.tolist()) == sorted(KNOWN.values())
    assert len(sets.train) == 12
    assert load("imagenet", tmp_path).train is None


def test_a_folder_that_is_no_class_is_named(tmp_path):
    write_val(tmp_path)
    save(tmp_path / "val" / "tench" / "a.jpg", 1)
    with pytest.raises(ValueError, match=r"^data\.root=.*1 of 7 folders in val/ are no class of ImageNet: tench;"):
        load("imagenet", tmp_path)


# --- the flat validation set, whose labels are in the development kit -------------------------------------------


def write_flat(root: Path, folder: str) -> tuple[dict[str, int], bytes, bytes]:
    """Write flat images; return their labels, and the two files of a kit whose class numbers are a permutation."""
    numbers = list(range(1, 1001))
    random.Random(0).shuffle(numbers)
    rows = [(number, wnid, "words") for number, wnid in zip(numbers, wnids(), strict=True)]
    rows += [(1001, "n00001740", "an inner node of the tree")]
    table = np.array(rows, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]).reshape(-1, 1)
    meta = io.BytesIO()
    savemat(meta, {"synsets": table})
    labels, truth = {}, []
    for place, (wnid, label) in enumerate(KNOWN.items()):
        save(root / folder / val_name(place + 1), place)
        labels[f"{folder}/{val_name(place + 1)}"] = label
        truth.append(numbers[wnids().index(wnid)])
    return labels, "\n".join(map(str, truth)).encode(), meta.getvalue()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("folder", ["val", "ILSVRC2012_img_val"])
def test_flat_images_take_their_labels_from_the_kit(folder, packed, tmp_path):
    expected, truth, meta = write_flat(tmp_path, folder)
    names = {"ILSVRC2012_validation_ground_truth.txt": truth, "meta.mat": meta}
    kit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    for name, content in names.items():
        (kit / name).write_bytes(content)
    if packed:
        with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
            archive.add(kit.parent, "ILSVRC2012_devkit_t12")
        for file in kit.iterdir():
            file.unlink()
        kit.rmdir(), kit.parent.rmdir()
    test = load("imagenet", tmp_path).test
    assert {test.sample_name(i): int(test.source.labels.labels[i]) for i in range(len(test))} == expected


def test_kaggles_layout_takes_them_from_its_table(tmp_path):
    folder = "ILSVRC/Data/CLS-LOC/val"
    expected, _, _ = write_flat(tmp_path, folder)
    lines = ["ImageId,PredictionString"]
    for place, wnid in enumerate(KNOWN):
        lines.append(f"{val_name(place + 1).removesuffix('.JPEG')},{wnid} 111 108 441 193 {wnid} 1 2 3 4")
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(lines))
    test = load("imagenet", tmp_path).test
    assert {test.sample_name(i): int(test.source.labels.labels[i]) for i in range(len(test))} == expected


@pytest.mark.parametrize("content", ["ImageId,Label\na,b", "ImageId,PredictionString\nILSVRC2012_val_00000001,"])
def test_a_table_that_is_not_kaggles_is_named(content, tmp_path):
    write_flat(tmp_path, "val")
    (tmp_path / "LOC_val_solution.csv").write_text(content)
    with pytest.raises(ValueError, match=r"LOC_val_solution\.csv is not as published; download it again"):
        load("imagenet", tmp_path)
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\na,n99999999 1 2 3 4")
    with pytest.raises(ValueError, match=r"LOC_val_solution\.csv has n99999999, which is no class of ImageNet"):
        load("imagenet", tmp_path)


def test_a_link_to_itself_and_lost_and_found_do_not_count(tmp_path):
    write_val(tmp_path)
    (tmp_path / "val" / "lost+found").mkdir()
    (tmp_path / "val" / TENCH / "loop").symlink_to(tmp_path / "val" / TENCH)
    assert load("imagenet", tmp_path).test.labels.tolist() == sorted(KNOWN.values())


def test_flat_images_without_labels_are_refused(tmp_path):
    write_flat(tmp_path, "val")
    with pytest.raises(
        ValueError, match=r"val/ is flat, and neither ILSVRC2012_devkit_t12 nor .* is beside it; put"
    ):
        load("imagenet", tmp_path)
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"ILSVRC2012_devkit_t12\.tar\.gz cannot be read"):
        load("imagenet", tmp_path)


# --- ReaL -------------------------------------------------------------------------------------------------------


def test_real_labels_are_found_by_the_number_of_the_file(tmp_path):
    write_val(tmp_path, per_class=4)
    lists = json.loads((Path(timm.__file__).parent / "data/_info/imagenet_real_labels.json").read_text())
    test = load("imagenet_real", tmp_path).test
    assert lists[0] == []
    assert len(test) == sum(bool(right) for right in lists[:24])
    everything = torch.arange(1000)
    for sample_id in test.sample_ids.tolist():
        number = int(test.sample_name(sample_id)[-13:-5])
        right = test.is_right(everything, torch.full((1000,), sample_id)).nonzero().flatten().tolist()
        assert right == sorted(lists[number - 1])
    whole = load("imagenet", tmp_path).test
    assert [test.sample_name(i) for i in test.sample_ids.tolist()] == [
        whole.sample_name(i) for i in test.sample_ids.tolist()
    ]


def test_real_labels_want_the_published_names(tmp_path):
    save(tmp_path / "val" / "n01440764" / "tench.JPEG", 0)
    with pytest.raises(
        ValueError, match=r"ImageNet-ReaL needs the validation images .* under their published names"
    ):
        load("imagenet_real", tmp_path)
    save(tmp_path / "val" / "n01440764" / "ILSVRC2012_val_00050001.JPEG", 0)
    (tmp_path / "val" / "n01440764" / "tench.JPEG").unlink()
    with pytest.raises(ValueError, match=r"00050001\.JPEG is not called ILSVRC2012_val_<number>"):
        load("imagenet_real", tmp_path)


# --- subsets ----------------------------------------------------------------------------------------------------


def test_a_list_names_images_by_path_or_by_name_alone(tmp_path):
    write_val(tmp_path)
    whole = load("imagenet", tmp_path).test
    lines = ["n02123045/ILSVRC2012_val_00000004.JPEG 281", "", "ILSVRC2012_val_00000001.JPEG 0 17"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    chosen = select_subset(whole, f"file:{tmp_path / 'list.txt'}")
    assert [chosen.sample_name(i)[-13:-5] for i in chosen.sample_ids.tolist()] == ["00000001", "00000004"]
    assert chosen.labels.tolist() == [0, 281]
    assert subset_hash(chosen) == subset_hash(whole.take([0, 3])) != subset_hash(whole)


def test_images_of_a_list_that_are_not_there_are_named(tmp_path):
    write_val(tmp_path)
    (tmp_path / "list.txt").write_text("n02123045/ILSVRC2012_val_00000004.JPEG\nnope.JPEG\n")
    with pytest.raises(ValueError, match=r"^subset=file:.*1 of the 2 images of the list are not in imagenet: nope"):
        select_subset(load("imagenet", tmp_path).test, f"file:{tmp_path / 'list.txt'}")
    with pytest.raises(ValueError, match=r"^subset=file:gone: gone is no readable list"):
        select_subset(load("imagenet", tmp_path).test, "file:gone")


def test_robustbenchs_list_is_read_from_the_root_and_must_be_whole(tmp_path):
    write_val(tmp_path)
    whole = load("imagenet", tmp_path).test
    with pytest.raises(
        ValueError, match=r"^subset=robustbench5k: RobustBench's list imagenet_test_image_ids\.txt is"
    ):
        select_subset(whole, "robustbench5k")
    (tmp_path / "imagenet_test_image_ids.txt").write_text("n02123045/ILSVRC2012_val_00000004.JPEG")
    with pytest.raises(ValueError, match=r"^subset=robustbench5k: the list has 1 images; expected 5000"):
        select_subset(whole, "robustbench5k")


def test_ares1k_is_a_thousand_images_by_seed():
    whole = load_image_sets("digits", None, Wishes(img_size=8, in_chans=1, num_val=10)).train
    assert select_subset(whole, "ares1k").sample_ids.equal(select_subset(whole, "random:1000@0").sample_ids)
    assert select_subset(whole, "ares1k@7").sample_ids.equal(select_subset(whole, "random:1000@7").sample_ids)
