"""Weights into networks: found in a checkpoint of whatever codebase, renamed, loaded as a whole or not at all."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from ares_lightning.models.checkpoints import CheckpointError, read_file
from ares_lightning.models.classifier import Classifier
from ares_lightning.models.wide_resnet import WideResNet, from_published

StateDict = dict[str, Tensor]

AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
RAW = ("state_dict", "model", "model_state_dict", "net", "network", "params", "weights")
"""Entries under which training scripts keep the averaged weights, and those of the last step."""
WHICH = ("ema", "raw")
LIGHTNING_RAW = "current_model_state"
"""Where Lightning's weight averaging keeps the raw weights; `state_dict` then holds the average."""
BOOKKEEPING = ("n_averaged",)
"""What torch's AveragedModel counts beside the weights."""
SHELLS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and activation checkpointing put into names, anywhere."""
WRAPPERS = ("module", "model", "backbone", "net", "network", "encoder", "classifier")
MEANS, STDS = ("mean", "mu", "new_mean"), ("std", "sigma", "new_std")
"""Names of the statistics that files keep of a normalisation in front of the network."""
NORMALISATION_TOLERANCE = 1e-4
POSITIONAL = ("pos_embed", "patch_embed", "relative_position_bias_table")
"""Parts of the names of what depends on the image or patch size and can be resampled."""


def load_network(network: nn.Module, state_dict: Mapping[str, Tensor], path: Path, prefix: str = "net.") -> None:
    """Load the entries of `state_dict` that start with `prefix` into `network`, all of them or none.

    Files from before PyTorch 0.4.1 lack the batch norms' `num_batches_tracked`, which inference never looks at; the
    network then keeps its own.

    Raises CheckpointError naming `path` and the keys or shapes that do not fit, or the weights that are no finite
    numbers.
    """
    weights = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    own = network.state_dict()
    weights = {**{key: value for key, value in own.items() if _is_counter(key)}, **weights}
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{path}: is of another architecture: {len(missing)} keys missing ({_some(missing)}), "
            f"{len(unexpected)} unexpected ({_some(unexpected)}); give the model it was trained with"
        )
    for key, value in weights.items():
        if value.shape != own[key].shape:
            raise CheckpointError(
                f"{path}: {key} has shape {list(value.shape)}, the model has {list(own[key].shape)}; "
                "give the model and the number of classes it was trained with"
            )
        is_plain = value.layout == torch.strided and not value.is_quantized and not value.is_meta
        if not is_plain or value.is_floating_point() != own[key].is_floating_point():
            kind = "sparse" if value.layout != torch.strided else "without values" if value.is_meta else value.dtype
            raise CheckpointError(
                f"{path}: {key} is {kind}, the model has {own[key].dtype}; give the weights as they were trained, "
                "from before they were quantised or packed"
            )
        num_bad = int((~value.float().isfinite()).sum()) if value.is_floating_point() else 0
        if num_bad:
            raise CheckpointError(
                f"{path}: {key} holds {num_bad} values that are NaN or infinite; the training diverged, or the "
                "file is damaged: give another checkpoint"
            )
    network.load_state_dict(weights)


def load_weights(
    classifier: Classifier,
    path: Path,
    *,
    weights: str | None = None,
    resample: bool = False,
    new_head: bool = False,
) -> str:
    """Load the network of `classifier` from a checkpoint of any of the usual codebases; return one line on it.

    Recognised by what lies in them are bare state dicts and the checkpoints of timm, ARES, RobustBench, MadryLab's
    robustness, easyrobust and Lightning, as .pth or .safetensors, under the prefixes of DDP, torch.compile and
    wrapper modules, with the names of parameters of the official code where timm knows them.

    weights: `ema` or `raw`; by default the averaged ones if there are any. resample: fit position embeddings and
    patches to another image or patch size (Dosovitskiy et al. 2021, arXiv 2010.11929, section 3.2; Beyer et al.
    2023, arXiv 2212.08013, section 3.4). new_head: leave the last layer as it is where the file lacks one for as
    many classes.

    Raises CheckpointError, with the network unchanged, for a file that `read_file` refuses or that holds no
    weights, for names that are missing or left over, for shapes that do not fit, and for another normalisation
    than the classifier's.
    """
    content = read_file(path)
    return _load(classifier, content, path, weights=weights, resample=resample, new_head=new_head)


def load_timm_weights(classifier: Classifier, name: str, *, resample: bool = False, new_head: bool = False) -> str:
    """Load weights of timm's hub, `<architecture>.<tag>`, as `load_weights` does a file; return one line on it.

    Raises CheckpointError where they are neither cached nor can be downloaded.
    """
    try:
        published = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # of the hub, its transport, the file system or timm: each means that there are none
        raise CheckpointError(
            f"model.weights={name}: timm cannot get them ({type(error).__name__}); connect to huggingface.co once, "
            "copy its cache here (HF_HOME), or give model.weights=<file>; model.weights=null begins at random"
        ) from error
    return _load(classifier, published, Path(name), weights=None, resample=resample, new_head=new_head)


def trained_weights(checkpoint: Mapping[str, Any], path: Path, weights: str | None) -> StateDict:
    """Return the weights of a checkpoint of this project, `ema` or `raw`; by default the averaged ones if there
    are any.

    Raises CheckpointError where averaged ones are asked for and there are none.
    """
    return _state_dict(checkpoint, path, weights)[0]


def timm_name(name: str, weights: str | None) -> str | None:
    """Return `<architecture>.<tag>` where `weights`, or the tag in a model's name, are weights that timm has.

    Raises ValueError where both name some.
    """
    architecture, _, tag = name.partition(".")
    if tag and weights:
        raise ValueError(f"weights={weights}: name={name} names weights too; give one of them")
    published = f"{architecture}.{weights or tag}"
    return published if timm.is_model_pretrained(published) else None


def no_such_weights(name: str, weights: str) -> str:
    """Return what is said about weights that are neither a file nor a folder nor a tag."""
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{name}.*")]
    near = get_close_matches(weights, tags, n=1) or tags[:1]
    known = f"of which {name} has {', '.join(near)}" if near else f"of which {name} has none"
    return f"weights={weights}: is no file, no folder and no tag of timm, {known}"


def _load(
    classifier: Classifier, content: Any, path: Path, *, weights: str | None, resample: bool, new_head: bool
) -> str:
    network = classifier.backbone
    found, entry = _state_dict(content, path, weights)
    own = {key: value for key, value in network.state_dict().items() if not _is_counter(key)}
    prefix, copies = _prefixes(found, own, path)
    state = {key.removeprefix(prefix): value for key, value in found.items() if key not in copies}
    statistics = [key for key in state if key.rpartition(".")[2] in MEANS + STDS and key not in own]
    _check_normalisation(classifier, {key: state.pop(key) for key in statistics} | _recorded(content), path)
    notes = [entry and f"from {entry}", prefix and f"under {prefix}"]

    head = _head(network)
    resized = [
        key for key, value in state.items() if _is_positional(key) and key in own and value.shape != own[key].shape
    ]
    if resized and not resample:
        key = resized[0]
        raise CheckpointError(
            f"{path}: {key} has shape {list(state[key].shape)}, the model has {list(own[key].shape)}; was "
            "trained on images or patches of another size: model.resample=true fits it"
        )
    if resized or {key for key in state if not _is_counter(key)} != own.keys() - (head if new_head else set()):
        renamed = _converted(network, state, path, resample)
        notes += [
            "names converted" if renamed.keys() != state.keys() else "",
            f"{', '.join(resized[:2])} resampled" if resized else "",
        ]
        state = renamed
    for key in sorted(head & own.keys()):
        fits = key in state and state[key].shape == own[key].shape
        if not fits and new_head:
            state[key] = own[key]
            notes.append(f"{key} is new")
        elif key in state and len(state[key]) != len(own[key]):
            raise CheckpointError(
                f"{path}: knows {len(state[key])} classes, the data have {len(own[key])}; model.new_head=true "
                "takes all but the last layer"
            )
    notes.append(_widened(state, own))
    load_network(network, state, path, prefix="")
    size = sum(value.numel() for value in own.values()) / 1e6
    return "; ".join([f"weights: {path.name}: {len(own)} tensors, {size:.1f} M numbers", *filter(None, notes)])


def _state_dict(content: Any, path: Path, weights: str | None) -> tuple[StateDict, str]:
    """Return the state dict in a file, without SHELLS in its names, and the entry it lay under."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not weights by name; save model.state_dict()"
        )
    filled = [name for name, value in content.items() if isinstance(value, Mapping) and value]
    averaged = next((name for name in AVERAGED if name in filled), None)
    raw = next((name for name in RAW if name in filled), None)
    if isinstance(content.get(LIGHTNING_RAW), Mapping):
        averaged, raw = "state_dict", LIGHTNING_RAW
    if weights == "ema" and averaged is None:
        raise CheckpointError(f"{path}: holds no averaged weights; give weights=raw")
    entry = raw if weights == "raw" or averaged is None else averaged
    if entry is not None:
        return _state_dict(content[entry], path, None)[0], entry
    tensors = {
        ".".join(part for part in str(key).split(".") if part not in SHELLS): value
        for key, value in content.items()
        if isinstance(value, Tensor) and key not in BOOKKEEPING
    }
    if not tensors:
        raise CheckpointError(
            f"{path}: holds no weights, only {_some(sorted(map(str, content)))}; give another file"
        )
    return tensors, ""


