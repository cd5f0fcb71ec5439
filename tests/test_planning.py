"""What a training will cost is told before it begins, and is what it then costs."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from networks import SmallNet
from processes import assert_one_line, here
from torch import Tensor, nn
from trainings import config, fit

from ares_lightning import build
from ares_lightning.attacks import make_attack
from ares_lightning.counting import AsOnCUDA, Operation, Trace, without_memory
from ares_lightning.evaluation.plan import plan
from ares_lightning.hardware import HARDWARE, REACHED
from ares_lightning.models import make_classifier
from ares_lightning.planning import evaluation_plan, training_plan, validated_images
from ares_lightning.training.cost import step_cost
from ares_lightning.training.objectives import AdversarialTraining, InnerAttack
from ares_lightning.training.plan import num_collectives, plan_training, trace_step

CPU = torch.device("cpu")
MIB = 2**20


def built(*overrides: str):
    cfg = config(*overrides)
    data = build.build_data(cfg, training=True)
    return build.build_module(cfg, build.build_classifier(cfg, data.num_classes), data), data


def plan_lines(done) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    return {line[:12].strip(): line[12:].strip() for line in done.stdout.splitlines()}


def test_a_plan_of_a_training_is_printed_and_nothing_is_written_or_trained(tmp_path):
    small = ["trainer.max_epochs=3", "data.batch_size=32", "model.settings.width=8", "eval=[clean,pgd20]"]
    done = here("train.py", "plan=true", "trainer=cpu", f"launch.root={tmp_path}", *small, "subset=first:6")
    lines = plan_lines(done)
    assert lines["updates"] == "117: 3 epochs of 39, with 1,248 images each"
    assert lines["a step"].startswith("32 images on each device, 9.0 F an image, F = ")
    assert lines["collectives"] == "none"
    assert re.search(r"^  pgd20 +digits +6 +22 +20 ", done.stdout, re.M)
    assert re.match(r"\d.* of steps, .* of validation \(at most ", lines["time"])
    assert re.match(r"\d.*, at most \d", lines["in all"])
    assert not list(tmp_path.iterdir())


def test_a_plan_for_other_hardware_needs_none_of_it(tmp_path):
    of_eight = ["trainer=ddp", "trainer.devices=4", "trainer.num_nodes=2", "trick=[ema,awp]", "eval=[]"]
    done = here("train.py", "plan=h100", *of_eight, "data.batch_size=16", f"launch.root={tmp_path}")
    lines = plan_lines(done)
    assert done.stdout.startswith("training on 8 x h100, bf16-mixed\n")
    assert lines["updates"].startswith("135: 15 epochs of 9, with 1,152 images each")
    sizes = dict(re.findall(r"([a-z ]+) ([\d.]+) MiB", lines["memory"]))
    assert float(sizes[" averaged weights"]) == pytest.approx(float(sizes[" weights"]), abs=0.1)
    assert lines["not in it"] == "trick=[awp] adds about 3 F a step and a copy of the weights"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", ["train.py", "evaluate.py"])
def test_hardware_that_is_not_known_is_told_in_one_line(program, tmp_path):
    done = here(program, "plan=h10", f"launch.root={tmp_path}")
    assert_one_line(done, "plan=h10: expected true, false or one of a100, h100, h200, l40s, rtx4090")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer=ddp"], "trainer.devices=auto: plan=h100 needs their number"),
        (["trainer.devices=-1"], "trainer.devices=-1: plan=h100 needs their number"),
        (["trainer.num_nodes=0"], "trainer.num_nodes=0: expected a whole number of at least 1"),
        (["trainer.num_nodes=x"], "trainer.num_nodes=x: expected a whole number of at least 1"),
        (["trainer.precision=fp8"], "trainer.precision=fp8: expected one of auto, 32-true"),
        (["precision=fp64"], "precision=fp64: plan=h100 knows no rate for it; plan=true measures one"),
    ],
)
def test_what_cannot_be_planned_names_its_key(overrides, message):
    cfg = config("plan=h100", *overrides)
    with pytest.raises(build.ConfigError, match=f"^{message}"):
        build.planned_devices(cfg), build.planned_precision(cfg)


def test_updates_and_bytes_follow_from_the_settings():
    module, data = built("data.batch_size={0: 64, 1: 32}", "trainer.max_epochs=2")
    planned = plan_training(module, data, epochs=range(2), accumulated=3, world_size=2, on=HARDWARE["a100"])
    images = len(data.train_set)
    batches = [images // 128, images // 64]
    assert planned.images == 128 * batches[0] + 64 * batches[1]
    assert planned.updates == sum(-(-number // 3) for number in batches), "an epoch's rest is an update too"
    assert planned.batch == 64
    size = sum(p.numel() * 4 for p in module.net.parameters())
    assert planned.reduced == planned.sent == size, "a ring of two: each sends half of it twice"
    eight = plan_training(module, data, epochs=range(1), world_size=8, on=HARDWARE["a100"])
    assert eight.sent == pytest.approx(2 * 7 / 8 * size, abs=1)
    alone = plan_training(module, data, epochs=range(1), limit=3, on=HARDWARE["a100"])
    assert (alone.reduced, alone.sent, alone.collectives, alone.updates) == (0, 0, 0, 3)
    assert alone.memory.gradients == size
    assert alone.memory.optimizer == pytest.approx(2 * size, rel=0.01), "AdamW has two numbers for each weight"


def test_updates_are_those_that_a_training_makes(tmp_path):
    run = fit(
        tmp_path, "trainer.max_epochs=3", "trainer.limit_train_batches=3", "trainer.accumulate_grad_batches=2"
    )
    module, data = built()
    few = plan_training(module, data, epochs=range(3), limit=3, accumulated=2, on=HARDWARE["a100"])
    assert few.updates == run.trainer.global_step == sum(run.module.steps_by_epoch(3)) == 6
    assert plan_training(module, data, epochs=range(3), limit=19, accumulated=4, on=HARDWARE["a100"]).updates == 15


def whole_plan(folder, *overrides: str, checkpoint=None) -> list[str]:
    """The lines of a training's plan for an H100."""
    cfg = config("plan=h100", *overrides)
    module, data = built(*overrides)
    trainer = build.build_trainer(cfg, folder)
    evaluation, cost = build.build_evaluation(cfg, data), build.rehearse(module, data)
    return training_plan(cfg, trainer, module, data, evaluation, cost, checkpoint).splitlines()


