"""Optimizers and learning rates: schedules in closed form, scaling, layer decay, weight decay, clipping."""

from __future__ import annotations

import math

import pytest
import torch
from networks import SmallNet
from timm.utils.agc import adaptive_clip_grad
from torch import nn
from trainings import Watch, fit

from ares_lightning.models import make_classifier
from ares_lightning.training.optim import OptimSettings


def settings(**changes) -> OptimSettings:
    return OptimSettings(**{"name": "sgd", "lr": 0.4, "weight_decay": 0.1, "momentum": 0.9, **changes})


def classifier(name: str, img_size: int = 32) -> nn.Module:
    return make_classifier(name, in_chans=3, num_classes=10, img_size=img_size, mean=[0.5] * 3, std=[0.5] * 3)


def rates(steps: list[int], **changes) -> list[float]:
    """The rate that each update is made with."""
    optim = settings(**changes)
    optimizer = optim.optimizer(SmallNet())
    schedule, found = optim.schedule_of(optimizer, steps), []
    for _ in range(sum(steps)):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_rate_warms_up_linearly_and_then_falls_along_a_cosine_of_the_whole_time():
    found = rates([10] * 10, warmup_epochs=2, warmup_lr=0.1, min_lr=0.04)
    warmup = [0.1 + (0.4 - 0.1) * step / 20 for step in range(20)]
    cosine = [0.04 + (0.4 - 0.04) * (1 + math.cos(math.pi * step / 100)) / 2 for step in range(20, 100)]
    assert found == pytest.approx(warmup + cosine, rel=1e-12)


def test_a_cooldown_stays_at_the_least_rate():
    """Debenedetti et al.: 100 epochs of cosine and 10 more at min_lr, 110 in all."""
    found = rates([4] * 110, warmup_epochs=10, warmup_lr=1e-6, min_lr=1e-5, cooldown_epochs=10, lr=5e-4)
    assert found[400:] == pytest.approx([1e-5] * 40, rel=1e-12)
    assert found[399] > 1e-5
    assert found[200] == pytest.approx((5e-4 + 1e-5) / 2, rel=1e-12)


def test_steps_fall_at_their_milestones():
    """Rice et al.: ×0.1 at epochs 100 and 150 of 200."""
    found = rates([2] * 200, schedule="step", milestones=[100, 150], decay_rate=0.1)
    assert found == pytest.approx([0.4] * 200 + [0.04] * 100 + [0.004] * 100)


def test_linear_points_are_joined_by_lines():
    """Wong et al. on ImageNet: 0 → 0.4 at epoch 1 → 0.04 at 6 → 0.004 at 12 → 0.0004 at 15."""
    points = {0: 0.0, 1: 1.0, 6: 0.1, 12: 0.01, 15: 0.001}
    found = rates([10] * 15, schedule="linear", points=points)
    assert [found[0], found[5], found[10]] == pytest.approx([0, 0.2, 0.4])
    assert [found[35], found[60], found[90], found[120], found[135]] == pytest.approx(
        [(0.4 + 0.04) / 2, 0.04, (0.04 + 0.004) / 2, 0.004, (0.004 + 0.0004) / 2]
    )


def test_a_constant_rate_is_constant_after_its_warm_up():
    found = rates([4] * 3, schedule="constant", warmup_epochs=0.5, warmup_lr=0.0)
    assert found == pytest.approx([0.0, 0.2] + [0.4] * 10)


def test_epochs_of_different_lengths_count_the_same():
    """As where the size of the batch changes: half way through each epoch the rate is that of the half epoch."""
    found = rates([2, 4, 8, 6], schedule="linear", points={0: 1.0, 4: 0.0})
    for step, epoch in (0, 0), (1, 0.5), (2, 1), (4, 1.5), (6, 2), (10, 2.5), (14, 3), (17, 3.5):
        assert found[step] == pytest.approx(0.4 * (1 - epoch / 4), rel=1e-9)


