"""Adversarial weight perturbation: the paper's loop, alone, accumulated, on two processes, and in bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from trainings import Watch, fit, weights

from ares_lightning.training.tricks import AWP

GAMMA, LR, DECAY = 0.05, 0.1, 0.01
SGD = ["optim=sgd", "optim.name=momentum", "optim.momentum=0", f"optim.lr={LR}", f"optim.weight_decay={DECAY}"]
SGD += ["optim.decay_norms=true", "optim.schedule=constant", "optim.warmup_epochs=0"]
TRICK = ["trick=[awp]", f"trick.awp.gamma={GAMMA}"]


class Batches(Watch):
    """The network as it was at first, and every batch of the training."""

    def on_fit_start(self, trainer, pl_module):
        self.net, self.batches = copy.deepcopy(pl_module.net), []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append((batch[0].float() / 255, batch[1], batch[2]))


def perturbed_by(net, loss, gamma=GAMMA):
    """What the authors add to each weight: a step of a proxy along −loss, rescaled to gamma times the weight."""
    proxy = copy.deepcopy(net).train()
    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
    optimizer.zero_grad()
    (-loss(proxy)).backward()
    optimizer.step()
    found = {}
    for (name, weight), moved in zip(net.named_parameters(), proxy.parameters(), strict=True):
        difference = (moved - weight).detach()
        if weight.ndim > 1:
            found[name] = gamma * weight.detach().norm() / (difference.norm() + 1e-20) * difference
    return found


def plain_training(net, batches, craft, loss, accumulated=1):
    """The authors' loop, but that the weights are back before the optimizer steps, which its decay sees."""
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, weight_decay=DECAY)
    net.train()
    optimizer.zero_grad()
    for number, (images, labels, ids) in enumerate(batches):
        adversarial = craft(net, images, labels, number // accumulated, ids)
        added = perturbed_by(net, lambda proxy, x=images, a=adversarial, y=labels: loss(proxy, x, a, y))
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        with torch.no_grad():
            for name, weight in net.named_parameters():
                weight += added.get(name, 0)
        (loss(net, images, adversarial, labels) / accumulated).backward()
        with torch.no_grad():
            for name, weight in net.named_parameters():
                weight.copy_(before[name])
        if (number + 1) % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
    return net


def adversarial_loss(net, images, adversarial, labels):
    return F.cross_entropy(net(adversarial), labels)


def trades_loss(net, images, adversarial, labels):
    clean, moved = net(images), net(adversarial)
    return F.cross_entropy(clean, labels) + 6 * F.kl_div(
        moved.log_softmax(1), clean.softmax(1), reduction="batchmean"
    )


@pytest.mark.parametrize(("adv", "loss"), [("pgd", adversarial_loss), ("trades", trades_loss)])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_awp_is_the_authors_loop(adv, loss, accumulated, tmp_path):
    watch = Batches()
    steps = [f"trainer.accumulate_grad_batches={accumulated}", "trainer.limit_train_batches=6", "adv.steps=2"]
    run = fit(tmp_path, f"adv={adv}", *steps, *SGD, *TRICK, callbacks=[watch], in_double=True)
    objective = run.module.objective

    def craft(net, images, labels, step, ids):
        return objective.craft(net, images, labels, step, epoch=0, sample_ids=ids)

    expected = plain_training(watch.net, watch.batches, craft, loss, accumulated)
    for name, value in expected.state_dict().items():
        found = run.module.net.state_dict()[name]
        assert torch.allclose(found, value, rtol=1e-9, atol=1e-9), name  # running statistics too


def test_the_weights_are_back_bit_for_bit_before_the_optimizer_steps(tmp_path):
    class Weights(Watch):
        moved = 0

        def on_train_batch_start(self, trainer, pl_module, *_):
            self.before = weights(pl_module.net)

        def on_before_backward(self, trainer, pl_module, loss):
            now = weights(pl_module.net)
            changed = [
                name for name, p in pl_module.net.named_parameters() if not torch.equal(p, self.before[name])
            ]
            assert changed
            assert all(now[name].ndim > 1 for name in changed)
            self.moved += 1

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for name, weight in pl_module.net.named_parameters():
                assert torch.equal(weight, self.before[name])

    watch = Weights()
    fit(tmp_path, *TRICK, callbacks=[watch])
    assert watch.moved == 3


def test_awp_waits_for_its_epoch(tmp_path):
    class Ends(Watch):
        def __init__(self):
            self.ends = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.ends.append(weights(pl_module.net))

    without, late = Ends(), Ends()
    two = [*SGD, "trainer.max_epochs=2"]
    fit(tmp_path / "without", *two, callbacks=[without])
    fit(tmp_path / "late", *two, *TRICK, "trick.awp.start_epoch=1", callbacks=[late])
    name = "backbone.head.weight"
    assert torch.equal(without.ends[0][name], late.ends[0][name])
    assert not torch.equal(without.ends[1][name], late.ends[1][name])


def test_the_weights_come_back_where_a_step_is_broken_off(tmp_path):
    class Breaks(Watch):
        def on_before_backward(self, trainer, pl_module, loss):
            raise KeyError("planted")

        def on_train_batch_start(self, trainer, pl_module, *_):
            self.module, self.before = pl_module, weights(pl_module.net)

    watch = Breaks()
    with pytest.raises(KeyError, match="planted"):
        fit(tmp_path, *TRICK, callbacks=[watch])
    assert all(torch.equal(p, watch.before[name]) for name, p in watch.module.net.named_parameters())


def test_in_bfloat16_the_loss_is_that_of_the_perturbed_weights(tmp_path):
    class Losses(Batches):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            images, labels, _ = self.batches[-1]
            net = copy.deepcopy(pl_module.net)
            loss = lambda net: F.cross_entropy(net(images), labels)  # noqa: E731
            with torch.autocast("cpu", dtype=torch.bfloat16):
                self.unmoved = loss(net).item()
                added = perturbed_by(net, loss, 0.5)
            with torch.no_grad():
                for name, weight in net.named_parameters():
                    weight += added.get(name, 0)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                self.moved = loss(net).item()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            found = outputs["loss"].item()
            assert self.moved > self.unmoved + 0.1
            assert found == pytest.approx(self.moved, rel=0.02)
            self.compared = True

    watch = Losses()
    fit(
        tmp_path,
        "adv=none",
        "trainer.precision=bf16-mixed",
        "trick=[awp]",
        "trick.awp.gamma=0.5",
        callbacks=[watch],
    )
    assert watch.compared


def test_two_processes_perturb_alike_so_that_the_batch_may_be_shared_out(tmp_path):
    """2 processes of 8 images make the steps of 1 process of 16, on a network with layer norm."""
    settings = ["model=vit_ti", "adv=none", "trainer.max_epochs=1", "trainer.limit_train_batches=3", *SGD]
    alone = fit(tmp_path / "alone", *settings, *TRICK, "data.batch_size=16").module.net.state_dict()
    unperturbed = fit(tmp_path / "without", *settings, "data.batch_size=16").module.net.state_dict()
    shared = ["trainer=ddp_sim", "trainer.strategy=ddp_fork", "data.batch_size=8"]
    fit(tmp_path / "shared", *settings, *TRICK, *shared)
    two = torch.load(tmp_path / "shared" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    differences = [(two[f"net.{name}"] - value).abs().max().item() for name, value in alone.items()]
    moved = max((unperturbed[name] - value).abs().max().item() for name, value in alone.items())
    assert max(differences) < 1e-5 < moved / 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": -1}, "gamma=-1: expected a number of at least 0"),
        ({"start_epoch": "x"}, "start_epoch=x: expected"),
    ],
)
def test_perturbations_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        AWP(**settings)
