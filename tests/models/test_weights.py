"""Weights from every codebase of the field, and files that are broken, foreign or hostile."""

from __future__ import annotations

import argparse
import os
import pickle
import struct
import zipfile

import lightning as L
import numpy as np
import pytest
import timm
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ares_lightning.models import CheckpointError, Classifier, load_weights, make_classifier
from ares_lightning.models.weights import trained_weights

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def resnet(seed: int = 0, **changes) -> Classifier:
    torch.manual_seed(seed)
    settings = {"in_chans": 3, "num_classes": 10, "img_size": 72, "mean": IMAGENET[0], "std": IMAGENET[1]}
    return lively(make_classifier("resnet18", **(settings | changes)))


def lively(net: Classifier) -> Classifier:
    """Give norms values of their own, so that every weight has a say in the logits."""
    with torch.no_grad():
        for name, value in [*net.named_parameters(), *net.named_buffers()]:
            if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
                value.uniform_(0.5, 1.5)
            elif name.endswith("running_mean") or (value.ndim == 1 and name.endswith("bias")):
                value.uniform_(-0.1, 0.1)
    return net


def assert_same(net: Classifier, source: Classifier, img_size: int, in_chans: int = 3) -> None:
    """Both give the same logits, which depend on the image."""
    images = torch.rand(2, in_chans, img_size, img_size)
    with torch.inference_mode():
        logits, expected = net.eval()(images), source.eval()(images)
    assert torch.equal(logits, expected)
    assert float((expected[0] - expected[1]).abs().max()) > 1e-4


def small(name: str, seed: int = 0, **changes) -> Classifier:
    torch.manual_seed(seed)
    settings = {"in_chans": 3, "num_classes": 10, "img_size": 64, "mean": IMAGENET[0], "std": IMAGENET[1]}
    return lively(make_classifier(name, **(settings | changes)))


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


def normaliser(prefix: str, mean: str, std: str) -> dict[str, Tensor]:
    return {f"{prefix}{mean}": torch.tensor(IMAGENET[0]).view(3, 1, 1), f"{prefix}{std}": torch.tensor(IMAGENET[1])}


def madrylab(state):
    model = {
        **normaliser("module.normalizer.", "new_mean", "new_std"),
        **prefixed(state, "module.model."),
        **normaliser("module.attacker.normalize.", "new_mean", "new_std"),
        **prefixed(state, "module.attacker.model."),
    }
    return {"model": model, "optimizer": {"state": {}, "param_groups": []}, "epoch": 89, "schedule": None}


def compiled(state):
    """As torch.compile of the whole network, and of single layers, name them."""
    return {f"_orig_mod.{key.replace('layer1.0.', 'layer1.0._orig_mod.')}": value for key, value in state.items()}


