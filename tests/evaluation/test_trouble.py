"""What an evaluation does about models, disks and evaluators that fail: nothing is lost, nothing is hidden."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from shared_run import make_data, make_net
from torch import Tensor, nn

from ares_lightning.atomic import WriteError
from ares_lightning.attacks import Threat, make_attack
from ares_lightning.data import select_subset
from ares_lightning.evaluation.curves import BracketedCurve, ExactCurve
from ares_lightning.evaluation.evaluators import (
    AttackEvaluator,
    CleanEvaluator,
    Evaluator,
    Verdicts,
    clean_outcome,
)
from ares_lightning.evaluation.run import Evaluation
from ares_lightning.evaluation.sanity import sanity_evaluators

CPU = torch.device("cpu")
PGD = make_attack("pgd", eps=0.1, steps=3)


@pytest.fixture(scope="module")
def data():
    return make_data()


def evaluation(data, *evaluators: Evaluator, **changes: object) -> Evaluation:
    settings = {
        "evaluators": evaluators,
        "threat": Threat("linf", 0.1),
        "dataset": select_subset(data.test_set, "first:40"),
        "loader": data.evaluation_loader,
        "batch_size": 4,
    }
    return Evaluation(**settings | changes)


class NotFinite(nn.Module):
    """Gives NaN for some images, infinity for others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = make_net()

    def forward(self, images: Tensor) -> Tensor:
        kind = (images.detach().mul(255).round().sum((1, 2, 3)).long() % 5)[:, None]
        logits = self.net(images)
        return logits + torch.where(kind == 0, torch.nan, 0.0) + torch.where(kind == 1, torch.inf, 0.0)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_samples_with_logits_that_are_not_finite_say_so_and_count_as_broken(data, tmp_path, batch_size):
    asked = [
        CleanEvaluator("clean"),
        AttackEvaluator("pgd", PGD),
        AttackEvaluator("aimed", PGD, "random"),
        ExactCurve("curve", PGD, (0.05, 0.1)),
        BracketedCurve("bracketed", PGD, (0.05, 0.1)),
    ]
    results = evaluation(data, *asked, batch_size=batch_size).run(NotFinite().eval(), tmp_path, CPU)
    assert not results.failed
    rows = pd.read_parquet(tmp_path / "verdicts")
    images = torch.stack([data.test_set[i][0] for i in range(40)])
    kind = images.long().sum((1, 2, 3)) % 5
    nan = set(data.test_set.sample_ids[:40][kind == 0].tolist())
    infinite = set(data.test_set.sample_ids[:40][kind == 1].tolist())
    assert len(nan) > 2 < len(infinite)
    for name, own in rows.groupby("evaluator"):
        assert own.groupby("eps")["sample_id"].nunique().eq(40).all(), name
        of_nan = own[own["sample_id"].isin(nan)]
        assert of_nan["broken"].all()
        assert (of_nan[["clean_prediction", "adversarial_prediction"]] == -1).all(axis=None)
        assert (of_nan["forwards"] == 0).all()
        attacked = own["eps"] > 0
        assert own.loc[attacked & own["sample_id"].isin(infinite), "broken"].all()


@dataclass(frozen=True)
class Failing(Evaluator):
    """Fails from the third pack on."""

    def verdicts(self, net, images, labels, sample_ids, seed, passes) -> Iterator[Verdicts]:
        if 25 in sample_ids.tolist() or sample_ids.min() > 60:
            raise RuntimeError("CUDA out of\nmemory")
        yield from CleanEvaluator("clean").verdicts(net, images, labels, sample_ids, seed, passes)


def test_an_evaluator_that_fails_is_told_of_while_the_others_go_on(data, tmp_path):
    asked = [Failing("failing"), CleanEvaluator("clean"), AttackEvaluator("pgd", PGD)]
    results = evaluation(data, *asked).run(make_net().eval(), tmp_path, CPU)
    assert [(failure.evaluator, failure.error) for failure in results.failed] == [
        ("failing", "RuntimeError: CUDA out of memory")
    ]
    assert {row["evaluator"] for row in results.summary} == {"clean", "pgd", "worst_case"}
    (told,) = json.loads((tmp_path / "about.json").read_text())["failed"]
    assert told == {"evaluator": "failing", "set": "digits", "error": "RuntimeError: CUDA out of memory"}
    with pytest.raises(RuntimeError, match="CUDA out of"):
        evaluation(data, *asked, raises=True).run(make_net().eval(), tmp_path / "raising", CPU)


@dataclass(frozen=True)
class Silent(Evaluator):
    """Yields nothing."""

    def verdicts(self, net, images, labels, sample_ids, seed, passes) -> Iterator[Verdicts]:
        yield from ()


@dataclass(frozen=True)
class Half(Evaluator):
    """Answers for every other sample, and says so or not."""

    says_which: bool

    def verdicts(self, net, images, labels, sample_ids, seed, passes) -> Iterator[Verdicts]:
        places = torch.arange(0, len(images), 2)
        outcome = clean_outcome(net, images[places], labels[places], sample_ids[places], seed, passes)
        yield Verdicts("none", None, 0.0, outcome, places=places if self.says_which else None)


