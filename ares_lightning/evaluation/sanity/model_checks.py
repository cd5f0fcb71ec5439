"""What measurements on the model alone say about attacks on it."""

from __future__ import annotations

from ares_lightning.evaluation.sanity.attack_checks import AUTOATTACK, CARLINI, INDICATORS, SAME
from ares_lightning.evaluation.sanity.gradients import GradientProbes
from ares_lightning.evaluation.sanity.probes import Probes
from ares_lightning.evaluation.sanity.rule import FAIL, NOT_ASKED, PASS, WARN, Check, count_of, exceeds

ATHALYE = "Athalye et al. 2018, arXiv 1802.00420"
ROBUSTBENCH = "RobustBench, Croce et al. 2021, arXiv 2010.09670"

FLAGGED_CHANGE = 1e-4
"""Change of L2-normalised logits from which on AutoAttack calls a model randomised (its checks.py)."""
ROUNDING_CHANGE = 1e-5
"""A change below this may be the rounding of float32: 84 times its relative error."""
ROUNDING_CHANGE_FP64 = 1e-9
TIMES_RANDOM = 3
"""Of a randomised model, neighbours count where they change the logits so many times as much as a repetition."""
FEW = 0.01
"""Share of images tolerated with a zero gradient, with one that points astray, or with logits that stand still."""
FEW_DOWNHILL = 0.1
"""Share of images tolerated where a random step of PGD's length beats one along the gradient."""
PGD_STEP = "0.25"
"""PGD's step in budgets, a key of `GradientProbes.uphill`."""
STILL_SIZE = "0.0001"
"""A change of the pixels a fortieth of 1/255, a key of `Probes.unmoved`."""
MANY_AT_ENDS = 0.2
"""Share of outputs at the ends of their range, where softmax, sigmoid and clipping leave no gradient."""
FEWEST_CLASSES = 4
"""Classes that the targeted DLR loss needs (arXiv 2003.01690, eq. 7)."""
STILL_RISING = 0.1
"""Share of the whole rise of the margin that the last quarter of the steps may still bring."""


def model_checks(probes: Probes | None, eot: int = 1) -> list[Check]:
    """Return what the measurements say; without any, nothing is asked. eot: draws of a randomised model."""
    if probes is None:
        evidence = "The model was not measured; eval=sanity does."
        return [Check(key, title, NOT_ASKED, evidence, None, source) for key, title, source in _CLAIMS.values()]
    checks = [
        _finite(probes),
        _logits(probes),
        _deterministic(probes, eot),
        _independent(probes),
        _no_optimisation(probes),
        _classes(probes),
        _moves(probes),
    ]
    gradients = probes.gradients
    if gradients is None:
        evidence = "No image is classified rightly."
        left = (_NONZERO, _UPHILL, _ENDS, _CONFIRMED)
        return checks + [Check(*claim[:2], NOT_ASKED, evidence, None, claim[2]) for claim in left]
    return [*checks, _nonzero(gradients), _uphill(gradients, probes), _ended(gradients), _confirmed(gradients)]


_FINITE = ("finite_logits", "All logits are finite", CARLINI)
_LOGITS = ("logits_not_probabilities", "The model returns logits", AUTOATTACK)
_SAME_TWICE = ("deterministic", "The model gives the same logits twice", f"{AUTOATTACK}; {ROBUSTBENCH}")
_ALONE = ("independent_of_batch", "An image's logits depend on the image alone", "github.com/fra31/auto-attack#74")
_NO_LOOP = ("no_gradients_in_forward", "No gradient is computed in a forward", f"{AUTOATTACK}; {ROBUSTBENCH}")
_ENOUGH = ("enough_classes", "The losses of the attacks are defined for so many classes", AUTOATTACK)
_MOVES = ("input_not_quantised", "Small changes of the pixels move the logits smoothly", ATHALYE)
_NONZERO = ("gradients_not_zero", "Gradients are there: neither zero nor NaN", f"{AUTOATTACK}; {INDICATORS}")
_UPHILL = ("gradients_point_uphill", "Gradients tell where the loss rises", ATHALYE)
_ENDS = ("climb_ended", "The margin has stopped rising when the attack stops", INDICATORS)
_CONFIRMED = ("verdicts_confirmed", "A fresh forward confirms the verdicts, and none is lost", INDICATORS)
_CLAIMS = {
    claim[0]: claim
    for claim in (
        *(_FINITE, _LOGITS, _SAME_TWICE, _ALONE, _NO_LOOP, _ENOUGH, _MOVES),
        *(_NONZERO, _UPHILL, _ENDS, _CONFIRMED),
    )
}


def _check(claim: tuple[str, str, str], verdict: str, evidence: str, remedy: str) -> Check:
    key, title, source = claim
    return Check(key, title, verdict, evidence, remedy if verdict in (WARN, FAIL) else None, source)