FORMATS = {
    "bare (ARES)": lambda state: state,
    "ARES, while training": lambda state: {
        "epoch": 3, "arch": "resnet18", "state_dict": state, "optimizer": {}, "args": argparse.Namespace(lr=0.1)
    },
    "timm": lambda state: {"epoch": 1, "arch": "resnet18", "state_dict": state, "metric": 0.7, "version": 2},
    "RobustBench, one layer inside a normalised model": lambda state: {
        **normaliser("normalize.", "mean", "std"), **prefixed(state, "model.")
    },
    "RobustBench, from a DDP training": lambda state: {"state_dict": prefixed(state, "module.model."), "best": 1.5},
    "RobustBench, with mu and sigma": lambda state: {**normaliser("", "mu", "sigma"), **state},
    "MadryLab": madrylab,
    "MadryLab, one copy": lambda state: {"model": prefixed(state, "module.attacker.model.")},
    "easyrobust": lambda state: {"state_dict": prefixed(state, "module."), "amp_scaler": {}, "epoch": 100},
    "Lightning of others": lambda state: {"state_dict": prefixed(state, "model."), "global_step": 7},
    "this project": lambda state: {
        "config": {"model": {"mean": None, "std": None}, "data": {"mean": IMAGENET[0], "std": IMAGENET[1]}},
        "state_dict": prefixed(state, "net.backbone."),
    },
    "torch.compile": compiled,
    "FSDP of checkpointed layers": lambda state: {
        f"_fsdp_wrapped_module.{key.replace('layer1.0.', 'layer1.0._checkpoint_wrapped_module.')}": value
        for key, value in state.items()
    },
    "torch.compile of DDP": lambda state: prefixed(state, "_orig_mod.module."),
    "DDP of torch.compile": lambda state: {"model": prefixed(state, "module._orig_mod.")},
    "before batch norms counted": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
    "Sequential(normalise, network)": lambda state: prefixed(state, "1."),
    "stochastic weight averaging": lambda state: {"n_averaged": torch.tensor(4), **prefixed(state, "module.")},
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("form", FORMATS)
def test_the_checkpoints_of_the_field_load(form, suffix, tmp_path):
    source, net, path = resnet(1), resnet(2), tmp_path / f"weights.{suffix}"
    content = FORMATS[form](source.backbone.state_dict())
    if suffix == "pth":
        torch.save(content, path)
    elif all(isinstance(value, Tensor) for value in content.values()):
        save_file({key: value.clone().contiguous() for key, value in content.items()}, path)
    else:
        return
    line = load_weights(net, path)
    assert line.startswith(f"weights: {path.name}: 102 tensors, 11.2 M numbers")
    assert "\n" not in line
    assert_same(net, source, 72)


def test_averaged_weights_are_taken_unless_the_raw_ones_are_asked_for(tmp_path):
    raw, averaged = resnet(1).backbone.state_dict(), resnet(2).backbone.state_dict()
    forms = {
        "timm": {"state_dict": raw, "state_dict_ema": averaged},
        "ARES": {"state_dict": prefixed(raw, "module."), "state_dict_ema": averaged, "args": argparse.Namespace()},
        "MAE": {"model": raw, "model_ema": averaged},
    }
    for name, content in forms.items():
        torch.save(content, tmp_path / f"{name}.pth")
        for which, expected in ((None, averaged), ("ema", averaged), ("raw", raw)):
            net = resnet(3)
            line = load_weights(net, tmp_path / f"{name}.pth", weights=which)
            assert torch.equal(net.backbone.state_dict()["conv1.weight"], expected["conv1.weight"])
            assert ("ema" in line) == (which != "raw")
    torch.save({"state_dict": raw, "state_dict_ema": None, "ema": {}}, tmp_path / "none.pth")
    assert "from state_dict" in load_weights(resnet(3), tmp_path / "none.pth")
    torch.save(raw, tmp_path / "raw.pth")
    load_weights(resnet(3), tmp_path / "raw.pth", weights="raw")
    with pytest.raises(CheckpointError, match=r"raw\.pth: holds no averaged weights; give weights=raw"):
        load_weights(resnet(3), tmp_path / "raw.pth", weights="ema")


def test_what_lightnings_own_averaging_writes_is_told_apart(tmp_path):
    class Training(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = small("cnn")

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[EMAWeightAveraging(decay=0.5), ModelCheckpoint(tmp_path, filename="averaged")],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Training()
    torch.manual_seed(0)
    trainer.fit(module, DataLoader(torch.rand(8, 3, 64, 64), batch_size=4))
    checkpoint = torch.load(tmp_path / "averaged.ckpt", weights_only=True)
    assert "current_model_state" in checkpoint
    ema, raw = (
        trained_weights(checkpoint, tmp_path, which)["net.backbone.head.weight"] for which in ("ema", "raw")
    )
    assert not torch.equal(ema, raw)
    for which, expected in (("ema", ema), ("raw", raw)):
        net = small("cnn", 3)
        load_weights(net, tmp_path / "averaged.ckpt", weights=which)
        assert torch.equal(net.backbone.head.weight, expected)


def old_swin(state):
    """The names of Microsoft's own files, and of timm before 0.8."""
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[:1] == ["layers"] and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        renamed[".".join(parts).replace("head.fc", "head")] = value
    renamed["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    renamed["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    return renamed


def swin(seed: int, **changes) -> Classifier:
    return small("swin_tiny_patch4_window7_224", seed, img_size=112, depths=(1, 1, 2, 1), **changes)


def test_old_swin_names_are_converted(tmp_path):
    source, net = swin(1), swin(2)
    torch.save({"model": old_swin(source.backbone.state_dict())}, tmp_path / "old.pth")
    assert "names converted" in load_weights(net, tmp_path / "old.pth")
    assert_same(net, source, 112)
    with pytest.raises(CheckpointError, match=r"old\.pth: is of another architecture"):
        load_weights(small("swin_tiny_patch4_window7_224", img_size=112, depths=(1, 1, 1, 1)), tmp_path / "old.pth")


def test_the_files_of_wide_resnets_have_names_of_their_own(tmp_path):
    settings = {"depth": 10, "width": 1, "img_size": 32, "padding": "same"}
    source, net = small("wide_resnet28_10", 1, **settings), small("wide_resnet28_10", 2, **settings)
    state = source.backbone.state_dict()
    deepmind = {"conv1": "init_conv", "bn1": "batchnorm", "fc": "logits"}
    inner = {"bn1": "batchnorm_0", "conv1": "conv_0", "bn2": "batchnorm_1", "conv2": "conv_1"}
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0].startswith("block"):
            module = inner.get(parts[3], "shortcut")
            parts = ["layer", str(int(parts[0][-1]) - 1), "block", parts[2], module, *parts[4:]]
        else:
            parts[0] = deepmind[parts[0]]
        renamed[".".join(parts)] = value
    torch.save(prefixed({**renamed, **normaliser("", "mean", "std")}, "module."), tmp_path / "gowal.pt")
    unused = {key.replace("block1.", "sub_block1."): value for key, value in state.items() if "block1." in key}
    torch.save({"state_dict": prefixed({**state, **unused}, "module.")}, tmp_path / "carmon.pt")
    for name in ("gowal", "carmon"):
        assert "names converted" in load_weights(net, tmp_path / f"{name}.pt")
        assert_same(net, source, 32)
        net = small("wide_resnet28_10", 2, **settings)
    with pytest.raises(CheckpointError, match=r"names of Gowal et al\., whose networks pad otherwise"):
        load_weights(small("wide_resnet28_10", 2, **settings | {"padding": "symmetric"}), tmp_path / "gowal.pt")


def test_the_names_of_meta_for_convnext_are_converted(tmp_path):
    source, net = small("convnext_atto", 1, img_size=64), small("convnext_atto", 2, img_size=64)
    renamed = {}
    for key, value in source.backbone.state_dict().items():
        key = (
            key.replace("stem.", "downsample_layers.0.").replace("head.norm.", "norm.").replace("head.fc.", "head.")
        )
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv").replace(".blocks.", ".")
        for stage in range(4):
            key = key.replace(f"stages.{stage}.downsample.", f"downsample_layers.{stage}.")
        renamed[key] = value
    assert "downsample_layers.0.0.weight" in renamed
    torch.save({"model": renamed}, tmp_path / "meta.pth")
    assert "names converted" in load_weights(net, tmp_path / "meta.pth")
    assert_same(net, source, 64)


def test_position_embeddings_and_patches_are_resampled_only_on_request(tmp_path):
    source = small("vit_tiny_patch16_224", 1, img_size=96, depth=1)
    torch.save(source.backbone.state_dict(), tmp_path / "vit.pth")
    for changes in ({"img_size": 128}, {"img_size": 96, "patch_size": 8}):
        net = small("vit_tiny_patch16_224", 2, depth=1, **changes)
        before = net.backbone.state_dict()["head.bias"].clone()
        with pytest.raises(CheckpointError, match=r"vit\.pth: .* model\.resample=true fits it"):
            load_weights(net, tmp_path / "vit.pth")
        assert torch.equal(net.backbone.state_dict()["head.bias"], before)
        assert "resampled" in load_weights(net, tmp_path / "vit.pth", resample=True)
        pretrained = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=1, **changes)
        by_timm = timm.models.vision_transformer.checkpoint_filter_fn
        timm.models.load_checkpoint(pretrained, str(tmp_path / "vit.pth"), filter_fn=by_timm)
        for key, value in pretrained.state_dict().items():
            assert torch.equal(net.backbone.state_dict()[key], value)


def test_sinusoids_of_another_grid_are_resampled_too(tmp_path):
    settings = {"embed_dim": 64, "depth": 1, "num_heads": 1}
    torch.save(small("t2t_vit_t_14", 1, img_size=96, **settings).backbone.state_dict(), tmp_path / "t2t.pth")
    net = small("t2t_vit_t_14", 2, img_size=128, **settings)
    with pytest.raises(CheckpointError, match=r"model\.resample=true"):
        load_weights(net, tmp_path / "t2t.pth")
    load_weights(net, tmp_path / "t2t.pth", resample=True)
    assert net.backbone.pos_embed.shape == (1, 65, 64)


def test_windows_of_another_size_are_resampled_too(tmp_path):
    torch.save(old_swin(swin(1).backbone.state_dict()), tmp_path / "old.pth")
    net = swin(2, window_size=4)
    with pytest.raises(CheckpointError, match=r"model\.resample=true"):
        load_weights(net, tmp_path / "old.pth")
    assert "resampled" in load_weights(net, tmp_path / "old.pth", resample=True)


def test_a_new_last_layer_is_made_only_on_request(tmp_path):
    source = resnet(1, num_classes=1000)
    torch.save(source.backbone.state_dict(), tmp_path / "thousand.pth")
    net = resnet(2)
    own = net.backbone.fc.weight.clone()
    with pytest.raises(CheckpointError, match=r"knows 1000 classes, the data have 10; model\.new_head=true"):
        load_weights(net, tmp_path / "thousand.pth")
    line = load_weights(net, tmp_path / "thousand.pth", new_head=True)
    assert "fc.weight is new" in line
    assert torch.equal(net.backbone.fc.weight, own)
    assert torch.equal(net.backbone.conv1.weight, source.backbone.conv1.weight)
    headless = {key: value for key, value in source.backbone.state_dict().items() if not key.startswith("fc.")}
    torch.save(headless, tmp_path / "headless.pth")
    with pytest.raises(CheckpointError, match=r"2 keys missing \(fc\.bias, fc\.weight\)"):
        load_weights(net, tmp_path / "headless.pth")
    load_weights(net, tmp_path / "headless.pth", new_head=True)
    torch.save(resnet(3).backbone.state_dict(), tmp_path / "ten.pth")
    assert "is new" not in load_weights(net, tmp_path / "ten.pth", new_head=True)


def test_another_normalisation_than_the_models_is_refused_with_the_right_one(tmp_path):
    state = resnet(1).backbone.state_dict()
    torch.save({**prefixed(state, "model."), **normaliser("normalize.", "mean", "std")}, tmp_path / "file.pth")
    net = resnet(2, mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(CheckpointError, match=r"model\.mean=\[0\.485,0\.456,0\.406\]"):
        load_weights(net, tmp_path / "file.pth")
    load_weights(resnet(2), tmp_path / "file.pth")
    config = {"model": {"mean": [0.1] * 3, "std": None}, "data": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    torch.save({"config": config, "state_dict": prefixed(state, "net.backbone.")}, tmp_path / "own.ckpt")
    with pytest.raises(CheckpointError, match=r"model\.mean=\[0\.1,0\.1,0\.1\]"):
        load_weights(net, tmp_path / "own.ckpt")


def test_a_file_with_two_different_networks_is_not_guessed_about(tmp_path):
    teacher, student = resnet(1).backbone.state_dict(), resnet(2).backbone.state_dict()
    torch.save({**prefixed(teacher, "teacher."), **prefixed(student, "student.")}, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match=r"holds two such networks, under teacher\. and student\."):
        load_weights(resnet(3), tmp_path / "two.pth")


class Hostile:
    """Would leave a file behind if it were ever unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def dill_pickle() -> bytes:
    """What dill writes for a class, in as few words as it takes."""
    return b"\x80\x02cdill._dill\n_load_type\nX\x04\x00\x00\x00type\x85R."


def write_broken(kind: str, path, mark) -> None:
    state = resnet(1).backbone.state_dict()
    if kind == "code":
        torch.save({"state_dict": state, "extra": Hostile(mark)}, path)
    elif kind == "code outside torch's format":
        path.write_bytes(pickle.dumps(Hostile(mark), protocol=2))
    elif kind == "dill":
        torch.save(state, path)
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, dill_pickle() if name.endswith("data.pkl") else content)
    elif kind == "a whole module":
        torch.save(nn.Linear(2, 2), path)
    elif kind == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:200_000])
    elif kind == "truncated, old format":
        torch.save(state, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:200_000])
    elif kind == "truncated safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
        path.write_bytes(path.read_bytes()[:200_000])
    elif kind == "wrong class count":
        torch.save(resnet(1, num_classes=7).backbone.state_dict(), path)
    elif kind == "wrong architecture":
        torch.save(timm.create_model("resnet34", num_classes=10).state_dict(), path)
    elif kind == "another family":
        torch.save(small("vit_tiny_patch16_224", depth=1, img_size=96).backbone.state_dict(), path)
    elif kind == "NaN":
        state["layer4.1.bn2.weight"] = torch.full_like(state["layer4.1.bn2.weight"], torch.nan)
        torch.save(state, path)
    elif kind == "optimizer only":
        weight = nn.Parameter(torch.ones(3))
        torch.save({"optimizer": torch.optim.AdamW([weight]).state_dict(), "epoch": 3}, path)
    elif kind == "optimizer, bare":
        weight = nn.Parameter(torch.ones(3))
        torch.save(torch.optim.AdamW([weight]).state_dict(), path)
    elif kind == "empty":
        path.touch()
    elif kind == "empty dict":
        torch.save({}, path)
    elif kind == "text":
        path.write_text("version 3\nnot weights\n")
    elif kind == "web page":
        path.write_text("<!DOCTYPE html><title>quota exceeded</title>")
    elif kind == "Git LFS pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif kind == "zip bomb header":
        torch.save(state, path)
        content = bytearray(path.read_bytes())
        place = content.rfind(b"PK\x01\x02")  # an entry of the central directory; its size stands 24 bytes on
        struct.pack_into("<I", content, place + 24, 0xFFFFFFF0)
        path.write_bytes(content)
    elif kind == "zip bomb":
        torch.save(state, path)
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in parts.items():
                archive.writestr(name, bytes(len(content)) if "/data/" in name else content)
    elif kind == "HDF5":
        path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    elif kind == "NumPy archive":
        with open(path, "wb") as file:
            np.savez(file, weight=np.zeros(3))
    elif kind == "TorchScript":
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)
    elif kind == "one tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "quantised":
        state["conv1.weight"] = torch.quantize_per_tensor(state["conv1.weight"], 0.1, 0, torch.qint8)
        torch.save(state, path)
    elif kind == "integers":
        state["conv1.weight"] = state["conv1.weight"].mul(100).to(torch.int8)
        torch.save(state, path)
    elif kind == "sparse":
        state["fc.weight"] = state["fc.weight"].to_sparse()
        torch.save(state, path)
    elif kind == "no values":
        torch.save({key: value.to("meta") for key, value in state.items()}, path)
    else:
        assert kind == "missing"


BROKEN = {
    "code": r"refused: holds posix\.system, which could run code.*nothing was run",
    "code outside torch's format": r"refused: .*could run code.*nothing was run",
    "dill": r"refused: was written with dill.*pickle_module=dill",
    "a whole module": r"refused: holds torch\.nn\.modules\.linear\.Linear.*torch\.save\(model\.state_dict\(\)",
    "truncated": "truncated or damaged",
    "truncated, old format": "truncated or damaged",
    "truncated safetensors": "truncated or damaged",
    "wrong class count": "knows 7 classes, the data have 10",
    "wrong architecture": r"another architecture: 0 keys missing \(none\), \d+ unexpected \(layer1\.2\.bn1\.bias",
    "another family": r"another architecture: \d+ keys missing",
    "NaN": r"layer4\.1\.bn2\.weight holds 512 values that are NaN",
    "optimizer only": "holds no weights, only epoch, optimizer",
    "optimizer, bare": "holds no weights, only param_groups, state",
    "empty": "is empty",
    "empty dict": "holds no weights",
    "text": "is text, not weights",
    "web page": "is a web page",
    "Git LFS pointer": "run git lfs pull",
    "zip bomb header": r"says to hold 4,\d+,\d+,\d+ bytes in a file of",
    "zip bomb": r"says to hold \d+,\d+,\d+ bytes in a file of",
    "HDF5": r"is HDF5 \(Keras\)",
    "NumPy archive": "is a NumPy archive",
    "TorchScript": "is a TorchScript program",
    "one tensor": "holds a Tensor, not weights by name",
    "quantised": r"conv1\.weight is torch\.qint8",
    "integers": r"conv1\.weight is torch\.int8",
    "sparse": r"fc\.weight is sparse",
    "no values": "is without values",
    "missing": "no such file",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_or_hostile_file_is_refused_in_one_line_and_nothing_is_executed(kind, tmp_path):
    path, mark = tmp_path / "file.pth", tmp_path / "executed"
    write_broken(kind, path, mark)
    net = resnet(2)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"file\.pth: .*{BROKEN[kind]}") as caught:
        load_weights(net, path)
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_precision_is_converted_and_said(dtype, tmp_path):
    source, net = resnet(1), resnet(2)
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in source.backbone.state_dict().items()}
    torch.save(state, tmp_path / "file.pth")
    name = str(dtype).removeprefix("torch.")
    assert load_weights(net, tmp_path / "file.pth").endswith(f"{name} converted to float32")
    assert net.backbone.conv1.weight.dtype == torch.float32
    assert torch.equal(net.backbone.conv1.weight, source.backbone.conv1.weight.to(dtype).float())
