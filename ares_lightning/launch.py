"""The two programs: compose a config, check it, make the run folder, do the work, say where the report lies."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from ares_lightning.atomic import WriteError
from ares_lightning.build import (
    ConfigError,
    adopt,
    adopt_for_evaluation,
    average_over_draws,
    build_classifier,
    build_data,
    build_evaluation,
    build_fabric,
    build_module,
    build_periodic,
    build_trainer,
    check_keys,
    check_resumed,
    end_loggers,
    one_line,
    prepare_logger,
    rehearse,
    start_loggers,
    take_all_of_few,
    take_weights,
    trust_own,
)
from ares_lightning.data import VARIANTS, ImageError
from ares_lightning.evaluating import EvaluatorFailedError, run_evaluation
from ares_lightning.evaluation.dashboards import log_evaluation
from ares_lightning.evaluation.run import Evaluation
from ares_lightning.evaluation.workers import Workers
from ares_lightning.models import ZOO, CheckpointError, Classifier, load_network, read_checkpoint
from ares_lightning.models.checkpoints import find_checkpoint
from ares_lightning.models.weights import trained_weights
from ares_lightning.planning import evaluation_plan, training_plan
from ares_lightning.run_folder import (
    find_start,
    inherited,
    is_main_process,
    new_run_dir,
    read_config,
    requeue,
    write_config,
)
from ares_lightning.training.preemption import Stopped, StopSignals
from ares_lightning.training.tricks import NonFiniteError

PACKAGE = Path(__file__).parent
CONFIG_DIR = next((path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir()), PACKAGE)
"""The shipped configs: inside an installed package, beside it in a checkout."""

for _variant in VARIANTS.values():
    _own_root = {} if _variant.is_of_validation else {"root": None}
    ConfigStore.instance().store(
        group="data",
        name=_variant.key,
        node={"defaults": [_variant.network, "_self_"], "name": _variant.key, **_own_root},
    )

for _model in ZOO.values():
    _node = {"defaults": ["/model/timm@_here_", "_self_"], **_model.config()}
    ConfigStore.instance().store(group="model/zoo", name=_model.key, node=_node)

Metrics = dict[str, float]

_UNHELPFUL_WARNINGS = (
    ".*Experiment logs directory .* exists and is not empty",  # config.yaml does; an old run was refused
    ".*does not have many workers",  # the digits lie in memory
    ".*LeafSpec.*is deprecated",  # Lightning's own call
)


def train(cfg: DictConfig, overrides: tuple[str, ...] = ()) -> Metrics:
    """Train as `conf/train.yaml` says, evaluate the best checkpoint, write the report; return the metrics.

    overrides: what the command line set; with `resume`, all else comes from the checkpoint. Raises Stopped where a
    signal has ended the training (see docs/cluster.md).
    """
    with StopSignals() as stop:
        return _train(cfg, overrides, stop)


def _train(cfg: DictConfig, overrides: tuple[str, ...], stop: StopSignals) -> Metrics:
    with _checking():
        trust_own(cfg)
        start = find_start(cfg)
        if start.config is not None:
            adopt(cfg, start.config, overrides, keep=("run_dir", "resume", "trust"))
        check_keys(cfg)
        if start.checkpoint is not None:
            check_resumed(cfg, start.checkpoint)
        prepare_logger(cfg, start.config)
        average_over_draws(cfg)
        L.seed_everything(cfg.seed, workers=True, verbose=False)
        data = build_data(cfg, training=True)
        few = take_all_of_few(cfg, data)
        net = build_classifier(cfg, data.num_classes)
        module = build_module(cfg, net, data)
        evaluation = build_evaluation(cfg, data)
        taken = None if start.path else take_weights(cfg, net)
        cost = rehearse(module, data)
        run_dir = start.run_dir or new_run_dir(cfg)
        if start.path is not None and start.checkpoint is not None:
            load_network(net, trained_weights(start.checkpoint, start.path, "raw"), start.path)
        trainer = build_trainer(cfg, run_dir, stop, cost=cost, periodic=build_periodic(cfg, data, run_dir))
        if cfg.plan:
            if is_main_process():
                print(training_plan(cfg, trainer, module, data, evaluation, cost, start.checkpoint))
            return {}
    if is_main_process():
        for line in filter(None, (taken, few)):
            print(line)
        write_config(cfg, run_dir)
        if not cfg.trainer.fast_dev_run:
            trainer.loggers = start_loggers(cfg, run_dir)
    goes_on, outcome = f"resume=last run_dir={run_dir} goes on", None
    try:
        with inherited(RUN_ID=run_dir.name):
            trainer.fit(module, datamodule=data, ckpt_path=start.path, weights_only=True)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        workers = Workers.current()
        run_dir = workers.share(run_dir)  # the others had only their own clock to name it by
        files = (run_dir / "checkpoints" / name for name in ("best.ckpt", "last.ckpt"))
        judged = workers.share(next((file for file in files if file.exists()), None))  # the last if never validated
        if judged is not None:
            load_network(net, trained_weights(read_checkpoint(judged), judged, cfg.weights), judged)
        if evaluation.evaluators:
            outcome = run_evaluation(evaluation, data, net, run_dir, module.device, workers)
            metrics |= outcome.metrics
            log_evaluation(trainer.loggers, run_dir)
    except (KeyboardInterrupt, SystemExit) as error:  # Lightning turns Ctrl-C into SystemExit
        _end_other_processes(trainer.strategy)
        if isinstance(error, SystemExit) and not trainer.interrupted:
            raise
        raise KeyboardInterrupt(f"{goes_on} from the last checkpoint") from error
    except Stopped as stopped:
        _end_other_processes(trainer.strategy)
        line = f"stopped by {stopped.name} at step {trainer.global_step}; {goes_on}"
        if trainer.is_global_zero and cfg.launch.requeue and stopped.signum in REQUEUE_SIGNALS:
            line = f"{line}\n{requeue()}"
        raise Stopped(stopped.signum, line) from stopped
    except WriteError as error:
        _end_other_processes(trainer.strategy)
        raise WriteError(f"{error}; {goes_on} once there is room") from error
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {one_line(error)}") from error
    except NonFiniteError as error:
        _end_other_processes(trainer.strategy)
        last = run_dir / "checkpoints" / "last.ckpt"
        kept = f"{last} is from before" if last.is_file() else "no checkpoint had been written yet"
        raise ConfigError(f"{error}; {kept}") from error
    except ValueError as error:
        if not str(error).startswith("data."):
            raise
        _end_other_processes(trainer.strategy)
        raise ConfigError(str(error)) from error
    except RuntimeError as error:
        _end_other_processes(trainer.strategy)
        if "DataLoader worker" not in str(error):
            raise
        raise ConfigError(
            f"data.num_workers={cfg.data.num_workers}: {one_line(error).rstrip('.')}, perhaps for "
            f"want of memory; {goes_on}, data.num_workers=0 loads in the main process"
        ) from error
    end_loggers(trainer.loggers)
    if outcome is not None:
        outcome.check()
    return metrics


REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
"""Those that say that a job's time is over; whoever sends SIGTERM decides by himself what becomes of the job."""


