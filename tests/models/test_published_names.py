"""Names of parameters as in the published files, stated here by themselves, load into every model of the zoo."""

from __future__ import annotations

import pytest
import torch
from networks import zoo_model

from ares_lightning.models import ZOO, CheckpointError, load_weights

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
SCALE = ("weight", "bias")


def named(prefix: str, *modules: str, parts: tuple[str, ...] = SCALE) -> list[str]:
    return [f"{prefix}{module}.{part}" for module in modules for part in parts]


def bottlenecks(stage: str, depth: int) -> list[str]:
    names = []
    for block in range(depth):
        for i in (1, 2, 3):
            names += [f"{stage}.{block}.conv{i}.weight", *named(f"{stage}.{block}.", f"bn{i}", parts=NORM)]
    return [*names, f"{stage}.0.downsample.0.weight", *named(f"{stage}.0.", "downsample.1", parts=NORM)]


def resnet(depths: tuple[int, ...]) -> list[str]:
    names = ["conv1.weight", *named("", "bn1", parts=NORM), *named("", "fc")]
    return names + [name for i, depth in enumerate(depths) for name in bottlenecks(f"layer{i + 1}", depth)]


def resnet_fd() -> list[str]:
    names = ["conv0.weight", *named("", "bn0", parts=NORM), *named("", "linear")]
    for stage, depth in enumerate((3, 8, 36, 3)):
        block = f"group{stage}.{depth}."
        names += bottlenecks(f"group{stage}", depth)
        names += [f"{block}{conv}.weight" for conv in ("embedding_theta", "embedding_phi", "conv")]
        names += named(block, "bn", parts=NORM)
    return names


def vgg(stages: tuple[int, ...]) -> list[str]:
    names, place = named("", "pre_logits.fc1", "pre_logits.fc2", "head.fc"), 0
    for convolutions in stages:
        for _ in range(convolutions):
            names += named("", f"features.{place}")
            place += 2
        place += 1  # pooling
    return names


def densenet(depths: tuple[int, ...]) -> list[str]:
    names = ["features.conv0.weight", *named("features.", "norm0", "norm5", parts=NORM), *named("", "classifier")]
    for block, depth in enumerate(depths, 1):
        for layer in range(1, depth + 1):
            prefix = f"features.denseblock{block}.denselayer{layer}."
            names += [
                f"{prefix}conv1.weight",
                f"{prefix}conv2.weight",
                *named(prefix, "norm1", "norm2", parts=NORM),
            ]
        if block < len(depths):
            prefix = f"features.transition{block}."
            names += [f"{prefix}conv.weight", *named(prefix, "norm", parts=NORM)]
    return names


def convnext(depths: tuple[int, ...]) -> list[str]:
    names = named("", "stem.0", "stem.1", "head.norm", "head.fc")
    for stage, depth in enumerate(depths):
        names += named(f"stages.{stage}.", "downsample.0", "downsample.1") if stage else []
        for block in range(depth):
            prefix = f"stages.{stage}.blocks.{block}."
            names += [f"{prefix}gamma", *named(prefix, "conv_dw", "norm", "mlp.fc1", "mlp.fc2")]
    return names


