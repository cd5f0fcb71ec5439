"""Models that know a few real images, to run the whole of ARES-Bench where there are no trained weights.

    python benchmarks/ares_bench_paths.py imagenet-100 heads resnet50_normal vits_normal
    python evaluate.py model=zoo/resnet50_normal model.weights=heads/resnet50_normal.pth data=imagenet \
        data.root=imagenet-100 eval=ares_bench

The backbones are random; only the last layer is fitted, by ridge regression on the very images that are evaluated.
This shows that the path is sound. No accuracy that comes out of it says anything about a model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from ares_lightning.build import build_classifier, build_data
from ares_lightning.launch import CONFIG_DIR
from ares_lightning.models import ZOO, Classifier

RIDGE = 1e-3
"""Weight of the penalty, relative to the mean squared length of a feature vector."""
BATCH_SIZE = 25
LOGIT = 10.0
"""What the head is to answer for the right class; for every other 0."""


def make_model(key: str, root: Path, *more: str) -> tuple[Classifier, float]:
    """Return a random model of the zoo or timm whose head is fitted to images, and its accuracy on them."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        model = [f"model=zoo/{key}"] if key in ZOO else ["model=timm", f"model.name={key}"]
        settings = [*model, "model.weights=null", "data=imagenet", f"data.root={root}", *more]
        cfg = compose("evaluate", settings)
    data = build_data(cfg, training=False)
    torch.manual_seed(cfg.seed)
    classifier = build_classifier(cfg, data.num_classes)
    samples = [data.test_set[i] for i in range(len(data.test_set))]
    images = torch.stack([sample[0] for sample in samples]) / 255
    fit_head(classifier, images, data.test_set.labels)
    with torch.inference_mode():
        predictions = torch.cat([classifier(part).argmax(1) for part in images.split(BATCH_SIZE)])
    return classifier, float((predictions == data.test_set.labels).double().mean())


@torch.no_grad()
def fit_head(classifier: Classifier, images: Tensor, labels: Tensor) -> None:
    """Fit the last linear layer to images [N, C, H, W] in [0, 1] and labels [N], the rest left as it is.

    Batch norms take the statistics of the first images, without which random features would all but coincide.
    """
    norms = [module for module in classifier.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # a mean over what is seen
    if norms:
        classifier.train()(images[:BATCH_SIZE])
    classifier.eval()
    head = [module for module in classifier.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    for part in images.split(BATCH_SIZE):
        classifier(part)
    handle.remove()
    features = torch.cat(seen)
    centre = features.mean(0)
    features = features - centre
    wanted = LOGIT * nn.functional.one_hot(labels, head.out_features).double()
    gram = features @ features.T
    penalty = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram + penalty, wanted).T @ features
    head.weight.copy_(weight)
    head.bias.copy_(-weight @ centre)


def main() -> None:
    """Write one file a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder with val/<wnid>/*.JPEG")
    parser.add_argument("output", type=Path)
    parser.add_argument("keys", nargs="+", help="models of the zoo, or architectures of timm")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for key in arguments.keys:
        classifier, accuracy = make_model(key, arguments.root)
        path = arguments.output / f"{key}.pth"
        torch.save(classifier.backbone.state_dict(), path)
        print(f"{path}: {accuracy:.0%} of the images that it was fitted to")


if __name__ == "__main__":
    main()