def _finite(probes: Probes) -> Check:
    bad = probes.num_non_finite
    evidence = f"Logits with NaN or infinity: {count_of(bad, probes.num_images)} clean images."
    return _check(
        _FINITE, FAIL if bad else PASS, evidence, "Mend the model: such an image counts as broken, attacked or not."
    )


def _logits(probes: Probes) -> Check:
    if probes.num_finite == 0:
        return _check(_LOGITS, NOT_ASKED, "There are no finite logits.", "")
    at_ends = probes.share_at_ends
    evidence = f"The outputs are {probes.output}; {at_ends:.1%} of them lie at the ends of their range."
    bad = probes.output not in ("logits", "log-probabilities") or at_ends > MANY_AT_ENDS
    remedy = "Take off what squeezes the output (softmax, sigmoid, clipping): it leaves losses without a gradient."
    return _check(_LOGITS, FAIL if bad else PASS, evidence, remedy)


def _deterministic(probes: Probes, eot: int) -> Check:
    differs = probes.repeat_change > ROUNDING_CHANGE or probes.repeat_right > 0
    flag = "above" if probes.repeat_change > FLAGGED_CHANGE or probes.repeat_right else "below"
    evidence = (
        f"Five passes of one batch: normalised logits differ by {probes.repeat_change:.2g} ({flag} AutoAttack's "
        f"flag of {FLAGGED_CHANGE:g}), right ones by {probes.repeat_right} of {probes.num_images}."
    )
    if probes.changes_itself:
        evidence += " A forward changes the model's own buffers or parameters."
    if differs and eot > 1:
        return _check(
            _SAME_TWICE,
            WARN,
            f"{evidence} Attacks and verdicts average {eot} draws.",
            "See that more draws change no verdict.",
        )
    remedy = (
        "Switch the randomness off, or declare it (model.defense, AutoAttack version=rand), so that gradients and "
        "verdicts average many draws."
    )
    return _check(_SAME_TWICE, FAIL if differs or probes.changes_itself else PASS, evidence, remedy)


def _independent(probes: Probes) -> Check:
    remedy = (
        "Put the model into eval mode, with running statistics in its batch norms; nothing may look at the batch."
    )
    still = f" {probes.num_training} modules stay in training mode after eval()." if probes.num_training else ""
    if probes.neighbour_change is None:
        evidence = f"The model fails on other batches: {probes.neighbour_error}.{still}"
        return _check(_ALONE, FAIL, evidence, remedy)
    allowed = ROUNDING_CHANGE_FP64 if probes.in_fp64 else FLAGGED_CHANGE
    precision = "float64" if probes.in_fp64 else "float32"
    evidence = (
        f"Alone, in another order or beside other images, normalised logits differ by "
        f"{probes.neighbour_change:.2g} ({precision}).{still}"
    )
    if probes.repeat_change > ROUNDING_CHANGE:
        if probes.neighbour_change <= TIMES_RANDOM * probes.repeat_change:
            return _check(_ALONE, NOT_ASKED, f"{evidence} The model's randomness does as much.", "")
        return _check(_ALONE, FAIL, evidence, remedy)
    return _check(_ALONE, FAIL if probes.neighbour_change > allowed else PASS, evidence, remedy)


def _no_optimisation(probes: Probes) -> Check:
    evidence = f"One forward computes gradients {probes.gradient_calls} times."
    remedy = "Attack what the optimisation does as well (adaptive attack); AutoAttack does not suffice."
    return _check(_NO_LOOP, FAIL if probes.gradient_calls else PASS, evidence, remedy)


def _classes(probes: Probes) -> Check:
    evidence = f"{probes.num_classes} classes, labels up to {probes.largest_label}."
    if probes.largest_label >= probes.num_classes:
        return _check(_ENOUGH, FAIL, evidence, "Give the model the classes of the data.")
    if probes.num_classes < FEWEST_CLASSES:
        evidence += " Below four, the margin stands in for the targeted DLR loss, below three for both."
    return _check(_ENOUGH, PASS, evidence, "")


def _moves(probes: Probes) -> Check:
    n, still = probes.num_finite, probes.unmoved.get(STILL_SIZE, 0)
    if n == 0:
        return _check(_MOVES, NOT_ASKED, "There are no finite logits.", "")
    if probes.repeat_change > ROUNDING_CHANGE:
        return _check(_MOVES, NOT_ASKED, "The model's randomness moves the logits.", "")
    moving = next((size for size, count in probes.unmoved.items() if 2 * count < n), None)
    least = f"half of them move from {moving} on" if moving else "no change tried moves half of them"
    evidence = (
        f"All pixels changed by {STILL_SIZE}: logits stand exactly still for {count_of(still, n)} images "
        f"({least}), and jump for {count_of(probes.num_jumps, n)}."
    )
    bad = exceeds(still, n, FEW) or exceeds(probes.num_jumps, n, FEW)
    remedy = (
        "Something rounds the input or a feature: attack through it with the gradient of a smooth stand-in (BPDA), "
        "at budgets above its steps, and give score-based attacks their say."
    )
    return _check(_MOVES, FAIL if bad else PASS, evidence, remedy)


