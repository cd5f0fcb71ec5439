"""The other models of a transfer matrix, and the evaluators that craft on each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from ares_lightning.attacks import Attack, Threat
from ares_lightning.build.budgets import attack_at_budget
from ares_lightning.build.config import ConfigError, section
from ares_lightning.build.model import build_classifier, take_weights
from ares_lightning.build.own import TARGET, check_trusted
from ares_lightning.data import ImageSet
from ares_lightning.evaluation.fingerprints import model_fingerprint
from ares_lightning.evaluation.sets import NothingFoundError
from ares_lightning.evaluation.transfer import OtherModel, TransferEvaluator
from ares_lightning.models import CheckpointError, ClassAnswers, load_network, read_checkpoint
from ares_lightning.models.checkpoints import find_checkpoint
from ares_lightning.models.weights import trained_weights
from ares_lightning.models.zoo import find_model

T = TypeVar("T")
ZOO_PREFIX = "zoo/"
FACTS = ("num_classes", "in_chans", "img_size")
"""Keys of `data` in which the models of a matrix must agree."""
_MODEL_SETTINGS: dict[str, Any] = {
    "settings": {},
    **dict.fromkeys(("mean", "std", "activation", "weights", "defense")),
    "resample": False,
    "new_head": False,
}
"""What the group model has where nothing is said."""


def build_transfer(
    name: str,
    cfg: DictConfig,
    dataset: ImageSet,
    threat: Threat,
    models: Any,
    attacks: Sequence[str | Mapping[str, Any]],
    **shared: Any,
) -> list[TransferEvaluator]:
    """Build one evaluator for each model that examples are crafted on, the evaluated one first.

    models: places or settings of the others, a list or by name. attacks: names, or settings with a name. shared:
    settings of all attacks that have them.

    Raises NothingFoundError where no models are given, and ValueError for those that cannot be used together.
    """
    given = _named(models)
    own = str(cfg.name)
    others = tuple(
        _other(key, model, cfg, dataset) for key, model in given.items() if not _is_evaluated(model, cfg)
    )
    if not others:
        raise NothingFoundError(
            f"models={models}: give others than the evaluated model, such as [runs/a,zoo/resnet50_at], to craft on "
            "and to judge"
        )
    names = [own, *(other.name for other in others)]
    if len(set(names)) < len(names):
        raise ValueError(
            f"models={models}: {own} is the evaluated model's name; give the others names of their own"
        )
    by_weights: dict[str, str] = {}
    for other in others:
        same = by_weights.setdefault(other.fingerprint, other.name)
        if same != other.name:
            raise ValueError(f"models={models}: {same} and {other.name} are the same model; leave one of them out")
    made = tuple(_attack(attack, shared, cfg, threat) for attack in attacks)
    if len({attack.name for attack in made}) < len(made):
        raise ValueError(f"attacks={attacks}: names an attack twice")
    return [TransferEvaluator(name, made, own, others, source, subset=cfg.subset) for source in names]


def _attack(
    settings: str | Mapping[str, Any], shared: Mapping[str, Any], cfg: DictConfig, threat: Threat
) -> Attack:
    own = {"name": settings} if isinstance(settings, str) else dict(settings)
    if TARGET in own:
        return attack_at_budget(own, cfg, threat, **shared)
    single_step = own["name"] == "fgsm"
    common = {key: value for key, value in shared.items() if not (single_step and key in ("steps", "step_size"))}
    return attack_at_budget({**common, **own}, cfg, threat)


def _named(models: Any) -> dict[str, Any]:
    """Return the models by name; those of a list are called after their run, file or key."""
    if models is None:
        return {}
    if isinstance(models, Mapping):
        return dict(models)
    if not isinstance(models, list | tuple) or not all(isinstance(model, str) for model in models):
        raise ValueError(f"models={models}: expected a list such as [runs/a,zoo/resnet50_at], or models by name")
    names = [_short_name(model) for model in models]
    if len(set(names)) < len(names):
        names = list(models)
    return dict(zip(names, models, strict=True))


def _short_name(model: str) -> str:
    """Return `<name>/<run id>` of a run folder or of its checkpoints, else the last part."""
    path = Path(model)
    if path.parent.name == "checkpoints":
        path = path.parent.parent
    return path.name if model.startswith(ZOO_PREFIX) or path.suffix else "/".join(path.parts[-2:])


def _is_evaluated(model: Any, cfg: DictConfig) -> bool:
    """Return whether this is the place that the evaluated model comes from, so that one list serves all runs."""
    if not isinstance(model, str):
        return False
    own = OmegaConf.select(cfg, "ckpt")
    if model.startswith(ZOO_PREFIX):
        return own is None and cfg.model.key == model.removeprefix(ZOO_PREFIX)
    return own is not None and _checkpoint(model).resolve() == find_checkpoint(Path(own)).resolve()


def _checkpoint(model: str) -> Path:
    return _naming(model, find_checkpoint, Path(model))


def _naming(model: str, open_it: Callable[[Path], T], path: Path) -> T:
    """Open a checkpoint; raise ValueError naming the model where it cannot be used."""
    try:
        return open_it(path)
    except CheckpointError as error:
        raise ValueError(f"models={model}: {error}") from error


def _other(name: str, model: Any, cfg: DictConfig, dataset: ImageSet) -> OtherModel:
    """Load a model with its weights."""
    if isinstance(model, str) and not model.startswith(ZOO_PREFIX):
        path = _checkpoint(model)
        checkpoint = _naming(model, read_checkpoint, path)
        config = OmegaConf.create(checkpoint["config"])
        for key in FACTS:
            if config.data[key] != cfg.data[key]:
                raise ValueError(
                    f"models={model}: has data.{key}={config.data[key]}, the evaluated model {cfg.data[key]}; give "
                    "models for the same images and classes"
                )
        check_trusted(config.model, cfg.trust, f"eval.transfer.models={model}: its checkpoint")
        classifier = build_classifier(config, config.data.num_classes)
        load_network(classifier, trained_weights(checkpoint, path, None), path)
    else:
        settings = _settings(name, model)
        own = OmegaConf.create({"model": settings, "data": cfg.data, "weights": cfg.weights})
        with section(name):
            classifier = build_classifier(own, cfg.data.num_classes)
            if take_weights(own, classifier) is None:
                raise ConfigError(f"eval.transfer.models.{name}.weights=null: expected a file, a folder or a tag")
    network = classifier.eval()
    answering = network if dataset.outputs is None else ClassAnswers(network, dataset.outputs)
    return OtherModel(name, answering, model_fingerprint(network))


def _settings(name: str, model: Any) -> dict[str, Any]:
    """Return settings of the group model: of the zoo's model where it names one, and its own."""
    if isinstance(model, str):
        model = {"zoo": model.removeprefix(ZOO_PREFIX)}
    if not isinstance(model, Mapping):
        raise ValueError(f"models.{name}={model}: expected a run, a checkpoint, zoo/<key>, or settings with a name")
    own = dict(model)
    of_zoo = find_model(own.pop("zoo")).config() if "zoo" in own else {}
    settings = {"key": name, **_MODEL_SETTINGS, **of_zoo, **own}
    unknown = settings.keys() - _MODEL_SETTINGS.keys() - {"key", "name", TARGET}
    if unknown or "name" not in settings:
        wrong = f"{min(unknown)}: no such key" if unknown else "name: must be given"
        raise ValueError(f"models.{name}.{wrong}; expected settings as in the group model")
    return settings
