"""What is attacked in a benchmark: a network, the copy of it that this project's attacks are run on, and images."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ares_lightning.attacks import make_attack
from ares_lightning.data import ImageSet, Wishes, load_image_sets
from ares_lightning.data.keyed import stratified_split
from ares_lightning.data.sources import class_folders, source_of_folders
from ares_lightning.models import load_weights, make_classifier
from ares_lightning.models.folding import fold_batchnorm

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_EPS, DIGITS_EPS = 8 / 255, 0.1
LAYOUT_TRIALS = 7


@dataclass(frozen=True, eq=False)
class Subject:
    """A network with images, and how it is called.

    network: as given, its parameters not frozen; peers attack this, and every adversarial image is judged by it.
    evaluated: the copy that an evaluation by this project searches on, its batch norms folded, in the memory layout
    that is faster here.
    """

    name: str
    network: nn.Module
    evaluated: nn.Module
    images: Tensor
    labels: Tensor
    num_classes: int
    eps: float
    batch_size: int
    folding: str
    channels_last: bool

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Return images and labels in batches of `batch_size`."""
        return list(zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True))


def make_subject(
    kind: str,
    weights: Path | None,
    folder: Path | None,
    eps: float | None,
    num_images: int,
    batch_size: int,
    epochs: int,
    seed: int,
    device: torch.device,
) -> Subject:
    """Load the CIFAR ResNet-20 of a weights file and images of a folder; without files, train a CNN on digits."""
    if weights is not None and folder is not None:
        facts = {"in_chans": 3, "num_classes": 10, "img_size": 32}
        network = make_classifier("resnet20", **facts, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        load_weights(network, weights)
        images, labels = _read_folder(folder, num_images, seed)
        num_classes, eps, name = 10, CIFAR_EPS if eps is None else eps, f"{kind} ResNet-20 ({weights.name})"
    else:
        eps = DIGITS_EPS if eps is None else eps
        sets = load_image_sets("digits", None, Wishes(img_size=8, in_chans=1, num_val=180, seed=seed))
        torch.manual_seed(seed)
        network = make_classifier("cnn", in_chans=1, num_classes=10, img_size=8, mean=[0.305], std=[0.376])
        _train(network, *_tensors(sets.train), eps if kind == "robust" else None, epochs)
        images, labels = _tensors(sets.test.take(range(min(num_images, len(sets.test)))))
        num_classes, name = 10, f"{kind} CNN on digits, {epochs} epochs"
    network = network.eval().to(device)
    images, labels = images.to(device), labels.to(device)
    folded = fold_batchnorm(network, (images.shape[1], images.shape[2], images.shape[3]))
    channels_last = copy.deepcopy(folded.network).to(memory_format=torch.channels_last)
    contiguous = copy.deepcopy(folded.network).to(memory_format=torch.contiguous_format)
    seconds = _pass_seconds([contiguous, channels_last], images[:batch_size])
    faster = seconds[1] < seconds[0]
    return Subject(
        name=name,
        network=network,
        evaluated=channels_last if faster else contiguous,
        images=images,
        labels=labels,
        num_classes=num_classes,
        eps=eps,
        batch_size=batch_size,
        folding=str(folded),
        channels_last=faster,
    )


def _read_folder(folder: Path, num_images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pick images of `folder/<class>/` in equal shares."""
    folders = class_folders(folder)
    classes = [found.name for found in folders]
    source = source_of_folders("images", folder, folders, classes, {name: i for i, name in enumerate(classes)})
    picked = stratified_split(source.labels.labels, num_images, "benchmark", seed)[0]
    return _tensors(ImageSet(source, picked, in_chans=3))


def _tensors(images: ImageSet) -> tuple[Tensor, Tensor]:
    return torch.stack([images[i][0] for i in range(len(images))]) / 255, images.labels


def _train(network: nn.Module, images: Tensor, labels: Tensor, eps: float | None, epochs: int) -> None:
    """Train for a few seconds, on PGD-3 images where `eps` is given."""
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    attack = None if eps is None else make_attack("pgd", eps=eps, steps=3)
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            batch = images[rows]
            if attack is not None:
                batch = attack.craft(network, batch, labels[rows])
            optimizer.zero_grad()
            F.cross_entropy(network(batch), labels[rows]).backward()
            optimizer.step()


def _pass_seconds(networks: list[nn.Module], images: Tensor) -> list[float]:
    """Return the median time of a forward and backward of each network, taken in turn."""
    seconds: list[list[float]] = [[] for _ in networks]
    for _ in range(LAYOUT_TRIALS):
        for network, times in zip(networks, seconds, strict=True):
            points = images.clone().requires_grad_()
            start = time.perf_counter()
            float(torch.autograd.grad(network(points).sum(), points)[0].sum())
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]
