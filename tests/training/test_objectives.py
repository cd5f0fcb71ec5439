"""What every objective keeps to: its cost, the network as it was, the global random state, warm-up by epoch."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import Counting, SmallNet
from plain import CLASSES, EPS, SIZE, batches, inner, network, soften
from torch import nn

from ares_lightning.attacks import Threat, make_attack
from ares_lightning.training.objectives import (
    ARD,
    MART,
    NFGSM,
    OBJECTIVES,
    RSLAD,
    TRADES,
    AdversarialTraining,
    AdvProp,
    AuxiliaryNorms,
    Consistency,
    FreeTraining,
    GradAlign,
    GradientNorm,
    InnerAttack,
    Objective,
    StandardTraining,
)

K = 3
PGD = {"steps": K, "step_size": "1/4 eps"}
Make = Callable[[nn.Module], Objective]

COSTS: dict[str, tuple[Make, tuple[int, int], tuple[int, int]]] = {
    # by name: the objective with a PGD-3 inside; forwards and input gradients to craft, forwards and input
    # gradients for the loss, whose backward then reaches the weights through every forward
    "none": (lambda net: StandardTraining(), (0, 0), (1, 0)),
    "pgd": (lambda net: AdversarialTraining(inner(**PGD)), (K, K), (1, 0)),
    "fgsm": (lambda net: AdversarialTraining(inner("fgsm")), (1, 1), (1, 0)),
    "fgsm_rs": (lambda net: AdversarialTraining(inner(steps=1, mode="train")), (1, 1), (1, 0)),
    "apgd": (lambda net: AdversarialTraining(inner("apgd_ce", steps=K, random_start=False)), (K + 1, K), (1, 0)),
    "trades": (lambda net: TRADES(inner(**PGD)), (K + 1, K), (2, 0)),
    "mart": (lambda net: MART(inner(**PGD)), (K, K), (2, 0)),
    "n_fgsm": (lambda net: NFGSM(inner("fgsm", mode="train")), (1, 1), (1, 0)),
    "gradalign": (lambda net: GradAlign(inner("fgsm", mode="train")), (1, 1), (2, 1)),
    "free": (lambda net: FreeTraining(inner("fgsm")), (0, 0), (1, 0)),
    "advprop": (lambda net: AdvProp(inner(**PGD), norms=AuxiliaryNorms(net)), (K, K), (2, 0)),
    "consistency": (lambda net: Consistency(inner(**PGD)), (K, K), (1, 0)),
    "gradient_norm": (lambda net: GradientNorm(Threat("linf", EPS)), (0, 0), (1, 1)),
    "ard": (lambda net: ARD(inner(**PGD, mode="train"), network(seed=9)), (K, K), (1, 0)),
    "rslad": (lambda net: RSLAD(inner(**PGD), network(seed=9)), (K, K), (2, 0)),
}


def test_every_name_of_adv_is_held_to_what_follows():
    assert sorted(COSTS) == sorted(OBJECTIVES)
    for name, (make, *_) in COSTS.items():
        assert type(make(network())) is OBJECTIVES[name]


def written_cost(name: str) -> int | None:
    """What the docstring says of a step, in F; of the attack APGD its own."""
    text = OBJECTIVES[name].__doc__ or ""
    found = re.search(r"\(2k \+ (\d+)\) F with APGD" if name == "apgd" else r"\(2k \+ (\d+)\) F", text)
    if found:
        return int(found[1]) + 2 * (1 if name in ("fgsm", "fgsm_rs") else K)
    found = re.search(r"(\d+) F a step", text)
    return None if found is None else int(found[1])


@pytest.mark.parametrize("name", COSTS)
def test_a_step_spends_the_passes_that_its_docstring_says(name):
    make, crafting, learning = COSTS[name]
    net = Counting(network())
    objective = make(net.net)
    images, labels, ids = next(batches())
    adversarial = objective.craft(net, images, labels, 0, epoch=9, sample_ids=ids)
    assert (net.forwards, net.backwards) == (crafting[0] * SIZE, crafting[1] * SIZE)
    net.forwards = net.backwards = 0
    loss, _ = objective.loss(net, images, adversarial, labels, 0)
    assert (net.forwards, net.backwards) == (learning[0] * SIZE, learning[1] * SIZE)
    if name not in ("gradalign", "gradient_norm"):  # whose second derivatives are no multiple of F
        assert written_cost(name) == sum(crafting) + 3 * learning[0]
    loss.backward()
    weights = net.net.named_parameters()
    assert all((weight.grad is not None) == weight.requires_grad for _, weight in weights)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", COSTS)
def test_crafting_leaves_the_network_and_the_random_state_as_they_were(name, mode):
    net = network()
    net.features[5].p = 0.3
    net.features[3].eval()
    objective = COSTS[name][0](net)
    if hasattr(objective, "inner"):
        objective.inner = InnerAttack(attack=objective.inner.attack, seed=1, mode=mode)
    images, labels, ids = next(batches())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    trainable = [parameter.requires_grad for parameter in net.parameters()]
    random = torch.get_rng_state()
    adversarial = objective.craft(net, images, labels, 0, epoch=9, sample_ids=ids)
    assert adversarial.shape == images.shape
    assert 0 <= adversarial.min() <= adversarial.max() <= 1
    assert torch.equal(torch.get_rng_state(), random)
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert [parameter.requires_grad for parameter in net.parameters()] == trainable
    assert all(parameter.grad is None for parameter in net.parameters())
    again = objective.craft(net, images, labels, 0, epoch=9, sample_ids=ids)
    assert torch.equal(adversarial, again), "the network's own random numbers follow from the step"


@pytest.mark.parametrize("name", COSTS)
def test_the_loss_leaves_gradients_to_its_backward_and_moves_statistics_of_one_forward_at_a_time(name):
    net = network()
    objective = COSTS[name][0](net)
    images, labels, ids = next(batches())
    adversarial = objective.craft(net, images, labels, 0, epoch=9, sample_ids=ids)
    loss, logs = objective.loss(net, images, adversarial, labels, 0)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert loss.ndim == 0
    assert not any(value.requires_grad for value in logs.values())
    updates = COSTS[name][2][0] - (name in ("gradalign", "advprop"))  # the one beside, the one through other norms
    assert net.features[1].num_batches_tracked == updates


@pytest.mark.parametrize("name", COSTS)
def test_soft_labels_are_learnt_from_or_refused(name):
    make, *_ = COSTS[name]
    net = network()
    objective = make(net)
    images, labels, ids = next(batches())
    if objective.wants_class_labels:
        with pytest.raises(ValueError, match=rf"^name={name}: its loss needs class labels; set aug\."):
            objective.craft(net, images, soften(labels), 0)
        return
    losses = []
    for given in (labels, F.one_hot(labels, CLASSES).double()):
        net = network()
        objective = make(net)
        adversarial = objective.craft(net, images, given, 0, sample_ids=ids)
        losses.append(objective.loss(net, images, adversarial, given, 0)[0])
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)


BUDGETED = [name for name in COSTS if name not in ("none", "gradient_norm")]


@pytest.mark.parametrize("name", BUDGETED)
def test_the_budget_grows_in_equal_parts_from_none_in_the_first_epoch(name):
    net, widest = network(), 3 if name == "n_fgsm" else 1
    images, labels, ids = next(batches())
    images = images / 2 + 0.25
    objective = COSTS[name][0](net)
    objective.inner = InnerAttack(attack=objective.inner.attack, eps_warmup_epochs=4)
    for epoch, share in (0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (9, 1.0):
        for _ in range(2):  # Free moves its images in the backward of the loss
            adversarial = objective.craft(net, images, labels, 0, epoch=epoch, sample_ids=ids)
            objective.loss(net, images, adversarial, labels, 0)[0].backward()
        distance = (adversarial - images).abs().max().item()
        assert distance == pytest.approx(widest * share * EPS, rel=0.05, abs=1e-12)
        assert distance <= widest * share * EPS + 1e-7


def test_steps_in_budgets_grow_with_it_and_lengths_do_not():
    relative = InnerAttack(attack=inner(step_size="1/4 eps").attack, eps_warmup_epochs=4).at(1)
    absolute = InnerAttack(attack=inner(step_size=0.03).attack, eps_warmup_epochs=4).at(1)
    assert (relative.eps, relative.step_size) == (EPS / 4, "0.25 eps")
    assert (absolute.eps, absolute.step_size) == (EPS / 4, 0.03)


@pytest.mark.parametrize("step_size", [0.02, "1/5 eps", None])
def test_the_steps_alone_grow_from_the_random_start_on(step_size):
    """ARES: step · min(epoch, 5) / 5."""
    net, (images, labels, ids) = network(), next(batches())
    images, full = images / 2 + 0.25, 2.5 * EPS if step_size is None else 0.02
    attack = inner(steps=1, step_size=step_size).attack
    warming = InnerAttack(attack=attack, step_warmup_epochs=5)
    for epoch, share in (0, 0), (1, 0.2), (4, 0.8), (5, 1), (7, 1):
        counted = Counting(net)
        made = warming.craft(counted, images, labels, epoch=epoch, sample_ids=ids)
        settled = InnerAttack(attack=attack.replace(step_size=share * full))
        expected = settled.craft(net, images, labels, epoch=epoch, sample_ids=ids)
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-12)
        assert counted.forwards == (SIZE if share else 0), "steps of no length cost nothing"


def test_in_training_mode_the_attack_differentiates_through_the_batchs_statistics():
    net, (images, labels, _) = network(), next(batches())
    one, all_ = slice(0, 1), slice(None)
    for mode, alike in ("eval", True), ("train", False):
        attack = inner("fgsm", mode=mode)
        alone, among = (
            attack.craft(net, images[rows], labels[rows], epoch=0, sample_ids=None) for rows in (one, all_)
        )
        assert torch.equal(alone, among[one]) == alike


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "test"}, "attack_mode=test: expected one of eval, train"),
        ({"eps_warmup_epochs": -1}, "eps_warmup_epochs=-1: expected a number of at least 0"),
        ({"step_warmup_epochs": True}, "step_warmup_epochs=True: expected a number"),
        ({"step_warmup_epochs": 2, "attack": inner("fgsm").attack}, "step_warmup_epochs=2: fgsm has no step_size"),
        ({"attack": make_attack("cw", norm="l2")}, "eps=None: training needs a budget"),
    ],
)
def test_inner_attacks_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        InnerAttack(**{"attack": inner().attack, **settings})


def test_split_norms_stay_in_use_where_the_networks_norms_are_replaced():
    """As Lightning does for trainer.sync_batchnorm."""
    net = SmallNet()
    norms = AuxiliaryNorms(net)
    nn.SyncBatchNorm.convert_sync_batchnorm(net)
    own = net.features[1].weight
    assert isinstance(net.features[1], nn.SyncBatchNorm)
    with norms.in_place():
        assert net.features[1].weight is not own
    assert net.features[1].weight is own