def test_a_rate_of_a_base_batch_is_scaled_in_proportion():
    optim = settings(base_batch=512, warmup_lr=0.01, min_lr=0.001)
    scaled = optim.scaled(128)
    assert (scaled.lr, scaled.warmup_lr, scaled.min_lr, scaled.base_batch) == (0.1, 0.01, 0.001, None)
    assert settings().scaled(128) == settings()


def test_biases_norms_and_what_the_architecture_names_are_not_decayed():
    net = classifier("vit_tiny_patch16_224")
    optimizer = settings().optimizer(net)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: decay[id(p)] for name, p in net.named_parameters()}
    for name, value in by_name.items():
        spared = "norm" in name or name.endswith((".bias", "pos_embed", "cls_token"))
        assert value == (0.0 if spared else 0.1), name
    assert {by_name["backbone.pos_embed"], by_name["backbone.head.weight"]} == {0.0, 0.1}
    everything = settings(decay_norms=True).optimizer(net)
    spared = [p for group in everything.param_groups if group["weight_decay"] == 0 for p in group["params"]]
    assert {id(p) for p in spared} == {id(net.backbone.pos_embed), id(net.backbone.cls_token)}


def test_layer_decay_gives_each_block_its_rate():
    net = classifier("vit_tiny_patch16_224")
    optimizer = settings(layer_decay=0.5).optimizer(net)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rate[id(p)] for name, p in net.named_parameters()}
    assert found["backbone.head.weight"] == pytest.approx(0.4)
    assert found["backbone.blocks.11.mlp.fc1.weight"] == pytest.approx(0.4 * 0.5)
    for block in range(12):
        assert found[f"backbone.blocks.{block}.attn.qkv.bias"] == pytest.approx(0.4 * 0.5 ** (12 - block))
    assert found["backbone.patch_embed.proj.weight"] == pytest.approx(0.4 * 0.5**13)


def test_layer_decay_reaches_the_optimizer_of_a_training(tmp_path):
    """Lightning's own schedulers would set all groups to one rate; here each keeps its share at every step."""
    seen = []

    class Rates(Watch):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append([(group["lr"], group["lr_scale"]) for group in optimizer.param_groups])

    optim = ["optim=sgd", "optim.lr=0.4", "optim.layer_decay=0.5", "optim.warmup_epochs=1", "optim.warmup_lr=0"]
    fit(tmp_path, "model=vit_ti", "adv=none", *optim, "trainer.max_epochs=2", callbacks=[Rates()])
    assert len(seen) == 6
    factors = [0, 1 / 3, 2 / 3, *((1 + math.cos(math.pi * epoch / 2)) / 2 for epoch in (1, 4 / 3, 5 / 3))]
    for groups, factor in zip(seen, factors, strict=True):
        assert len({scale for _, scale in groups}) > 5
        assert [rate for rate, _ in groups] == pytest.approx([0.4 * scale * factor for _, scale in groups])


def test_norms_beside_the_network_are_trained_without_decay():
    net, beside = SmallNet(), nn.BatchNorm2d(4)
    optimizer = settings(lr=0.4).optimizer(net, beside)
    group = optimizer.param_groups[-1]
    assert {id(p) for p in group["params"]} == {id(p) for p in beside.parameters()}
    assert (group["lr"], group["weight_decay"]) == (0.4, 0.0)


HEADS = (
    "resnet18",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_atto",
    "cnn",
    "preact_resnet18",
)


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_the_layer_that_makes_the_logits(name):
    net = classifier(name)
    linears = [module for module in net.modules() if isinstance(module, nn.Linear)]
    (head,) = [layer for layer in linears if layer.out_features == 10]
    assert {id(p) for p in settings().head(net)} == {id(p) for p in head.parameters()}


