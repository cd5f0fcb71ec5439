"""The networks that timm lacks, and the head of MAE, against a second statement of their formulas."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ares_lightning.models.conv_stem import WIDTHS, with_conv_stem
from ares_lightning.models.resnet_fd import DenoisingResNet
from ares_lightning.models.t2t_vit import T2TViT
from ares_lightning.models.wide_resnet import PreActResNet18, WideResNet, from_published

State = dict[str, Tensor]


def shaken(net: nn.Module) -> nn.Module:
    """Give norms values of their own, so that nothing is 0 or 1 by default, and compute in float64."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in [*net.named_parameters(), *net.named_buffers()]:
            if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
                value.uniform_(0.5, 1.5)
            elif name.endswith("running_mean") or (value.ndim == 1 and name.endswith("bias")):
                value.uniform_(-0.1, 0.1)
    return net.eval().double()


def assert_agree(logits: Tensor, expected: Tensor) -> None:
    """Both are the same within rounding, and depend on the image."""
    spread = (expected[0] - expected[1]).abs().max()
    assert spread > 1e-3
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def layer_norm(x: Tensor, state: State, name: str, eps: float) -> Tensor:
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (centred**2).sum(-1, keepdim=True) / x.shape[-1]
    return centred / (variance + eps) ** 0.5 * state[f"{name}.weight"] + state[f"{name}.bias"]


def batch_norm(x: Tensor, state: State, name: str) -> Tensor:
    scale = state[f"{name}.weight"] / (state[f"{name}.running_var"] + 1e-5) ** 0.5
    shift = state[f"{name}.bias"] - state[f"{name}.running_mean"] * scale
    return x * scale[:, None, None] + shift[:, None, None]


def gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def linear(x: Tensor, state: State, name: str) -> Tensor:
    out = torch.einsum("...i,oi->...o", x, state[f"{name}.weight"])
    return out + state[f"{name}.bias"] if f"{name}.bias" in state else out


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    weights = torch.einsum("...ic,...jc->...ij", query, key).mul(scale).exp()
    return torch.einsum("...ij,...jc->...ic", weights / weights.sum(-1, keepdim=True), value)


def mlp(x: Tensor, state: State, name: str) -> Tensor:
    return linear(gelu(linear(x, state, f"{name}.fc1")), state, f"{name}.fc2")