def test_an_evaluator_that_leaves_samples_out_fails_alone(data, tmp_path):
    asked = [Silent("silent"), Half("half", False), Half("some", True), CleanEvaluator("clean")]
    results = evaluation(data, *asked).run(make_net().eval(), tmp_path, CPU)
    assert {failure.evaluator: failure.error for failure in results.failed} == {
        "silent": "ValueError: Silent.verdicts yields verdicts on 0 of 16 samples; yield one for each",
        "half": "ValueError: Half.verdicts yields an outcome with 8 images for 16 samples; yield one for each",
        "some": "ValueError: Half.verdicts yields verdicts on 8 of 16 samples; yield one for each",
    }
    assert [(row["evaluator"], row["n"]) for row in results.summary] == [("clean", 40)]
    assert set(pd.read_parquet(tmp_path / "verdicts")["evaluator"]) == {"clean"}


def test_a_model_that_the_probes_cannot_measure_costs_no_verdicts(data, tmp_path):
    class WithoutGradients(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def forward(self, images: Tensor) -> Tensor:
            if images.requires_grad:
                raise TypeError("for inference only")
            return self.net(images)

    settings = {"num_samples": 20, "steps": [2], "strong_steps": 2, "queries": 4}
    asked = sanity_evaluators(Threat("linf", 0.1), data.test_set, **settings)[:1]
    results = evaluation(data, CleanEvaluator("clean"), *asked).run(WithoutGradients().eval(), tmp_path, CPU)
    assert [(each.evaluator, each.error) for each in results.failed] == [
        ("sanity", "TypeError: for inference only")
    ]
    assert {row["evaluator"] for row in json.loads((tmp_path / "summary.json").read_text())} >= {
        "clean",
        "worst_case",
    }


def test_a_softmax_model_fails_in_the_attacks_alone_and_the_program_ends_with_an_error(tmp_path, data):
    class Softmax(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def forward(self, images: Tensor) -> Tensor:
            return self.net(images).softmax(1)

    asked = [AttackEvaluator("pgd", PGD), CleanEvaluator("clean")]
    results = evaluation(data, *asked).run(Softmax().eval(), tmp_path, CPU)
    assert [failure.evaluator for failure in results.failed] == ["pgd"]
    assert "returns probabilities" in results.failed[0].error


def test_a_full_disk_ends_in_a_clear_line_and_the_evaluation_goes_on_later(data, tmp_path):
    asked = [CleanEvaluator("clean"), AttackEvaluator("pgd", PGD)]
    net = make_net().eval()
    whole = evaluation(data, *asked).run(net, tmp_path / "whole", CPU).summary
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))
    try:
        with pytest.raises(WriteError, match=r"verdicts/part-.*\.parquet: cannot be written: File too large"):
            evaluation(data, *asked).run(net, tmp_path / "full", CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert evaluation(data, *asked).run(net, tmp_path / "full", CPU).summary == whole


def test_verdicts_of_other_settings_are_refused_with_both_fingerprints(data, tmp_path):
    net = make_net().eval()
    evaluation(data, AttackEvaluator("pgd", PGD)).run(net, tmp_path, CPU)
    same = evaluation(data, AttackEvaluator("pgd", PGD), CleanEvaluator("clean"))
    same.check_ledger(tmp_path, net, others=False)
    other = evaluation(data, AttackEvaluator("pgd", PGD.replace(steps=4)))
    fingerprints = [each.questions[0].fingerprint for each in (same, other)]
    with pytest.raises(
        ValueError, match=rf"eval\.pgd on digits .* {fingerprints[0]}, these have {fingerprints[1]}"
    ):
        other.check_ledger(tmp_path, net, others=False)
    with pytest.raises(ValueError, match=r"holds verdicts of model [0-9a-f]{16}, this one is [0-9a-f]{16}"):
        same.check_ledger(tmp_path, make_net().eval(), others=False)
    same.check_ledger(tmp_path, make_net().eval(), others=True)


def test_a_network_is_evaluated_inside_inference_mode(data, trained_net, tmp_path):
    asked = [CleanEvaluator("clean"), AttackEvaluator("pgd", PGD)]
    expected = evaluation(data, *asked).run(trained_net, tmp_path / "outside", CPU).summary
    with torch.inference_mode():
        assert evaluation(data, *asked).run(trained_net, tmp_path / "inside", CPU).summary == expected


def test_adversarial_images_are_kept_where_that_is_wanted(data, trained_net, tmp_path):
    asked = [CleanEvaluator("clean"), AttackEvaluator("pgd", PGD), ExactCurve("curve", PGD, (0.05, 0.1))]
    evaluation(data, *asked, save_images=True).run(trained_net, tmp_path, CPU)
    rows = pd.read_parquet(tmp_path / "verdicts")
    new = rows[rows["broken"] & (rows["distance"] > 0) & (rows["forwards"] > 0)]
    kept = [np.load(path, allow_pickle=False) for path in sorted((tmp_path / "images").glob("*.npz"))]
    columns = [zip(part["evaluator"], part["sample_id"], part["eps"], strict=True) for part in kept]
    keys = [(str(name), int(sample_id), float(eps)) for rows in columns for name, sample_id, eps in rows]
    assert sorted(keys) == sorted(zip(new["evaluator"], new["sample_id"], new["eps"], strict=True))
    assert len(keys) > 0
    for part in kept:
        images = torch.from_numpy(part["images"])
        with torch.no_grad():
            predicted = trained_net(images).argmax(1)
        told = new.set_index(["evaluator", "sample_id", "eps"])["adversarial_prediction"]
        own = zip(part["evaluator"], part["sample_id"], part["eps"], strict=True)
        assert predicted.tolist() == [told[str(e), int(i), float(eps)] for e, i, eps in own]
