"""The one place where a composed config becomes objects, and where bad values become clear errors."""

from __future__ import annotations

import importlib.util
import inspect
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
from ares_lightning.models import (
    Classifier,
    load_network,
    load_timm_weights,
    load_weights,
    make_classifier,
    make_defense,
    read_checkpoint,
)
from ares_lightning.models.checkpoints import find_checkpoint
from ares_lightning.models.defenses import Defense
from ares_lightning.models.preprocessing import own_preprocessing
from ares_lightning.models.weights import WHICH, no_such_weights, timm_name, trained_weights
from ares_lightning.models.zoo import find_file
from ares_lightning.training import RobustTraining
from ares_lightning.training.checkpointing import AtomicCheckpointIO, Checkpoints
from ares_lightning.training.cost import StepCost, step_cost
from ares_lightning.training.devices import device_settings
from ares_lightning.training.forecast import Forecast
from ares_lightning.training.metrics_file import MetricsFile
from ares_lightning.training.module import MONITORED, to_pixels
from ares_lightning.training.objectives import OBJECTIVES, AuxiliaryNorms, InnerAttack, Objective
from ares_lightning.training.optim import OptimSettings
from ares_lightning.training.preemption import StopSignals
from ares_lightning.training.progress import TrainingProgress
from ares_lightning.training.tricks import AWP, EMA, SWA, NonFiniteGuard, OverfittingProbe


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
        aug = _plain(cfg.aug)
        settings |= {key: aug[key] for key in ("randaugment", "color_jitter", "resolution", "repeats")}
        settings |= {"num_views": _objective(cfg).num_views, "replays": cfg.adv.get("replays", 1)}
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
            activation=model["activation"],
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


def build_objective(cfg: DictConfig, net: Classifier, num_classes: int) -> Objective:
    """Build the training objective of `adv` for a network."""
    settings = {key: value for key, value in _plain(cfg.adv).items() if key not in ("name", "val_steps")}
    objective = _objective(cfg)
    takes = inspect.signature(objective).parameters
    arguments: dict[str, Any] = {key: settings.pop(key) for key in takes if key in settings}
    with section("adv"):
        if "norms" in takes:
            split = settings.pop("split_bn")
            if type(split) is not bool:
                raise ValueError(f"split_bn={split}: expected true or false")
            arguments["norms"] = AuxiliaryNorms(net) if split else None
        if "teacher" in takes:
            arguments["teacher"] = _teacher(cfg, num_classes)
        if "threat" in takes:
            arguments["threat"] = Threat(settings.pop("norm"), parse_budget(settings.pop("eps")))
        if "inner" in takes:
            arguments["inner"] = _inner_attack(settings, cfg.seed)
        elif settings:
            raise ValueError(f"{next(iter(settings))}: no such key; {_HOW_TO_LIST_KEYS}")
        return objective(**arguments)


