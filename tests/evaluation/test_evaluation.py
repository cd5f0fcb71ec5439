"""From verdicts to numbers: nothing is counted twice, lost, or counted as robust that is not."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest
from shared_run import ShortAutoAttack

from ares_lightning.attacks import Threat, make_attack
from ares_lightning.attacks.autoattack import AutoAttack
from ares_lightning.data import RobustDataModule, select_subset
from ares_lightning.evaluation.curves import BisectedCurve, BracketedCurve, ExactCurve
from ares_lightning.evaluation.evaluators import AttackEvaluator, CleanEvaluator
from ares_lightning.evaluation.fingerprints import model_fingerprint
from ares_lightning.evaluation.metrics import wilson_interval
from ares_lightning.evaluation.run import Evaluation
from ares_lightning.evaluation.sanity import SanityAttack
from ares_lightning.evaluation.verdicts import SCHEMA
from ares_lightning.models import make_classifier
from ares_lightning.models.folding import fold_batchnorm

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> RobustDataModule:
    sizes = {"batch_size": 64, "eval_batch_size": 16, "num_workers": 0, "num_val": 180}
    return RobustDataModule(name="digits", img_size=8, in_chans=1, **sizes)


@pytest.fixture(scope="module")
def net(data) -> torch.nn.Module:
    """A network that has seen the digits for a moment, so that some are right and some break."""
    torch.manual_seed(0)
    net = make_classifier("cnn", in_chans=1, num_classes=10, img_size=8, mean=[0.3], std=[0.38], width=8)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(3):
        for images, labels, _ids in data.train_dataloader():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(images / 255), labels).backward()
            optimizer.step()
    return net.eval()


def evaluation(data, subset="first:50", **changes) -> Evaluation:
    attack = make_attack("pgd", eps=0.1, steps=4)
    settings = {
        "evaluators": [
            CleanEvaluator("clean"),
            AttackEvaluator("pgd4", attack),
            ExactCurve("curve", attack, (0.05, 0.1, 0.2)),
        ],
        "threat": Threat("linf", 0.1),
        "dataset": select_subset(data.test_set, subset),
        "loader": data.evaluation_loader,
        "batch_size": data.eval_batch_size,
        "subset": subset,
        **changes,
    }
    return Evaluation(**settings)


def of(summary, evaluator, eps=None):
    rows = [row for row in summary if row["evaluator"] == evaluator and eps in (None, row["eps"])]
    assert len(rows) == 1
    return rows[0]


def test_the_summary_follows_from_the_verdict_rows(data, net, tmp_path):
    summary = evaluation(data).run(net, tmp_path, CPU).summary
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    rows = pd.read_parquet(tmp_path / "verdicts")
    assert list(rows.columns) == SCHEMA.names
    assert len(rows) == 50 * (1 + 1 + 4)
    key = ["evaluator_fingerprint", "model_fingerprint", "set", "sample_id", "attack", "eps"]
    assert not rows.duplicated(key).any()
    images = torch.stack([data.test_set[i][0] for i in range(50)])
    labels = data.test_set.labels[:50]
    with torch.no_grad():
        right = net(images / 255).argmax(1) == labels
    assert of(summary, "clean")["value"] == right.double().mean().item()
    outcome = make_attack("pgd", eps=0.1, steps=4)(
        net,
        images / 255,
        labels,
        sample_ids=data.test_set.sample_ids[:50],
        seed=0,
        search_on=fold_batchnorm(net, (1, 8, 8)).network,
    )
    assert of(summary, "pgd4")["value"] == 1 - outcome.broken.double().mean().item()
    pgd = rows[rows["evaluator"] == "pgd4"].sort_values("sample_id")
    np.testing.assert_array_equal(pgd["broken"], outcome.broken)
    np.testing.assert_array_equal(pgd["forwards"], outcome.forwards)
    assert 0 < of(summary, "pgd4")["value"] < of(summary, "clean")["value"]
    assert pgd["sample_name"].str.fullmatch(r"digits/\d{5}").all()


def test_the_curve_never_rises_and_starts_at_the_clean_accuracy(data, net, tmp_path):
    summary = evaluation(data).run(net, tmp_path, CPU).summary
    values = [row["value"] for row in summary if row["evaluator"] == "curve"]
    assert [row["eps"] for row in summary if row["evaluator"] == "curve"] == [0, 0.05, 0.1, 0.2]
    assert values == sorted(values, reverse=True)
    assert values[0] == of(summary, "clean")["value"]
    assert of(summary, "curve", 0.1)["value"] <= of(summary, "pgd4")["value"]
    rows = pd.read_parquet(tmp_path / "verdicts")
    curve = rows[rows["evaluator"] == "curve"]
    assert (curve.loc[curve["broken"], "distance"] <= curve.loc[curve["broken"], "eps"] + 6e-8).all()
    first_broken = curve[curve["broken"]].groupby("sample_id")["eps"].min()
    later = curve[curve.apply(lambda row: row["eps"] > first_broken.get(row["sample_id"], 9), axis=1)]
    assert (later["forwards"] == 0).all(), "a budget that is already decided costs nothing"


def test_the_worst_case_is_taken_sample_by_sample(data, net, tmp_path):
    attacks = {"a": ("fgsm", 0.1), "b": ("noise", 0.05), "c": ("pgd", 0.1), "far": ("pgd", 0.3)}
    evaluators = [AttackEvaluator(name, make_attack(attack, eps=eps)) for name, (attack, eps) in attacks.items()]
    summary = evaluation(data, evaluators=evaluators).run(net, tmp_path, CPU).summary
    rows = pd.read_parquet(tmp_path / "verdicts")
    within = rows[rows["eps"] <= 0.1].pivot(index="sample_id", columns="evaluator", values="broken")
    worst = of(summary, "worst_case")
    assert worst["value"] == (~within.any(axis=1)).mean()
    assert (worst["n"], worst["eps"], worst["attack"]) == (50, 0.1, None)
    assert within.any(axis=1).mean() < rows.loc[rows["evaluator"] == "far", "broken"].mean()


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (321, 360), (1, 1000)])
def test_intervals_are_wilsons(successes, n):
    expected = binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson_interval(successes, n) == pytest.approx((expected.low, expected.high))


class StopError(Exception):
    pass


def test_a_stopped_evaluation_goes_on_where_it_was(data, net, tmp_path):
    whole = evaluation(data).run(net, tmp_path / "whole", CPU).summary
    expected = pd.read_parquet(tmp_path / "whole" / "verdicts")

    def stopping(after):
        def loader(dataset, *, batch_size):
            loader = data.evaluation_loader(dataset, batch_size=batch_size)
            for number, batch in enumerate(loader):
                if number == after:
                    raise StopError
                yield batch

        return loader

    run_dir = tmp_path / "stopped"
    for after in (0, 2, 1):
        with pytest.raises(StopError):
            evaluation(data, loader=stopping(after), batch_size=4).run(net, run_dir, CPU)
        assert not (run_dir / "summary.json").exists()
    assert evaluation(data).run(net, run_dir, CPU).summary == whole
    rows = pd.read_parquet(run_dir / "verdicts")
    order = ["evaluator", "eps", "sample_id"]
    pd.testing.assert_frame_equal(
        rows.sort_values(order, ignore_index=True), expected.sort_values(order, ignore_index=True)
    )
    parts = len(list((run_dir / "verdicts").iterdir()))
    evaluation(data).run(net, run_dir, CPU)
    assert len(list((run_dir / "verdicts").iterdir())) == parts, "a finished evaluation asks nothing again"


def test_verdicts_of_another_model_do_not_count(data, net, tmp_path):
    expected = evaluation(data, subset="first:20").run(net, tmp_path / "alone", CPU).summary
    other = make_classifier("cnn", in_chans=1, num_classes=10, img_size=8, mean=[0.3], std=[0.38], width=8)
    evaluation(data, subset="first:20").run(other, tmp_path / "both", CPU)
    assert evaluation(data, subset="first:20").run(net, tmp_path / "both", CPU).summary == expected
    assert len(pd.read_parquet(tmp_path / "both" / "verdicts")) == 2 * 20 * 6


def test_fingerprints_follow_what_decides_a_verdict(data, net):
    base = evaluation(data)
    assert base.fingerprint(net) == evaluation(data).fingerprint(net)
    changed = [
        evaluation(data, seed=1),
        evaluation(data, precision="fp64"),
        evaluation(data, subset="first:51"),
        evaluation(data, evaluators=[AttackEvaluator("pgd4", make_attack("pgd", eps=0.1, steps=5))]),
    ]
    assert len({base.fingerprint(net), *(e.fingerprint(net) for e in changed)}) == 5
    other = make_classifier("cnn", in_chans=1, num_classes=10, img_size=8, mean=[0.3], std=[0.38], width=8)
    assert model_fingerprint(net) != model_fingerprint(other)
    shifted = make_classifier("cnn", in_chans=1, num_classes=10, img_size=8, mean=[0.4], std=[0.38], width=8)
    shifted.load_state_dict(other.state_dict())
    assert model_fingerprint(shifted) != model_fingerprint(other), "normalisation decides verdicts"
    sizes = {"batch_size": 64, "eval_batch_size": 16, "num_workers": 0, "num_val": 180}
    other_split = RobustDataModule(name="digits", img_size=8, in_chans=1, split_seed=1, **sizes)
    assert evaluation(other_split).fingerprint(net) != base.fingerprint(net)


def test_rows_and_summary_name_the_attack_by_its_fingerprint(data, net, tmp_path):
    attack = make_attack("pgd", eps=0.1, steps=4)
    summary = evaluation(data, subset="first:5").run(net, tmp_path, CPU).summary
    fingerprints = pd.read_parquet(tmp_path / "verdicts").groupby("evaluator")["attack_fingerprint"].unique()
    assert pd.isna(fingerprints["clean"]).all()
    assert fingerprints["pgd4"].tolist() == fingerprints["curve"].tolist() == [attack.fingerprint]
    shown = {row["evaluator"]: row["attack_fingerprint"] for row in summary}
    assert shown == {"clean": None, "pgd4": attack.fingerprint, "curve": attack.fingerprint, "worst_case": None}


def test_an_evaluators_fingerprint_covers_the_members_of_its_ensemble_and_the_mode_of_its_curve():
    class Weaker(AutoAttack):
        @property
        def members(self):
            return super().members[:1]

    attack = make_attack("pgd", eps=0.1)
    evaluators = [AttackEvaluator("aa", made) for made in (make_attack("autoattack"), Weaker())]
    evaluators += [curve("aa", attack, (0.1, 0.2)) for curve in (ExactCurve, BracketedCurve, BisectedCurve)]
    evaluators += [AttackEvaluator("aa", attack, targets) for targets in (None, "random", "least_likely")]
    fingerprints = {evaluator.fingerprint(0, "fp32") for evaluator in evaluators}
    assert len(fingerprints) == len(evaluators)


def test_an_evaluators_fingerprint_is_that_of_the_generators_content(tmp_path):
    for name in ("one.pth", "other.pth"):
        (tmp_path / name).write_bytes(b"weights")
    evaluators = [AttackEvaluator("cda", make_attack("cda", generator=str(path))) for path in tmp_path.iterdir()]
    before = {evaluator.fingerprint(0, "fp32") for evaluator in evaluators}
    (tmp_path / "one.pth").write_bytes(b"others")
    after = {evaluator.fingerprint(0, "fp32") for evaluator in evaluators}
    assert len(before) == 1
    assert len(after) == 2


def test_only_attacks_with_the_whole_budget_make_a_headline(data, net, tmp_path):
    attack = make_attack("pgd", eps=0.15, steps=5)
    curve = ExactCurve("curve", attack, (0.05, 0.1))
    part = SanityAttack("few", attack, subset="first:20", sets=(select_subset(data.test_set, "first:20"),))
    for asked, n in (([curve], None), ([curve, part], 20), ([curve, AttackEvaluator("pgd", attack)], 50)):
        summary = (
            evaluation(data, evaluators=asked, threat=Threat("linf", 0.15)).run(net, tmp_path / str(n), CPU).summary
        )
        assert [row["n"] for row in summary if row["evaluator"] == "worst_case"] == ([n] if n else [])


def test_what_each_member_leaves_of_a_curve_begins_below_the_misclassified(data, trained_net, tmp_path):
    curve = ExactCurve("curve", ShortAutoAttack(eps=0.1), (0.05, 0.1))
    summary = evaluation(data, evaluators=[curve]).run(trained_net, tmp_path, CPU).summary
    for eps in curve.eps:
        rows = [row for row in summary if row["eps"] == eps]
        (whole,) = (
            row["value"] for row in rows if row["metric"] == "robust_accuracy" and row["evaluator"] == "curve"
        )
        left = [row["value"] for row in rows if row["metric"] == "robust_accuracy_after"]
        clean = next(row["value"] for row in summary if row["eps"] == 0)
        assert len(left) == 4
        assert clean > left[0] >= left[-1] == whole


@pytest.mark.parametrize("targets", ["random", "least_likely"])
def test_with_targets_only_the_target_counts(targets, data, net, tmp_path):
    attack = make_attack("pgd", eps=0.15, steps=10)
    evaluators = [AttackEvaluator("aimed", attack, targets), AttackEvaluator("free", attack)]
    summary = evaluation(data, evaluators=evaluators, threat=Threat("linf", 0.15)).run(net, tmp_path, CPU).summary
    rows = pd.read_parquet(tmp_path / "verdicts")
    aimed, free = (rows[rows["evaluator"] == name].sort_values("sample_id") for name in ("aimed", "free"))
    assert free["target"].isna().all()
    assert ((aimed["target"] != aimed["label"]) & aimed["target"].between(0, 9)).all()
    wrong = aimed["clean_prediction"] != aimed["label"]
    reached = aimed["adversarial_prediction"] == aimed["target"]
    assert (aimed["broken"] == wrong | reached).all()
    assert wrong.any()
    assert (reached & ~wrong).any()
    assert (aimed.loc[wrong, ["distance", "forwards"]] == 0).all(axis=None), "there is nothing left to break"
    assert of(summary, "aimed")["metric"] == "targeted_robust_accuracy"
    assert of(summary, "aimed")["value"] == pytest.approx(1 - aimed["broken"].mean())
    assert of(summary, "worst_case")["value"] <= of(summary, "free")["value"] < of(summary, "aimed")["value"]
    if targets == "least_likely":
        logits = net(torch.stack([data.test_set[i][0] for i in range(50)]) / 255)
        logits[range(50), data.test_set.labels[:50]] = torch.inf
        assert aimed["target"].tolist() == logits.argmin(1).tolist()
    else:
        assert aimed["target"].nunique() > 5


def test_random_targets_belong_to_the_sample(data, net, tmp_path):
    evaluators = [AttackEvaluator("aimed", make_attack("fgsm", eps=0.1), "random")]
    targets = {}
    for subset, batch_size in (("first:30", 16), ("random:100@1", 3)):
        settings = {"evaluators": evaluators, "batch_size": batch_size}
        summary = evaluation(data, subset, **settings).run(net, tmp_path / subset, CPU).summary
        assert [row["evaluator"] for row in summary] == ["aimed"], "which says nothing of the worst case"
        targets[subset] = pd.read_parquet(tmp_path / subset / "verdicts").set_index("sample_id")["target"]
    both = pd.concat(targets, axis=1).dropna()
    assert len(both) > 0
    assert (both["first:30"] == both["random:100@1"]).all()


def test_targets_may_come_from_a_file(data, net, tmp_path):
    attack, path = make_attack("fgsm", eps=0.1), tmp_path / "targets.csv"
    subset = select_subset(data.test_set, "first:30")
    given = pd.DataFrame({"sample_id": subset.sample_ids, "target": (subset.labels + 3) % 10}).sample(frac=1)
    given.to_csv(path, index=False)
    evaluator = AttackEvaluator("aimed", attack, str(path))
    evaluation(data, "first:30", evaluators=[evaluator]).run(net, tmp_path / "run", CPU)
    rows = pd.read_parquet(tmp_path / "run" / "verdicts").set_index("sample_id")
    assert rows["target"].sort_index().tolist() == given.sort_values("sample_id")["target"].tolist()
    before = evaluator.fingerprint(0, "fp32")
    assert AttackEvaluator("aimed", make_attack("tta", eps=0.1), str(path)).fingerprint(0, "fp32") != before
    path.rename(tmp_path / "moved.csv")
    assert AttackEvaluator("aimed", attack, str(tmp_path / "moved.csv")).fingerprint(0, "fp32") == before
    given[:20].to_csv(path, index=False)
    evaluator = AttackEvaluator("aimed", attack, str(path))
    assert evaluator.fingerprint(0, "fp32") != before
    missing = given["sample_id"][20:].tolist()
    with pytest.raises(ValueError, match=r"targets\.csv: has no row for sample_id") as caught:
        evaluation(data, "first:30", evaluators=[evaluator]).run(net, tmp_path / "short", CPU)
    assert int(str(caught.value).split()[-1]) in missing
    assert not (tmp_path / "short").exists(), "a file that lacks a sample is found out before the first verdict"
    for content, message in [
        ("sample_id,class\n1,2\n", "is no CSV file with columns sample_id and target"),
        ("", "is no CSV file with columns sample_id and target"),
        ("sample_id,target\n1,cat\n", "expected whole numbers in columns sample_id and target"),
        ("sample_id,target\n1,2\n1,3\n", "names a sample_id twice"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            AttackEvaluator("aimed", attack, str(path))
    given["target"] = subset.labels[0].item()
    given.to_csv(path, index=False)
    evaluator = AttackEvaluator("aimed", attack, str(path))
    with pytest.raises(ValueError, match=f"gives sample_id {subset.sample_ids[0]} its own label"):
        evaluation(data, "first:30", evaluators=[evaluator]).run(net, tmp_path / "own", CPU)


def test_no_budget_is_null_in_the_summary(data, net, tmp_path):
    evaluators = [AttackEvaluator("nearest", make_attack("fmn", eps=None, steps=10))]
    (row,) = evaluation(data, subset="first:10", evaluators=evaluators).run(net, tmp_path, CPU).summary
    assert row["eps"] is None
    assert "Infinity" not in (tmp_path / "summary.json").read_text()
    rows = pd.read_parquet(tmp_path / "verdicts")
    assert np.isposinf(rows["eps"]).all()
    assert rows.loc[rows["broken"], "distance"].lt(1).all()


def test_a_table_with_other_columns_is_refused(data, net, tmp_path):
    evaluation(data, subset="first:5").run(net, tmp_path, CPU)
    part = min((tmp_path / "verdicts").iterdir())
    pd.read_parquet(part).drop(columns="attack_fingerprint").to_parquet(part, index=False)
    with pytest.raises(ValueError, match=rf"{part.name}: has other columns than this version writes"):
        evaluation(data, subset="first:5").run(net, tmp_path, CPU)


def test_only_the_subset_is_counted(data, net, tmp_path):
    evaluation(data, subset="first:20").run(net, tmp_path, CPU)
    assert {row["n"] for row in evaluation(data, subset="first:5").run(net, tmp_path, CPU).summary} == {5}
    assert {row["n"] for row in evaluation(data, subset="first:30").run(net, tmp_path, CPU).summary} == {30}


def test_a_corrupt_part_is_named_set_aside_and_asked_again_while_the_others_are_kept(data, net, tmp_path, capsys):
    whole = evaluation(data, subset="first:20").run(net, tmp_path, CPU).summary
    bad, *others = sorted((tmp_path / "verdicts").iterdir())
    contents = {part: part.read_bytes() for part in others}
    bad.write_bytes(bad.read_bytes()[:-100])
    capsys.readouterr()
    assert evaluation(data, subset="first:20").run(net, tmp_path, CPU).summary == whole
    assert f"_corrupt-{bad.name}: could not be read" in capsys.readouterr().out.replace("\n", "")
    assert {part: part.read_bytes() for part in others} == contents, "no part is ever written over"
    assert len(pd.read_parquet(tmp_path / "verdicts")) == 20 * 6, "nor does the one set aside stand in the way"


def test_examples_show_what_was_found(data, net, tmp_path):
    evaluation(data).run(net, tmp_path, CPU)
    with np.load(tmp_path / "examples.npz", allow_pickle=False) as examples:
        assert str(examples["attack"]) == "pgd"
        assert (examples["clean_prediction"] == examples["label"]).all()
        assert (examples["adversarial_prediction"] != examples["label"]).all()
        difference = np.abs(examples["adversarial"].astype(np.float64) - examples["clean"])
        assert difference.max() <= 0.1 + 6e-8
        assert (difference.reshape(len(difference), -1).max(1) > 0).all()
        assert list(examples["classes"]) == [str(digit) for digit in range(10)]
