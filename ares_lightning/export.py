"""A trained model as files that others load: for timm, for RobustBench or as safetensors, with a model card."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import timm
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from ares_lightning.build import build_classifier, check_trusted
from ares_lightning.build.own import TARGET
from ares_lightning.evaluation.fingerprints import model_fingerprint
from ares_lightning.evaluation.robustbench import leaderboard_record
from ares_lightning.models import Classifier, load_network, read_checkpoint
from ares_lightning.models.checkpoints import find_checkpoint
from ares_lightning.models.classifier import ARCHITECTURES
from ares_lightning.models.weights import trained_weights

RECIPE = ("model", "adv", "trick", "aug", "optim", "trainer", "threat", "seed")
"""Groups of the config that say how a model was trained."""
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
"""The names that RobustBench has for norms."""


def export(
    run: Path,
    to: str,
    *,
    output: Path | None = None,
    weights: str | None = None,
    license: str = "unknown",
    evaluations: Sequence[Path] = (),
    trust: Sequence[str] = (),
) -> Path:
    """Write the model of a run folder or checkpoint in a format, with a card; return the folder.

    timm: `model.safetensors` and `config.json`, for `timm.create_model("local-dir:<folder>", pretrained=True)`.
    robustbench: the weights as `<name>.pt` and the facts of its leaderboard as `<name>.json`. safetensors:
    `<name>.safetensors`. All hold the network without its normalisation, whose mean and std stand in the card.

    output: the folder, by default `export/<format>` beside the checkpoints; weights: `ema` or `raw`; license: for
    the card; evaluations: run folders of further evaluations of this model, whose numbers go onto the card;
    trust: classes that the checkpoint may name.

    Raises CheckpointError for a checkpoint that cannot be used, and ValueError for a model that the format cannot
    hold, and for evaluations of another model.
    """
    path = find_checkpoint(run)
    checkpoint = read_checkpoint(path)
    config = checkpoint["config"]
    check_trusted(config["model"], trust, f"{path}: the checkpoint", _trust_option)
    classifier = build_classifier(OmegaConf.create(config), config["data"]["num_classes"])
    load_network(classifier, trained_weights(checkpoint, path, weights), path)
    name = str(config["name"])
    folder = run if run.is_dir() else path.parent.parent
    numbers = _numbers(classifier, folder, evaluations)
    output = output or folder / "export" / to
    writers = {"timm": _write_timm, "robustbench": _write_robustbench, "safetensors": _write_safetensors}
    usage = writers[to](classifier, config, numbers, name, output)
    (output / "README.md").write_text(_card(classifier, config, numbers, name, license, usage), encoding="utf-8")
    return output


def _trust_option(names: Sequence[str]) -> str:
    return " ".join(f"--trust {name}" for name in names)


def _numbers(classifier: Classifier, folder: Path, evaluations: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the summary rows about this very model; raise ValueError for an evaluation of another."""
    own = model_fingerprint(classifier.eval())
    rows: list[dict[str, Any]] = []
    for place in (folder, *evaluations):
        if not (place / "summary.json").is_file():
            if place is folder:
                continue
            raise ValueError(f"--evaluation {place}: has no summary.json; give the run folder of an evaluation")
        tested = set(pd.read_parquet(place / "verdicts", columns=["model_fingerprint"])["model_fingerprint"])
        if own in tested:
            rows += json.loads((place / "summary.json").read_text(encoding="utf-8"))
        elif place is not folder:
            raise ValueError(f"--evaluation {place}: is about model {', '.join(sorted(tested))}, this one is {own}")
    return rows


def _weights(classifier: Classifier) -> dict[str, Tensor]:
    return {key: value.contiguous() for key, value in classifier.backbone.state_dict().items()}