def _objective(cfg: DictConfig) -> type[Objective]:
    if cfg.adv.name not in OBJECTIVES:
        raise ConfigError(f"adv.name={cfg.adv.name}: expected one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[cfg.adv.name]


def _inner_attack(settings: dict[str, Any], seed: int) -> InnerAttack:
    own = {key: settings.pop(key) for key in ("eps_warmup_epochs", "step_warmup_epochs") if key in settings}
    mode, attack = settings.pop("attack_mode", "eval"), settings.pop("attack")
    return InnerAttack(attack=make_attack(attack, **settings), seed=seed, mode=mode, **own)


def _teacher(cfg: DictConfig, num_classes: int) -> Classifier:
    """Build the network of `adv.teacher`: a checkpoint or run folder of this project, or settings as in `model`."""
    teacher = _plain(cfg.adv)["teacher"]
    if teacher is None:
        raise ValueError("teacher=null: give a checkpoint or a run folder, or {name: …, weights: …} as in model")
    own = cfg.copy()
    if isinstance(teacher, dict):
        fresh: dict[str, Any] = {"settings": {}, "activation": None, "defense": None, "key": teacher.get("name")}
        own.model = {**_plain(cfg.model), **fresh, **teacher}
        net = build_classifier(own, num_classes)
        if take_weights(own, net) is None:
            raise ValueError(f"teacher={teacher}: has no weights; give weights: <file or tag>")
        return net
    path = find_checkpoint(Path(str(teacher)))
    checkpoint = read_checkpoint(path)
    saved = OmegaConf.create(checkpoint["config"])
    if saved.data.num_classes != num_classes or saved.data.img_size != cfg.data.img_size:
        raise ValueError(
            f"teacher={teacher}: knows {saved.data.num_classes} classes of {saved.data.img_size} pixels, the "
            f"student {num_classes} of {cfg.data.img_size}"
        )
    net = build_classifier(saved, num_classes)
    load_network(net, trained_weights(checkpoint, path, None), path)
    return net


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
    augmentation = _batch_augmentation(cfg, data)
    objective = build_objective(cfg, net, data.num_classes)
    _check_together(cfg, objective)
    _checkpoint_activations(cfg, net)
    return RobustTraining(
        net,
        num_classes=data.num_classes,
        objective=objective,
        optim=optim,
        val_attack=val_attack,
        label_smoothing=smoothing,
        augmentation=augmentation,
        seed=cfg.seed,
        compile=cfg.trainer.compile,
        config=_plain(cfg),
    )


def _checkpoint_activations(cfg: DictConfig, net: Classifier) -> None:
    """Have the network keep less of a forward and compute it again in the backward, where that is wanted."""
    for key in ("compile", "activation_checkpointing"):
        if type(cfg.trainer[key]) is not bool:
            raise ConfigError(f"trainer.{key}={cfg.trainer[key]}: expected true or false")
    if not cfg.trainer.activation_checkpointing:
        return
    backbone: Any = net.backbone
    try:
        backbone.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise ConfigError(
            f"trainer.activation_checkpointing=true: {cfg.model.name} cannot; set it to false"
        ) from error


def _check_together(cfg: DictConfig, objective: Objective) -> None:
    """Raise ConfigError for settings of which each makes sense, but not beside the other."""
    name, tricks, aug = cfg.adv.name, _plain(cfg.get("trick")), cfg.aug
    if {"ema", "swa"} <= tricks.keys():
        raise ConfigError("trick=[ema,swa]: both say what the averaged weights are; take one of them")
    probe = tricks.get("overfitting_probe", {})
    if probe.get("action") == "fall_back" and {"ema", "swa"} & tricks.keys():
        raise ConfigError(
            "trick.overfitting_probe.action=fall_back: the average of trick=[ema] or [swa] has no way back; set "
            "stop"
        )
    if probe and name == "none":
        raise ConfigError("trick=[overfitting_probe]: adv=none trains against no attack; leave it out")
    if objective.wants_class_labels and (aug.label_smoothing or aug.mixup or aug.cutmix):
        key = "label_smoothing" if aug.label_smoothing else "mixup" if aug.mixup else "cutmix"
        raise ConfigError(f"aug.{key}={aug[key]}: the loss of adv={name} needs class labels; set it to 0")
    if objective.replays > 1 and cfg.trainer.accumulate_grad_batches > 1:
        raise ConfigError(
            f"trainer.accumulate_grad_batches={cfg.trainer.accumulate_grad_batches}: adv={name} updates in every "
            "replay; set it to 1"
        )
    if name == "free" and "awp" in tricks:
        raise ConfigError(
            "trick=[awp]: adv=free moves its images in the backward of the loss; leave one of them out"
        )
    if objective.differentiates_twice and cfg.trainer.compile:
        raise ConfigError(
            f"trainer.compile=true: adv={name} differentiates twice, which compiled networks cannot; set it false"
        )


def _batch_augmentation(cfg: DictConfig, data: RobustDataModule) -> BatchAugmentation:
    settings = {key: cfg.aug[key] for key in ("mixup", "cutmix", "switch_prob", "erasing")}
    with section("aug"):
        augmentation = BatchAugmentation(**settings, copies=data.repeats * data.num_views, seed=cfg.seed)
    group = 2 * data.repeats
    if augmentation.mixes and any(size % group for size in data.batch_size.all):
        raise ConfigError(
            f"{data.batch_size}: must be a multiple of {group} (2 * aug.repeats), since aug.mixup and aug.cutmix "
            "mix an image with its neighbour"
        )
    return augmentation


def rehearse(module: RobustTraining, data: RobustDataModule) -> StepCost | None:
    """Compute the loss on two training images, so that settings that do not go together show before the run.

    Returns what a step costs, None for a network that cannot be followed without computing.
    """
    samples = (data.train_set[place] for place in range(len(data.train_set)))
    readable = (sample for sample in samples if not isinstance(sample, Unreadable))
    images, labels, sample_ids = collate(list(islice(readable, 2)))
    with torch.random.fork_rng([]):
        module.eval()
        with section("adv"):
            module.loss(to_pixels(images), labels, sample_ids)
        with section("aug"), torch.no_grad():
            for side in () if data.resolution is None else data.resolution.all:
                _check_resolution(module.net, images, side)
        module.train()
        pixels, targets = module.augmented(to_pixels(images), labels, sample_ids)
        with suppress(NotImplementedError):
            return step_cost(module.net, module.objective, pixels, targets)
    return None


def _check_resolution(net: torch.nn.Module, images: torch.Tensor, side: int) -> None:
    try:
        net(images.new_zeros(len(images), images.shape[1], side, side, dtype=torch.float32))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"resolution: the network cannot take {side} pixels: {_one_line(error)}") from error


