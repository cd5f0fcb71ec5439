"""An evaluation is believed where it deserves it: planted defences are seen through, honest networks pass."""

from __future__ import annotations

import copy

import pytest
import torch
from planted_defences import DEFENCES, HONEST, train_digits

from ares_lightning.attacks import Threat
from ares_lightning.data import RobustDataModule
from ares_lightning.evaluation.run import Evaluation
from ares_lightning.evaluation.sanity import run_checks, sanity_evaluators, sanity_subset, take_probes
from ares_lightning.evaluation.sanity.model_checks import model_checks
from ares_lightning.evaluation.verdicts import SCHEMA

LINF = Threat("linf", 0.1)
ABOUT = {
    "sets": [{"set": "digits", "n": 128, "names_hash": "0", "preparation": None}],
    "run": {"versions": {"torch": torch.__version__}},
    "failed": [],
}
NO_ROWS = SCHEMA.empty_table().to_pandas()


@pytest.fixture(scope="module")
def data() -> RobustDataModule:
    sizes = {"batch_size": 64, "eval_batch_size": 128, "num_workers": 0, "num_val": 180}
    return RobustDataModule(name="digits", img_size=8, in_chans=1, **sizes)


@pytest.fixture(scope="module")
def networks(data) -> dict[str, torch.nn.Module]:
    """Trained adversarially, and on clean images alone."""
    return {
        "robust": train_digits(data.train_set, eps=0.1, epochs=6),
        "undefended": train_digits(data.train_set, eps=None, epochs=4),
    }


@pytest.fixture(scope="module")
def with_group_norms(data) -> torch.nn.Module:
    return train_digits(data.train_set, eps=None, epochs=5, num_groups=4)


def probe(data, net, num_samples=128, threat=LINF):
    subset, _ = sanity_subset(data.test_set, num_samples)
    images = torch.stack([subset[i][0] for i in range(len(subset))]) / 255
    return take_probes(net, images, subset.labels, threat)


def judge(data, net, run_dir, threat=LINF, **settings):
    """Run everything that the sanity check asks for and return the checks by name."""
    evaluators = sanity_evaluators(threat, data.test_set, **settings)
    subset, spec = sanity_subset(data.test_set, settings.get("num_samples", 128))
    asked = Evaluation(
        evaluators=evaluators,
        threat=threat,
        dataset=subset,
        loader=data.evaluation_loader,
        batch_size=128,
        subset=spec,
    )
    return {check.check: check for check in asked.run(net, run_dir, torch.device("cpu")).checks}


def failing(checks):
    return {key: check.evidence for key, check in checks.items() if check.verdict in ("warn", "fail")}


def of_probes(probes):
    return {check.check: check for check in model_checks(probes)}


@pytest.mark.parametrize("which", ["robust", "undefended"])
def test_honest_networks_pass_every_check_that_is_asked(data, networks, tmp_path, which):
    checks = judge(data, networks[which], tmp_path, num_samples=64, queries=200)
    assert failing(checks) == {}
    not_asked = {key for key, check in checks.items() if check.verdict == "not asked"}
    assert not_asked == {"transfer_not_stronger"}
    assert len(checks) == 24


@pytest.mark.parametrize("name", HONEST)
@pytest.mark.parametrize("which", ["robust", "undefended"])
def test_honest_forms_of_a_network_are_not_taken_for_defences(data, networks, which, name):
    net = HONEST[name](copy.deepcopy(networks[which])).eval()
    assert failing(of_probes(probe(data, net, 64))) == {}


def test_group_norms_are_not_taken_for_batch_norms(data, with_group_norms):
    assert failing(of_probes(probe(data, with_group_norms, 64))) == {}


@pytest.mark.parametrize("name", DEFENCES)
def test_planted_defences_are_seen_through_without_an_attack(data, networks, name):
    build, expected = DEFENCES[name]
    checks = of_probes(probe(data, build(copy.deepcopy(networks["undefended"])).eval(), 32))
    for key in expected:
        assert checks[key].verdict == "fail", checks[key].evidence
        assert checks[key].remedy


def test_masked_gradients_show_in_what_attacks_break_of_each_other(data, networks, tmp_path):
    net = DEFENCES["logits x1e3"][0](networks["undefended"])
    checks = judge(data, net, tmp_path, num_samples=64, queries=200)
    for key in ("unbounded_attack_breaks_all", "black_box_not_stronger"):
        assert checks[key].verdict == "fail", checks[key].evidence
    assert "sanity_evolutionary" in checks["black_box_not_stronger"].evidence
    assert checks["headline_is_worst_case"].verdict == "pass"


