"""CDA: the published network layer by layer, the projection of what it makes, and files that are refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import Counting, SmallNet, predicted
from torch import Tensor

from ares_lightning.attacks.generator import CDA, ResNetGenerator, load_generator


def norm_keys(prefix: str) -> list[str]:
    return [f"{prefix}.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


PUBLISHED_KEYS = [
    *("block1.1.weight", *norm_keys("block1.2")),
    *("block2.0.weight", *norm_keys("block2.1")),
    *("block3.0.weight", *norm_keys("block3.1")),
    *(
        key
        for i in range(1, 7)
        for convolution, norm in ((1, 2), (6, 7))
        for key in (f"resblock{i}.block.{convolution}.weight", *norm_keys(f"resblock{i}.block.{norm}"))
    ),
    *("upsampl1.0.weight", *norm_keys("upsampl1.1")),
    *("upsampl2.0.weight", *norm_keys("upsampl2.1")),
    *("blockf.1.weight", "blockf.1.bias"),
]
"""The keys of the files at github.com/Muzammal-Naseer/CDA."""


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random weights of a small-image generator, whose statistics are no identity."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = ResNetGenerator(2)
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.05)
            elif name.endswith("running_var"):
                buffer.uniform_(0.02, 0.1)
        return network.state_dict()


@pytest.fixture
def path(weights, tmp_path) -> str:
    torch.save(weights, tmp_path / "netG.pth")
    return str(tmp_path / "netG.pth")


def made(weights: dict[str, Tensor], image: Tensor) -> Tensor:
    """What the published network makes of one image [3, H, W], layer by layer."""
    w = {key: value.to(image) for key, value in weights.items()}

    def norm(x, name):
        return F.batch_norm(
            x, *(w[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")), eps=1e-5
        )

    def padded(x, size, name, bias=None):
        return F.conv2d(F.pad(x, (size,) * 4, mode="reflect"), w[name], bias)

    x = norm(padded(image[None], 3, "block1.1.weight"), "block1.2").relu()
    for name in ("block2", "block3"):
        x = norm(F.conv2d(x, w[f"{name}.0.weight"], stride=2, padding=1), f"{name}.1").relu()
    for block in ("resblock1.block", "resblock2.block"):
        residual = norm(padded(x, 1, f"{block}.1.weight"), f"{block}.2").relu()
        x = x + norm(padded(residual, 1, f"{block}.6.weight"), f"{block}.7")
    for name in ("upsampl1", "upsampl2"):
        x = F.conv_transpose2d(x, w[f"{name}.0.weight"], stride=2, padding=1, output_padding=1)
        x = norm(x, f"{name}.1").relu()
    x = padded(x, 3, "blockf.1.weight", w["blockf.1.bias"]).tanh() / 2 + 0.5
    top, right = x.shape[2] - image.shape[1], x.shape[3] - image.shape[2]
    return F.pad(x, (0, -right, -top, 0))[0]


def blurred(image: Tensor) -> Tensor:
    """A 3×3 Gaussian of standard deviation 1 with zeros around the image."""
    column = torch.tensor([-1.0, 0.0, 1.0], dtype=image.dtype).square().div(-2).exp()
    kernel = torch.outer(column, column) / column.sum() ** 2
    return torch.stack([F.conv2d(channel[None, None], kernel[None, None], padding=1)[0, 0] for channel in image])


@pytest.mark.parametrize("eps", [0.1, 1.0])
@pytest.mark.parametrize("size", [(6, 5), (8, 12), (11, 9)])
def test_examples_are_smoothed_and_projected_generator_images(size, eps, weights, path):
    images = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    crafted = CDA(generator=path, eps=eps).craft(SmallNet().double(), images, torch.zeros(3, dtype=torch.int64))
    for image, adversarial in zip(images, crafted, strict=True):
        assert made(weights, image).std((1, 2)).min() > 0.1, "a network that tells pixels apart"
        expected = torch.clamp(blurred(made(weights, image)), image - eps, image + eps).clamp(0, 1)
        torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-9)


def test_the_network_has_the_published_keys_and_takes_files_with_and_without_module(tmp_path):
    network = ResNetGenerator(6)
    assert list(network.state_dict()) == PUBLISHED_KEYS
    assert sum(p.numel() for p in network.parameters()) == 7_841_411
    path = tmp_path / "parallel.pth"
    torch.save({f"module.{key}": value for key, value in network.state_dict().items()}, path)
    loaded = load_generator(str(path))
    assert not loaded.training
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.3), ("l2", 2.0), ("l1", 10.0)])
def test_verdicts_cost_the_model_nothing(norm, eps, path, images):
    net = Counting(SmallNet().double().eval())
    labels = predicted(net, images)
    net.forwards = 0
    outcome = CDA(norm=norm, eps=eps, generator=path)(net, images, labels)
    assert (net.forwards, net.backwards) == (2 * len(images), 0)
    assert not outcome.forwards.any()
    assert not outcome.backwards.any()
    assert outcome.broken.any()
    assert outcome.distance.max() <= eps * (1 + 1e-9)


def test_a_sample_is_the_same_in_every_batch_and_precision_follows_the_images(path, images):
    net = SmallNet().double()
    labels = predicted(net, images)
    attack = CDA(eps=0.1, generator=path)
    many = images.repeat(4, 1, 1, 1)
    whole = attack.craft(net, many, labels.repeat(4))
    for i in (0, 5, 11):
        one = attack.craft(net, images[i : i + 1], labels[i : i + 1])
        for copy in range(4):
            torch.testing.assert_close(whole[i + 12 * copy], one[0], rtol=0, atol=1e-12)
    assert attack.craft(net.float(), images.float(), labels).dtype == torch.float32


def test_one_crafted_batch_serves_many_victims(path, images):
    victims = {"near": SmallNet(seed=0).double(), "far": SmallNet(seed=7).double()}
    labels = predicted(victims["near"], images)
    attack = CDA(eps=0.2, generator=path)
    crafted = attack.craft(victims["near"], images, labels)
    outcomes = attack(victims["near"], images, labels, victim=victims)
    for name, victim in victims.items():
        wrong = (predicted(victim, images) != labels) | (predicted(victim, crafted) != labels)
        assert torch.equal(outcomes[name].broken, wrong)


def write(path: Path, content: str, weights: dict[str, Tensor]) -> None:
    if content == "text":
        path.write_text("no weights")
    elif content == "empty":
        path.write_bytes(b"")
    elif content == "pickle":
        path.write_bytes(pickle.dumps(print, protocol=2))
    elif content == "list":
        torch.save([1, 2], path)
    elif content == "module":
        torch.save(torch.nn.Linear(2, 2), path)
    elif content == "other":
        torch.save(SmallNet().state_dict(), path)
    elif content == "missing":
        torch.save({key: value for key, value in weights.items() if key != "block2.0.weight"}, path)
    elif content == "shape":
        torch.save({**weights, "block2.0.weight": torch.zeros(1)}, path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("absent", "no such file"),
        ("text", "cannot be read"),
        ("empty", "cannot be read"),
        ("pickle", "cannot be read"),
        ("list", "holds no plain state dict"),
        ("module", "cannot be read"),
        ("other", "does not fit at block1.1.weight"),
        ("missing", r"does not fit at block2.0.weight \(1 keys"),
        ("shape", r"does not fit at block2.0.weight \(1 keys"),
    ],
)
def test_files_that_hold_no_generator_are_named_in_one_line(content, reason, weights, tmp_path, images):
    path = tmp_path / "netG.pth"
    write(path, content, weights)
    net = SmallNet().double()
    with pytest.raises(ValueError, match=f"{reason}.*; expected a file of weights") as error:
        CDA(generator=str(path))(net, images, predicted(net, images))
    assert f"generator={path}: " in str(error.value)
    assert "\n" not in str(error.value)


def test_a_call_without_generator_names_the_key(images):
    net = SmallNet().double()
    labels = predicted(net, images)
    for way in (CDA(), CDA().craft):
        with pytest.raises(ValueError, match="generator=None: cda needs a trained generator"):
            way(net, images, labels)


def test_what_a_generator_cannot_take_is_refused(path, images):
    net = SmallNet().double()
    labels = predicted(net, images)
    with pytest.raises(ValueError, match="cda knows no targeted form"):
        CDA(generator=path)(net, images, labels, targets=(labels + 1) % 10)
    grey = SmallNet(in_chans=1).double()
    with pytest.raises(ValueError, match="images have 1 channels; the generator of cda takes 3"):
        CDA(generator=path).craft(grey, images[:, :1], labels)
    assert CDA(generator=path).craft(net, images[..., :5, :], labels).shape == (12, 3, 5, 5)
    with pytest.raises(ValueError, match="images are 4 x 5; the generator of cda takes 5 pixels a side or more"):
        CDA(generator=path).craft(net, images[..., :4, :], labels)


def test_the_fingerprint_is_that_of_the_generators_content(path, weights, tmp_path):
    moved = tmp_path / "moved.pth"
    moved.write_bytes(Path(path).read_bytes())
    assert CDA(generator=str(moved)).fingerprint == CDA(generator=path).fingerprint
    torch.save({key: value + 1 for key, value in weights.items()}, moved)
    assert CDA(generator=str(moved)).fingerprint != CDA(generator=path).fingerprint
