"""Files that are there as a whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


class WriteError(Exception):
    """A file that cannot be written; the message is one line with the path and the reason."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write, which takes the place of `path` once it is on the disk as a whole.

    It is written beside `path`, so that both lie on one disk, and synchronised before it is renamed. A kill at any
    moment leaves the file that was there before; so does an error, which also removes what was written.

    Raises WriteError where the folder, the disk or its quota does not allow it.
    """
    unfinished = path.with_name(f".{path.name}.tmp")  # hidden from whoever reads the folder as a whole
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _synchronise(path.parent)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save hides it behind its own
        if isinstance(error, OSError | RuntimeError) and isinstance(reason, OSError):
            kept = "; the one before is kept" if _is_file(path) else ""
            raise WriteError(f"{path}: cannot be written: {reason.strerror or reason}{kept}") from error
        raise


def _synchronise(folder: Path) -> None:
    """Bring the new name to the disk; some file systems cannot synchronise a folder, and need not."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False
