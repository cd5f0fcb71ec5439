"""Settings as plain values, and bad ones as errors of one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ares_lightning.data import (
    ImageError,
)
from ares_lightning.hardware import HARDWARE
from ares_lightning.models.weights import WHICH


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
        raise ConfigError(f"{prefix}.{unknown[1]}: no such key; {HOW_TO_LIST_KEYS}") from error


HOW_TO_LIST_KEYS = "--cfg job prints all keys"

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
    *("weights", "subset", "precision", "compile", "plan", "verdicts", "trust"),
)


def check_keys(cfg: DictConfig) -> None:
    """Raise ConfigError for a top-level key that nothing reads, and for a seed that is none."""
    for key in map(str, cfg):
        if key not in _GROUPS + _SINGLE_KEYS:
            raise ConfigError(f"{key}: no such key; {HOW_TO_LIST_KEYS}")
    if type(cfg.seed) is not int or not 0 <= cfg.seed < 2**32:
        raise ConfigError(f"seed={cfg.seed}: expected a whole number from 0 to 4294967295")
    if type(cfg.compile) is not bool:
        raise ConfigError(f"compile={cfg.compile}: expected true or false")
    if type(cfg.plan) is not bool and cfg.plan not in HARDWARE:
        raise ConfigError(f"plan={cfg.plan}: expected true, false or one of {', '.join(HARDWARE)}")
    if cfg.weights not in (None, *WHICH):
        raise ConfigError(f"weights={cfg.weights}: expected null or one of {', '.join(WHICH)}")


def plain(cfg: Any) -> dict[str, Any]:
    """Return a config node as plain containers, interpolations resolved; no node is an empty one."""
    content: Any = {} if cfg is None else OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return {str(key): value for key, value in content.items()}


def one_line(error: Exception) -> str:
    """Return the text of an error without its line breaks."""
    return " ".join(str(error).split())