def build_trainer(
    cfg: DictConfig,
    run_dir: Path,
    stop: StopSignals | None = None,
    *,
    cost: StepCost | None = None,
) -> L.Trainer:
    """Build the Lightning Trainer with its callbacks and loggers; writes nothing yet.

    stop: signals that end the training. cost: of a step, for the forecast.
    """
    settings = {key: value for key, value in _plain(cfg.trainer).items() if key not in _TRAINER_KEYS}
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
            callbacks=_callbacks(cfg, run_dir, None if debugging else stop, cost, checkpoints=not debugging),
            logger=loggers or False,
            enable_checkpointing=not debugging,
            default_root_dir=run_dir,
            gradient_clip_val=cfg.optim.clip_grad_norm,
            inference_mode=False,  # a network may cache tensors in validation that a later attack differentiates
            reload_dataloaders_every_n_epochs=int(OmegaConf.is_config(cfg.data.batch_size)),  # sizes by epoch
            use_distributed_sampler=False,  # the data module shards by itself, without duplicates
            enable_progress_bar=cfg.callbacks.progress,
            enable_model_summary=False,
            log_every_n_steps=1,  # only epoch means are logged
        )
    except (ValueError, TypeError, RuntimeError, L.fabric.utilities.exceptions.MisconfigurationException) as error:
        raise ConfigError(f"trainer: {_one_line(error)}") from error


_TRAINER_KEYS = ("compile", "activation_checkpointing")
"""Keys of `trainer` that are no arguments of lightning.Trainer."""
_DEVICE_KEYS = ("accelerator", "devices", "num_nodes", "strategy", "precision", "sync_batchnorm")


def _callbacks(
    cfg: DictConfig, run_dir: Path, stop: StopSignals | None, cost: StepCost | None, *, checkpoints: bool
) -> list[Callback]:
    callbacks: list[Callback] = [TrainingProgress()] if cfg.callbacks.progress else []
    callbacks += [NonFiniteGuard(), Forecast(cost)]
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
    return EarlyStopping(checkpoint.monitor, mode=checkpoint.mode, **settings)


def _overfitting_probe(cfg: DictConfig, settings: dict[str, Any]) -> Callback:
    steps, threat = settings.pop("steps"), build_threat(cfg)
    attack = make_attack("pgd", norm=threat.norm, eps=threat.eps, steps=steps, step_size="1/4 eps")
    return OverfittingProbe(attack, seed=cfg.seed, **settings)


_TRICKS: dict[str, Callable[[DictConfig, dict[str, Any]], Callback]] = {
    "ema": lambda cfg, settings: EMA(**settings),
    "swa": lambda cfg, settings: SWA(**settings),
    "awp": lambda cfg, settings: AWP(**settings),
    "early_stopping": _early_stopping,
    "overfitting_probe": _overfitting_probe,
}


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