def test_a_plan_follows_what_the_trainer_leaves_out(tmp_path):
    lines = whole_plan(tmp_path, "trainer.limit_val_batches=0")
    assert ", 0.0 s of validation (at most 0.0 s)" in lines[5]
    lines = whole_plan(tmp_path, "trainer.fast_dev_run=2", "trainer.max_epochs=30", "trainer.limit_train_batches=9")
    assert lines[1] == "updates      2: 1 epochs of 2, with 32 images each"


def test_a_plan_of_a_training_that_goes_on_has_what_is_left(tmp_path):
    checkpoint = fit(tmp_path / "run", "trainer.max_epochs=1").checkpoint()
    lines = whole_plan(tmp_path, "trainer.max_epochs=3", checkpoint=checkpoint)
    assert lines[1] == "updates      6: 2 epochs of 3, with 48 images each, what is left of 3 epochs"
    with pytest.raises(build.ConfigError, match="all 1 epochs are behind the checkpoint"):
        whole_plan(tmp_path, checkpoint=checkpoint)
    fit_loop = checkpoint["loops"]["fit_loop"]
    fit_loop["epoch_progress"]["current"] |= {"ready": 2, "started": 2}
    fit_loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    fit_loop["epoch_loop.batch_progress"]["current"]["processed"] = 2
    lines = whole_plan(tmp_path, "trainer.max_epochs=3", checkpoint=checkpoint)
    assert lines[1].startswith("updates      4: 2 epochs of 2,")
    fit_loop["epoch_progress"]["current"]["processed"] = 0
    lines = whole_plan(tmp_path, "trainer.max_epochs=1", checkpoint=checkpoint)
    assert lines[1] == "updates      1: 1 epochs of 1, with 16 images each, what is left of 1 epochs"


class LooksAtValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.scale = nn.Linear(64, 10), torch.tensor(2.0)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1) * self.scale) if images.mean() > 0 else self.head(images.flatten(1))


