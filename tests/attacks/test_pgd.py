"""FGSM, BIM, PGD and noise: closed forms and pass counts; what attacks are as values; input that is refused."""

from __future__ import annotations

import pytest
import torch
from networks import Counting, Linear, SmallNet, predicted

from ares_lightning.attacks import make_attack
from ares_lightning.attacks.threat import BALLS

DUAL = {"linf": 1, "l2": 2, "l1": float("inf")}
EPS = {"linf": 0.05, "l2": 0.4, "l1": 2.0}


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
    assert surrogate.forwards == (1 + 4) * len(images), "the clean images once, then four steps for all"
    crafted = attack.craft(surrogate, images, labels)
    for name, victim in (("near", near), ("far", far)):
        right = predicted(victim, images) == labels
        assert torch.equal(outcomes[name].broken, ~right | (predicted(victim, crafted) != labels))
        assert torch.equal(outcomes[name].images[~right], images[~right])
        assert (outcomes[name].forwards == 4).all()
    alone = attack(surrogate, images, labels, victim=far)
    assert torch.equal(alone.broken, outcomes["far"].broken)


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


@pytest.mark.parametrize("way", ["verdict", "craft", "victim"])
def test_what_a_model_returns_is_named_where_it_is_no_logits(way, images):
    net = SmallNet().double().eval()
    labels, attack = predicted(net, images), make_attack("pgd")

    def attacked(model, labels=labels):
        if way == "craft":
            return attack.craft(model, images, labels)
        return attack(model, images, labels, victim=net if way == "victim" else None)

    with pytest.raises(ValueError, match="the model returned a tuple; expected logits"):
        attacked(lambda x: (net(x), x))
    with pytest.raises(ValueError, match=r"the model returned shape \[12, 1\]; expected logits .*, two at least"):
        attacked(lambda x: net(x)[:, :1], labels * 0)
    if way != "craft":
        with pytest.raises(ValueError, match="returns probabilities"):
            attacked(lambda x: net(x).softmax(1))
        with pytest.raises(ValueError, match="not finite for 12 of 12"):
            attacked(lambda x: net(x) * torch.nan)


def test_a_loss_gives_one_value_a_sample(images):
    net = SmallNet().double().eval()
    with pytest.raises(ValueError, match=r"the loss has shape \[12, 10\]; expected \[12\]"):
        make_attack("pgd").craft(net, images, predicted(net, images), loss=lambda logits, labels: -logits)


def test_a_model_without_gradients_is_named(images):
    net = SmallNet().double()
    with pytest.raises(ValueError, match="gives no gradient"):
        make_attack("pgd").craft(lambda x: net(x.detach()), images, predicted(net, images))