def _nonzero(gradients: GradientProbes) -> Check:
    n = gradients.num_images
    if gradients.zero is None or gradients.num_non_finite is None:
        remedy = "Something cuts the input off (detach, no_grad, a type without gradients): mend it, or use BPDA."
        return _check(_NONZERO, FAIL, "Autograd knows no way from the logits to the input.", remedy)
    zero = {name: count for name, count in gradients.zero.items() if count}
    told = ", ".join(f"{name} {count_of(count, n)}" for name, count in zero.items()) or "none"
    evidence = f"Exactly zero gradients: {told}; with NaN or infinity: {count_of(gradients.num_non_finite, n)}."
    if exceeds(gradients.num_non_finite, n, FEW):
        return _check(
            _NONZERO, FAIL, evidence, "Find the operation whose derivative is infinite (sqrt, log, division)."
        )
    worst = max(gradients.zero["ce"], gradients.zero["margin"])
    if not exceeds(worst, n, FEW):
        return _check(_NONZERO, PASS, evidence, "")
    if not exceeds(gradients.zero["margin"], n, FEW):
        evidence += " The margin has gradients where cross-entropy has none: that one is saturated by large logits."
        remedy = "Attack with a loss that the scale of the logits does not change (APGD-DLR, APGD-T, loss=margin)."
        return _check(_NONZERO, FAIL, evidence, remedy)
    remedy = "Gradients are masked: use BPDA for the step that has none, and score-based attacks (square)."
    return _check(_NONZERO, FAIL, evidence, remedy)


def _uphill(gradients: GradientProbes, probes: Probes) -> Check:
    n = gradients.num_images
    if gradients.uphill is None or gradients.num_wrong is None:
        return _check(_UPHILL, NOT_ASKED, "There are no gradients.", "")
    wrong, downhill = gradients.num_wrong, n - gradients.uphill[PGD_STEP]
    sizes = ", ".join(f"{share} eps {count_of(count, n)}" for share, count in gradients.uphill.items())
    evidence = (
        f"Gradients that miss measured slopes: {count_of(wrong, n)}. One step along the gradient raises the margin "
        f"further than random ones: {sizes}."
    )
    if probes.repeat_change > ROUNDING_CHANGE:
        wrong, evidence = 0, f"{evidence} The slopes are those of a randomised model and do not count."
    bad = exceeds(wrong, n, FEW) or exceeds(downhill, n, FEW_DOWNHILL)
    remedy = (
        "Gradients are shattered, or of another function than the model: use BPDA, gradients averaged over noise, "
        "and score-based attacks (square, spsa)."
    )
    return _check(_UPHILL, FAIL if bad else PASS, evidence, remedy)


def _ended(gradients: GradientProbes) -> Check:
    if gradients.trace is None:
        return _check(_ENDS, NOT_ASKED, "There are no gradients.", "")
    if not gradients.trace:
        return _check(_ENDS, PASS, "PGD-20 breaks every image.", "")
    quarter = len(gradients.trace) // 4
    start = gradients.trace[0]
    before, last = (
        sum(part) / quarter for part in (gradients.trace[-2 * quarter : -quarter], gradients.trace[-quarter:])
    )
    share = (last - before) / (last - start) if last > start else 0.0
    evidence = (
        f"PGD-20 raises the mean margin of the {gradients.trace_survivors} images that it never breaks from "
        f"{start:.3g} to {gradients.trace[-1]:.3g}, {share:.1%} of that in its last quarter."
    )
    if last <= start:
        return _check(_ENDS, FAIL, evidence, "The margin does not rise: the gradients fail the attack.")
    return _check(_ENDS, WARN if share > STILL_RISING else PASS, evidence, "Give the attack more steps.")


def _confirmed(gradients: GradientProbes) -> Check:
    n = gradients.num_images
    if gradients.num_recounted is None or gradients.num_lost is None or gradients.num_astray is None:
        why = f"PGD-20 refused the model: {gradients.refused}" if gradients.refused else "There are no gradients."
        return _check(_CONFIRMED, NOT_ASKED, why, "")
    evidence = (
        f"Of {n} images, a fresh forward in another order confirms all verdicts of PGD-20 but "
        f"{gradients.num_recounted}; {gradients.num_lost} were broken on the way and not in the verdict; "
        f"{gradients.num_astray} left budget or box, or hold NaN."
    )
    bad = (
        gradients.num_astray > 0
        or exceeds(gradients.num_recounted, n, SAME)
        or exceeds(gradients.num_lost, n, SAME)
    )
    remedy = "See whether the model is deterministic and independent of the batch; if it is, report a bug."
    return _check(_CONFIRMED, FAIL if bad else PASS, evidence, remedy)