def transformer(prefix: str, *, qkv_bias: bool = True) -> list[str]:
    names = named(prefix, "norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    return [*names, *named(prefix, "attn.qkv", parts=SCALE if qkv_bias else ("weight",))]


def old_swin(depths: tuple[int, ...]) -> list[str]:
    """As timm 0.6.7 and Microsoft's own code name them; the published files are of that time."""
    names = named("", "patch_embed.proj", "patch_embed.norm", "norm", "head")
    for stage, depth in enumerate(depths):
        for block in range(depth):
            prefix = f"layers.{stage}.blocks.{block}."
            names += transformer(prefix)
            names += [f"{prefix}attn.relative_position_bias_table", f"{prefix}attn.relative_position_index"]
            names += [f"{prefix}attn_mask"] if block % 2 and stage < 3 else []
        if stage < 3:
            names += [f"layers.{stage}.downsample.reduction.weight", *named(f"layers.{stage}.", "downsample.norm")]
    return names


def vit(depth: int, norm: str = "norm") -> list[str]:
    names = ["cls_token", "pos_embed", *named("", "patch_embed.proj", norm, "head")]
    return names + [name for block in range(depth) for name in transformer(f"blocks.{block}.")]


def t2t_vit(depth: int) -> list[str]:
    names = ["cls_token", "pos_embed", *named("", "norm", "head", "tokens_to_token.project")]
    for i in (1, 2):
        names += transformer(f"tokens_to_token.attention{i}.", qkv_bias=False)
    return names + [name for block in range(depth) for name in transformer(f"blocks.{block}.", qkv_bias=False)]


def xcit(depth: int) -> list[str]:
    names = ["cls_token", *named("", "pos_embed.token_projection", "norm", "head")]
    for i in (0, 2, 4, 6):
        names += [f"patch_embed.proj.{i}.0.weight", *named("", f"patch_embed.proj.{i}.1", parts=NORM)]
    for block in range(depth):
        prefix = f"blocks.{block}."
        names += [f"{prefix}gamma{i}" for i in (1, 2, 3)] + [f"{prefix}attn.temperature", *transformer(prefix)]
        names += named(prefix, "norm3", "local_mp.conv1", "local_mp.conv2")
        names += named(prefix, "local_mp.bn", parts=NORM)
    for block in range(2):
        prefix = f"cls_attn_blocks.{block}."
        names += [f"{prefix}gamma1", f"{prefix}gamma2"]
        names += named(prefix, "norm1", "attn.q", "attn.k", "attn.v", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    return names


PUBLISHED = {
    "resnet50": resnet((3, 4, 6, 3)),
    "resnet101": resnet((3, 4, 23, 3)),
    "resnet152": resnet((3, 8, 36, 3)),
    "resnet152_fd": resnet_fd(),
    "wide_resnet50_2": resnet((3, 4, 6, 3)),
    "vgg13": vgg((2, 2, 2, 2, 2)),
    "vgg16": vgg((2, 2, 3, 3, 3)),
    "vgg19": vgg((2, 2, 4, 4, 4)),
    "densenet121": densenet((6, 12, 24, 16)),
    "densenet161": densenet((6, 12, 36, 24)),
    "densenet201": densenet((6, 12, 48, 32)),
    "convnext_small": convnext((3, 3, 27, 3)),
    "convnext_base": convnext((3, 3, 27, 3)),
    "convnext_large": convnext((3, 3, 27, 3)),
    "swin_small_patch4_window7_224": old_swin((2, 2, 18, 2)),
    "swin_base_patch4_window7_224": old_swin((2, 2, 18, 2)),
    "swin_large_patch4_window7_224": old_swin((2, 2, 18, 2)),
    "vit_small_patch16_224": vit(12),
    "vit_base_patch16_224": vit(12),
    "vit_large_patch16_224": vit(24),
    "t2t_vit_t_14": t2t_vit(14),
    "t2t_vit_t_19": t2t_vit(19),
    "t2t_vit_t_24": t2t_vit(24),
    "xcit_small_12_p16_224": xcit(12),
    "xcit_small_24_p16_224": xcit(24),
    "xcit_medium_12_p16_224": xcit(12),
    "xcit_medium_24_p16_224": xcit(24),
    "xcit_large_12_p16_224": xcit(12),
    "xcit_large_24_p16_224": xcit(24),
}


def published_names(key: str) -> list[str]:
    model = ZOO[key]
    if model.settings.get("global_pool") == "avg":
        return vit(24 if "large" in model.architecture else 12, norm="fc_norm")
    return PUBLISHED[model.architecture]


def modern(name: str, key: str) -> str:
    """What a published name is called in the network that is built today."""
    if not ZOO[key].architecture.startswith("swin"):
        return name
    parts = name.split(".")
    if "downsample" in parts:
        parts[1] = str(int(parts[1]) + 1)
    return ".".join(parts).replace("head.", "head.fc.")


def one_of_each() -> list[str]:
    """A key for every architecture and its settings."""
    return list({(model.architecture, str(model.settings)): key for key, model in ZOO.items()}.values())


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
@pytest.mark.parametrize("key", one_of_each())
def test_a_file_with_the_published_names_loads_as_a_whole(key, tmp_path):
    """On the meta device, from tensors that are one number seen many times, so that no file is large."""
    with torch.device("meta"):
        net = zoo_model(key)
    shapes = {name: value.shape for name, value in net.backbone.state_dict().items()}
    names = published_names(key)
    assert len(set(names)) == len(names)
    buffers = {"relative_position_index": (49, 49), "attn_mask": (1, 49, 49)}  # of old Swins, computed today
    state = {}
    for name in names:
        shape = buffers.get(name.rpartition(".")[2]) or shapes[modern(name, key)]
        dtype = torch.int64 if name.endswith(("num_batches_tracked", "index")) else torch.float32
        state[name] = torch.zeros((), dtype=dtype).expand(shape)
    torch.save(state, tmp_path / "published.pth")
    line = load_weights(net, tmp_path / "published.pth")
    assert ("names converted" in line) == ZOO[key].architecture.startswith("swin")
    missing = next(name for name in names[len(names) // 2 :] if name.endswith(".weight"))
    torch.save({name: value for name, value in state.items() if name != missing}, tmp_path / "partial.pth")
    with pytest.raises(CheckpointError, match="1 keys missing"):
        load_weights(net, tmp_path / "partial.pth")