class Gradients(Watch):
    """The gradients after the backward, and those that the optimizer gets."""

    def on_after_backward(self, trainer, pl_module):
        self.raw = {name: p.grad.clone() for name, p in pl_module.net.named_parameters()}
        self.weights = {name: p.detach().clone() for name, p in pl_module.net.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.used = {name: p.grad.clone() for name, p in pl_module.net.named_parameters()}


def test_agc_clips_each_unit_as_timm_does_and_leaves_the_head_out(tmp_path):
    watch = Gradients()
    fit(tmp_path, "adv=none", "optim.agc=0.001", "trainer.limit_train_batches=1", callbacks=[watch])
    parameters = {name: nn.Parameter(weight) for name, weight in watch.weights.items()}
    for name, parameter in parameters.items():
        parameter.grad = watch.raw[name].clone()
    adaptive_clip_grad([p for name, p in parameters.items() if "head" not in name], 0.001)
    changed = 0
    for name, parameter in parameters.items():
        torch.testing.assert_close(watch.used[name], parameter.grad, msg=name)
        changed += not torch.equal(watch.used[name], watch.raw[name])
        assert "head" not in name or torch.equal(watch.used[name], watch.raw[name])
    assert changed > 3


def test_the_norm_of_the_whole_gradient_is_clipped(tmp_path):
    watch = Gradients()
    fit(tmp_path, "adv=none", "optim.clip_grad_norm=0.01", "trainer.limit_train_batches=1", callbacks=[watch])

    def norm(gradients):
        return torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()

    assert norm(watch.raw) > 0.02
    assert norm(watch.used) == pytest.approx(0.01, rel=1e-3)


def test_a_batch_that_changes_with_the_epoch_is_scheduled_by_its_epochs(tmp_path):
    """The rate is scaled by the first epoch's batch; each epoch takes its own number of steps of the schedule."""
    seen = []

    class Rates(Watch):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append((trainer.current_epoch, optimizer.param_groups[0]["lr"]))

    optim = ["optim=sgd", "optim.lr=0.4", "optim.base_batch=512", "optim.warmup_epochs=0", "optim.min_lr=0"]
    sizes = ["data.batch_size={0:256,1:512}", "trainer.limit_train_batches=1.0", "trainer.max_epochs=2"]
    fit(
        tmp_path, "adv=none", *optim, *sizes, "optim.schedule=linear", "optim.points={0:1,2:0}", callbacks=[Rates()]
    )
    number = [sum(epoch == which for epoch, _ in seen) for which in (0, 1)]
    assert number == [4, 2]  # of 1257 images
    expected = [0.2 * (1 - epoch / 2) for epoch in (0, 0.25, 0.5, 0.75, 1, 1.5)]
    assert [rate for _, rate in seen] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adamm"}, "name=adamm: timm has no such optimizer"),
        ({"lr": -1}, "lr=-1: expected a number of at least 0"),
        ({"weight_decay": "x"}, "weight_decay=x: expected a number"),
        ({"schedule": "poly"}, "schedule=poly: expected one of cosine, step, linear, constant"),
        ({"base_batch": 0}, "base_batch=0: expected a number of images"),
        ({"agc": 0.01, "clip_grad_norm": 1.0}, r"agc=0\.01: contradicts clip_grad_norm=1\.0"),
        ({"schedule": "step"}, r"milestones=\[\]: schedule=step needs the epochs"),
        ({"schedule": "step", "milestones": [5, 3]}, r"milestones=\[5, 3\]: expected rising epochs"),
        ({"schedule": "linear"}, "points=None: go with schedule=linear, this is schedule=linear"),
        ({"points": {0: 1.0}}, r"points=\{0: 1\.0\}: go with schedule=linear, this is schedule=cosine"),
        ({"schedule": "linear", "points": {3: 1.0, 1: 0.0}}, r"points=.*: expected \{epoch: multiple of lr\}"),
        ({"warmup_epochs": math.nan}, "warmup_epochs=nan"),
    ],
)
def test_settings_that_contradict_or_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        settings(**changes)