def _end_other_processes(strategy: Any) -> None:
    """Kill the processes that Lightning has started, which would wait for this one."""
    launcher = strategy.launcher
    if launcher is not None:
        launcher.kill(signal.SIGKILL)


def evaluate(cfg: DictConfig, overrides: tuple[str, ...] = ()) -> Metrics:
    """Evaluate a checkpoint, or a model with published weights, as `conf/evaluate.yaml` says; return the metrics.

    overrides: what the command line set; model, data and threat come from the checkpoint where it is silent.
    """
    with _checking():
        trust_own(cfg)
        path = None if cfg.ckpt is None else find_checkpoint(Path(cfg.ckpt))
        checkpoint = {} if path is None else read_checkpoint(path)
        if path is None:
            cfg.name = cfg.name or f"{cfg.model.key}-{cfg.data.name}"
        else:
            adopt_for_evaluation(cfg, checkpoint["config"], overrides)
        check_keys(cfg)
        average_over_draws(cfg)
        L.seed_everything(cfg.seed, workers=True, verbose=False)
        data = build_data(cfg, training=False)
        net = build_classifier(cfg, data.num_classes)
        evaluation = build_evaluation(cfg, data)
        if not evaluation.evaluators:
            raise ConfigError(f"eval={list(cfg.get('eval', []))}: asks nothing; give a suite, such as eval=[quick]")
        if path is None:
            taken = _take_published(cfg, net)
            if is_main_process():
                print(taken)
        else:
            load_network(net, trained_weights(checkpoint, path, cfg.weights), path)
        if cfg.plan:
            if is_main_process():
                print(evaluation_plan(cfg, evaluation, net).text)
            return {}
        fabric = build_fabric(cfg)
        run_dir = Path(cfg.run_dir or Path(cfg.launch.root) / str(cfg.name) / evaluation.fingerprint(net))
        if is_main_process():
            _check_evaluation_folder(evaluation, net, run_dir)
        prepare_logger(cfg, read_config(run_dir))
    loggers = []
    if is_main_process():
        write_config(cfg, run_dir)
        loggers = start_loggers(cfg, run_dir)
    fabric.launch()
    try:
        outcome = run_evaluation(evaluation, data, net, run_dir, fabric.device, Workers.current())
        log_evaluation(loggers, run_dir)
    except BaseException:
        _end_other_processes(fabric.strategy)
        raise
    end_loggers(loggers)
    outcome.check()
    return outcome.metrics


def _take_published(cfg: DictConfig, net: Classifier) -> str:
    """Load the weights that the model names; return one line on them. Raises ConfigError where it names none."""
    taken = take_weights(cfg, net)
    if taken is None:
        raise ConfigError(
            "ckpt=null: expected a checkpoint or a run folder, such as ckpt=runs/<name>/<run id>, or a model with "
            "weights: model=zoo/<key>, model.weights=<file>"
        )
    return taken