def _prefixes(found: StateDict, own: StateDict, path: Path) -> tuple[str, set[str]]:
    """Return what stands before the network's names in a file, and the names of further copies of its tensors."""
    first = next(iter(own))
    candidates = [key.removesuffix(first) for key in found if key == first or key.endswith(f".{first}")]
    if not candidates:
        return _common_wrappers(found), set()
    covered = {prefix: sum(f"{prefix}{key}" in found for key in own) for prefix in candidates}
    prefix = max(candidates, key=lambda candidate: covered[candidate])
    copies = [other for other in candidates if covered[other] == len(own) and other != prefix]
    for other in copies:
        if not all(_are_equal(found[f"{prefix}{key}"], found[f"{other}{key}"]) for key in own):
            raise CheckpointError(
                f"{path}: holds two such networks, under {prefix} and {other}; save one of them alone"
            )
    return prefix, {f"{other}{key}" for other in copies for key in own} | {
        key for key in found if key.startswith(tuple(copies)) and _is_counter(key)
    }


def _are_equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _common_wrappers(found: StateDict) -> str:
    """Return the names of wrapper modules that stand before every parameter."""
    names = [key.split(".") for key in found if key.rpartition(".")[2] not in MEANS + STDS]
    prefix = ""
    for parts in zip(*names, strict=False):
        if len(set(parts)) > 1 or parts[0] not in WRAPPERS:
            break
        prefix += f"{parts[0]}."
    return prefix


