"""The 55 models: built as published, without network."""

from __future__ import annotations

import csv
import json
import resource
from collections import Counter

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from networks import zoo_model
from omegaconf import OmegaConf

from ares_lightning.launch import CONFIG_DIR
from ares_lightning.models import ZOO
from ares_lightning.models.__main__ import main
from ares_lightning.models.zoo import NORMALISATIONS, TABLE, TRAININGS, find_file

NUM_PARAMETERS = {
    # torchvision's documentation of its weights
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "wide_resnet50_2": 68_883_240,
    "vgg13": 133_047_848,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "densenet201": 20_013_928,
    "convnext_small": 50_223_688,
    "convnext_base": 88_591_464,
    "convnext_large": 197_767_336,
    "swin_small_patch4_window7_224": 49_606_258,
    "swin_base_patch4_window7_224": 87_768_224,
    "vit_base_patch16_224": 86_567_656,
    "vit_large_patch16_224": 304_326_632,
}
"""Published numbers of parameters by architecture."""
MILLIONS = {
    # timm's results-imagenet.csv
    "swin_large_patch4_window7_224": 196.53,
    "vit_small_patch16_224": 22.05,
    "xcit_small_12_p16_224": 26.25,
    "xcit_small_24_p16_224": 47.67,
    "xcit_medium_24_p16_224": 84.40,
    "xcit_large_24_p16_224": 189.10,
    # mmpretrain's model zoo, and 197 position embeddings, fixed, which it leaves out
    "t2t_vit_t_14": 21.47 + 0.197 * 0.384,
    "t2t_vit_t_19": 39.08 + 0.197 * 0.448,
    "t2t_vit_t_24": 64.00 + 0.197 * 0.512,
    # counted on the published code of ARES 2.0
    "resnet152_fd": 71.34,
    "xcit_medium_12_p16_224": 46.40,
    "xcit_large_12_p16_224": 103.79,
}
"""The same to two digits, where no more is published."""


def test_the_table_holds_the_benchmarks_55_models():
    assert len(ZOO) == 55
    assert Counter(model.training for model in ZOO.values()) == {
        "normal": 24, "at": 12, "21k": 9, "sota": 6, "mae": 2, "moco": 1, "fd": 1
    }  # fmt: skip
    assert sum(board.source.startswith("timm") for model in ZOO.values() for board in model.published) == 25
    assert sum(not model.published for model in ZOO.values()) == 9
    assert sum(model.in_timm for model in ZOO.values()) == 25
    files = [model.weights for model in ZOO.values() if not model.in_timm]
    assert len(set(files)) == len(files) == 30
    assert all(name.startswith("ARES_") for name in files)
    assert {model.training for model in ZOO.values()} == TRAININGS.keys()
    assert sum(any(board.source == "ARES 2.0" for board in model.published) for model in ZOO.values()) == 12
    with open(TABLE, newline="") as file:
        assert all(None not in row and None not in row.values() for row in csv.DictReader(file)), "a cell too few"


@pytest.mark.parametrize("key", [key for key, model in ZOO.items() if model.in_timm])
def test_pinned_tags_are_timms_and_normalise_as_the_table_says(key):
    model = ZOO[key]
    tag = timm.get_pretrained_cfg(f"{model.architecture}.{model.weights}")
    assert (tag.mean, tag.std) == NORMALISATIONS[model.normalisation]
    assert tag.input_size == (3, 224, 224)
    assert ("in22k" in model.weights or "in21k" in model.weights) == (model.training == "21k")


@pytest.mark.parametrize("key", ZOO)
def test_every_model_builds_with_the_published_number_of_parameters(key):
    model = ZOO[key]
    with torch.device("meta"):
        net = zoo_model(key).eval()
        assert net(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    count = sum(parameter.numel() for parameter in net.parameters())
    if model.architecture in NUM_PARAMETERS:
        assert count == NUM_PARAMETERS[model.architecture]
    else:
        assert count / 1e6 == pytest.approx(MILLIONS[model.architecture], abs=0.006)
    activations = {type(module).__name__ for module in net.modules()} & {"ReLU", "GELU", "GELUTanh"}
    assert {name.lower() for name in activations} == {model.activation}


@pytest.mark.proof
@pytest.mark.parametrize("key", ZOO)
def test_every_model_gives_finite_logits(key):
    torch.manual_seed(0)
    net = zoo_model(key).eval()
    with torch.inference_mode():
        logits = net(torch.rand(1, 3, 224, 224))
    assert logits.shape == (1, 1000)
    assert bool(logits.isfinite().all())
    assert float(logits.std()) > 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    assert peak < 8 * 2**20


@pytest.mark.parametrize("key", ZOO)
def test_every_model_is_a_choice_of_both_programs(key):
    for program in ("train", "evaluate"):
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            model = OmegaConf.to_container(compose(program, [f"model=zoo/{key}"]).model)
        plain = {"activation": None, "resample": False, "new_head": False, "defense": None}
        assert model == {**ZOO[key].config(), **plain}


def test_the_published_file_is_found_in_its_folder_or_by_itself(tmp_path):
    (tmp_path / "ARES_Swin_base_patch4_window7_224_AT.pth").touch()
    file = tmp_path / "ARES_Swin_base_patch4_window7_224_AT.pth"
    assert find_file(str(tmp_path), "swinb_at") == file
    assert find_file(str(file), "swinb_at") == file
    assert find_file("tv_in1k", "resnet50_normal") is None
    with pytest.raises(ValueError, match=r"has no ARES_ViT_small_patch16_224_AT\.pth, which is published at https"):
        find_file(str(tmp_path), "vits_at")
    with pytest.raises(ValueError, match="no published file is called after resnet18; give the file"):
        find_file(str(tmp_path), "resnet18")
    with pytest.raises(
        ValueError, match=r"is not here; download it from https://.*ARES_ViT_small_patch16_224_AT\.pth"
    ):
        find_file("ARES_ViT_small_patch16_224_AT.pth", "vits_at")


def printed(capsys, *words: str) -> str:
    main(words)
    return capsys.readouterr().out


def test_the_command_line_lists_filters_and_shows(capsys):
    everything = printed(capsys)
    assert all(key in everything for key in ZOO)
    assert "…" not in everything
    assert max(map(len, everything.splitlines())) <= 80
    assert "55 of 55 models" in everything
    assert "3 of 55 models" in printed(capsys, "--family", "Swin", "--training", "at")
    assert [row["key"] for row in json.loads(printed(capsys, "list", "xcit", "sota", "--json"))] == [
        "xcits_sota", "xcitm_sota", "xcitl_sota"
    ]  # fmt: skip
    assert len(json.loads(printed(capsys, "--weights", "file", "--json"))) == 30
    shown = printed(capsys, "show", "swinb_at")
    assert "https://ml.cs.tsinghua.edu.cn/~xiaoyang/aresbench/ckpt-imagenet/ARES_Swin_base_patch4" in shown
    assert "autoattack 57.3 % (ARES 2.0, 1,000 images)" in shown
    facts = json.loads(printed(capsys, "show", "swinb_at", "--json"))
    assert facts["published"][1]["percent"] == {"clean": 76.16, "autoattack": 56.16}
    with pytest.raises(SystemExit) as caught:
        main(["swim", "--training", "at"])
    assert caught.value.code == "error: no model is like that: swim at; without filters all are listed"
    with pytest.raises(SystemExit) as caught:
        main(["show", "swinb"])
    assert caught.value.code == "error: swinb: is no model of the zoo; did you mean swinb_at?"
