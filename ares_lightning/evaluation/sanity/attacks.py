"""The attacks that a sanity check asks for: weak and strong ones, blind ones, and one without a bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ares_lightning.attacks import Threat, make_attack
from ares_lightning.attacks.attack import check_count
from ares_lightning.data import ImageSet, select_subset
from ares_lightning.evaluation.evaluators import AttackEvaluator

WHOLE_BOX = "whole_box"
"""How the name of an attack ends whose budget holds every image."""
NUM_SAMPLES = 128
STEPS = (20, 40, 80)
BUDGETS = (0.5, 2.0)
NUM_RESTARTS = 3
STRONG_STEPS = 50
NUM_TARGETS = 3
NUM_QUERIES = 500


@dataclass(frozen=True)
class SanityAttack(AttackEvaluator):
    """An attack on a few samples, whose verdicts are compared with those of others.

    sets: the samples.
    """

    sets: tuple[ImageSet, ...] = field(repr=False, compare=False, kw_only=True)

    @property
    def own_sets(self) -> tuple[ImageSet, ...]:
        """The samples."""
        return self.sets


def sanity_subset(dataset: ImageSet, num_samples: int = NUM_SAMPLES) -> tuple[ImageSet, str]:
    """Draw `num_samples` of a set, all where it has no more, and say how: the same ones whatever is asked."""
    check_count("num_samples", num_samples)
    spec = f"random:{min(num_samples, len(dataset))}@0"
    return select_subset(dataset, spec), spec


def sanity_evaluators(
    threat: Threat,
    dataset: ImageSet,
    *,
    num_samples: int = NUM_SAMPLES,
    steps: Sequence[int] = STEPS,
    budgets: Sequence[float] = BUDGETS,
    restarts: int = NUM_RESTARTS,
    strong_steps: int = STRONG_STEPS,
    num_targets: int = NUM_TARGETS,
    queries: int = NUM_QUERIES,
    eot: int = 1,
) -> list[SanityAttack]:
    """Return what is asked on a few samples of `dataset`, cheap ones first, each a named evaluator of its own.

    steps: of PGD, rising, each the double of the one before to show convergence; the first number is that of all
        other runs of PGD. budgets: multiples of the threat model's budget for PGD, besides 1 and the whole box.
    restarts: of PGD with the first number of steps. strong_steps: of APGD with cross-entropy and of APGD-T, which
        aims at num_targets classes. queries: of Square and, half as many, of the Evolutionary attack, which knows
        L2 only: its budget is the radius of the smallest L2 ball around the threat model's, where PGD is run, too.
    eot: draws of a randomised model.

    Raises ValueError for settings that an attack refuses.
    """
    if not isinstance(steps, list | tuple) or not steps or list(steps) != sorted(set(steps)):
        raise ValueError(f"steps={steps}: expected a rising list such as [20,40,80]")
    if not isinstance(budgets, list | tuple) or not all(
        isinstance(multiple, int | float) and 0 < multiple < math.inf for multiple in budgets
    ):
        raise ValueError(f"budgets={budgets}: expected a list of multiples above 0, such as [0.5,2]")
    subset, spec = sanity_subset(dataset, num_samples)
    example = subset.example()
    size = example.numel()
    norm, eps = threat.norm, threat.eps
    whole = {"linf": 1.0, "l2": math.sqrt(size), "l1": float(size)}[norm]
    l2_eps = eps * math.sqrt(size) if norm == "linf" else eps
    first = steps[0]

    def ask(name: str, attack: str, norm: str = norm, eps: float = eps, **settings: Any) -> SanityAttack:
        made = make_attack(attack, norm=norm, eps=eps, eot=eot, **settings)
        return SanityAttack(f"sanity_{name}", made, subset=spec, sets=(subset,))

    asked = [ask("noise", "noise"), ask("fgsm", "fgsm")]
    asked += [ask(f"pgd{k}", "pgd", steps=k) for k in steps]
    asked += [ask(f"pgd{first}_restarts", "pgd", steps=first, restarts=restarts)]
    asked += [ask(f"pgd{first}_budget_x{m:g}", "pgd", eps=m * eps, steps=first) for m in budgets]
    asked += [ask(f"pgd{first}_{WHOLE_BOX}", "pgd", eps=whole, steps=first)]
    asked += [ask("apgd_ce", "apgd_ce", steps=strong_steps)]
    asked += [ask("apgd_t", "apgd_t", steps=strong_steps, num_targets=num_targets)]
    asked += [ask("square", "square", queries=queries, rescale_schedule=True)]
    if norm != "l2":
        asked += [ask(f"pgd{first}_l2", "pgd", norm="l2", eps=l2_eps, steps=first)]
    asked += [ask("evolutionary", "evolutionary", norm="l2", eps=l2_eps, queries=max(queries // 2, 1))]
    return asked
