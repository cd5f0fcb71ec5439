"""Loading of training images beside torchvision: JPEG files to batches, with RandAugment, in turns in one run.

    python benchmarks/loading.py                              # images are made of scikit-learn's photographs
    python benchmarks/loading.py --images imagenet/val --epochs 3

Ours: uint8 batches with channels last, to be converted on the device. torchvision: ImageFolder, DataLoader and v2
transforms up to normalised float batches, once on Pillow images (the default of its references), once on tensors.
All decode with Pillow, crop, flip and apply two operations of RandAugment at magnitude 9 in the workers. "times" is
the median over the epochs of the ratio of images a second, ours to theirs; memory is what the main process and the
loader's workers each have for themselves at the end of an epoch (Linux).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from provenance import device_name, revision, version
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from ares_lightning.data import ImageLoader, ImageSet, ShardedSampler
from ares_lightning.data.images import Augmentation, resized_crop_and_flip
from ares_lightning.data.sources import class_folders, source_of_folders

IMG_SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RANDAUGMENT = "rand-m9"
"""Two operations of magnitude 9, the defaults of torchvision's RandAugment."""
MADE_SIZE, MADE_CLASSES = (500, 375), 10
"""What is made where no images are given: files of ImageNet's median size."""
PACKAGES = ("torch", "torchvision", "timm", "pillow", "numpy", "ares-lightning")


def our_loader(folder: Path, batch_size: int, workers: int) -> ImageLoader:
    """Return this project's loader of a folder of class folders."""
    folders = class_folders(folder)
    classes = [found.name for found in folders]
    source = source_of_folders("images", folder, folders, classes, {name: i for i, name in enumerate(classes)})
    size = len(source.labels.labels)
    augment = Augmentation(resized_crop_and_flip, IMG_SIZE, RANDAUGMENT, mean=MEAN)
    images = ImageSet(source, torch.arange(size), in_chans=3, augment=augment)
    sampler = ShardedSampler(size, shuffle=True, seed=0, rank=0, world_size=1, batch_size=batch_size)
    return ImageLoader(images, batch_size, sampler=sampler, num_workers=workers)


def torchvisions_loader(folder: Path, batch_size: int, workers: int, on_tensors: bool) -> DataLoader[Any]:
    """Return the loader of torchvision's own classes."""
    transform = v2.Compose(
        [
            *([v2.PILToTensor()] if on_tensors else []),
            v2.RandomResizedCrop(IMG_SIZE, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(),
            *([] if on_tensors else [v2.PILToTensor()]),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    images = ImageFolder(str(folder), transform)
    return DataLoader(images, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def epoch(loader: DataLoader[Any]) -> tuple[float, int]:
    """Load one epoch; return images a second, and the memory of this process and the loader's workers, in MiB."""
    start, count = time.perf_counter(), 0
    for batch in loader:
        count += len(batch[0])
    rate = count / (time.perf_counter() - start)
    gc.collect()
    workers = [str(worker.pid) for worker in loader._iterator._workers] if loader.num_workers else []
    return rate, sum(map(_own_memory, ["self", *workers])) // 2**10


def _own_memory(process: str) -> int:
    """Return the memory that a process shares with no other, in KiB (Linux)."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def make_images(folder: Path, number: int) -> None:
    """Write JPEG files cut out of scikit-learn's two photographs."""
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    rng = np.random.default_rng(0)
    for i in range(number):
        photo = photos[i % 2]
        width = int(rng.integers(300, photo.width))
        left, top = rng.integers(0, photo.width - width + 1), rng.integers(0, photo.height - width * 2 // 3 + 1)
        cut = photo.crop((left, top, left + width, min(top + width * 3 // 4, photo.height)))
        path = folder / f"class{i % MADE_CLASSES}" / f"{i:05d}.jpg"
        path.parent.mkdir(exist_ok=True)
        cut.resize(MADE_SIZE).save(path, quality=90)


def main() -> None:
    """Run the epochs in turns, print the table and write the JSON file."""
    parser = argparse.ArgumentParser(description="Loading of training images beside torchvision.")
    parser.add_argument("--images", type=Path, help="a folder of class folders (default: made of two photographs)")
    parser.add_argument("--n", type=int, default=600, help="images to make")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = options.images or Path(made)
        if options.images is None:
            make_images(folder, options.n)
        makers: dict[str, Callable[[Path, int, int], DataLoader[Any]]] = {
            "ares-lightning": our_loader,
            "torchvision": partial(torchvisions_loader, on_tensors=False),
            "torchvision, tensors": partial(torchvisions_loader, on_tensors=True),
        }
        loaders = {name: make(folder, options.batch_size, options.workers) for name, make in makers.items()}
        num_images = sum(1 for _ in folder.glob("*/*"))
        measured: dict[str, list[tuple[float, int]]] = {name: [] for name in loaders}
        for number in range(options.epochs + 1):  # the first starts the workers and does not count
            for name in list(loaders)[:: 1 if number % 2 else -1]:
                loader = loaders[name]
                if isinstance(loader, ImageLoader):
                    loader.sampler.set_epoch(number)
                figures = epoch(loader)
                if number:
                    measured[name].append(figures)
    ours, *others = measured.values()
    times = {
        name: [one[0] / other[0] for one, other in zip(ours, rows, strict=True)]
        for name, rows in zip(list(measured)[1:], others, strict=True)
    }
    print(f"{'':>20}  images/s in each epoch        memory, MiB")
    for name, rows in measured.items():
        print(f"{name:>20}  {' '.join(f'{row[0]:8.1f}' for row in rows)}   {' '.join(str(row[1]) for row in rows)}")
    for name, ratios in times.items():
        print(f"times {name}: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")
    if options.output:
        report = {
            "command": shlex.join(["python", "benchmarks/loading.py", *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "revision": revision(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "hardware": {"device": device_name(torch.device("cpu")), "host": platform.platform()},
            "images": num_images,
            "images_per_second": {name: [row[0] for row in rows] for name, rows in measured.items()},
            "memory_mib": {name: [row[1] for row in rows] for name, rows in measured.items()},
            "times": times,
        }
        options.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written: {options.output}")


if __name__ == "__main__":
    main()
