"""The suites of evaluators: what they ask, at which budgets, and what they do without."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from networks import Counting, SmallNet, predicted
from omegaconf import DictConfig, OmegaConf

from ares_lightning import build
from ares_lightning.attacks import Outcome, Threat, accuracy_over_queries, make_attack
from ares_lightning.attacks.passes import Passes
from ares_lightning.build.budgets import usual_budget
from ares_lightning.evaluation.frequency import FrequencyEvaluator, low_pass, low_pass_radii
from ares_lightning.evaluation.plan import plan
from ares_lightning.evaluation.queries import QueryEvaluator, query_numbers
from ares_lightning.evaluation.robustbench import write_record
from ares_lightning.evaluation.transfer import OtherModel, TransferEvaluator
from ares_lightning.launch import CONFIG_DIR
from ares_lightning.models import make_classifier

CPU = torch.device("cpu")
BLACKBOX = ("square", "nes", "spsa", "nattack", "boundary", "evolutionary")


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("evaluate", ["name=mine", *overrides])
    return cfg


def evaluation_of(*overrides: str):
    cfg = composed(*overrides)
    return build.build_evaluation(cfg, build.build_data(cfg, training=False))


def names_of(*overrides: str) -> list[str]:
    return [evaluator.name for evaluator in evaluation_of(*overrides).evaluators]


def small_cnn(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    facts = {"in_chans": 1, "num_classes": 10, "img_size": 8, "mean": [0.3], "std": [0.38]}
    return make_classifier("cnn", **facts, width=8).eval()


SUITES = {
    "quick": ["clean", "noise", "pgd20", "curve_threat"],
    "curve": ["curve_linf", "curve_l2", "curve_l1"],
    "unseen": ["autoattack_l2", "autoattack_l1"],
    "blackbox": [*BLACKBOX],
    "ares_bench": [
        *("clean", "fgsm", "pgd100", "autoattack", "curve_linf", "curve_l2", "curve_l1", "curve_ares"),
        *(*BLACKBOX, "corruptions", "frequency"),
    ],
}


@pytest.mark.parametrize(("suite", "expected"), SUITES.items())
def test_a_suite_asks_its_evaluators(suite, expected):
    assert names_of(f"eval=[{suite}]") == expected


def test_an_evaluator_of_two_suites_is_asked_once_and_every_key_can_be_set():
    shared = ("eval=[quick,ares_bench,clean]", "eval.pgd100.attack.steps=7")
    names = names_of(*shared)
    assert len(names) == len(set(names)) == 19
    pgd = next(each for each in evaluation_of(*shared).evaluators if each.name == "pgd100")
    assert pgd.attack == make_attack("pgd", eps=0.1, steps=7)
    assert names_of("eval=[autoattack]", "eval.autoattack.attack.version=rand") == ["autoattack"]


@pytest.mark.parametrize("choice", sorted(path.stem for path in (CONFIG_DIR / "eval").glob("*.yaml")))
def test_every_choice_holds_one_key_of_its_own_name_or_is_a_suite(choice):
    text = (CONFIG_DIR / "eval" / f"{choice}.yaml").read_text()
    assert text.startswith("# ")
    config = OmegaConf.load(CONFIG_DIR / "eval" / f"{choice}.yaml")
    if "defaults" not in config:
        assert list(config) == [choice]
        return
    asked = composed(f"eval=[{choice}]").eval
    assert len(asked) > 1


def test_what_a_suite_lacks_is_left_out_and_told_and_alone_it_is_an_error():
    assert evaluation_of("eval=[ares_bench]").not_found == ("transfer", "ood")
    with pytest.raises(build.ConfigError, match=r"^eval\.ood\.sets=None: no out-of-distribution sets are known"):
        evaluation_of("eval=[ood]")
    with pytest.raises(build.ConfigError, match=r"^eval\.transfer\.models=None: give others than the evaluated"):
        evaluation_of("eval=[transfer]")
    with pytest.raises(build.ConfigError, match=r"^nowhere: no such file|nowhere"):
        evaluation_of("eval=[ares_bench]", "eval.transfer.models=[nowhere]")


@pytest.mark.parametrize(
    ("norm", "threat", "num_pixels", "expected"),
    [
        ("linf", Threat("linf", 0.1), 64, 0.1),
        ("linf", Threat("l2", 0.5), 64, 4 / 255),
        ("l2", Threat("linf", 0.1), 3 * 224 * 224, 2.0),
        ("l2", Threat("linf", 0.1), 3 * 56 * 56, 0.5),
        ("l1", Threat("linf", 0.1), 3 * 112 * 112, 37.5),
        ("l1", Threat("l1", 12.0), 64, 12.0),
    ],
)
def test_a_budget_that_is_not_given_is_the_threat_models_or_the_norms_usual_one(norm, threat, num_pixels, expected):
    assert usual_budget(norm, threat, num_pixels) == pytest.approx(expected)


def test_curves_and_unseen_attacks_have_the_budgets_of_their_norms():
    evaluators = evaluation_of("eval=[curve,unseen,blackbox]", "data=digits").evaluators
    root = math.sqrt(64 / (3 * 224 * 224))
    eps = {each.name: each.attack.threat.eps for each in evaluators}
    assert eps["curve_linf"] == eps["square"] == 0.1
    assert eps["curve_l2"] == eps["autoattack_l2"] == eps["boundary"] == eps["evolutionary"] == 2.0 * root
    assert eps["curve_l1"] == eps["autoattack_l1"] == 75.0 * root
    (boundary,) = evaluation_of("eval=[boundary]", "eval.boundary.attack.eps=null").evaluators
    assert boundary.attack.eps is None, "a minimum-distance attack without a budget looks for the nearest"
    curve = next(each for each in evaluators if each.name == "curve_l2")
    assert curve.eps == pytest.approx([multiple * eps["curve_l2"] for multiple in (0.25, 0.5, 0.75, 1, 1.5, 2)])


def test_pgd100_takes_steps_of_a_quarter_of_the_budget():
    (pgd,) = evaluation_of("eval=[pgd100]", "threat.eps=4/255").evaluators
    assert pgd.attack == make_attack("pgd", eps="4/255", steps=100, step_size=None)
    assert float(pgd.attack._step_size(torch.tensor(4 / 255, dtype=torch.float64))) == pytest.approx(1 / 255)


@pytest.mark.parametrize("size", [(8, 8), (9, 12)])
@pytest.mark.parametrize("radius", [1, 3])
def test_the_low_pass_is_that_of_numpys_fourier_transform(size, radius):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    spectrum = np.fft.fftshift(np.fft.fft2(images.numpy()), axes=(-2, -1))
    rows, columns = np.indices(size)
    distance = np.hypot(rows - size[0] // 2, columns - size[1] // 2)
    spectrum[..., distance > radius] = 0
    expected = np.fft.ifft2(np.fft.ifftshift(spectrum, axes=(-2, -1))).real.clip(0, 1)
    np.testing.assert_allclose(low_pass(images, radius).numpy(), expected, atol=1e-12)


def test_the_radii_are_those_of_ares_bench_and_from_the_first_on_nothing_is_taken_away():
    radii = low_pass_radii(224)
    assert (radii[0], radii[1], radii[-1], len(radii)) == (112, 110, 4, 55)
    assert low_pass_radii(32) == tuple(range(16, 0, -1))
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(low_pass(images, 4), images)
    flat = low_pass(images, 0)
    torch.testing.assert_close(flat, images.mean((2, 3), keepdim=True).expand_as(images))


def test_every_radius_is_a_set_of_its_own_and_costs_a_forward():
    net = Counting(SmallNet().eval())
    images = torch.rand(5, 3, 8, 8)
    asked = FrequencyEvaluator("frequency", "photos", (4, 2, 1))
    answers = list(asked.verdicts(net, images, predicted(net, images), torch.arange(5), 0, Passes(2)))
    assert net.forwards == 5 * (1 + 3)
    assert [answer.of_set for answer in answers] == [f"photos/low_pass/{radius}" for radius in (4, 2, 1)]
    assert {(answer.attack, answer.norm, answer.eps) for answer in answers} == {("none", None, 0.0)}
    assert not answers[0].outcome.broken.any()
    with pytest.raises(ValueError, match=r"radii=\[1, 2\]: expected a falling list"):
        FrequencyEvaluator("frequency", "photos", (1, 2))


def test_accuracy_over_queries_is_what_the_rows_of_one_run_say():
    attack = make_attack("square", eps=0.03, queries=60)
    net = SmallNet().double().eval()
    images = torch.rand(30, 3, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = predicted(net, images)
    labels[0] = (labels[0] + 1) % 10
    asked = QueryEvaluator("square", attack)
    ((answer),) = asked.verdicts(net, images, labels, torch.arange(30), 0, Passes(16))
    rows = frame(answer.outcome, attack)
    curve = asked.further_rows(rows)
    queries = [row["queries"] for row in curve]
    assert queries == [0, 1, 2, 5, 10, 20, 50, 61]
    expected = accuracy_over_queries(answer.outcome, queries)
    assert [row["value"] for row in curve] == pytest.approx(expected.tolist(), abs=1e-12)
    assert curve[0]["value"] == 29 / 30, "a misclassified image needs no query"
    assert curve[-1]["value"] == pytest.approx(1 - answer.outcome.broken.double().mean().item())
    assert curve[-1]["value"] < curve[0]["value"]
    assert {row["metric"] for row in curve} == {"accuracy_over_queries"}


def frame(outcome: Outcome, attack) -> pd.DataFrame:
    columns = {key: getattr(outcome, key).numpy() for key in ("broken", "forwards", "backwards")}
    constants = {"set": "s", "norm": attack.norm, "eps": attack.eps, "seed": 0, "precision": "fp32"}
    return pd.DataFrame(columns).assign(**constants, attack=attack.name, attack_fingerprint=attack.fingerprint)


def test_a_nearest_example_without_budget_has_no_curve_over_queries():
    assert query_numbers(5000) == (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
    assert QueryEvaluator("boundary", make_attack("boundary", queries=10)).further_rows(pd.DataFrame()) == []


def test_a_batch_of_examples_is_made_once_and_judged_by_every_model():
    own, other = (Counting(SmallNet(seed=seed).eval()) for seed in (0, 1))
    images = torch.rand(6, 3, 6, 5)
    labels = predicted(own, images)
    own.forwards = 0
    attacks = (make_attack("fgsm", eps=0.05), make_attack("mim", eps=0.05, steps=3))
    asked = TransferEvaluator("transfer", attacks, "own", (OtherModel("other", other, "ff"),), "own").asked_of("aa")
    answers = list(asked.verdicts(own, images, labels, torch.arange(6), 0, Passes(4)))
    assert [(each.attack, each.model_fingerprint, each.source_fingerprint) for each in answers] == [
        ("fgsm", None, "aa"), ("fgsm", "ff", "aa"), ("mim", None, "aa"), ("mim", "ff", "aa"),
    ]  # fmt: skip
    right = predicted(other, images) == labels
    assert own.backwards == 6 * (1 + 3)
    assert other.backwards == 0
    assert other.forwards == 6 + 2 * (6 + int(right.sum())), "one look at the clean images and one at the examples"
    spent = [int(each.outcome.backwards.sum()) for each in answers]
    assert spent == [6, 0, 18, 0]
    for attack, answer in zip(("fgsm", "mim"), answers[::2], strict=True):
        made = next(each for each in attacks if each.name == attack).craft(own, images, labels)
        assert torch.equal(answer.outcome.broken, predicted(own, made) != labels)


def test_a_model_of_the_matrix_that_is_no_classifier_is_named():
    class Soft(torch.nn.Module):
        def forward(self, images):
            return SmallNet(seed=2).eval()(images).softmax(1)

    images, labels = torch.rand(4, 3, 6, 5), torch.zeros(4, dtype=torch.int64)
    asked = TransferEvaluator("t", (make_attack("fgsm"),), "own", (OtherModel("soft", Soft(), "ff"),), "soft")
    with pytest.raises(ValueError, match=r"^soft: the model returns prob"):
        list(asked.asked_of("aa").verdicts(SmallNet(), images, labels, torch.arange(4), 0, Passes(4)))
    with pytest.raises(ValueError, match=r"eval\.t\.models: soft is the evaluated model"):
        asked.asked_of("ff")


class NotFiniteFor(torch.nn.Module):
    """A network that gives NaN for images whose first pixel is above a threshold."""

    def __init__(self, threshold: float, seed: int) -> None:
        super().__init__()
        self.threshold, self.net = threshold, SmallNet(seed=seed)

    def forward(self, images):
        return torch.where(images[:, 0, 0, 0, None] > self.threshold, torch.nan, self.net(images))


@pytest.mark.parametrize("source", ["own", "other"])
def test_a_model_that_is_not_finite_for_some_images_loses_these_alone(source):
    images, ids = torch.rand(40, 3, 6, 5), torch.arange(40)
    own, other = NotFiniteFor(0.7, seed=0).eval(), NotFiniteFor(0.4, seed=1).eval()
    labels = predicted(own.net, images)
    attacks = (make_attack("fgsm", eps=0.02), make_attack("mim", eps=0.02, steps=3))
    asked = TransferEvaluator("t", attacks, "own", (OtherModel("other", other, "ff"),), source).asked_of("aa")
    answers = list(asked.verdicts(own, images, labels, ids, 0, Passes(4)))
    first = images[:, 0, 0, 0]
    crafted_on, is_finite = (own, first <= 0.7) if source == "own" else (other, first <= 0.4)
    for attack in attacks:
        made = images.clone()
        made[is_finite] = attack.craft(crafted_on, images[is_finite], labels[is_finite], sample_ids=ids[is_finite])
        for judge, fingerprint, threshold in ((own, None, 0.7), (other, "ff", 0.4)):
            wrong = (predicted(judge, images) != labels) | (predicted(judge, made) != labels)
            found = torch.full((40,), 2, dtype=torch.int64)
            for answer in answers:
                if (answer.attack, answer.model_fingerprint) == (attack.name, fingerprint):
                    assert (found[answer.places] == 2).all()
                    found[answer.places] = answer.outcome.broken.long()
                    lost = answer.places[answer.outcome.clean_prediction == -1]
                    assert torch.equal(lost, answer.places[first[answer.places] > threshold])
            assert torch.equal(found.bool(), wrong | (first > threshold))
            assert (found != 2).all()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for seed in (1, 2):
        torch.save(small_cnn(seed).backbone.state_dict(), folder / f"{seed}.pt")
    return folder


def matrix(weights, *overrides: str):
    settings = "{name: cnn, settings: {width: 8}, weights: %s}"
    given = ", ".join(f"m{seed}: {settings % (weights / f'{seed}.pt')}" for seed in (1, 2))
    return evaluation_of(
        *("eval=[transfer]", "subset=first:30", f"eval.transfer.models={{{given}}}"),
        *("eval.transfer.attacks=[fgsm,{name: mim, steps: 2}]", *overrides),
    )


def test_a_matrix_has_a_number_for_every_source_model_and_attack_and_goes_on_where_it_was(weights, tmp_path):
    evaluation = matrix(weights)
    assert [each.source for each in evaluation.evaluators] == ["mine", "m1", "m2"]
    assert evaluation.evaluators[0].attacks[1].step_size == f"{1 / 18} eps", "what ARES-Bench's steps are"
    results = evaluation.run(small_cnn(0), tmp_path, CPU)
    assert not results.failed
    cells = {(row["source"], row["model"], row["attack"]): row for row in results.summary if row["source"]}
    names = ("mine", "m1", "m2")
    assert set(cells) == {
        (source, model, attack) for source in names for model in names for attack in ("fgsm", "mim")
    }
    assert {row["metric"] for row in cells.values()} == {"transfer_accuracy"}
    assert all(row["n"] == 30 for row in cells.values())
    rows = pd.read_parquet(tmp_path / "verdicts")
    assert len(rows) == 3 * 3 * 2 * 30
    own = rows[(rows["source_fingerprint"] == rows["model_fingerprint"]) & (rows["attack"] == "fgsm")]
    direct = make_attack("fgsm", eps=0.1)
    images = torch.stack([evaluation.dataset[i][0] for i in range(30)]) / 255
    outcome = direct(small_cnn(0), images, evaluation.dataset.labels, victim=small_cnn(0))
    accuracy = cells["mine", "mine", "fgsm"]["value"]
    assert accuracy == pytest.approx(1 - outcome.broken.double().mean().item())
    assert len(own) == 90
    worst = next(row for row in results.summary if row["evaluator"] == "worst_case")
    assert worst["value"] <= accuracy
    models = json.loads((tmp_path / "about.json").read_text())["models"]
    assert sorted(models.values()) == ["m1", "m2", "mine"]
    again = matrix(weights).run(small_cnn(0), tmp_path, CPU)
    assert again.summary == results.summary
    assert len(pd.read_parquet(tmp_path / "verdicts")) == len(rows), "nothing is asked twice"
    matrix(weights).check_ledger(tmp_path, small_cnn(0), others=False)
    other = matrix(weights, "eval.transfer.attacks=[fgsm]")
    with pytest.raises(ValueError, match=r"verdicts of eval\.transfer on digits under other settings"):
        other.check_ledger(tmp_path, small_cnn(0), others=False)


def test_models_of_other_images_or_without_weights_are_refused(weights, tmp_path):
    same = f"{{name: cnn, settings: {{width: 8}}, weights: {weights / '1.pt'}}}"
    for given, message in (
        ("{a: {name: cnn}}", r"eval\.transfer\.models\.a\.weights=null"),
        ("{a: {weights: x}}", r"eval\.transfer\.models\.a\.name: must be given"),
        ("{a: {name: cnn, speed: 1}}", r"eval\.transfer\.models\.a\.speed: no such key"),
        ("[zoo/resnet50_nomal]", "did you mean resnet50_normal"),
        (f"{{a: {same}, b: {same}}}", "a and b are the same model; leave one of them out"),
        (f"{{mine: {{name: cnn, settings: {{width: 8}}, weights: {weights / '1.pt'}}}}}", "names of their own"),
    ):
        with pytest.raises((build.ConfigError, ValueError), match=message):
            evaluation_of("eval=[transfer]", f"eval.transfer.models={given}")
    config = OmegaConf.to_container(composed("data=cifar10"), resolve=True)
    torch.save({"config": config, "state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(build.ConfigError, match=r"has data\.in_chans=3, the evaluated model 1"):
        evaluation_of("eval=[transfer]", f"eval.transfer.models=[{tmp_path / 'other.ckpt'}]")


def test_robustbench_asks_about_its_own_images_and_writes_its_record(tmp_path, monkeypatch):
    cfg = composed("eval=[robustbench]")
    data = build.build_data(cfg, training=False)
    build.build_evaluation(cfg, data)
    assert cfg.subset is None, "all test images, but of ImageNet"
    monkeypatch.setattr(data, "network", "imagenet")
    with pytest.raises(build.ConfigError, match="subset=robustbench5k"):
        build.build_evaluation(cfg, data)
    assert cfg.subset == "robustbench5k"
    OmegaConf.save(composed("threat.eps=8/255"), tmp_path / "config.yaml", resolve=True)
    shared = {"evaluator": "robustbench", "n": 360}
    rows = [
        {
            **shared,
            "metric": "robust_accuracy",
            "attack": "autoattack",
            "norm": "linf",
            "eps": 8 / 255,
            "value": 0.5,
        },
        {**shared, "metric": "clean_accuracy", "attack": "none", "norm": None, "eps": 0.0, "value": 0.9},
    ]
    (tmp_path / "summary.json").write_text(json.dumps(rows))
    assert "robustbench.json" in write_record(tmp_path)
    record = json.loads((tmp_path / "robustbench.json").read_text())
    assert (record["clean_acc"], record["autoattack_acc"], record["eps"]) == ("90.00", "50.00", "8/255")
    assert {"external", "footnote", "unreliable", "number_forward_passes", "dataset"} <= set(record)
    OmegaConf.save(composed("subset=first:5"), tmp_path / "config.yaml", resolve=True)
    assert "is not written: it is about subset=null, this is first:5" in write_record(tmp_path)


PLANNED = {
    "clean": (),
    "noise": (),
    "pgd20": (),
    "fgsm": ("eval.fgsm.targets=random",),
    "curve_threat": ("eval.curve_threat.eps=[1e-6,2e-6]",),
    "attack": ("attack=apgd_t", "attack.steps=5"),
    "square": ("eval.square.attack.queries=30",),
    "nes": ("eval.nes.attack.queries=120",),
    "boundary": ("eval.boundary.attack.queries=40", "eval.boundary.attack.eps=1e-6"),
    "frequency": (),
}


@pytest.mark.parametrize(("name", "settings"), PLANNED.items())
def test_the_planned_passes_are_those_of_a_sample_that_withstands(name, settings):
    evaluation = evaluation_of(f"eval=[{name}]", "threat.eps=1e-6", "subset=first:1", *settings)
    net = Counting(small_cnn(0))
    (row,) = plan(evaluation, net.net, CPU).rows
    image, _, sample_id = evaluation.dataset[0]
    images = image[None] / 255
    labels = predicted(net, images)
    net.forwards = net.backwards = 0
    for stage in evaluation.evaluators[0].stages:
        given = (images, labels, torch.tensor([sample_id]))
        for answer in stage.verdicts(net, *given, evaluation.seed, Passes(16)):
            assert name == "frequency" or not answer.outcome.broken.any()
    assert (row.forwards, row.backwards) == (net.forwards, net.backwards)
    assert row.samples == 1


def test_a_plan_tells_samples_and_times_by_evaluator_and_in_all():
    told = plan(evaluation_of("eval=[clean,pgd20,corruptions]"), small_cnn(0), CPU, world_size=2)
    assert [(row.evaluator, row.samples) for row in told.rows] == [
        ("clean", 360), ("pgd20", 360), ("corruptions", 31 * 360)
    ]  # fmt: skip
    clean, pgd, _ = told.rows
    assert clean.seconds == clean.most_seconds
    assert pgd.seconds == pgd.most_seconds / 2
    lines = told.text.splitlines()
    assert lines[0].split() == ["evaluator", "set", "samples", "forwards", "backwards", "expected", "at", "most"]
    assert lines[4].startswith("total")
    assert "on 2 x cpu" in lines[5]
    assert "50% of the samples withstand" in lines[6]
