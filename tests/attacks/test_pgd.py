"""FGSM, BIM, PGD and noise: closed forms, pass counts, and the contract of every attack."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from networks import Counting, Linear, SmallNet, predicted

from ares_lightning.attacks import list_attacks, make_attack
from ares_lightning.attacks.threat import BALLS

DUAL = {"linf": 1, "l2": 2, "l1": float("inf")}
EPS = {"linf": 0.05, "l2": 0.4, "l1": 2.0}
NAMES = [row.name for row in list_attacks()]
CASES = list(itertools.product(NAMES, EPS))


def linear_case(num_classes: int, norm: str, shape=(1, 4, 3), n: int = 24):
    """A linear model, mid-grey images, their labels and their exact distances to the decision boundary."""
    net = Linear(shape, num_classes)
    generator = torch.Generator().manual_seed(5)
    images = 0.5 + 0.02 * torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    net.bias.data -= net(images).mean(0)
    logits = net(images).detach()
    labels = logits.argmax(1)
    difference = net.weight[labels][:, None] - net.weight[None]
    margins = logits.gather(1, labels[:, None]) - logits
    radius = margins / difference.norm(p=DUAL[norm], dim=2)
    return net, images, labels, radius.masked_fill(torch.eye(num_classes)[labels].bool(), float("inf")).detach()


@pytest.mark.parametrize("norm", EPS)
def test_pgd_succeeds_exactly_beyond_the_radius_of_a_two_class_linear_model(norm):
    net, images, labels, radius = linear_case(2, norm)
    radius = radius.amin(1)
    attack = make_attack("pgd", norm=norm, steps=100)
    for i in range(len(images)):
        one, label = images[i : i + 1], labels[i : i + 1]
        assert attack.replace(eps=1.02 * radius[i].item())(net, one, label).broken.item()
        assert not attack.replace(eps=0.999 * radius[i].item())(net, one, label).broken.item()


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("name", ["bim", "pgd"])
def test_margin_attacks_reach_the_radius_of_a_ten_class_linear_model(norm, name):
    net, images, labels, radius = linear_case(10, norm)
    attack = make_attack(name, norm=norm, steps=100)
    for i in range(len(images)):
        one, label = images[i : i + 1], labels[i : i + 1]
        eps, target = radius[i].min(0)
        assert not attack.replace(eps=0.999 * eps.item(), loss="margin")(net, one, label).broken.item()
        targeted = attack.replace(eps=1.02 * eps.item(), loss="margin")(net, one, label, targets=target[None])
        assert targeted.broken.item()
        assert targeted.adversarial_prediction.item() == target


@pytest.mark.parametrize("norm", EPS)
def test_one_step_moves_the_margin_by_eps_times_the_dual_norm(norm):
    net, images, labels, _ = linear_case(2, norm)
    eps = 1e-3
    stepped = make_attack("fgsm", norm=norm, eps=eps).craft(net, images, labels)

    def margin(x):
        logits = net(x).detach()
        return (2 * labels - 1) * (logits[:, 1] - logits[:, 0])

    dual = (net.weight[1] - net.weight[0]).norm(p=DUAL[norm]).item()
    torch.testing.assert_close(margin(images) - margin(stepped), torch.full_like(margin(images), eps * dual))


@pytest.mark.parametrize("norm", EPS)
def test_an_iterate_fills_the_box_as_the_best_perturbation_does(norm):
    """Where the box is active, no point of ball ∩ box lowers a linear margin further than an iterate."""
    net, _, _, _ = linear_case(2, norm)
    clean = torch.rand(16, 1, 4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels = predicted(net, clean)
    eps = {"linf": 0.4, "l2": 1.0, "l1": 2.5}[norm]
    slope = (1 - 2 * labels)[:, None] * (net.weight[1] - net.weight[0]).detach()
    far = (clean.flatten(1) + 1e4 * slope).view_as(clean)  # the projection of a far point maximises the slope
    best = BALLS[norm].project(far, clean, eps)
    attack = make_attack("bim", norm=norm, eps=eps, step_size=eps / 4)
    gains = [
        ((attack.replace(steps=steps).craft(net, clean, labels) - clean).flatten(1) * slope).sum(1)
        for steps in range(1, 30)
    ]
    gain = torch.stack(gains).amax(0)
    torch.testing.assert_close(gain, ((best - clean).flatten(1) * slope).sum(1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm", EPS)
def test_a_pgd_k_verdict_costs_k_passes_each_way(norm, images):
    net = Counting(SmallNet().double().eval())
    labels = predicted(net, images)
    net.forwards = 0
    outcome = make_attack("pgd", norm=norm, eps=1e-6, steps=7)(net, images, labels)
    assert not outcome.broken.any()
    assert net.forwards == (7 + 2) * len(images)
    assert net.backwards == 7 * len(images)
    assert outcome.forwards.tolist() == outcome.backwards.tolist() == [7] * len(images)


@pytest.mark.parametrize("norm", EPS)
def test_crafting_with_pgd_k_costs_k_passes_each_way(norm, images):
    net = Counting(SmallNet().double())
    make_attack("pgd", norm=norm, eps=0.3, steps=5, restarts=3).craft(
        net, images, torch.zeros(12, dtype=torch.int64)
    )
    assert (net.forwards, net.backwards) == (5 * 12, 5 * 12)


def test_broken_samples_leave_the_working_set(images):
    net = Counting(SmallNet().double().eval())
    labels = predicted(net, images)
    net.forwards = 0
    outcome = make_attack("pgd", eps=0.1, steps=10)(net, images, labels)
    assert 0 < outcome.broken.sum() < len(images)
    assert net.forwards == outcome.forwards.sum() + 2 * len(images)
    early = outcome.broken & (outcome.forwards < 10)
    assert early.any()
    assert (outcome.backwards[early] == outcome.forwards[early] - 1).all()
    assert (outcome.forwards[~outcome.broken] == 10).all()


def test_restarts_go_on_with_the_survivors_only(images):
    net = SmallNet().double().eval()
    labels = predicted(net, images)
    one = make_attack("pgd", eps=0.07, steps=3)(net, images, labels)
    many = make_attack("pgd", eps=0.07, steps=3, restarts=6)(net, images, labels)
    assert (many.broken | ~one.broken).all()
    assert (many.forwards[~many.broken] == 6 * 3 + 5).all()
    assert (many.backwards[~many.broken] == 6 * 3).all()


def test_noise_counts_its_draws(images):
    net = Counting(SmallNet().double().eval())
    labels = predicted(net, images)
    net.forwards = 0
    outcome = make_attack("noise", eps=1e-6, draws=4)(net, images, labels)
    assert net.forwards == (3 + 2) * len(images)
    assert outcome.forwards.tolist() == [3] * len(images)
    assert net.backwards == 0


@pytest.mark.parametrize(("name", "norm"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_classes", [2, 3, 10, 1000])
def test_outcomes_keep_the_contract(name, norm, dtype, num_classes, images):
    net = SmallNet(num_classes=num_classes).to(dtype)
    images = images.to(dtype)
    labels = predicted(net, images)
    labels[3] = (labels[3] + 1) % num_classes
    original = images.clone()
    attack = make_attack(name, norm=norm, eps=EPS[norm])
    outcome = attack(net, images, labels)
    assert torch.equal(images, original), "the caller's images were written to"
    assert outcome.images.shape == images.shape
    assert outcome.images.dtype == dtype
    assert outcome.images.min() >= 0
    assert outcome.images.max() <= 1
    slack = 6e-8 if norm == "linf" else EPS[norm] * (1e-5 if dtype == torch.float32 else 1e-9)
    assert (outcome.distance <= EPS[norm] + slack).all()
    torch.testing.assert_close(outcome.distance, BALLS[norm].distance(outcome.images, images))
    assert torch.equal(outcome.broken, predicted(net, outcome.images) != labels)
    assert torch.equal(outcome.adversarial_prediction, predicted(net, outcome.images))
    assert torch.equal(outcome.images[~outcome.broken], images[~outcome.broken])
    assert outcome.broken[3]
    assert torch.equal(outcome.images[3], images[3])
    assert outcome.forwards[3] == outcome.backwards[3] == outcome.distance[3] == 0
    assert outcome.forwards.dtype == outcome.backwards.dtype == torch.int64


@pytest.mark.parametrize("name", NAMES)
def test_a_targeted_sample_is_broken_when_the_target_is_predicted(name, images):
    net = SmallNet(num_classes=3).double()
    labels = predicted(net, images)
    targets = (labels + 1) % 3
    outcome = make_attack(name, eps=0.3)(net, images, labels, targets=targets)
    assert torch.equal(outcome.broken, predicted(net, outcome.images) == targets)
    if name != "noise":
        assert outcome.broken.any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(name, training, fails, images):
    net = SmallNet().double().train(training)
    net.features[1].eval()  # a user's frozen batch norm
    labels = predicted(net, images)
    net.train(training)
    net.features[1].eval()
    hooks = []
    if fails:
        hooks.append(net.head.register_forward_hook(lambda *_: torch.zeros(1)))
    before = (
        [module.training for module in net.modules()],
        [(p.requires_grad, p.grad) for p in net.parameters()],
        {key: value.clone() for key, value in net.state_dict().items()},
        torch.get_rng_state(),
    )
    attack = make_attack(name, eps=0.1)
    for call in (attack, attack.craft):
        if fails and not (name == "noise" and call != attack):
            with pytest.raises(ValueError, match="logits"):
                call(net, images, labels)
        else:
            call(net, images, labels)
    assert [module.training for module in net.modules()] == before[0]
    assert [(p.requires_grad, p.grad) for p in net.parameters()] == before[1]
    assert all(torch.equal(value, before[2][key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before[3])


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_verdicts_do_not_depend_on_how_the_work_was_cut(name, norm):
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(23, 3, 6, 5, generator=generator, dtype=torch.float64)
    net = SmallNet().double()
    labels = predicted(net, images)
    settings = {"draws": 5} if name == "noise" else {} if name == "fgsm" else {"steps": 6}
    if name == "pgd":
        settings["restarts"] = 2
    attack = make_attack(name, norm=norm, eps=EPS[norm], **settings)
    ids = torch.arange(100, 123)
    whole = attack(net, images, labels, sample_ids=ids, seed=4)
    assert 0 < whole.broken.sum() < 23 or name == "noise"
    order = torch.randperm(23, generator=generator)
    for size in (1, 7, 23):
        parts = [
            attack(net, images[part], labels[part], sample_ids=ids[part], seed=4) for part in order.split(size)
        ]
        for column in ("images", "broken", "distance", "forwards", "backwards", "adversarial_prediction"):
            joined = torch.cat([getattr(part, column) for part in parts])[order.argsort()]
            torch.testing.assert_close(joined, getattr(whole, column), rtol=0, atol=1e-12)
    single = [
        attack(net.float(), images[p].float(), labels[p], sample_ids=ids[p], seed=4).broken for p in order.split(7)
    ]
    in_float32 = attack(net.float(), images.float(), labels, sample_ids=ids, seed=4).broken
    assert torch.equal(torch.cat(single)[order.argsort()], in_float32)


def test_another_seed_or_id_means_other_noise(images):
    net = SmallNet().double()
    labels = predicted(net, images)
    attack = make_attack("pgd", eps=0.1, steps=1)
    first = attack.craft(net, images, labels, seed=0)
    assert torch.equal(first, attack.craft(net, images, labels, seed=0))
    assert not torch.equal(first, attack.craft(net, images, labels, seed=1))
    assert not torch.equal(first, attack.craft(net, images, labels, seed=0, sample_ids=range(1, 13)))


def test_one_crafted_batch_serves_many_victims(images):
    surrogate, near, far = Counting(SmallNet(seed=0).double()), SmallNet(seed=0).double(), SmallNet(seed=7).double()
    labels = predicted(near, images)
    attack = make_attack("bim", eps=0.2, steps=4)
    outcomes = attack(surrogate, images, labels, victim={"near": near, "far": far})
    assert surrogate.forwards == 4 * len(images), "the images are made once, without feedback"
    crafted = attack.craft(surrogate, images, labels)
    for name, victim in (("near", near), ("far", far)):
        right = predicted(victim, images) == labels
        assert torch.equal(outcomes[name].broken, ~right | (predicted(victim, crafted) != labels))
        assert torch.equal(outcomes[name].images[~right], images[~right])
        assert (outcomes[name].forwards == 4).all()
    alone = attack(surrogate, images, labels, victim=far)
    assert torch.equal(alone.broken, outcomes["far"].broken)


@pytest.mark.parametrize("name", NAMES)
def test_attacks_work_inside_inference_mode_and_autocast(name):
    images = torch.rand(5, 3, 6, 5)
    net = SmallNet()
    labels = predicted(net, images)
    attack = make_attack(name, eps=0.1)
    expected = attack(net, images, labels)
    with torch.inference_mode():
        inside = attack(net, images.clone(), labels.clone())
        attack.craft(net, images.clone(), labels.clone())
    assert torch.equal(expected.images, inside.images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = attack(net, images, labels)
    assert mixed.images.dtype == torch.float32
    assert torch.equal(mixed.images, expected.images), "a verdict is never taken below float32"


@pytest.mark.parametrize("name", NAMES)
def test_an_image_that_leaves_the_model_without_a_prediction_is_adversarial(name, images):
    net = SmallNet().double().eval()
    labels = predicted(net, images)

    def undecided(x):
        """NaN for everything but the clean images."""
        clean = (x.flatten(1)[:, None] == images.flatten(1)[None]).all(2).any(1)
        return torch.where(clean[:, None], net(x), torch.nan)

    outcome = make_attack(name, eps=0.01)(undecided, images, labels)
    assert outcome.broken.all()
    assert (outcome.adversarial_prediction == -1).all()


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_and_an_all_misclassified_batch_return_at_once(name, images):
    net = Counting(SmallNet().double())
    empty = make_attack(name)(net, images[:0], torch.empty(0, dtype=torch.int64))
    assert empty.images.shape == (0, 3, 6, 5)
    assert empty.broken.shape == (0,)
    assert make_attack(name).craft(net, images[:0], torch.empty(0, dtype=torch.int64)).shape == (0, 3, 6, 5)
    assert net.forwards == 0
    wrong = (predicted(net, images) + 1) % 10
    net.forwards = 0
    assert make_attack(name)(net, images, wrong).broken.all()
    assert net.forwards == len(images)


def test_any_callable_will_do_and_soft_labels_and_losses_are_taken(images):
    net = SmallNet().double().eval()
    labels = predicted(net, images)
    attack = make_attack("bim", eps=0.1, steps=3)
    hard = attack.craft(net, images, labels)
    assert torch.equal(hard, attack.craft(lambda x: net(x), images, labels))
    soft = torch.nn.functional.one_hot(labels, 10).double()
    torch.testing.assert_close(attack.craft(net, images, soft), hard)
    by_loss = attack.craft(
        net, images, labels, loss=lambda logits, y: -logits.log_softmax(1).gather(1, y[:, None])[:, 0]
    )
    torch.testing.assert_close(by_loss, hard)


def test_eps_zero_leaves_the_clean_accuracy_and_eps_one_breaks_everything(images):
    net = SmallNet().double()
    labels = predicted(net, images)
    labels[:2] = (labels[:2] + 1) % 10
    assert make_attack("pgd", eps=0)(net, images, labels).broken.sum() == 2
    assert make_attack("pgd", eps=1)(net, images, labels).broken.all()


def test_every_name_works_with_its_defaults(images):
    net = SmallNet()
    for row in list_attacks():
        attack = make_attack(row.name)
        assert attack.name == row.name
        assert attack.threat.norm == "linf"
        assert attack.threat.eps == 4 / 255
        attack(net, images.float(), predicted(net, images.float()))


def test_attacks_are_values():
    attack = make_attack("pgd", eps="8/255", steps=10)
    assert attack == make_attack("pgd", eps=8 / 255, steps=10)
    assert hash(attack) == hash(make_attack("pgd", eps=8 / 255, steps=10))
    assert attack.replace(steps=20).steps == 20
    assert attack.replace(eps="4/255").threat.eps == 4 / 255
    with pytest.raises(ValueError, match="norm=l2: give its eps"):
        attack.replace(norm="l2")
    assert "steps=10" in repr(attack)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("pdg", {}, "attack=pdg: did you mean pgd"),
        ("pgd", {"step": 3}, "step=3: not a setting of pgd; did you mean steps"),
        ("pgd", {"steps": 0}, "steps=0"),
        ("pgd", {"steps": 2.5}, r"steps=2\.5"),
        ("pgd", {"eps": "abc"}, "eps=abc"),
        ("pgd", {"eps": -1}, "eps=-1"),
        ("pgd", {"norm": "l3"}, "norm=l3: pgd knows linf, l2, l1"),
        ("pgd", {"loss": "hinge"}, "loss=hinge"),
        ("pgd", {"restarts": 0}, "restarts=0"),
        ("pgd", {"restarts": 2, "random_start": False}, "restarts=2"),
        ("pgd", {"step_size": -1}, "step_size=-1"),
        ("noise", {"draws": 0}, "draws=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(name, settings, message):
    with pytest.raises(ValueError, match=message):
        make_attack(name, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": lambda x: x + 1}, r"images lie in \[1, 2\]"),
        ({"images": lambda x: x * float("nan")}, "images lie in"),
        ({"images": lambda x: x[0]}, "images have shape"),
        ({"images": lambda x: (x * 255).to(torch.uint8)}, r"torch\.uint8"),
        ({"images": lambda x: x.half()}, r"torch\.float16"),
        ({"labels": lambda y: y + 10}, "the model has 10 classes"),
        ({"labels": lambda y: y - 11}, "labels hold -"),
        ({"labels": lambda y: y[:3]}, "labels have shape"),
        ({"labels": lambda y: y.float()}, r"labels are torch\.float32"),
        ({"targets": lambda y: y}, "targets equal the labels"),
        ({"targets": lambda y: y + 10}, "targets hold"),
        ({"sample_ids": lambda _: [1, 2]}, "sample_ids hold 2"),
    ],
)
@pytest.mark.parametrize("way", ["verdict", "craft"])
def test_input_that_makes_no_sense_is_refused(change, message, way, images):
    net = SmallNet().double()
    labels = predicted(net, images)
    arguments = {"images": images, "labels": labels}
    for key, make in change.items():
        arguments[key] = make(images if key == "images" else labels)
    if arguments["images"].dtype == torch.float16:
        arguments["images"] = images.half()
    attack = make_attack("pgd")
    with pytest.raises(ValueError, match=message):
        (attack if way == "verdict" else attack.craft)(net, **arguments)


def test_a_model_without_gradients_is_named(images):
    net = SmallNet().double()
    with pytest.raises(ValueError, match="gives no gradient"):
        make_attack("pgd").craft(lambda x: net(x.detach()), images, predicted(net, images))


def test_the_attack_package_imports_torch_and_the_standard_library_only():
    code = (
        "import sys, torch; before = set(sys.modules); import ares_lightning.attacks;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names);"
        "print(sorted(new - {'torch', 'ares_lightning'}))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
