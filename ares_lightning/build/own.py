"""A user's own classes: what `_target_` names is imported, checked and built here, and nowhere else."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ares_lightning.build.config import ConfigError, one_line

TARGET = "_target_"
"""The key under which settings name their class, as `<module>.<Class>`."""


def build_own(settings: Mapping[str, Any], base: type[Any], **offered: Any) -> Any:
    """Build an object of the class that `settings` name, a subclass of `base`; the rest of them are its arguments.

    offered: arguments for a class that takes them, where the settings have none of that name.

    Raises ValueError naming the key: `_target_` as `own_class` does, a setting that the class does not take or
    lacks, and whatever the constructor finds wrong.
    """
    arguments = {key: value for key, value in settings.items() if key != TARGET}
    target, own = settings[TARGET], own_class(settings[TARGET], base)
    parameters = inspect.signature(own).parameters
    arguments = {key: value for key, value in offered.items() if key in parameters} | arguments
    named = {key: p for key, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in arguments:
        if key not in named and not takes_any:
            raise ValueError(f"{key}={arguments[key]}: {target} takes no such argument; {_hint(key, named)}")
    for key, parameter in named.items():
        if parameter.default is parameter.empty and key not in arguments:
            raise ValueError(f"{key}: must be given; {target} needs it")
    try:
        return own(**arguments)
    except Exception as error:
        if isinstance(error, ValueError) and re.match(r"[\w.]+=", str(error)):
            raise  # names its key by itself
        raise ValueError(f"{TARGET}={target}: {type(error).__name__}: {one_line(error)}") from error


def classes_named(config: Any) -> set[str]:
    """Return the classes that a config names anywhere, as they stand there."""
    content = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
    if isinstance(content, list | tuple):
        return set().union(*map(classes_named, content))
    if not isinstance(content, dict):
        return set()
    named = {str(content[TARGET])} if TARGET in content else set()
    return named.union(*map(classes_named, content.values()))


def trust_own(cfg: DictConfig) -> None:
    """Add the classes that a user's config names to `trust`, before anything of a checkpoint comes into it."""
    if not OmegaConf.is_list(cfg.trust) or not all(isinstance(name, str) for name in cfg.trust):
        raise ConfigError(f"trust={cfg.trust}: expected a list of classes or modules, such as [mine.MyNet]")
    cfg.trust = [*cfg.trust, *sorted(classes_named(cfg) - set(cfg.trust))]


def trust_setting(names: Sequence[str]) -> str:
    """Return what makes a program trust classes."""
    return f"trust=[{','.join(names)}]"


def check_trusted(
    config: Any, trust: Collection[str], key: str, remedy: Callable[[Sequence[str]], str] = trust_setting
) -> None:
    """Raise ConfigError for a class in a checkpoint's `config` that `trust` does not name: its code would be run.

    trust: classes, or modules of such. key: of the checkpoint, for the message. remedy: what makes the caller's
    program trust classes.
    """
    known = tuple(f"{name}." for name in trust)
    unknown = sorted(name for name in classes_named(config) if not f"{name}.".startswith(known))
    if unknown:
        raise ConfigError(
            f"{key} names {', '.join(unknown)}, whose code would be run; give {remedy(unknown)} if it is yours"
        )


def own_class(target: object, base: type[Any]) -> type[Any]:
    """Return the class that `target` names, of a module that is installed or lies in the working directory.

    Raises ValueError, beginning with `_target_=`, unless it can be imported and is a complete subclass of `base`.
    """
    module_name, _, name = str(target).rpartition(".")
    if not re.fullmatch(r"([^\W\d]\w*\.)+[^\W\d]\w*", str(target)):
        raise ValueError(f"{TARGET}={target}: expected <module>.<Class>, such as mine.{name or 'Mine'}")
    module = _module(target, module_name)
    found = vars(module).get(name)
    wanted = f"{base.__module__}.{base.__qualname__}"
    if not isinstance(found, type):
        place = getattr(module, "__file__", None) or "built in"
        known = {key: None for key, value in vars(module).items() if _is_own(value, base)}
        raise ValueError(f"{TARGET}={target}: {module_name} ({place}) has no class {name}; {_hint(name, known)}")
    if not issubclass(found, base):
        raise ValueError(f"{TARGET}={target}: is no subclass of {wanted}; derive it from that")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise ValueError(f"{TARGET}={target}: lacks {missing}; write what {wanted} leaves open")
    if dataclasses.is_dataclass(base) and "__dataclass_fields__" not in vars(found):
        raise ValueError(f"{TARGET}={target}: is no dataclass; put @dataclass(frozen=True, kw_only=True) above it")
    return found


def _is_own(value: object, base: type[Any]) -> bool:
    return isinstance(value, type) and issubclass(value, base) and value is not base


def _module(target: object, name: str) -> ModuleType:
    """Import a module; the working directory comes first, as with `python -m`, and is told to other processes."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{TARGET}={target}: there is no module {error.name} in {here}, and none is installed; run where "
                "its file lies, or install it"
            ) from error
        raise ValueError(_failed(target, name, error)) from error
    except (Exception, SystemExit) as error:
        raise ValueError(_failed(target, name, error)) from error


def _failed(target: object, name: str, error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    place = "" if isinstance(error, SyntaxError) else f" in {frames[-1].filename}, line {frames[-1].lineno}"
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return f"{TARGET}={target}: importing {name} fails{place}: {what}; mend it"


def _hint(word: str, known: Mapping[str, Any]) -> str:
    near = get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known) or 'none'}"