def test_a_network_that_looks_at_values_trains_but_cannot_be_planned():
    module, data = built()
    module.net.backbone = LooksAtValues()
    assert build.rehearse(module, data) is None
    cfg = config("plan=h100", "eval=[clean]")
    with pytest.raises(build.ConfigError, match=r"^plan=h100: the network cannot be followed: .*meta"):
        evaluation_plan(cfg, build.build_evaluation(cfg, data), module.net)


def test_a_network_with_a_random_defense_trains_and_can_be_planned():
    module, data = built("model.defense=random_resize_pad")
    assert build.rehearse(module, data) is not None


@pytest.mark.parametrize(
    ("limit", "world_size", "images"),
    [(0, 1, 0), (2, 1, 64), (1, 2, 64), (0.5, 1, 128), (1.0, 1, 288), (1.0, 4, 288)],
)
def test_as_many_images_are_validated_as_the_limit_leaves(limit, world_size, images):
    _, data = built("data.num_val=288", "data.eval_batch_size=32")
    assert validated_images(data, limit, world_size) == images


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_epochs=0", "trainer.max_epochs=0: expected a whole number of at least 1"),
        ("trainer.max_epochs=-1", "trainer.max_epochs=-1: expected a whole number of at least 1"),
        ("trainer.strategy=fsdp", "trainer.strategy=fsdp: "),
        ("+trainer.epochs=3", "trainer: Trainer.__init__\\(\\) got an unexpected keyword argument 'epochs'"),
        ("+trick.momentum.decay=1", "trick.momentum: expected one of ema"),
    ],
)
def test_a_plan_for_other_hardware_refuses_what_a_training_does(override, message, tmp_path):
    with pytest.raises(build.ConfigError, match=f"^{message}"):
        build.build_trainer(config("plan=h100", "trainer=ddp", "trainer.sync_batchnorm=true", override), tmp_path)