def _write_timm(
    classifier: Classifier, config: dict[str, Any], numbers: Sequence[dict[str, Any]], name: str, output: Path
) -> str:
    architecture = str(config["model"]["name"]).partition(".")[0]
    if TARGET in config["model"] or architecture in ARCHITECTURES:
        unknown = config["model"].get(TARGET, architecture)
        raise ValueError(f"--to timm: timm has no {unknown}; export --to safetensors")
    with torch.device("meta"):
        plain = timm.create_model(architecture, **classifier.settings).state_dict()
    own = _weights(classifier)
    if {key: value.shape for key, value in plain.items()} != {key: value.shape for key, value in own.items()}:
        raise ValueError(
            f"--to timm: {architecture} was fitted to small images, which timm's is not; export --to safetensors"
        )
    mean, std = _normalisation(classifier)
    size = [config["data"]["in_chans"], config["data"]["img_size"], config["data"]["img_size"]]
    described = {
        "architecture": architecture,
        "num_classes": config["data"]["num_classes"],
        "num_features": classifier.backbone.num_features,
        "model_args": classifier.settings,
        "pretrained_cfg": {
            "mean": mean,
            "std": std,
            "input_size": size,
            "num_classes": config["data"]["num_classes"],
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    save_file(own, output / "model.safetensors", {"format": "pt"})
    (output / "config.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return _USAGE["timm"].format(folder=output.name)


def _write_robustbench(
    classifier: Classifier, config: dict[str, Any], numbers: Sequence[dict[str, Any]], name: str, output: Path
) -> str:
    facts = leaderboard_record(config, numbers, name)
    output.mkdir(parents=True, exist_ok=True)
    torch.save(_weights(classifier), output / f"{name}.pt")
    (output / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    mean, std = _normalisation(classifier)
    return _USAGE["robustbench"].format(
        name=name,
        network=_OWN_NETWORK if TARGET in config["model"] else _SHIPPED_NETWORK,
        mean=mean,
        std=std,
        norm=NORMS[config["threat"]["norm"]],
        dataset=config["data"]["name"],
    )


def _write_safetensors(
    classifier: Classifier, config: dict[str, Any], numbers: Sequence[dict[str, Any]], name: str, output: Path
) -> str:
    output.mkdir(parents=True, exist_ok=True)
    facts = {"architecture": str(config["model"]["name"]), "settings": json.dumps(classifier.settings)}
    save_file(_weights(classifier), output / f"{name}.safetensors", facts)
    if TARGET in config["model"]:
        command = _command(classifier, config["model"], name)
        return _USAGE["own safetensors"].format(name=name, architecture=config["model"][TARGET], command=command)
    return _USAGE["safetensors"].format(name=name, architecture=config["model"]["name"])


def _command(classifier: Classifier, model: Mapping[str, Any], name: str) -> str:
    """Return the command that evaluates the exported weights of a user's own class."""
    mean, std = _normalisation(classifier)
    words = ["model=timm", f"model.name={model['name']}", f"+model.{TARGET}={model[TARGET]}"]
    words += [f"+model.settings.{key}={json.dumps(value)}" for key, value in classifier.settings.items()]
    words += [f"model.mean={mean}", f"model.std={std}", f"model.weights={name}.safetensors"]
    return f"{shlex.join(['python', 'evaluate.py', *words])} data=…"


_USAGE = {
    "timm": """\
```python
import timm
import torch

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()  # the path of this folder
mean, std = (torch.tensor(model.pretrained_cfg[name]).view(-1, 1, 1) for name in ("mean", "std"))
logits = model((images - mean) / std)  # images [N, C, H, W] in [0, 1]
```""",
    "robustbench": """\
An entry of RobustBench's model zoo ({dataset}, {norm}); `network` is {network}:

```python
("{name}", {{"model": lambda: normalize_model(network, {mean}, {std}), "gdrive_id": "…"}})
```

`{name}.json` is its line on the leaderboard; what is null there is for its authors to say.""",
    "safetensors": """\
```python
from safetensors.torch import load_file

network.load_state_dict(load_file("{name}.safetensors"))  # network: {architecture}
```

or `python evaluate.py model=timm model.name={architecture} model.weights={name}.safetensors data=…`
(settings: `+model.settings.<key>=<value>`).""",
    "own safetensors": """\
```python
from safetensors.torch import load_file

network.load_state_dict(load_file("{name}.safetensors"))  # network: an object of {architecture}
```

or, where that class can be imported, which these files do not hold:

```sh
{command}
```""",
}
_SHIPPED_NETWORK = """\
the architecture above, built by timm or by
`ares_lightning.models.make_classifier(...).backbone`"""
_OWN_NETWORK = "an object of the class above, which these files do not hold"


def _normalisation(classifier: Classifier) -> tuple[list[float], list[float]]:
    mean, std = classifier.normalize.mean, classifier.normalize.std
    return [round(v, 6) for v in mean.flatten().tolist()], [round(v, 6) for v in std.flatten().tolist()]


def _card(
    classifier: Classifier,
    config: dict[str, Any],
    numbers: Sequence[dict[str, Any]],
    name: str,
    license: str,
    usage: str,
) -> str:
    mean, std = _normalisation(classifier)
    data, threat = config["data"], config["threat"]
    architecture = config["model"].get(TARGET, config["model"]["name"])
    num_parameters = sum(parameter.numel() for parameter in classifier.backbone.parameters())
    recipe = yaml.safe_dump({key: config[key] for key in RECIPE if key in config}, sort_keys=False).strip()
    head = yaml.safe_dump(
        {"license": license, "tags": ["image-classification", "adversarial-robustness"]}, sort_keys=False
    )
    return f"""\
---
{head}---
# {name}

{architecture}, {num_parameters / 1e6:.1f} M parameters, {data["num_classes"]} classes of {data["name"]}.
Images {data["in_chans"]}x{data["img_size"]}x{data["img_size"]} in [0, 1], normalised by mean {mean} and std {std}.
Trained with `adv={config["adv"]["name"]}` for {threat["norm"]} {threat["eps"]}.

## Use

{usage}

## Robustness

{_table(numbers)}

## Recipe

```yaml
{recipe}
```

## Licence

{license}
"""


def _table(numbers: Sequence[dict[str, Any]]) -> str:
    """Return the accuracies with their intervals as a Markdown table."""
    if not numbers:
        return "No evaluation of these weights is on record."
    lines = ["| evaluator | metric | threat | accuracy | 95 % interval | images |", "|---|---|---|---|---|---|"]
    for row in numbers:
        budget = "any budget" if row["eps"] is None else f"{row['eps']:.4g}"
        threat = "-" if row["norm"] is None else f"{row['norm']} {budget}"
        images = f"{row['n']} of {row['set']}" + ("" if row["subset"] is None else f" ({row['subset']})")
        cells = row["evaluator"], row["metric"].replace("_", " "), threat, f"{row['value']:.1%}"
        lines.append(f"| {' | '.join(cells)} | [{row['low']:.1%}, {row['high']:.1%}] | {images} |")
    return "\n".join(lines)