def _converted(network: nn.Module, state: StateDict, path: Path, resample: bool) -> StateDict:
    """Return the state dict under the names that the network has, resampled where timm does so.

    Raises CheckpointError where that resamples what it was not asked to.
    """
    if isinstance(network, WideResNet):
        if "init_conv.weight" in state and network.padding != "same":
            raise CheckpointError(
                f"{path}: has the names of Gowal et al., whose networks pad otherwise than this one: "
                "+model.settings.padding=same, and activation=silu where they have it"
            )
        return from_published(state)
    timms = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if timms is None:
        own = network.state_dict().get("pos_embed") if resample else None
        return state if own is None else {**state, "pos_embed": _resampled(state["pos_embed"], own)}
    try:
        converted: StateDict = timms(dict(state), network)
    except (AttributeError, KeyError, RuntimeError):  # such as a layer that this network lacks
        return state
    given = {value.untyped_storage().data_ptr() for value in state.values()}
    made = [key for key, value in converted.items() if value.untyped_storage().data_ptr() not in given]
    if not resample and any(_is_positional(key) for key in made):
        raise CheckpointError(
            f"{path}: was trained on images or patches of another size: model.resample=true fits {_some(made)}"
        )
    return converted


def _resampled(embedding: Tensor, own: Tensor) -> Tensor:
    """Return position embeddings [1, 1 + tokens, C] for the square grid of the network's own."""
    side = round((own.shape[1] - 1) ** 0.5)
    resampled: Tensor = resample_abs_pos_embed(embedding, new_size=[side, side])
    return resampled


def _check_normalisation(classifier: Classifier, statistics: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError where a file keeps another mean or standard deviation than the classifier has."""
    for key, value in statistics.items():
        name = "mean" if key.rpartition(".")[2] in MEANS else "std"
        own: Tensor = getattr(classifier.normalize, name).flatten()
        given = value.flatten().to(own)
        if len(given) != len(own) or not torch.allclose(given, own, rtol=0, atol=NORMALISATION_TOLERANCE):
            short = [round(number, 6) for number in given.tolist()]
            raise CheckpointError(
                f"{path}: was trained with {key}={short}, the model has {[round(n, 6) for n in own.tolist()]}; "
                f"give model.{name}={str(short).replace(' ', '')}"
            )


def _recorded(content: Any) -> StateDict:
    """Return mean and std of a checkpoint of this project, from its config."""
    config = content.get("config") if isinstance(content, Mapping) else None
    if not isinstance(config, Mapping) or not {"model", "data"} <= config.keys():
        return {}
    return {name: torch.tensor(config["model"].get(name) or config["data"][name]) for name in ("mean", "std")}


def _head(network: nn.Module) -> set[str]:
    """Return the names of the parameters of the last layer."""
    named = (getattr(network, "pretrained_cfg", None) or {}).get("classifier")
    if named is None:
        named = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1:]
    layers = [named] if isinstance(named, str) else named
    return {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def _widened(state: StateDict, own: StateDict) -> str:
    """Tell of weights in another floating-point type, which loading converts."""
    kinds = {
        f"{value.dtype} converted to {own[key].dtype}".replace("torch.", "")
        for key, value in state.items()
        if key in own and value.is_floating_point() and value.dtype != own[key].dtype
    }
    return ", ".join(sorted(kinds))


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _is_positional(key: str) -> bool:
    return any(part in key for part in POSITIONAL)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:2]) + ", …" * (len(keys) > 2) if keys else "none"
