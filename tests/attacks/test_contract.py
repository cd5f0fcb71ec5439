"""The contract, held by every attack of the catalogue."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from contract import (
    CASES,
    CHEAP,
    EPS,
    LONG,
    ROWS,
    TARGETED_ONLY,
    WEAK,
    call,
    cheap,
    check_cuts,
    check_defaults,
    check_outcome,
    every_pair,
)
from networks import Counting, SmallNet, predicted

NAMES = list(ROWS)


def test_every_attack_has_cheap_settings_for_these_tests():
    assert set(CHEAP) == set(NAMES)


@pytest.mark.parametrize(("case", "dtype", "num_classes", "size", "n", "targeted"), every_pair())
def test_outcomes_keep_the_contract(case, dtype, num_classes, size, n, targeted):
    check_outcome(case, dtype, num_classes, size, n, targeted)


def first_norm(name: str) -> str:
    return ROWS[name].norms[0]


def small(name: str, scale: float = 1.0):
    """The attack with cheap settings, in its first norm, at `scale` times a usual budget."""
    return cheap(name, norm=first_norm(name), eps=scale * EPS[first_norm(name)])


def craft(attack, net, images, labels):
    targets = (labels + 1) % 10 if attack.name in TARGETED_ONLY else None
    return attack.craft(net, images, labels, targets=targets)


@pytest.mark.parametrize("name", [name for name in NAMES if ROWS[name].targeted])
def test_a_targeted_sample_is_broken_when_the_target_is_predicted(name, images):
    net = SmallNet(num_classes=3).double()
    labels = predicted(net, images)
    targets = (labels + 1) % 3
    outcome = small(name, 3)(net, images, labels, targets=targets)
    assert torch.equal(outcome.broken, predicted(net, outcome.images) == targets)
    assert outcome.broken.any() or name in WEAK


@pytest.mark.parametrize("name", [name for name in NAMES if not ROWS[name].targeted])
def test_targets_are_refused_where_the_method_knows_none(name, images):
    net = SmallNet().double()
    labels = predicted(net, images)
    for way in (small(name), small(name).craft):
        with pytest.raises(ValueError, match=f"{name} knows no targeted form"):
            way(net, images, labels, targets=(labels + 1) % 10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(name, training, fails, images):
    net = SmallNet().double()
    labels = predicted(net, images)
    net.train(training)
    net.features[1].eval()  # a user's frozen batch norm
    if fails:
        calls = []
        net.head.register_forward_hook(lambda *_: calls.append(1) if not calls else torch.zeros(1))
    before = (
        [module.training for module in net.modules()],
        [(p.requires_grad, p.grad) for p in net.parameters()],
        {key: value.clone() for key, value in net.state_dict().items()},
        [(dict(m._forward_hooks), dict(m._backward_hooks), dict(m._forward_pre_hooks)) for m in net.modules()],
        torch.get_rng_state(),
    )
    attack = small(name)
    if fails:
        with pytest.raises(ValueError, match="logits"):
            call(attack, net, images, labels)
    else:
        call(attack, net, images, labels)
        craft(attack, net, images, labels)
    assert [module.training for module in net.modules()] == before[0]
    assert [(p.requires_grad, p.grad) for p in net.parameters()] == before[1]
    assert all(torch.equal(value, before[2][key]) for key, value in net.state_dict().items())
    assert before[3] == [
        (dict(m._forward_hooks), dict(m._backward_hooks), dict(m._forward_pre_hooks)) for m in net.modules()
    ]
    assert torch.equal(torch.get_rng_state(), before[4])


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_outcomes_do_not_depend_on_how_the_work_was_cut(name, norm):
    check_cuts((name, norm), (1, 7, 23))


@pytest.mark.parametrize("name", NAMES)
def test_attacks_work_inside_inference_mode_and_autocast(name):
    images = torch.rand(5, 3, 6, 5)
    net = SmallNet()
    labels = predicted(net, images)
    attack = small(name)
    expected = call(attack, net, images, labels)
    with torch.inference_mode():
        inside = call(attack, net, images.clone(), labels.clone())
        craft(attack, net, images.clone(), labels.clone())
    assert torch.equal(expected.images, inside.images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = call(attack, net, images, labels)
    assert mixed.images.dtype == torch.float32
    assert torch.equal(mixed.images, expected.images), "a verdict is never taken below float32"


@pytest.mark.parametrize("name", NAMES)
def test_a_search_in_bf16_gives_verdicts_in_float32(name):
    images = torch.rand(17, 3, 6, 5, generator=torch.Generator().manual_seed(6))
    net = SmallNet()
    labels = predicted(net, images)
    outcome = call(small(name), net, images, labels, precision="bf16")
    assert outcome.images.dtype == torch.float32
    prediction = predicted(net, outcome.images)
    assert torch.equal(outcome.adversarial_prediction, prediction)
    assert torch.equal(
        outcome.broken, prediction == (labels + 1) % 10 if name in TARGETED_ONLY else prediction != labels
    )
    assert outcome.broken.any() or name in WEAK
    with pytest.raises(ValueError, match="precision=bf16"):
        call(small(name), net, images.double(), labels, precision="bf16")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TARGETED_ONLY])
def test_an_image_that_leaves_the_model_without_a_prediction_is_adversarial(name, images):
    net = SmallNet().double().eval()
    labels = predicted(net, images)

    def undecided(x):
        """NaN for everything but the clean images."""
        clean = (x.flatten(1)[:, None] == images.flatten(1)[None]).all(2).any(1)
        return torch.where(clean[:, None], net(x), torch.nan)

    outcome = small(name)(undecided, images, labels)
    assert outcome.broken.all() or name in WEAK
    assert (outcome.adversarial_prediction == -1)[outcome.broken].all()


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_and_an_all_misclassified_batch_return_at_once(name, images):
    net = Counting(SmallNet().double())
    attack = small(name)
    none = torch.empty(0, dtype=torch.int64)
    empty = call(attack, net, images[:0], none)
    assert empty.images.shape == (0, 3, 6, 5)
    assert empty.broken.shape == (0,)
    assert craft(attack, net, images[:0], none).shape == (0, 3, 6, 5)
    assert net.forwards == 0
    if name in TARGETED_ONLY:
        return
    wrong = (predicted(net, images) + 1) % 10
    net.forwards = 0
    assert attack(net, images, wrong).broken.all()
    assert net.forwards == len(images)


@pytest.mark.parametrize("name", [name for name in NAMES if ROWS[name].needs_gradients])
def test_a_model_without_gradients_is_named(name, images):
    net = SmallNet().double().eval()
    labels = predicted(net, images)
    with pytest.raises(ValueError, match="gives no gradient"):
        call(small(name), lambda x: net(x.detach()), images, labels)


@pytest.mark.parametrize("name", NAMES)
def test_logits_that_are_none_are_refused(name, images):
    net = SmallNet().double().eval()
    labels = predicted(net, images)
    if ROWS[name].kind != "decision-based":
        with pytest.raises(ValueError, match="returns probabilities"):
            call(small(name), lambda x: net(x).softmax(1), images, labels)
    with pytest.raises(ValueError, match=r"not finite for 2 of 12 clean images, sample_ids 30, 50"):
        call(
            small(name),
            lambda x: net(x).masked_fill((torch.arange(len(x)) % 8 == 3)[:, None] & (len(x) == 12), torch.nan),
            images,
            labels,
            sample_ids=[0, 10, 20, 30, 31, 32, 33, 34, 35, 36, 40, 50],
        )


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LONG])
def test_every_name_works_with_its_defaults(name):
    check_defaults(name)


def test_the_attack_package_imports_torch_and_the_standard_library_only():
    code = (
        "import sys, torch; before = set(sys.modules); import ares_lightning.attacks;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names);"
        "print(sorted(new - {'torch', 'ares_lightning'}))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
