"""Small networks that the tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ares_lightning.attacks.guard import full_precision
from ares_lightning.models import ZOO, Classifier, make_classifier
from ares_lightning.models.zoo import NORMALISATIONS


class Linear(nn.Module):
    """A linear classifier, whose distance to the decision boundary is known in closed form."""

    def __init__(self, shape: tuple[int, ...], num_classes: int, seed: int = 0, dtype: torch.dtype = torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        numel = torch.Size(shape).numel()
        self.weight = nn.Parameter(torch.randn(num_classes, numel, generator=generator, dtype=dtype) / numel**0.5)
        self.bias = nn.Parameter(torch.randn(num_classes, generator=generator, dtype=dtype) / 10)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T + self.bias


class SmallNet(nn.Module):
    """A ReLU network with everything that an attack could leave changed: batch norm, dropout, a frozen layer."""

    def __init__(self, in_chans: int = 3, num_classes: int = 10, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.features = nn.Sequential(
                nn.Conv2d(in_chans, 8, 3, padding=1),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Conv2d(8, 16, 3, padding=1),
                nn.ReLU(),
                nn.Dropout(0.3),
            )
            self.head = nn.Linear(16, num_classes)
            self.features[1].running_mean.normal_()
            self.features[1].running_var.uniform_(0.5, 2)
            self.features[0].weight.requires_grad_(False)
            self.head.weight.data *= 20
            probe = torch.rand(64, in_chans, 6, 5)
            with torch.no_grad():
                self.head.bias -= self.eval()(probe).mean(0)
            self.train()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).flatten(2).mean(2))


class Counting(nn.Module):
    """Counts the rows of every forward and of every backward that reaches the input."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.forwards = self.backwards = self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.forwards += len(images)
        if images.requires_grad:
            images.register_hook(self._count)
        return self.net(images)

    def _count(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


def predicted(net: nn.Module, images: Tensor) -> Tensor:
    """The classes that `net` predicts in eval mode, at the images' precision."""
    was_training = net.training
    with torch.no_grad(), full_precision(images.device):
        labels = net.eval()(images).argmax(1)
    net.train(was_training)
    return labels


def zoo_model(key: str) -> Classifier:
    """A model of the zoo with random weights."""
    model = ZOO[key]
    mean, std = NORMALISATIONS[model.normalisation]
    return make_classifier(
        model.architecture, in_chans=3, num_classes=1000, img_size=224, mean=mean, std=std, **model.settings
    )