def test_a_model_that_attacks_refuse_is_judged_all_the_same(data, networks):
    net = DEFENCES["softmax"][0](networks["robust"])
    failed = [{"evaluator": "sanity_fgsm", "set": "digits", "error": "the model returns probabilities"}]
    checks = run_checks(NO_ROWS, [], {**ABOUT, "failed": failed}, LINF, "digits", probe(data, net, 64))
    by_name = {check.check: check for check in checks}
    assert by_name["logits_not_probabilities"].verdict == "fail"
    assert "probabilities" in by_name["all_ran"].evidence
    assert by_name["all_ran"].verdict == "fail"
    assert by_name["black_box_not_stronger"].verdict == "not asked"
    assert "refused" in by_name["verdicts_confirmed"].evidence


def test_a_declared_randomised_model_is_warned_of_and_not_condemned(data, networks):
    probes = probe(data, DEFENCES["input noise"][0](networks["undefended"]), 64)
    checks = {check.check: check for check in run_checks(NO_ROWS, [], ABOUT, LINF, "digits", probes, eot=20)}
    assert checks["deterministic"].verdict == "warn"
    assert "20 draws" in checks["deterministic"].evidence


def test_zero_by_saturation_is_told_from_truly_zero(data, networks):
    saturated = of_probes(probe(data, DEFENCES["logits x1e3"][0](networks["undefended"]), 64))
    truly = of_probes(probe(data, DEFENCES["detached"][0](networks["undefended"]), 64))
    assert "saturated" in saturated["gradients_not_zero"].evidence
    assert "margin_fp64" in truly["gradients_not_zero"].evidence
    assert "saturated" not in truly["gradients_not_zero"].evidence


def test_a_quantised_model_is_told_from_which_change_on_its_logits_move(data, networks):
    evidence = of_probes(probe(data, DEFENCES["bit depth"][0](networks["undefended"]), 64))["input_not_quantised"]
    assert "half of them move from 0.0" in evidence.evidence


def test_probing_leaves_model_and_random_state_as_they_were(data, networks):
    net = copy.deepcopy(networks["robust"]).train()
    before = copy.deepcopy(net.state_dict())
    state = torch.random.get_rng_state()
    probe(data, net, 32)
    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_passes_take_no_more_images_than_those_of_attacks(data, networks):
    sizes: dict[bool, set[int]] = {False: set(), True: set()}
    net = copy.deepcopy(networks["robust"])
    net.register_forward_pre_hook(lambda _module, args: sizes[args[0].requires_grad].add(len(args[0])))
    subset, _ = sanity_subset(data.test_set, 40)
    images = torch.stack([subset[i][0] for i in range(40)]) / 255
    probes = take_probes(net, images, subset.labels, LINF, batch_size=16)
    assert max(sizes[True]) <= 16
    assert max(sizes[False]) <= 4 * 16
    assert failing(of_probes(probes)) == {}


def test_images_that_are_all_misclassified_leave_gradients_unasked(data, networks):
    subset, _ = sanity_subset(data.test_set, 16)
    images = torch.stack([subset[i][0] for i in range(16)]) / 255
    wrong = (networks["robust"](images).argmax(1) + 1) % 10
    checks = of_probes(take_probes(networks["robust"], images, wrong, LINF))
    assert checks["gradients_not_zero"].verdict == "not asked"
    assert failing(checks) == {}


@pytest.mark.proof
@pytest.mark.parametrize("which", ["robust", "undefended"])
@pytest.mark.parametrize("name", DEFENCES)
def test_planted_defences_are_seen_through_by_the_whole_check(data, networks, tmp_path, which, name):
    build, expected = DEFENCES[name]
    net = build(copy.deepcopy(networks[which])).eval()
    checks = judge(data, net, tmp_path)
    assert {*expected} <= {key for key, check in checks.items() if check.verdict == "fail"}


@pytest.mark.proof
@pytest.mark.parametrize("which", ["robust", "undefended"])
@pytest.mark.parametrize("threat", [Threat("l2", 0.5), Threat("l1", 2.0), LINF], ids=lambda threat: threat.norm)
def test_honest_networks_pass_in_every_norm(data, networks, tmp_path, which, threat):
    assert failing(judge(data, networks[which], tmp_path, threat)) == {}


@pytest.mark.proof
@pytest.mark.parametrize("name", HONEST)
@pytest.mark.parametrize("which", ["robust", "undefended"])
def test_honest_forms_pass_the_whole_check(data, networks, tmp_path, which, name):
    assert failing(judge(data, HONEST[name](copy.deepcopy(networks[which])).eval(), tmp_path)) == {}
