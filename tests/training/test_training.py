"""What a training step does."""

from __future__ import annotations

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from networks import SmallNet
from torch.utils.data import DataLoader, TensorDataset

from ares_lightning.attacks import make_attack
from ares_lightning.models import make_classifier
from ares_lightning.training import AdversarialTraining, RobustTraining, StandardTraining
from ares_lightning.training.attention import split_attention
from ares_lightning.training.optim import OptimSettings


def test_adversarial_training_minimises_the_loss_on_what_its_attack_makes():
    """Equal weights after 20 steps of the plain loop of the paper, given the same noise."""
    attack = make_attack("pgd", eps=0.1, steps=2)
    objective = AdversarialTraining(attack, seed=3)
    ours, plain = SmallNet().double(), SmallNet().double()
    plain.features[5].p = ours.features[5].p = 0.0
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in (ours, plain)]
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        images = torch.rand(8, 3, 6, 5, generator=generator, dtype=torch.float64)
        labels = torch.randint(10, (8,), generator=generator)
        ids = torch.arange(8) + 8 * step
        adversarial = objective.craft(ours, images, labels, step, epoch=1, sample_ids=ids)
        loss, logs = objective.loss(ours, images, adversarial, labels, step)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()

        start = attack.replace(step_size=0.0).craft(plain, images, labels, sample_ids=ids, seed=3 * 1_000_000 + 1)
        x = start
        plain.eval()
        for _ in range(2):
            x = x.detach().requires_grad_()
            F.cross_entropy(plain(x), labels).backward()
            x = x + 0.125 * x.grad.sign()  # 2.5 eps / 2 steps
            x = torch.max(torch.min(x, images + 0.1), images - 0.1).clamp(0, 1)
        plain.train()
        optimizers[1].zero_grad()
        F.cross_entropy(plain(x.detach()), labels).backward()
        optimizers[1].step()
        assert 0 <= logs["robust_acc"] <= 1
    for got, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_noise_changes_with_the_epoch_and_not_with_the_batch():
    objective = AdversarialTraining(make_attack("pgd", eps=0.1, steps=1, step_size=0.0))
    net, images = SmallNet(), torch.rand(6, 3, 6, 5)
    labels, ids = torch.zeros(6, dtype=torch.int64), torch.arange(6)
    whole = objective.craft(net, images, labels, 0, epoch=2, sample_ids=ids)
    half = objective.craft(net, images[3:], labels[3:], 9, epoch=2, sample_ids=ids[3:])
    assert torch.equal(whole[3:], half)
    assert not torch.equal(whole, objective.craft(net, images, labels, 0, epoch=3, sample_ids=ids))


def test_crafting_leaves_no_gradient_for_the_optimizer():
    net = SmallNet().train()
    objective = AdversarialTraining(make_attack("pgd", steps=2))
    objective.craft(net, torch.rand(4, 3, 6, 5), torch.zeros(4, dtype=torch.int64), 0)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert net.training


def test_standard_training_is_cross_entropy_on_the_clean_images():
    net, images, labels = SmallNet().eval(), torch.rand(4, 3, 6, 5), torch.tensor([1, 2, 3, 4])
    objective = StandardTraining()
    assert objective.craft(net, images, labels, 0) is images
    loss, logs = objective.loss(net, images, images, labels, 0)
    torch.testing.assert_close(loss, F.cross_entropy(net(images), labels))
    assert "clean_acc" in logs


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    settings = OptimSettings(name="sgd", lr=1.0, weight_decay=0.0, momentum=0.9, warmup_epochs=2, min_lr=0.1)
    optimizer = settings.optimizer(SmallNet())
    schedule = settings.scheduler(optimizer, steps=100, epochs=10)
    rates = []
    for step in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step_update(step + 1)
    assert rates[0] == 0
    assert rates[10] == pytest.approx(0.5)
    assert max(rates) == pytest.approx(1.0, abs=0.1)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"name": "adamm"}, "name=adamm"), ({"lr": -1}, "lr=-1"), ({"weight_decay": "x"}, "weight_decay=x")],
)
def test_optimizer_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        OptimSettings(**{"name": "adamw", "lr": 0.1, "weight_decay": 0.0, **change})


def test_attention_taken_apart_has_the_same_gradient():
    facts = {"in_chans": 3, "num_classes": 10, "img_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    net = make_classifier("vit_tiny_patch16_224", **facts, depth=2, embed_dim=32, num_heads=2).double()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    (fused,) = torch.autograd.grad(net(images).square().sum(), images)
    split_attention(net)
    assert not any(block.attn.fused_attn for block in net.backbone.blocks)
    (split,) = torch.autograd.grad(net(images).square().sum(), images)
    torch.testing.assert_close(split, fused)


@pytest.mark.parametrize(("precision", "is_fused"), [("bf16-mixed", False), ("32-true", True)])
def test_attention_is_taken_apart_for_bf16_on_the_cpu_alone(precision, is_fused):
    facts = {"in_chans": 3, "num_classes": 10, "img_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    net = make_classifier("vit_tiny_patch16_224", **facts, depth=1, embed_dim=32, num_heads=2)
    module = RobustTraining(
        net,
        num_classes=10,
        objective=AdversarialTraining(make_attack("pgd", steps=1)),
        optim=OptimSettings(name="sgd", lr=0.1, weight_decay=0.0),
        val_attack=make_attack("fgsm"),
        config={},
    )
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    batches = DataLoader(TensorDataset(images, torch.tensor([1, 2, 3, 4]), torch.arange(4)), batch_size=4)
    trainer = L.Trainer(accelerator="cpu", precision=precision, fast_dev_run=True, logger=False)
    trainer.fit(module, batches, batches)
    assert all(block.attn.fused_attn is is_fused for block in net.backbone.blocks)