def test_a_plan_for_other_hardware_minds_no_job_that_it_is_made_in(tmp_path, monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.setenv(name, "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "training")
    build.build_trainer(config("plan=h100", "trainer=ddp", "trainer.devices=8"), tmp_path)


def test_collectives_are_the_buckets_of_ddp_and_one_a_type_of_buffers():
    facts = {"in_chans": 3, "num_classes": 1000, "img_size": 224, "mean": [0.5] * 3, "std": [0.5] * 3}
    for name, types in (("resnet50", 2), ("vit_small_patch16_224", 1)):  # mean and deviation; numbers of batches
        net = make_classifier(name, **facts)
        weights = list(reversed(list(net.parameters())))
        limits = [torch.distributed._DEFAULT_FIRST_BUCKET_BYTES, 25 * MIB]
        buckets, _ = torch.distributed._compute_bucket_assignment_by_size(weights, limits)
        assert num_collectives(net) == len(buckets) + types
    net = SmallNet()
    norms = sum("BatchNorm" in type(module).__name__ for module in net.modules())
    assert norms
    assert num_collectives(net, sync_batchnorm=True) == num_collectives(net) + 2 * norms


def saved_bytes(work, given: list[Tensor]) -> int:
    """Bytes of all tensors besides the given ones that autograd keeps for the backward, each storage once."""
    storages, known = {}, {tensor.untyped_storage()._cdata for tensor in given}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        work()
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_memory_is_that_of_the_tensors_that_a_real_step_keeps(name):
    """On the CPU, in float32: what is counted without memory is at least what autograd keeps, and little more."""
    facts = {"in_chans": 3, "num_classes": 10, "img_size": 224, "mean": [0.5] * 3, "std": [0.5] * 3}
    net = make_classifier(name, **facts).train()
    objective = AdversarialTraining(InnerAttack(attack=make_attack("pgd", steps=1)))
    images, labels = torch.rand(2, 3, 224, 224), torch.tensor([1, 2])
    given = [images, labels, *net.parameters(), *net.buffers()]
    kept = saved_bytes(lambda: objective.loss(net, images, images, labels, 0), given)
    (twin,) = without_memory((net,), [net])
    shapes = images.to("meta"), images.to("meta"), labels.to("meta")
    with Trace() as trace, AsOnCUDA(bf16=False):
        loss = objective.loss(twin, *shapes, 0)
    assert kept <= trace.live <= 1.05 * kept
    assert trace.live <= trace.peak <= 1.1 * kept
    del loss
    assert trace.live == 0, "what is no longer held is not counted"
    with Trace() as real:
        objective.loss(net, images, images, labels, 0)
    assert real.peak == pytest.approx(trace.peak, rel=0.05)


def test_a_step_is_followed_with_the_operations_that_it_has():
    module, _ = built("model=resnet18", "adv.steps=2")
    cost = step_cost(module.net, module.objective, torch.rand(2, 1, 8, 8), torch.tensor([1, 2]))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for bf16 in False, True:
        operations, memory = trace_step(module, (4, 1, 8, 8), bf16=bf16)
        assert sum(each.flops for each in operations) == pytest.approx(4 * cost.step * cost.forward, rel=0.001)
        kinds = {each.kind for each in operations if each.flops}
        assert kinds == ({"bf16"} if bf16 else {"tf32", "fp32"}), "convolutions go by TF32, torch's default"
        assert memory.peak == (
            memory.weights
            + memory.gradients
            + memory.optimizer
            + memory.averaged
            + memory.images
            + max(memory.attack, memory.update)
        )
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_under_bf16_the_residual_stream_of_a_transformer_stays_in_float32():
    module, _ = built("model=vit_ti")
    half, full = (trace_step(module, (1024, 1, 8, 8), bf16=bf16)[1].update for bf16 in (True, False))
    assert 0.5 < half / full < 0.75


def test_the_time_of_an_operation_is_that_of_its_rate_its_memory_or_its_launch():
    on = HARDWARE["h100"]
    shares = {"rate": 0.5, "bandwidth": 0.5, "launch": 1e-5}
    product = Operation(flops=10**12, bytes=10**6, kind="bf16")
    assert on.seconds([product], **shares) == pytest.approx(1e12 / (0.5 * on.bf16))
    assert on.seconds([Operation(10**12, 10**6, "fp32")], **shares) == pytest.approx(1e12 / (0.5 * on.fp32))
    assert on.seconds([Operation(0, 10**9, "fp32")], **shares) == pytest.approx(1e9 / (0.5 * on.bandwidth))
    assert on.seconds([Operation(0, 8, "fp32")] * 3, **shares) == pytest.approx(3e-5)


def test_the_table_of_hardware_holds_what_data_sheets_state():
    for name, on in HARDWARE.items():
        assert on.name == name
        assert on.bf16 >= on.tf32 >= on.fp32 > 1e13
        assert on.memory > 20 * 2**30
        assert 5e11 < on.bandwidth < 1e13
        assert on.link < on.bandwidth
    assert (HARDWARE["h100"].bf16, HARDWARE["h200"].bandwidth) == (989.4e12, 4.8e12)
    assert 0 < REACHED["rate"] < 1
    assert 0 < REACHED["bandwidth"] < 1


def test_an_evaluation_is_planned_for_other_hardware(tmp_path):
    net = make_classifier("resnet10t", in_chans=1, num_classes=10, img_size=8, mean=[0.3], std=[0.4])
    torch.save(net.backbone.state_dict(), tmp_path / "weights.pth")
    run = ["model=timm", "model.name=resnet10t", f"model.weights={tmp_path / 'weights.pth'}", "eval=[clean,pgd20]"]
    done = here("evaluate.py", *run, f"run_dir={tmp_path / 'run'}", "plan=a100", "trainer.devices=2")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^pgd20 +digits +360 +22 +20 ", done.stdout, re.M)
    assert "times: of such passes on 2 x a100, 0." in done.stdout
    assert not (tmp_path / "run").exists()


def test_an_evaluation_takes_the_time_of_its_operations():
    cfg = config("eval=[pgd20]")
    data = build.build_data(cfg, training=True)
    evaluation, net = build.build_evaluation(cfg, data), build.build_classifier(cfg, data.num_classes)
    one, two = (plan(evaluation, net, HARDWARE["a100"], devices).seconds for devices in (1, 2))
    assert one[1] == 2 * one[0] == 2 * two[1] > 0
    assert plan(evaluation, net, replace(HARDWARE["a100"], tf32=1.0)).seconds == one, "searches switch TF32 off"
    assert plan(evaluation, net, replace(HARDWARE["a100"], fp32=1e9)).seconds > one, "convolutions included"
    slow = replace(HARDWARE["a100"], bandwidth=HARDWARE["a100"].bandwidth / 1e6)
    assert plan(evaluation, net, slow).seconds > one
