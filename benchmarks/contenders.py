"""The same attack by several libraries, with the same settings."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from subjects import Subject
from torch import Tensor

from ares_lightning.attacks import make_attack
from ares_lightning.attacks.passes import Passes
from ares_lightning.evaluation.curves import BracketedCurve, ExactCurve

PGD_STEPS, STEP_SIZE = 10, 1 / 4  # the step in multiples of eps: 2/255 at 8/255
AUTO_STEPS, QUERIES, TARGETS = 100, 5000, 9
FMN_STEPS, DEEPFOOL_STEPS, CW_SEARCHES, CW_STEPS = 100, 50, 9, 100
L2_BUDGET = 16.0  # in multiples of the L-inf eps: 0.5 at 8/255
CURVE = tuple(k / 4 for k in range(1, 10))

Run = Callable[[Subject, int], Tensor]
"""(subject, seed) -> adversarial images [N, C, H, W], or [budgets, N, C, H, W] for a curve."""


@dataclass(frozen=True)
class Contender:
    """One library's way to run an attack; `package` is what has to be installed for it."""

    label: str
    package: str
    run: Run


@dataclass(frozen=True)
class Contest:
    """The setting of an attack that all share, and who takes part, ourselves first.

    norm: by which results are judged; budgets: at which, in multiples of the subject's eps.
    """

    setting: str
    contenders: tuple[Contender, ...]
    norm: str = "linf"
    budgets: tuple[float, ...] = (1.0,)


def ares(
    name: str,
    label: str = "ares",
    *,
    nearest: bool = False,
    as_given: bool = False,
    bf16: bool = False,
    **settings: Any,
) -> Contender:
    """Run our attack on all images at once, in passes of the batch size, as an evaluation does: the folded copy is
    what it searches on, the network as given has the last word."""

    def run(subject: Subject, seed: int) -> Tensor:
        attack = make_attack(name, eps=None if nearest else subject.eps, **settings)
        return attack(
            subject.network,
            subject.images,
            subject.labels,
            seed=seed,
            batch_size=subject.batch_size,
            precision="bf16" if bf16 else "fp32",
            search_on=None if as_given else subject.evaluated,
        ).images

    return Contender(label, "ares_lightning", run)


def ares_curve(label: str, kind: type[ExactCurve] | type[BracketedCurve]) -> Contender:
    """Run our evaluator of robustness curves with PGD, searching on the folded copy."""

    def run(subject: Subject, seed: int) -> Tensor:
        attack = make_attack("pgd", eps=subject.eps, steps=PGD_STEPS)
        curve = kind("curve", attack, tuple(multiple * subject.eps for multiple in CURVE))
        ids = torch.arange(len(subject.images))
        verdicts = curve.verdicts(
            subject.network,
            subject.images,
            subject.labels,
            ids,
            seed,
            Passes(subject.batch_size, search_on=subject.evaluated),
        )
        return torch.stack([verdict.outcome.images for verdict in verdicts][1:])

    return Contender(label, "ares_lightning", run)


def torchattacks(make: Callable[[Any, Subject], Any], label: str = "torchattacks", bf16: bool = False) -> Contender:
    """Run an attack of torchattacks, batch by batch; `make` builds it from the package and the subject."""

    def run(subject: Subject, seed: int) -> Tensor:
        attack = make(importlib.import_module("torchattacks"), subject)
        with torch.autocast(subject.images.device.type, torch.bfloat16) if bf16 else nullcontext():
            return torch.cat([attack(images, labels) for images, labels in subject.batches()])

    return Contender(label, "torchattacks", run)


def foolbox(make: Callable[[Any], Any], budgets: tuple[float, ...] | None = (1.0,)) -> Contender:
    """Run an attack of foolbox, batch by batch; without budgets it looks for the nearest adversarial example."""

    def run(subject: Subject, seed: int) -> Tensor:
        package = importlib.import_module("foolbox")
        model = package.PyTorchModel(subject.network, bounds=(0, 1), device=subject.images.device)
        attack = make(package.attacks)
        epsilons = [None] if budgets is None else [budget * subject.eps for budget in budgets]
        found = [attack(model, images, labels, epsilons=epsilons)[1] for images, labels in subject.batches()]
        budgeted = [torch.cat(batches) for batches in zip(*found, strict=True)]
        return torch.stack(budgeted) if len(budgeted) > 1 else budgeted[0]

    return Contender("foolbox", "foolbox", run)


def pyautoattack(*attacks: str) -> Contender:
    """Run the official AutoAttack in its standard version, or some attacks of it."""

    def run(subject: Subject, seed: int) -> Tensor:
        package = importlib.import_module("pyautoattack")
        official = package.AutoAttack(
            subject.network, eps=subject.eps, norm="Linf", seed=seed, device=subject.images.device
        )
        if attacks:
            official.attacks_to_run = list(attacks)
        found: Tensor = official.run_standard_evaluation(
            subject.images, subject.labels, batch_size=subject.batch_size
        )[0]
        return found

    return Contender("pyautoattack", "pyautoattack", run)


