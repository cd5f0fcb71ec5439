"""Checks on verdict rows: what no honest evaluation shows is found, and what chance shows is not."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from ares_lightning.attacks import Threat, make_attack
from ares_lightning.data import ImageSet, RobustDataModule
from ares_lightning.evaluation.sanity import run_checks, sanity_evaluators, sanity_report, sanity_subset
from ares_lightning.evaluation.sanity.rule import exceeds
from ares_lightning.evaluation.verdicts import SCHEMA

THREAT = Threat("linf", 0.1)
N = 100


def rows(attack, broken, *, eps=0.1, evaluator=None, norm="linf", **columns):
    """Verdicts on N samples of class 0, of which those in `broken` are broken."""
    table = pd.DataFrame({"sample_id": range(N)})
    table["broken"] = table["sample_id"].isin([*broken])
    table["distance"] = table["broken"] * eps
    table["adversarial_prediction"] = table["broken"].astype(int)
    constant = {
        "evaluator": evaluator or attack,
        "evaluator_fingerprint": evaluator or attack,
        "model_fingerprint": "model",
        "set": "digits",
        "sample_name": "",
        "label": 0,
        "clean_prediction": 0,
        "attack": attack,
        "attack_fingerprint": attack,
        "target": None,
        "norm": norm,
        "eps": eps,
        "seed": 0,
        "precision": "fp32",
        "forwards": 1,
        "backwards": 1,
        "source_fingerprint": None,
        **columns,
    }
    return table.assign(**constant)[SCHEMA.names]


def checks(*tables, attacks=(), summary=(), **about):
    evaluators = [{"fingerprint": name, "settings": repr(attack)} for name, attack in attacks]
    table = pd.concat(tables) if tables else SCHEMA.empty_table().to_pandas()
    found = run_checks(table, list(summary), {"evaluators": evaluators, **about}, THREAT, "digits")
    return {check.check: check for check in found}


def pgd(**settings):
    return make_attack("pgd", eps=0.1, **settings)


def test_of_nothing_nothing_is_asked():
    asked = {key for key, check in checks().items() if check.verdict != "not asked"}
    assert asked == {"all_ran", "provenance"}


def test_a_handful_of_many_is_chance_and_more_is_not():
    assert not exceeds(2, 128, 0.002)
    assert exceeds(3, 128, 0.002)
    assert not exceeds(30, 10_000, 0.002)
    assert exceeds(40, 10_000, 0.002)
    assert not exceeds(0, 128, 0.0)


@pytest.mark.parametrize(("alone", "verdict"), [(2, "pass"), (3, "fail")])
def test_black_box_attacks_that_win_are_counted_sample_by_sample(alone, verdict):
    white, square = rows("pgd", range(50)), rows("square", range(50 - 20, 50 + alone))
    check = checks(white, square)["black_box_not_stronger"]
    assert check.verdict == verdict
    assert f"{alone} of 100" in check.evidence


def test_black_box_attacks_are_held_against_all_white_box_attacks_within_their_budget():
    halves = rows("pgd", range(0, 40)), rows("apgd_ce", range(30, 60)), rows("fgsm", range(60, 70), eps=0.05)
    assert checks(*halves, rows("square", range(70)))["black_box_not_stronger"].verdict == "pass"
    beyond = rows("pgd", range(70), eps=0.2)
    assert checks(beyond, rows("square", range(70)))["black_box_not_stronger"].verdict == "not asked"


def test_square_last_in_an_ensemble_is_held_against_what_came_before():
    members = [rows("apgd_ce", range(50), evaluator="autoattack")]
    left = rows("square", range(50, 60), evaluator="autoattack")
    check = checks(*members, left[left["sample_id"] >= 50])["black_box_not_stronger"]
    assert check.verdict == "fail"
    assert "10 of 100" in check.evidence
    few = rows("square", [50], evaluator="autoattack")
    assert checks(*members, few[few["sample_id"] >= 50])["black_box_not_stronger"].verdict == "pass"


def test_transferred_examples_that_win_are_found():
    own, foreign = rows("pgd", range(40)), rows("mim", range(60), evaluator="transfer", source_fingerprint="other")
    found = checks(own, foreign)
    assert found["transfer_not_stronger"].verdict == "fail"
    assert found["stronger_attacks_break_more"].verdict == "not asked"


def test_noise_that_wins_is_found():
    assert checks(rows("pgd", range(5)), rows("noise", range(10)))["noise_not_stronger"].verdict == "fail"
    assert checks(rows("pgd", range(10)), rows("noise", range(5)))["noise_not_stronger"].verdict == "pass"


@pytest.mark.parametrize(("weak", "strong"), [("fgsm", "pgd"), ("pgd", "apgd_ce"), ("fgsm", "apgd_ce")])
def test_stronger_attacks_must_break_the_same_samples_not_as_many(weak, strong):
    assert (
        checks(rows(weak, range(30)), rows(strong, range(30, 90)))["stronger_attacks_break_more"].verdict == "fail"
    )
    assert checks(rows(weak, range(30)), rows(strong, range(90)))["stronger_attacks_break_more"].verdict == "pass"


def test_a_larger_budget_must_break_what_a_smaller_one_does():
    small, large = rows("pgd", range(30), evaluator="a"), rows("pgd", range(20), eps=0.2, evaluator="b")
    attacks = [("a", pgd(steps=20)), ("b", pgd(steps=20).replace(eps=0.2))]
    assert checks(small, large, attacks=attacks)["monotone_in_budget"].verdict == "fail"
    others = [("a", pgd(steps=20)), ("b", pgd(steps=40).replace(eps=0.2))]
    assert checks(small, large, attacks=others)["monotone_in_budget"].verdict == "not asked"
    twin = rows("pgd", range(20), evaluator="b")
    alike = [("a", pgd(steps=20)), ("b", pgd(steps=20))]
    assert checks(small, twin, attacks=alike)["monotone_in_budget"].verdict == "not asked", "budgets are equal"


def test_more_steps_break_what_fewer_do_and_twice_as_many_no_more():
    attacks = [("a", pgd(steps=20)), ("b", pgd(steps=40))]

    def verdicts(few, many):
        found = checks(rows("pgd", few, evaluator="a"), rows("pgd", many, evaluator="b"), attacks=attacks)
        return found["monotone_in_effort"].verdict, found["converged"].verdict

    assert verdicts(range(30), range(31)) == ("pass", "pass")
    assert verdicts(range(30), range(40)) == ("pass", "fail")
    assert verdicts(range(30), range(20)) == ("fail", "pass")


def test_without_a_bound_something_withstands():
    assert checks(rows("pgd", range(N), eps=1.0))["unbounded_attack_breaks_all"].verdict == "pass"
    check = checks(rows("pgd", range(90), eps=1.0))["unbounded_attack_breaks_all"]
    assert (check.verdict, "10 of 100" in check.evidence) == ("fail", True)
    in_l2 = rows("pgd", range(90), eps=8.0, norm="l2", evaluator="sanity_pgd20_whole_box")
    assert checks(in_l2)["unbounded_attack_breaks_all"].verdict == "fail"


def test_one_example_beyond_its_budget_is_one_too_many():
    table = rows("pgd", range(10))
    assert checks(table)["budgets_kept"].verdict == "pass"
    table.loc[3, "distance"] = 0.1 + 1e-6
    assert checks(table)["budgets_kept"].verdict == "fail"
    table.loc[3, "distance"] = float("nan")
    assert checks(table)["budgets_kept"].verdict == "fail"


def test_verdicts_must_agree_with_predictions_and_with_each_other():
    table = rows("pgd", range(10))
    assert checks(table)["verdicts_consistent"].verdict == "pass"
    forged = table.assign(broken=False)
    assert checks(forged)["verdicts_consistent"].verdict == "fail"
    wavering = rows("fgsm", range(10))
    wavering.loc[range(5), ["clean_prediction", "adversarial_prediction"]] = 2
    assert checks(table, wavering)["verdicts_consistent"].verdict == "fail"


def test_where_samples_have_several_right_classes_another_than_the_label_may_be_right():
    table = rows("none", range(10), eps=0.0, norm=None, clean_prediction=0)
    table.loc[:4, "broken"] = False
    about = {"evaluators": []}
    found = {
        several: next(
            check
            for check in run_checks(table, [], about, THREAT, "digits", several_labels=several)
            if check.check == "verdicts_consistent"
        )
        for several in (False, True)
    }
    assert found[False].verdict == "fail"
    assert found[True].verdict == "pass"


def test_a_targeted_verdict_is_about_its_target():
    table = rows("pgd", range(10), target=1)
    assert checks(table)["verdicts_consistent"].verdict == "pass"
    assert checks(table.assign(target=2))["verdicts_consistent"].verdict == "fail"


def headline(value, n=N):
    return {"evaluator": "worst_case", "value": value, "n": n, "seed": 0, "precision": "fp32"}


def test_the_headline_is_recounted_over_everything_that_was_run():
    tables = rows("pgd", range(30)), rows("square", range(20, 40)), rows("pgd", range(90), eps=0.2, evaluator="far")
    key = "headline_is_worst_case"
    assert checks(*tables, summary=[headline(0.6)])[key].verdict == "pass"
    assert checks(*tables, summary=[headline(0.7)])[key].verdict == "fail"
    assert checks(*tables, summary=[headline(0.6, 99)])[key].verdict == "fail"


def test_what_the_record_lacks_is_named():
    table = rows("pgd", range(10))
    sets = [{"set": "digits", "n": N, "names_hash": "0", "preparation": None}]
    whole = {"summary": [headline(0.9)], "sets": sets, "run": {"versions": {"torch": "2"}}}
    assert checks(table, **whole)["provenance"].verdict == "pass"
    assert "versions" in checks(table, **{**whole, "run": {}})["provenance"].evidence
    del sets[0]["names_hash"]
    assert "hash" in checks(table, **whole)["provenance"].evidence


def test_other_sets_do_not_count():
    elsewhere = rows("square", range(90)).assign(set="digits/fog/3")
    assert checks(rows("pgd", range(5)), elsewhere)["black_box_not_stronger"].verdict == "not asked"


def test_the_report_is_plain_json():
    found = checks(rows("pgd", range(10)))
    report = json.loads(json.dumps(sanity_report([*found.values()], "model", None)))
    assert [check["check"] for check in report["checks"]] == [*found]
    assert {*report["checks"][0]} == {"check", "title", "verdict", "evidence", "remedy", "source"}


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    sizes = {"batch_size": 64, "eval_batch_size": 64, "num_workers": 0, "num_val": 180}
    return RobustDataModule(name="digits", img_size=8, in_chans=1, **sizes).test_set


@pytest.mark.parametrize(("norm", "whole"), [("linf", 1.0), ("l2", 8.0), ("l1", 64.0)])
def test_the_attacks_are_about_the_same_few_samples_and_one_holds_every_image(digits, norm, whole):
    asked = sanity_evaluators(Threat(norm, 0.1), digits, num_samples=32)
    assert len({each.name for each in asked}) == len(asked)
    assert all(each.name.startswith("sanity_") for each in asked)
    subset, _ = sanity_subset(digits, 32)
    assert all(each.own_sets[0].sample_ids.tolist() == subset.sample_ids.tolist() for each in asked)
    (boundless,) = [each for each in asked if each.name.endswith("whole_box")]
    assert boundless.attack.threat == Threat(norm, whole)


def test_bad_settings_are_refused_by_their_keys(digits):
    with pytest.raises(ValueError, match=r"^steps=\[40, 20\]: expected a rising list"):
        sanity_evaluators(THREAT, digits, steps=[40, 20])
    with pytest.raises(ValueError, match=r"^steps=5: expected a rising list"):
        sanity_evaluators(THREAT, digits, steps=5)
    with pytest.raises(ValueError, match=r"^budgets=\[-1\]: expected"):
        sanity_evaluators(THREAT, digits, budgets=[-1])
    with pytest.raises(ValueError, match=r"^num_samples=0"):
        sanity_evaluators(THREAT, digits, num_samples=0)
