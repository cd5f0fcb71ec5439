"""The one place where a composed config becomes objects, and where bad values become clear errors."""

from ares_lightning.build.adopt import adopt, adopt_for_evaluation
from ares_lightning.build.config import ConfigError, check_keys, one_line
from ares_lightning.build.data import build_data
from ares_lightning.build.devices import build_fabric, planned_devices, planned_precision
from ares_lightning.build.evaluation import build_evaluation, build_evaluators, build_threat, take_all_of_few
from ares_lightning.build.loggers import end_loggers, prepare_logger, start_loggers
from ares_lightning.build.model import average_over_draws, build_classifier, take_weights
from ares_lightning.build.objective import build_objective
from ares_lightning.build.own import check_trusted, trust_own
from ares_lightning.build.periodic import build_periodic
from ares_lightning.build.trainer import build_trainer, check_resumed
from ares_lightning.build.training import build_module, rehearse

__all__ = [
    "ConfigError",
    "adopt",
    "adopt_for_evaluation",
    "average_over_draws",
    "build_classifier",
    "build_data",
    "build_evaluation",
    "build_evaluators",
    "build_fabric",
    "build_module",
    "build_objective",
    "build_periodic",
    "build_threat",
    "build_trainer",
    "check_keys",
    "check_resumed",
    "check_trusted",
    "end_loggers",
    "one_line",
    "planned_devices",
    "planned_precision",
    "prepare_logger",
    "rehearse",
    "start_loggers",
    "take_all_of_few",
    "take_weights",
    "trust_own",
]
