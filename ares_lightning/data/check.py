"""Looks at every image below a folder before a long run does.

python -m ares_lightning.data.check /data/imagenet/val --workers 16
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image

from ares_lightning.data.images import EXTENSIONS, ImageError, decode
from ares_lightning.data.sources import image_names

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".ppm": "PPM"}
"""What a file should hold by its extension, in Pillow's words."""
SMALLEST = 32
"""A side in pixels below which an image is remarkable."""
UPRIGHT = 1


class Finding(NamedTuple):
    """What is to be said about one file: why it cannot be used (None: it can), and what is unusual about it."""

    name: str
    problem: str | None
    remarks: tuple[str, ...]


def examine(root: Path, name: str) -> Finding:
    """Decode the image `name` below `root` as training and evaluation would."""
    path = root / name
    try:
        decode(path, 3)
        with Image.open(path) as image:
            return Finding(name, None, tuple(_remarks(image, path)))
    except ImageError as error:
        return Finding(name, str(error).removeprefix(f"{path}: "), ())


def _remarks(image: Image.Image, path: Path) -> list[str]:
    remarks = []
    if image.format != FORMATS[path.suffix.lower()]:
        remarks.append(f"is {image.format} in spite of its extension")
    if image.mode not in ("RGB", "L"):
        remarks.append(f"has mode {image.mode}")
    elif image.mode == "L":
        remarks.append("is grey")
    if image.getexif().get(ExifTags.Base.Orientation, UPRIGHT) != UPRIGHT:
        remarks.append(
            "is to be turned according to its EXIF data, which is ignored, as by the published evaluations"
        )
    if min(image.size) < SMALLEST:
        remarks.append(f"has a side below {SMALLEST} pixels")
    return remarks


def examine_all(root: Path, workers: int) -> list[Finding]:
    """Examine every image file below `root`, in the order of their paths.

    Raises ValueError where there is none.
    """
    names = sorted(image_names(root, ""))
    if not names:
        raise ValueError(f"{root}: no images ({' '.join(EXTENSIONS)}) here or below")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ares_lightning.data"])  # loaded once for all processes
    with context.Pool(workers) as pool:
        return pool.map(partial(examine, root), names, chunksize=16)


def report(findings: Sequence[Finding]) -> str:
    """Return what was found, as text: the files that cannot be used, then how many are unusual and how."""
    broken = [finding for finding in findings if finding.problem is not None]
    lines = [f"{len(findings)} images, {len(broken)} cannot be used"]
    lines += [f"  {finding.name}: {finding.problem}" for finding in broken]
    examples = {remark: finding.name for finding in reversed(findings) for remark in finding.remarks}
    counts = Counter(remark for finding in findings for remark in finding.remarks)
    lines += [f"{count} {remark}, e.g. {examples[remark]}" for remark, count in counts.most_common()]
    if broken:
        lines.append("replace or remove them, or leave them out with data.on_error=skip")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine the folder that the command line names; return 0 if all can be used, 1 if not, 2 after a mistake."""
    parser = argparse.ArgumentParser(
        "python -m ares_lightning.data.check", description="Look at every image below a folder."
    )
    parser.add_argument("root", type=Path, help="the folder")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    options = parser.parse_args(arguments)
    try:
        if not options.root.is_dir():
            raise ValueError(f"{options.root}: is no folder")
        if options.workers < 1:
            raise ValueError(f"--workers={options.workers}: expected 1 or more")
        findings = examine_all(options.root, options.workers)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(report(findings))
    return int(any(finding.problem is not None for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