def train_main() -> None:
    """Run `python train.py` and `ares-train`."""
    _main("train", train)


def evaluate_main() -> None:
    """Run `python evaluate.py` and `ares-evaluate`."""
    _main("evaluate", evaluate)


def _main(config_name: str, work: Callable[[DictConfig, tuple[str, ...]], Metrics]) -> None:
    """Run `work` under Hydra; a user's mistake becomes one line on stderr and exit code 1."""
    for message in _UNHELPFUL_WARNINGS:
        warnings.filterwarnings("ignore", message)
    wanted = os.environ.get("HYDRA_FULL_ERROR", "0")
    full_error = wanted == "1"

    def task(cfg: DictConfig) -> None:
        os.environ["HYDRA_FULL_ERROR"] = wanted
        try:
            work(cfg, tuple(HydraConfig.get().overrides.task))
        except (
            ConfigError,
            CheckpointError,
            ImageError,
            WriteError,
            EvaluatorFailedError,
            OmegaConfBaseException,
        ) as error:
            if full_error:
                raise
            _let_go_of_loaders(error)
            sys.exit(_complaint(error))
        except KeyboardInterrupt as error:
            _let_go_of_loaders(error)
            print(f"interrupted: {str(error) or 'the same command goes on where it stopped'}", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        except Stopped as stopped:
            _let_go_of_loaders(stopped)
            if not is_main_process():  # else a launcher would kill rank 0, which speaks for all
                sys.exit(0)
            print(stopped, file=sys.stderr)
            sys.exit(128 + stopped.signum)

    sys.argv = [sys.argv[0], *map(_with_quoted_choices, sys.argv[1:])]
    try:
        with inherited(HYDRA_FULL_ERROR="1"):  # so that composition errors reach us instead of being printed
            hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(task)()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        if full_error:
            raise
        sys.exit(_complaint(error))


_NO_NAMES = re.compile(r"(?i)(?<![^\[,\s])(null|true|false|[+-]?(nan|inf|\.?\d[\w.+-]*))(?![^\],\s])")
"""What Hydra takes for a number, a truth value or null where the names of choices stand."""


def _with_quoted_choices(word: str) -> str:
    """Return a word of the command line with such choices of a config group in quotes.

    Hydra then looks for them, where it would end in a traceback. What is quoted, settings, interpolations and
    sweeps by function stay as they are.
    """
    key, equals, given = word.partition("=")
    group = key.lstrip("+~")
    if not group or not (CONFIG_DIR / group).is_dir() or re.search(r"[{('\"]", given):
        return word
    return f"{key}{equals}{_NO_NAMES.sub(lambda choice: repr(choice[0]), given)}"


def _let_go_of_loaders(error: BaseException | None) -> None:
    """Free what the frames of an error hold: loaders, whose processes the end of the program would wait for."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()


def _complaint(error: Exception) -> str:
    """Return the one line that tells what is wrong."""
    line = one_line(error)
    unknown = re.match(r"Could not override '([^']+)'", line)
    if unknown:
        line = f"{unknown[1]}: no such key; --cfg job prints all keys"
    choice = re.match(r".*Could not (?:load|find) '(\w+)/([^/']+)'", line)
    if choice:
        group, given = choice.groups()
        folders = {CONFIG_DIR, *map(Path, re.findall(r"path=file://(.+)", str(error)))}  # with --config-dir
        known = sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})
        near = get_close_matches(given, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        line = f"{group}={given}: no such choice; {hint}expected one of {', '.join(known)}"
    in_zoo = re.match(r".*Could not find 'model/zoo/([^']+)'", line)
    if in_zoo:
        near = get_close_matches(in_zoo[1], ZOO, n=1)
        hint = f"did you mean zoo/{near[0]}? " if near else ""
        line = f"model=zoo/{in_zoo[1]}: no such model; {hint}python -m ares_lightning.models lists them"
    if isinstance(error, MissingMandatoryValue):
        line = f"{error.full_key}: must be given"
    return f"error: {line}"


def _check_evaluation_folder(evaluation: Evaluation, net: torch.nn.Module, run_dir: Path) -> None:
    """Raise ConfigError where an evaluation would overwrite a training, or meet verdicts of something else."""
    if (run_dir / "checkpoints").exists():
        raise ConfigError(f"run_dir={run_dir}: is the run folder of a training; give another run_dir")
    try:
        evaluation.check_ledger(run_dir, net, others=False)
    except ValueError as error:
        raise ConfigError(str(error)) from error


@contextmanager
def _checking() -> Iterator[None]:
    """Turn whatever a setting provokes while objects are built, before anything is written, into a ConfigError."""
    try:
        yield
    except (ConfigError, CheckpointError, ImageError, OmegaConfBaseException):
        raise
    except Exception as error:
        raise ConfigError(
            f"the config cannot be used: {type(error).__name__}: {error}; "
            "--cfg job prints it, HYDRA_FULL_ERROR=1 shows where it failed"
        ) from error
