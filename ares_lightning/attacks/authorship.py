"""What tells a class of another author from one of the same name: where it stands, and what is written there."""

from __future__ import annotations

import hashlib
import sys
from functools import cache
from pathlib import Path

PUBLISHED = {__name__.partition(".")[0], "torch", "torchvision", "timm", *sys.stdlib_module_names}
"""Packages whose classes change with a release alone, which a run folder tells anyway."""


@cache
def foreign_code(*classes: type) -> tuple[str, ...]:
    """Return name and hash of the file of each class that `classes` come from and that is in none of PUBLISHED.

    The whole file counts, for a class may call anything in it, but not what it imports; of a class that was typed
    in, the name alone.
    """
    line = dict.fromkeys(ancestor for each in classes for ancestor in each.__mro__)
    return tuple(
        f"{each.__qualname__} {_file_hash(each.__module__)}"
        for each in line
        if each.__module__.partition(".")[0] not in PUBLISHED
    )


def _file_hash(module: str) -> str:
    file = getattr(sys.modules.get(module), "__file__", None)
    content = Path(file).read_bytes() if file and Path(file).is_file() else b""
    return hashlib.blake2b(content, digest_size=8).hexdigest()