def block(x: Tensor, state: State, name: str, heads: int, eps: float) -> Tensor:
    """A transformer block (Dosovitskiy et al. 2021, arXiv 2010.11929, equations 2 and 3)."""
    n, tokens, dim = x.shape
    qkv = linear(layer_norm(x, state, f"{name}.norm1", eps), state, f"{name}.attn.qkv")
    query, key, value = qkv.reshape(n, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    mixed = attention(query, key, value, (dim // heads) ** -0.5).permute(0, 2, 1, 3).reshape(n, tokens, dim)
    x = x + linear(mixed, state, f"{name}.attn.proj")
    return x + mlp(layer_norm(x, state, f"{name}.norm2", eps), state, f"{name}.mlp")


def soft_split(x: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """Every patch of an image as a token [N, places, channels times size times size], from one slice an offset."""
    n, channels, height, width = x.shape
    padded = x.new_zeros(n, channels, height + 2 * padding, width + 2 * padding)
    padded[:, :, padding : padding + height, padding : padding + width] = x
    rows, columns = ((side + 2 * padding - size) // stride + 1 for side in (height, width))
    offsets = [
        padded[:, :, i : i + stride * rows : stride, j : j + stride * columns : stride]
        for i in range(size)
        for j in range(size)
    ]
    return torch.stack(offsets, 2).reshape(n, channels * size * size, rows * columns).permute(0, 2, 1)


def token_layer(x: Tensor, state: State, name: str) -> Tensor:
    dim = x.shape[-1]
    qkv = linear(layer_norm(x, state, f"{name}.norm1", 1e-5), state, f"{name}.attn.qkv")
    query, key, value = qkv[..., :64], qkv[..., 64:128], qkv[..., 128:]
    x = value + linear(attention(query, key, value, dim**-0.5), state, f"{name}.attn.proj")
    return x + mlp(layer_norm(x, state, f"{name}.norm2", 1e-5), state, f"{name}.mlp")


def t2t_logits(images: Tensor, state: State, depth: int, heads: int) -> Tensor:
    """Yuan et al. 2021, arXiv 2101.11986, section 3.1 and figures 2 and 3."""
    x, side = soft_split(images, 7, 4, 2), images.shape[2] // 4
    for i in (1, 2):
        x = token_layer(x, state, f"tokens_to_token.attention{i}")
        x = soft_split(x.permute(0, 2, 1).reshape(len(x), 64, side, side), 3, 2, 1)
        side //= 2
    x = linear(x, state, "tokens_to_token.project")
    positions, dim = x.shape[1] + 1, x.shape[2]
    table = [
        [(math.sin, math.cos)[c % 2](place / 10000 ** ((c - c % 2) / dim)) for c in range(dim)]
        for place in range(positions)
    ]
    x = torch.cat([state["cls_token"].repeat(len(x), 1, 1), x], 1) + torch.tensor(table).double()  # kept in float32
    for i in range(depth):
        x = block(x, state, f"blocks.{i}", heads, 1e-5)
    return linear(layer_norm(x, state, "norm", 1e-5)[:, 0], state, "head")


def test_t2t_vit_is_what_the_paper_says():
    torch.manual_seed(0)
    net = shaken(T2TViT(embed_dim=48, depth=2, num_heads=3, num_classes=7, img_size=48))
    images = torch.rand(3, 3, 48, 48, dtype=torch.float64)
    with torch.inference_mode():
        assert_agree(net(images), t2t_logits(images, net.state_dict(), 2, 3))


def padded_same(x: Tensor, size: int, stride: int) -> Tensor:
    """TensorFlow's SAME: ceil(in / stride) places, the odd zero at the end."""
    before_after = []
    for side in (x.shape[3], x.shape[2]):
        total = max((math.ceil(side / stride) - 1) * stride + size - side, 0)
        before_after += [total // 2, total - total // 2]
    return F.pad(x, before_after)


def fd_logits(images: Tensor, state: State, depths: tuple[int, ...], act) -> Tensor:
    """Xie et al. 2019, arXiv 1812.03411, sections 4 and 6; padding and channel order of the published code."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(padded_same(x, weight.shape[2], stride), weight, stride=stride)

    x = act(batch_norm(conv(images[:, [2, 1, 0]], "conv0", 2), state, "bn0"))
    x = F.max_pool2d(padded_same(x, 3, 2), 3, 2)
    for stage, depth in enumerate(depths):
        for i in range(depth):
            name, stride = f"group{stage}.{i}", 2 if stage and not i else 1
            y = act(batch_norm(conv(x, f"{name}.conv1"), state, f"{name}.bn1"))
            y = act(batch_norm(conv(y, f"{name}.conv2", stride), state, f"{name}.bn2"))
            y = batch_norm(conv(y, f"{name}.conv3"), state, f"{name}.bn3")
            if i == 0:
                x = batch_norm(conv(x, f"{name}.downsample.0", stride), state, f"{name}.downsample.1")
            x = act(x + y)
        name = f"group{stage}.{depth}"
        theta, phi = (conv(x, f"{name}.embedding_{part}").flatten(2) for part in ("theta", "phi"))
        similar = torch.einsum("nci,ncj->nij", theta, phi) / x.shape[1] ** 0.5
        mean = torch.einsum("nij,ncj->nci", similar.softmax(2), x.flatten(2)).reshape(x.shape)
        x = x + batch_norm(conv(mean, f"{name}.conv"), state, f"{name}.bn")
    return linear(x.mean((2, 3)), state, "linear")


@pytest.mark.parametrize(("activation", "act"), [("gelu", gelu), ("relu", lambda x: x.clamp(min=0))])
@pytest.mark.parametrize("size", [(64, 64), (63, 50)])
def test_feature_denoising_is_what_the_paper_says(activation, act, size):
    net = shaken(DenoisingResNet(num_classes=5, layers=(1, 2, 1, 1), activation=activation))
    images = torch.rand(2, 3, *size, dtype=torch.float64)
    with torch.inference_mode():
        assert_agree(net(images), fd_logits(images, net.state_dict(), (1, 2, 1, 1), act))


def mae_logits(images: Tensor, state: State, depth: int, heads: int) -> Tensor:
    """He et al. 2022, arXiv 2111.06377, appendix A.1: the head sees the mean of the patch tokens, normed once."""
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
    x = torch.cat([state["cls_token"].repeat(len(x), 1, 1), x.flatten(2).permute(0, 2, 1)], 1) + state["pos_embed"]
    for i in range(depth):
        x = block(x, state, f"blocks.{i}", heads, 1e-6)
    return linear(layer_norm(x[:, 1:].mean(1), state, "fc_norm", 1e-6), state, "head")


def test_the_head_of_a_masked_autoencoder_norms_once():
    net = shaken(timm.create_model("vit_tiny_patch16_224", global_pool="avg", depth=2, img_size=64, num_classes=9))
    images = torch.rand(3, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        assert_agree(net(images), mae_logits(images, net.state_dict(), 2, 3))
    assert not {key for key in net.state_dict() if key.startswith("norm.")}


def preactivated_logits(
    images: Tensor,
    state: State,
    blocks: list[tuple[str, str, int]],
    norm: str | None,
    head: str,
    act,
    padding: str,
    late: bool,
) -> Tensor:
    """Blocks of (name, name of the skip's convolution, stride), each BN, act, conv, BN, act, conv.

    late: a convolution on the skip takes what comes after the first activation.
    """

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        if padding == "same":
            return F.conv2d(padded_same(x, weight.shape[2], stride), weight, stride=stride)
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)

    x = conv(images, "conv1")
    for name, skip, stride in blocks:
        active = act(batch_norm(x, state, f"{name}.bn1"))
        y = conv(active, f"{name}.conv1", stride)
        y = conv(act(batch_norm(y, state, f"{name}.bn2")), f"{name}.conv2")
        if f"{name}.{skip}.weight" in state:
            x = conv(active if late else x, f"{name}.{skip}", stride)
        x = x + y
    x = x if norm is None else act(batch_norm(x, state, norm))
    return linear(x.mean((2, 3)), state, head)


ACTS = {"relu": lambda x: x.clamp(min=0), "silu": lambda x: x / (1 + torch.exp(-x))}


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_wide_resnets_are_what_their_papers_say(activation, padding):
    net = shaken(WideResNet(depth=16, width=2, activation=activation, padding=padding))
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    blocks = [
        (f"block{stage}.layer.{i}", "convShortcut", 2 if stage > 1 and not i else 1)
        for stage in (1, 2, 3)
        for i in (0, 1)
    ]
    with torch.inference_mode():
        expected = preactivated_logits(
            images, net.state_dict(), blocks, "bn1", "fc", ACTS[activation], padding, late=True
        )
        assert_agree(net(images), expected)


@pytest.mark.parametrize(("active_skip", "final_norm"), [(True, True), (False, True), (False, False)])
def test_preactivation_resnet18_is_what_its_paper_says_and_the_published_files_need(active_skip, final_norm):
    net = shaken(PreActResNet18(active_skip=active_skip, final_norm=final_norm))
    norm = "bn" if final_norm else None
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    blocks = [
        (f"layer{stage}.{i}", "shortcut.0", 2 if stage > 1 and not i else 1)
        for stage in (1, 2, 3, 4)
        for i in (0, 1)
    ]
    with torch.inference_mode():
        expected = preactivated_logits(
            images, net.state_dict(), blocks, norm, "linear", ACTS["relu"], "symmetric", active_skip
        )
        assert_agree(net(images), expected)


def deepmind_names(depth: int) -> set[str]:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {"init_conv.weight", "logits.weight", "logits.bias", *(f"batchnorm.{part}" for part in norm)}
    for stage in range(3):
        names.add(f"layer.{stage}.block.0.shortcut.weight")
        for i in range((depth - 4) // 6):
            prefix = f"layer.{stage}.block.{i}"
            names |= {f"{prefix}.conv_{j}.weight" for j in (0, 1)}
            names |= {f"{prefix}.batchnorm_{j}.{part}" for j in (0, 1) for part in norm}
    return names


@pytest.mark.parametrize(("depth", "width", "millions"), [(28, 10, 36.48), (34, 10, 46.16), (70, 16, 266.80)])
def test_wide_resnets_have_the_published_size_and_take_the_names_of_deepmind_and_of_trades(depth, width, millions):
    """Millions of parameters as counted on the networks of RobustBench's code."""
    with torch.device("meta"):
        net = WideResNet(depth=depth, width=width)
        state = net.state_dict()
    assert sum(parameter.numel() for parameter in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    assert from_published(dict.fromkeys(deepmind_names(depth), torch.zeros(0))).keys() == state.keys()
    unused = dict.fromkeys(["sub_block1.layer.0.bn1.weight", "sub_block1.layer.3.conv2.weight"], torch.zeros(0))
    assert from_published({**state, **unused}).keys() == state.keys()


@pytest.mark.parametrize("name", WIDTHS)
def test_conv_stems_take_the_patch_embeddings_place(name):
    with torch.device("meta"):
        plain, net = timm.create_model(name), with_conv_stem(name, num_classes=11)
        assert net(torch.zeros(2, 3, 224, 224)).shape == (2, 11)
    own = {key for key in net.state_dict() if "stem." in key}
    stem = "stem.stem" if name.startswith("convnext") else "patch_embed.proj.stem"
    convolutions = len(WIDTHS[name])
    places = [3 * i + j for i in range(convolutions) for j in (0, 1)]  # convolution, norm, activation
    places += [] if name.startswith("convnext") else [3 * convolutions]
    assert own == {f"{stem}.{place}.{part}" for place in places for part in ("weight", "bias")}
    others = {key for key in plain.state_dict() if "stem." not in key and "patch_embed." not in key}
    assert net.state_dict().keys() - own == others


def test_bad_settings_are_told():
    with pytest.raises(ValueError, match="depth=30: expected 6 n"):
        WideResNet(depth=30, width=1)
    with pytest.raises(ValueError, match="activation=tanh: expected one of relu, silu"):
        PreActResNet18(activation="tanh")
    with pytest.raises(ValueError, match="padding=valid: expected one of symmetric, same"):
        WideResNet(depth=10, width=1, padding="valid")
    with pytest.raises(ValueError, match="activation=silu: expected one of relu, gelu"):
        DenoisingResNet(activation="silu")
    with pytest.raises(ValueError, match="img_size=100: a T2T-ViT takes multiples of 16"):
        T2TViT(embed_dim=48, depth=1, num_heads=3, img_size=100)