def _pgd(package: Any, subject: Subject, multiple: float = 1.0) -> Any:
    eps = multiple * subject.eps
    return package.PGD(subject.network, eps=eps, alpha=STEP_SIZE * eps, steps=PGD_STEPS, random_start=True)


def _torchattacks_curve(subject: Subject, seed: int) -> Tensor:
    return torch.stack(
        [
            torchattacks(lambda package, subject, at=multiple: _pgd(package, subject, at)).run(subject, seed)
            for multiple in CURVE
        ]
    )


def _linf_pgd(attacks: Any) -> Any:
    return attacks.LinfPGD(rel_stepsize=STEP_SIZE, steps=PGD_STEPS, random_start=True)


def _of(subject: Subject) -> dict[str, Any]:
    return {"norm": "Linf", "eps": subject.eps}


# torchattacks' AutoAttack is left out: its APGD and FAB make 10 iterations where the official ones make 100.
CONTESTS = {
    "pgd": Contest(
        f"{PGD_STEPS} steps of eps/4, random start",
        (
            ares("pgd", steps=PGD_STEPS),
            ares("pgd", "ares, network as given", as_given=True, steps=PGD_STEPS),
            torchattacks(_pgd),
            foolbox(_linf_pgd),
        ),
    ),
    "pgd_bf16": Contest(
        f"{PGD_STEPS} steps of eps/4, random start; search in bf16, verdicts in float32",
        (
            ares("pgd", "ares bf16", bf16=True, steps=PGD_STEPS),
            torchattacks(_pgd, "torchattacks fp32"),
            torchattacks(_pgd, "torchattacks bf16 autocast", bf16=True),
        ),
    ),
    "apgd_ce": Contest(
        f"{AUTO_STEPS} steps, 1 restart",
        (
            ares("apgd_ce", steps=AUTO_STEPS),
            pyautoattack("apgd-ce"),
            torchattacks(lambda package, s: package.APGD(s.network, steps=AUTO_STEPS, loss="ce", **_of(s))),
        ),
    ),
    "apgd_t": Contest(
        f"{AUTO_STEPS} steps, {TARGETS} targets",
        (
            ares("apgd_t", steps=AUTO_STEPS, num_targets=TARGETS),
            pyautoattack("apgd-t"),
            torchattacks(
                lambda package, s: package.APGDT(s.network, steps=AUTO_STEPS, n_classes=s.num_classes, **_of(s))
            ),
        ),
    ),
    "fab_t": Contest(
        f"{AUTO_STEPS} steps, {TARGETS} targets",
        (
            ares("fab_t", steps=AUTO_STEPS, num_targets=TARGETS),
            pyautoattack("fab-t"),
            torchattacks(
                lambda package, s: package.FAB(
                    s.network, steps=AUTO_STEPS, multi_targeted=True, n_classes=s.num_classes, **_of(s)
                )
            ),
        ),
    ),
    "square": Contest(
        f"{QUERIES} queries",
        (
            ares("square", queries=QUERIES),
            pyautoattack("square"),
            torchattacks(
                lambda package, s: package.Square(s.network, n_queries=QUERIES, resc_schedule=False, **_of(s))
            ),
        ),
    ),
    "autoattack": Contest(
        "standard", (ares("autoattack"), ares("autoattack", "ares bf16", bf16=True), pyautoattack())
    ),
    "fmn": Contest(
        f"nearest in L-inf, {FMN_STEPS} steps",
        (
            ares("fmn", nearest=True, steps=FMN_STEPS),
            foolbox(lambda attacks: attacks.LInfFMNAttack(steps=FMN_STEPS), budgets=None),
        ),
    ),
    "deepfool": Contest(
        f"nearest in L2, at most {DEEPFOOL_STEPS} steps",
        (
            ares("deepfool", nearest=True, norm="l2", steps=DEEPFOOL_STEPS),
            foolbox(lambda attacks: attacks.L2DeepFoolAttack(steps=DEEPFOOL_STEPS), budgets=None),
        ),
        norm="l2",
        budgets=(L2_BUDGET,),
    ),
    "cw": Contest(
        f"nearest in L2, {CW_SEARCHES} searches of at most {CW_STEPS} steps",
        (
            ares("cw", nearest=True, norm="l2", search_steps=CW_SEARCHES, steps=CW_STEPS),
            foolbox(
                lambda attacks: attacks.L2CarliniWagnerAttack(binary_search_steps=CW_SEARCHES, steps=CW_STEPS),
                budgets=None,
            ),
        ),
        norm="l2",
        budgets=(L2_BUDGET,),
    ),
    "curve": Contest(
        f"{len(CURVE)} budgets from {CURVE[0]} eps to {CURVE[-1]} eps; PGD, {PGD_STEPS} steps of a fourth of each",
        (
            ares_curve("ares, exact", ExactCurve),
            ares_curve("ares, bracketed", BracketedCurve),
            Contender("torchattacks", "torchattacks", _torchattacks_curve),
            foolbox(_linf_pgd, CURVE),
        ),
        budgets=CURVE,
    ),
}
