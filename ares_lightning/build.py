"""The one place where a composed config becomes objects, and where bad values become clear errors."""

from __future__ import annotations

import importlib.util
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from omegaconf import DictConfig, OmegaConf, open_dict

from ares_lightning.attacks import Attack, Threat, make_attack, parse_budget
from ares_lightning.attacks.attack import check_count
from ares_lightning.attacks.autoattack import RANDOM_DRAWS
from ares_lightning.attacks.threat import BALLS
from ares_lightning.data import (
    BatchAugmentation,
    ImageError,
    ImageSet,
    Preprocessing,
    RobustDataModule,
    ares_preprocessing,
    collate,
    select_subset,
)
from ares_lightning.data.datasets import Unreadable
from ares_lightning.evaluation.curves import BisectedCurve, BracketedCurve, Curve, ExactCurve, curve_budgets
from ares_lightning.evaluation.evaluators import AttackEvaluator, CleanEvaluator, Evaluator, SetsEvaluator
from ares_lightning.evaluation.run import Evaluation
from ares_lightning.evaluation.sets import FoundSets, corrupted_sets, published_sets
from ares_lightning.models import Classifier, load_timm_weights, load_weights, make_classifier, make_defense
from ares_lightning.models.defenses import Defense
from ares_lightning.models.preprocessing import own_preprocessing
from ares_lightning.models.weights import WHICH, no_such_weights, timm_name
from ares_lightning.models.zoo import find_file
from ares_lightning.training import AdversarialTraining, Objective, RobustTraining, StandardTraining
from ares_lightning.training.checkpointing import AtomicCheckpointIO, Checkpoints
from ares_lightning.training.devices import device_settings
from ares_lightning.training.metrics_file import MetricsFile
from ares_lightning.training.module import MONITORED, to_pixels
from ares_lightning.training.optim import OptimSettings
from ares_lightning.training.preemption import StopSignals
from ares_lightning.training.progress import TrainingProgress


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line with the key, the value and the remedy."""


@contextmanager
def section(prefix: str) -> Iterator[None]:
    """Turn a ValueError `key=value: …` raised inside into a ConfigError `prefix.key=value: …`."""
    try:
        yield
    except (ConfigError, ImageError):
        raise
    except ValueError as error:
        raise ConfigError(f"{prefix}.{error}") from error
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise
        raise ConfigError(f"{prefix}.{unknown[1]}: no such key; {_HOW_TO_LIST_KEYS}") from error


_HOW_TO_LIST_KEYS = "--cfg job prints all keys"

_GROUPS = (
    "data",
    "model",
    "adv",
    "trick",
    "aug",
    "optim",
    "trainer",
    "eval",
    "attack",
    "logger",
    "callbacks",
    "launch",
)
_SINGLE_KEYS = (
    *("threat", "name", "seed", "run_dir", "ckpt", "resume"),
    *("weights", "subset", "precision", "compile", "device"),
)


def check_keys(cfg: DictConfig) -> None:
    """Raise ConfigError for a top-level key that nothing reads, and for a seed that is none."""
    for key in map(str, cfg):
        if key not in _GROUPS + _SINGLE_KEYS:
            raise ConfigError(f"{key}: no such key; {_HOW_TO_LIST_KEYS}")
    if type(cfg.seed) is not int or not 0 <= cfg.seed < 2**32:
        raise ConfigError(f"seed={cfg.seed}: expected a whole number from 0 to 4294967295")
    if type(cfg.compile) is not bool:
        raise ConfigError(f"compile={cfg.compile}: expected true or false")
    if cfg.weights not in (None, *WHICH):
        raise ConfigError(f"weights={cfg.weights}: expected null or one of {', '.join(WHICH)}")


def build_threat(cfg: DictConfig) -> Threat:
    """Build the threat model of `threat`."""
    if cfg.threat.norm not in BALLS:
        raise ConfigError(f"threat.norm={cfg.threat.norm}: expected one of {', '.join(BALLS)}")
    with section("threat"):
        return Threat(cfg.threat.norm, parse_budget(cfg.threat.eps))


def build_data(cfg: DictConfig, *, training: bool) -> RobustDataModule:
    """Build the data module of `data`; the data are looked at, not yet decoded.

    training: whether training images are needed.
    """
    preprocessing = _preprocessing(cfg)
    facts = _plain(cfg.data)
    settings = {key: value for key, value in facts.items() if key not in _DATA_FACTS}
    if training:
        settings |= {"randaugment": cfg.aug.randaugment, "repeats": cfg.aug.repeats}
    with section("data"):
        try:
            data = RobustDataModule(
                **settings,
                seed=cfg.seed,
                training=training,
                preprocessing=preprocessing,
                mean=tuple(facts["mean"]),
            )
        except ImageError:
            raise
        except ValueError as error:  # names its key in full
            raise ConfigError(str(error)) from error
    cfg.data.num_classes = data.num_classes  # for the record, where it was null
    return data


_DATA_FACTS = ("mean", "std", "threat", "epochs", "subset_after_training", "preprocess")
"""Keys of `data` that the model, the threat model, the trainer, the evaluation and the preprocessing take."""

PREPROCESS = ("model", "ares")
ARES_IMG_SIZE = 224


def _preprocessing(cfg: DictConfig) -> Preprocessing | None:
    """Resolve `data.preprocess` and, where it is null, `data.img_size`; None where all images have one size."""
    preprocess = cfg.data.get("preprocess")
    if preprocess is None:
        return None
    if preprocess not in PREPROCESS:
        raise ConfigError(f"data.preprocess={preprocess}: expected one of {', '.join(PREPROCESS)}")
    own = None
    if preprocess == "model":
        with section("data"):
            own = own_preprocessing(cfg.model.name, cfg.model.weights, cfg.model.key, cfg.data.img_size)
    if own is None:
        cfg.data.img_size = ARES_IMG_SIZE if cfg.data.img_size is None else cfg.data.img_size
        return ares_preprocessing(cfg.data.img_size)
    cfg.data.img_size = own.img_size
    return Preprocessing(own.img_size, own.resize, own.interpolation, squash=own.squash)


def build_classifier(cfg: DictConfig, num_classes: int) -> Classifier:
    """Build the network of `model`, fitted to the data, with random weights."""
    name, facts, model = cfg.model.name, _plain(cfg.data), _plain(cfg.model)
    with section("model"):
        published = timm_name(name, model["weights"])
        tag = None if published is None else timm.get_pretrained_cfg(published)
        if tag is not None and facts["in_chans"] == len(tag.mean):
            facts |= {"mean": tag.mean, "std": tag.std}
        return make_classifier(
            name,
            in_chans=facts["in_chans"],
            num_classes=num_classes,
            img_size=facts["img_size"],
            mean=model["mean"] or facts["mean"],
            std=model["std"] or facts["std"],
            defense=_defense(cfg),
            **model["settings"],
        )


def _defense(cfg: DictConfig) -> Defense | None:
    """Build the defence that `model.defense` asks for, by name or by name and settings."""
    setting: Any = OmegaConf.select(cfg, "model.defense")
    if OmegaConf.is_config(setting):
        setting = OmegaConf.to_container(setting)
    if setting is None:
        return None
    settings = {"name": setting} if isinstance(setting, str) else setting
    if not isinstance(settings, dict) or "name" not in settings:
        raise ConfigError(f"model.defense={setting}: expected a name, or {{name: jpeg, quality: 50}}")
    with section("model.defense"):
        return make_defense(**settings)


def take_weights(cfg: DictConfig, classifier: Classifier) -> str | None:
    """Load the weights that `model` names into the classifier; return one line on them, None for none."""
    model = _plain(cfg.model)
    options: dict[str, bool] = {}
    for key in ("resample", "new_head"):
        if type(model[key]) is not bool:
            raise ConfigError(f"model.{key}={model[key]}: expected true or false")
        options[key] = model[key]
    with section("model"):
        published, file = timm_name(model["name"], model["weights"]), None
        if published is None and model["weights"] is not None:
            file = find_file(str(model["weights"]), model["key"])
            if file is None:
                raise ValueError(no_such_weights(model["name"], str(model["weights"])))
    if published is not None:
        print(f"weights: looking for {published} in timm's cache, then at huggingface.co")
        return load_timm_weights(classifier, published, **options)
    return None if file is None else load_weights(classifier, file, weights=cfg.weights, **options)


def average_over_draws(cfg: DictConfig) -> None:
    """Where the model's defence is random, have the attacks of `eval` look at the mean over several draws.

    As many as in AutoAttack's version for randomised models (Croce & Hein 2020, arXiv 2003.01690), where `eot` is
    1.
    """
    if not _is_random(cfg):
        return
    for evaluator in (cfg.get("eval") or {}).values():
        attack = evaluator.get("attack")
        if attack is not None and attack.eot == 1:
            attack.eot = RANDOM_DRAWS


def _is_random(cfg: DictConfig) -> bool:
    defense = _defense(cfg)
    return defense is not None and defense.is_random


def build_objective(cfg: DictConfig) -> Objective:
    """Build the training objective of `adv`."""
    settings = {key: value for key, value in _plain(cfg.adv).items() if key != "val_steps"}
    if settings["name"] == "none":
        return StandardTraining()
    with section("adv"):
        return AdversarialTraining(make_attack(**settings), seed=cfg.seed)


def build_module(cfg: DictConfig, net: Classifier, data: RobustDataModule) -> RobustTraining:
    """Build the LightningModule around a network, with objective, optimizer settings and validation attack."""
    with section("optim"):
        optim = OptimSettings(**_plain(cfg.optim))
    threat = build_threat(cfg)
    with section("adv"):
        try:
            val_attack = make_attack("pgd", norm=threat.norm, eps=threat.eps, steps=cfg.adv.val_steps)
        except ValueError as error:
            raise ValueError(f"val_{error}") from error
    smoothing = cfg.aug.label_smoothing
    if not 0 <= smoothing < 1:
        raise ConfigError(f"aug.label_smoothing={smoothing}: expected a number from 0 to below 1")
    with section("aug"):
        augmentation = BatchAugmentation(cfg.aug.mixup, cfg.aug.cutmix, cfg.aug.erasing, seed=cfg.seed)
    return RobustTraining(
        net,
        num_classes=data.num_classes,
        objective=build_objective(cfg),
        optim=optim,
        val_attack=val_attack,
        label_smoothing=smoothing,
        augmentation=augmentation,
        seed=cfg.seed,
        config=_plain(cfg),
    )


def rehearse(module: RobustTraining, data: RobustDataModule) -> None:
    """Compute the loss on two training images, so that settings that do not go together show before the run."""
    samples = (data.train_set[place] for place in range(len(data.train_set)))
    readable = (sample for sample in samples if not isinstance(sample, Unreadable))
    images, labels, sample_ids = collate(list(islice(readable, 2)))
    with section("adv"), torch.random.fork_rng([]):
        module.eval()
        module.loss(to_pixels(images), labels, sample_ids)
        module.train()


def build_trainer(cfg: DictConfig, run_dir: Path, stop: StopSignals | None = None) -> L.Trainer:
    """Build the Lightning Trainer with its callbacks and loggers; writes nothing yet.

    stop: signals that end the training.
    """
    settings = _plain(cfg.trainer)
    for key in ("max_epochs", "accumulate_grad_batches", "check_val_every_n_epoch"):
        with section("trainer"):
            check_count(key, settings[key])
    with section("trainer"):
        settings |= device_settings(**{key: settings[key] for key in _DEVICE_KEYS})
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # `stop` sees to signals
    debugging = bool(settings["fast_dev_run"])
    loggers = [] if debugging else _loggers(cfg, run_dir)
    try:
        return L.Trainer(
            **settings,
            plugins=plugins,
            callbacks=_callbacks(cfg, run_dir, None if debugging else stop, checkpoints=not debugging),
            logger=loggers or False,
            enable_checkpointing=not debugging,
            default_root_dir=run_dir,
            gradient_clip_val=cfg.optim.clip_grad_norm,
            inference_mode=False,  # a network may cache tensors in validation that a later attack differentiates
            use_distributed_sampler=False,  # the data module shards by itself, without duplicates
            enable_progress_bar=cfg.callbacks.progress,
            enable_model_summary=False,
            log_every_n_steps=1,  # only epoch means are logged
        )
    except (ValueError, TypeError, RuntimeError, L.fabric.utilities.exceptions.MisconfigurationException) as error:
        raise ConfigError(f"trainer: {_one_line(error)}") from error


_DEVICE_KEYS = ("accelerator", "devices", "num_nodes", "strategy", "precision", "sync_batchnorm")


def _callbacks(cfg: DictConfig, run_dir: Path, stop: StopSignals | None, checkpoints: bool) -> list[Callback]:
    callbacks: list[Callback] = [TrainingProgress()] if cfg.callbacks.progress else []
    if checkpoints:
        callbacks += [MetricsFile(run_dir / "metrics.csv"), _checkpoints(cfg, run_dir, stop)]
    for name, settings in _plain(cfg.get("trick")).items():
        if name not in _TRICKS:
            raise ConfigError(f"trick.{name}: expected one of {', '.join(_TRICKS)}")
        with section(f"trick.{name}"):
            callbacks.append(_TRICKS[name](cfg, settings))
    return callbacks


def _checkpoints(cfg: DictConfig, run_dir: Path, stop: StopSignals | None) -> Checkpoints:
    settings = _plain(cfg.callbacks.checkpoint)
    if settings["monitor"] not in MONITORED:
        raise ConfigError(
            f"callbacks.checkpoint.monitor={settings['monitor']}: expected one of {', '.join(MONITORED)}"
        )
    with section("callbacks.checkpoint"):
        if settings["every_n_steps"] is not None:
            check_count("every_n_steps", settings["every_n_steps"])
        return Checkpoints(run_dir / "checkpoints", stop=stop, **settings)


def _early_stopping(cfg: DictConfig, settings: dict[str, Any]) -> Callback:
    checkpoint = cfg.callbacks.checkpoint
    return EarlyStopping(checkpoint.monitor, mode=checkpoint.mode, patience=settings["patience"])


_TRICKS = {"early_stopping": _early_stopping}


def _loggers(cfg: DictConfig, run_dir: Path) -> list[Logger]:
    loggers: list[Logger] = []
    if cfg.logger.name == "tensorboard":
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                "logger=tensorboard: TensorBoard is not installed; pip install ares-lightning[tensorboard]"
            )
        loggers.append(TensorBoardLogger(run_dir, name="", version="tensorboard"))
    elif cfg.logger.name == "wandb":
        settings = {key: value for key, value in _plain(cfg.logger).items() if key != "name"}
        loggers.append(WandbLogger(save_dir=run_dir, name=cfg.name, config=_plain(cfg), **settings))
    elif cfg.logger.name != "csv":
        raise ConfigError(f"logger.name={cfg.logger.name}: expected csv, tensorboard or wandb")
    return loggers


def name_wandb_run(cfg: DictConfig, saved: DictConfig | None) -> None:
    """Put the id of the Weights & Biases run into `logger`: that of a training that goes on, else a new one."""
    if cfg.logger.name == "wandb" and not cfg.logger.get("id"):
        with open_dict(cfg):
            cfg.logger.id = OmegaConf.select(saved, "logger.id") if saved is not None else None
            cfg.logger.id = cfg.logger.id or secrets.token_hex(4)


def check_resumed(cfg: DictConfig, checkpoint: dict[str, Any]) -> None:
    """Raise ConfigError where `optim` is not that of a checkpoint, which goes on, or where that is further."""
    for key, value in _plain(cfg.optim).items():
        before = checkpoint["config"]["optim"].get(key)
        if value != before:
            raise ConfigError(
                f"optim.{key}={value}: the checkpoint was made with {before}, and its optimizer goes on as it was; "
                "leave this out, or begin a new training with model.weights=<checkpoint>"
            )
    if checkpoint["epoch"] > cfg.trainer.max_epochs:
        raise ConfigError(
            f"trainer.max_epochs={cfg.trainer.max_epochs}: the checkpoint has {checkpoint['epoch']} epochs behind "
            "it; give at least so many"
        )


def build_evaluation(cfg: DictConfig, data: RobustDataModule) -> Evaluation:
    """Build what `eval` asks, on the test images that `subset` names."""
    try:
        dataset = select_subset(data.test_set, cfg.subset)
        return Evaluation(
            evaluators=build_evaluators(cfg, data, dataset),
            threat=build_threat(cfg),
            dataset=dataset,
            loader=data.evaluation_loader,
            batch_size=data.eval_batch_size,
            subset=cfg.subset,
            precision=cfg.precision,
            seed=cfg.seed,
            compile=cfg.compile,
            eot=RANDOM_DRAWS if _is_random(cfg) else 1,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_evaluators(cfg: DictConfig, data: RobustDataModule, dataset: ImageSet) -> Sequence[Evaluator]:
    """Build the evaluators of `eval`, in the order in which they are named, for the test images `dataset`."""
    evaluators: list[Evaluator] = []
    for name, settings in _plain(cfg.get("eval")).items():
        kind = settings.pop("type", None)
        if kind not in _EVALUATORS and kind not in _SETS:
            raise ConfigError(f"eval.{name}.type={kind}: expected one of {', '.join([*_EVALUATORS, *_SETS])}")
        if "attack" in settings:
            settings["attack"] = _attack(f"eval.{name}.attack", settings["attack"])
        with section(f"eval.{name}"):
            if kind in _SETS:
                found = _SETS[kind](data, dataset, **settings)
                evaluators.append(SetsEvaluator(name, *found, subset=settings.get("subset", cfg.subset)))
            else:
                evaluators.append(_EVALUATORS[kind](name, **settings))
    return evaluators


_SETS: dict[str, Callable[..., FoundSets]] = {"ood": published_sets, "corruptions": corrupted_sets}


def _curve(name: str, attack: Attack, eps: Sequence[object] | None, mode: str, **settings: Any) -> Curve:
    curves: dict[str, type[Curve]] = {"exact": ExactCurve, "bracketed": BracketedCurve, "bisected": BisectedCurve}
    if mode not in curves:
        raise ValueError(f"mode={mode}: expected one of {', '.join(curves)}")
    given = None if eps is None else [parse_budget(budget) for budget in eps]
    for key in settings:
        if key not in {field.name for field in fields(curves[mode])}:
            raise ValueError(f"{key}={settings[key]}: not a key of mode={mode}")
    return curves[mode](name, attack, curve_budgets(attack.threat.eps, given), **settings)


_EVALUATORS: dict[str, Callable[..., Evaluator]] = {
    "clean": CleanEvaluator,
    "attack": AttackEvaluator,
    "curve": _curve,
}


def _attack(key: str, settings: dict[str, Any]) -> Attack:
    with section(key):
        return make_attack(**settings)


def build_device(name: str) -> torch.device:
    """Return the device called `auto`, `cpu`, `cuda` or `cuda:<i>`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name}: {_one_line(error)}; expected auto, cpu, cuda or cuda:<i>") from error
    return device


def _plain(cfg: Any) -> dict[str, Any]:
    """Return a config node as plain containers, interpolations resolved; no node is an empty one."""
    content: Any = {} if cfg is None else OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return {str(key): value for key, value in content.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
