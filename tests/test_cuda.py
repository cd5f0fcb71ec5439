"""What must hold on a GPU as well: the contract, the CPU's verdicts, no waits, and the two programs end to end."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import torch
from contract import CASES, EPS, ROWS, TARGETED_ONLY, WEAK, call, cheap, check_cuts, check_outcome, every_pair
from lightning.pytorch.callbacks import Callback
from networks import Counting, SmallNet, predicted
from processes import assert_one_line, run
from torch import Tensor
from trainings import config

from ares_lightning import build
from ares_lightning.attacks import make_attack
from ares_lightning.attacks.noise import sample_noise
from ares_lightning.models import make_classifier
from ares_lightning.training.objectives import AdversarialTraining, InnerAttack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PAIRS = [row for row in every_pair() if row[4] == 17]
"""Those of every_pair that hold many samples."""
CRAFTS = [(name, norm) for name, norm in CASES if not make_attack(name, norm=norm).nearest]
"""Those whose loop waits for nothing."""


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Make whatever waits for the device an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def in_tf32() -> Iterator[None]:
    """Let float32 products and convolutions round their factors to TF32, as a training may have chosen."""
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "tf32"
        yield
        assert all(backend.fp32_precision == "tf32" for backend in backends), "the attack has left its own"
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def some(dtype: torch.dtype, n: int = 12, seed: int = 1) -> Tensor:
    return torch.rand(n, 3, 6, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def accuracy(run_dir: Path, evaluator: str) -> float:
    rows = json.loads((run_dir / "summary.json").read_text())
    return next(row["value"] for row in rows if row["evaluator"] == evaluator)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The default training on the GPU, half as long."""
    run_dir = tmp_path_factory.mktemp("runs") / "gpu"
    done = run("train.py", "trainer=gpu", "trainer.max_epochs=6", f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.xdist_group("programs")
def test_a_training_in_bf16_gains_robustness(trained):
    assert accuracy(trained, "clean") > 0.9
    assert accuracy(trained, "pgd20") > 0.6
    assert pd.read_csv(trained / "metrics.csv")["train/loss"].dropna().map(math.isfinite).all()


@pytest.mark.xdist_group("programs")
def test_an_evaluation_gives_the_same_verdicts_on_both_devices(trained, tmp_path):
    verdicts = []
    for trainer in "gpu", "cpu":
        asked = [f"ckpt={trained}", "precision=fp64", "subset=first:100", "eval=[clean,pgd20]"]
        done = run("evaluate.py", *asked, f"trainer={trainer}", f"run_dir={tmp_path / trainer}")
        assert done.returncode == 0, done.stderr
        rows = pd.read_parquet(tmp_path / trainer / "verdicts").sort_values(["evaluator", "sample_id"])
        verdicts.append(rows[["evaluator", "sample_id", "clean_prediction", "broken", "forwards", "backwards"]])
    assert len(verdicts[0]) == 200
    pd.testing.assert_frame_equal(*(rows.reset_index(drop=True) for rows in verdicts))


@pytest.mark.xdist_group("compiled")
def test_compiled_training_and_evaluation_give_the_accuracies_of_uncompiled_ones(trained, tmp_path):
    short = ["trainer.max_epochs=6", "eval=[clean,pgd20]"]
    done = run("train.py", "trainer=gpu", "trainer.compile=true", *short, f"run_dir={tmp_path / 'trained'}")
    assert done.returncode == 0, done.stderr
    for evaluator in "clean", "pgd20":
        assert abs(accuracy(tmp_path / "trained", evaluator) - accuracy(trained, evaluator)) < 0.1
    asked = [f"ckpt={trained}", "compile=true", "trainer=gpu", "eval=[clean,pgd20]"]
    done = run("evaluate.py", *asked, f"run_dir={tmp_path / 'evaluated'}")
    assert done.returncode == 0, done.stderr
    assert accuracy(tmp_path / "evaluated", "clean") == accuracy(trained, "clean")
    assert abs(accuracy(tmp_path / "evaluated", "pgd20") - accuracy(trained, "pgd20")) < 0.01


@pytest.mark.parametrize(("case", "dtype", "num_classes", "size", "n", "targeted"), PAIRS)
def test_outcomes_keep_the_contract(case, dtype, num_classes, size, n, targeted):
    check_outcome(case, dtype, num_classes, size, n, targeted, "cuda")


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_outcomes_do_not_depend_on_how_the_work_was_cut(name, norm):
    check_cuts((name, norm), (7, 23), "cuda")


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_the_verdicts_are_those_of_the_cpu(name, norm):
    images, net = some(torch.float64, 23), SmallNet().double()
    labels = predicted(net, images)
    attack = cheap(name, norm=norm, eps=EPS[norm] / 4)
    here = call(attack, net, images, labels, seed=4)
    there = call(attack, SmallNet().double().cuda(), images.cuda(), labels.cuda(), seed=4)
    assert 0 < here.broken.sum() < 23 or name in WEAK
    assert torch.equal(there.broken.cpu(), here.broken)
    assert torch.equal(there.clean_prediction.cpu(), here.clean_prediction)
    assert torch.equal(there.forwards.cpu(), here.forwards)


@pytest.mark.parametrize("kind", ["uniform", "normal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_has_the_same_bits_as_on_the_cpu(kind, dtype):
    ids, shape = [7, 1, 2**40], (3, 65, 33)
    here, there = (
        sample_noise(kind, (0, "pgd", 1), ids, shape, torch.empty(0, dtype=dtype, device=device))
        for device in ("cpu", "cuda")
    )
    assert there.device.type == "cuda"
    assert torch.equal(there.cpu(), here)


@pytest.mark.parametrize("name", ["pgd", "apgd_ce", "fab", "square", "dim", "boundary"])
def test_the_model_and_the_random_state_come_back_as_they_were(name):
    net = SmallNet().cuda()
    images = some(torch.float32).cuda()
    labels = predicted(net, images)
    net.train()
    net.features[1].eval()
    before = (
        [module.training for module in net.modules()],
        [(p.requires_grad, p.grad) for p in net.parameters()],
        {key: value.clone() for key, value in net.state_dict().items()},
        torch.get_rng_state(),
        torch.cuda.get_rng_state(),
    )
    norm = ROWS[name].norms[0]
    attack = cheap(name, norm=norm, eps=EPS[norm])
    call(attack, net, images, labels)
    attack.craft(net, images, labels)
    assert [module.training for module in net.modules()] == before[0]
    assert [(p.requires_grad, p.grad) for p in net.parameters()] == before[1]
    assert all(torch.equal(value, before[2][key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before[3])
    assert torch.equal(torch.cuda.get_rng_state(), before[4])


@pytest.mark.parametrize("name", list(ROWS))
def test_a_search_in_bf16_gives_verdicts_in_float32(name):
    images, net = some(torch.float32, 17, seed=6).cuda(), SmallNet().cuda()
    labels = predicted(net, images)
    norm = ROWS[name].norms[0]
    outcome = call(cheap(name, norm=norm, eps=EPS[norm]), net, images, labels, precision="bf16")
    assert outcome.images.dtype == torch.float32
    prediction = predicted(net, outcome.images)
    assert torch.equal(outcome.adversarial_prediction, prediction)
    wanted = prediction == (labels + 1) % 10 if name in TARGETED_ONLY else prediction != labels
    assert torch.equal(outcome.broken, wanted)
    assert outcome.broken.any() or name in WEAK


@pytest.mark.parametrize("name", ["pgd", "apgd_ce", "square"])
def test_autocast_and_tf32_around_a_call_change_no_verdict(name):
    images, net = some(torch.float32).cuda(), SmallNet().cuda()
    labels = predicted(net, images)
    attack = cheap(name, norm="linf", eps=EPS["linf"])
    expected = call(attack, net, images, labels)
    with in_tf32(), torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        mixed = call(attack, net, images.clone(), labels.clone())
    assert mixed.images.dtype == torch.float32
    assert torch.equal(mixed.broken, expected.broken)


@pytest.mark.filterwarnings("ignore:sgm found no skip connection")
@pytest.mark.parametrize(("name", "norm"), CRAFTS)
def test_crafting_waits_for_nothing(name, norm):
    net, images = SmallNet().cuda(), some(torch.float32).cuda()
    labels = predicted(net, images)
    targets = (labels + 1) % 10 if name in TARGETED_ONLY else None
    attack = cheap(name, norm=norm, eps=EPS[norm])
    attack.craft(net, images, labels, targets=targets)
    with nothing_waits():
        crafted = attack.craft(net, images, labels, targets=targets, sample_ids=torch.arange(12), seed=1)
    assert crafted.isfinite().all()


def test_pgd_k_costs_k_passes_each_way():
    net = Counting(SmallNet().cuda())
    images = some(torch.float32).cuda()
    labels = predicted(net, images)
    net.forwards = 0
    make_attack("pgd", eps=0.3, steps=5).craft(net, images, labels)
    assert (net.forwards, net.backwards) == (5 * 12, 5 * 12)
    net.forwards = net.backwards = 0
    outcome = make_attack("pgd", eps=1e-6, steps=7)(net, images, labels)
    assert not outcome.broken.any()
    assert (net.forwards, net.backwards) == ((7 + 2) * 12, 7 * 12)


class StepsWithoutWaits(Callback):
    """Makes waits an error within every training step but the first, which loads kernels."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        assert batch[0].device.type == "cuda"
        if batch_idx:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("adv", ["pgd", "trades", "fgsm_rs", "apgd"])
def test_a_training_step_waits_for_nothing(adv, tmp_path):
    cfg = config(f"adv={adv}", "trainer=gpu", "trainer.limit_train_batches=4")
    data = build.build_data(cfg, training=True)
    module = build.build_module(cfg, build.build_classifier(cfg, data.num_classes), data)
    trainer = build.build_trainer(cfg, tmp_path)
    assert trainer.precision == "bf16-mixed"
    trainer.callbacks.append(StepsWithoutWaits())
    try:
        trainer.fit(module, datamodule=data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.global_step == 4


def test_gradients_lie_in_the_layout_of_the_network():
    """What comes back of channels_last weights is channels_last, so that nothing is transposed at every step."""
    net = make_classifier("resnet18", in_chans=3, num_classes=10, img_size=64, mean=[0.5] * 3, std=[0.5] * 3).cuda()
    images = torch.rand(8, 3, 64, 64, device="cuda")
    labels = torch.arange(8, device="cuda")
    crafted = make_attack("pgd", steps=2).craft(net, images.to(memory_format=torch.channels_last), labels)
    assert crafted.is_contiguous(memory_format=torch.channels_last)
    objective = AdversarialTraining(InnerAttack(attack=make_attack("pgd", steps=2)))
    with torch.autocast("cuda", torch.bfloat16):
        objective.loss(net.train(), images, crafted, labels, 0)[0].backward()
    for weight in net.parameters():
        if weight.ndim == 4:
            assert weight.grad.is_contiguous(memory_format=torch.channels_last)


def test_more_gpus_than_there_are_are_refused_in_one_line(tmp_path):
    done = run("train.py", "trainer=gpu", "trainer.devices=99", f"run_dir={tmp_path}")
    assert_one_line(done, r"trainer\.devices=99: there (is 1 GPU|are \d+ GPUs) on this machine")
