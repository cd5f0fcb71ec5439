"""One process of an evaluation with a short AutoAttack: <weights> <run folder> <batch size> <precision>."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ares_lightning.attacks import Threat, make_attack
from ares_lightning.attacks.attack import Attack
from ares_lightning.attacks.autoattack import AutoAttack
from ares_lightning.data import RobustDataModule, select_subset
from ares_lightning.evaluation.curves import BracketedCurve, ExactCurve
from ares_lightning.evaluation.evaluators import AttackEvaluator, CleanEvaluator
from ares_lightning.evaluation.run import Evaluation
from ares_lightning.evaluation.workers import Workers
from ares_lightning.models import Classifier, make_classifier

EPS = 0.1


class ShortAutoAttack(AutoAttack):
    """The members of AutoAttack with a fraction of their steps, targets and queries."""

    name = "autoattack"

    @property
    def members(self) -> tuple[Attack, ...]:
        ce, t, fab, square = super().members
        return (
            ce.replace(steps=5),
            t.replace(steps=5, num_targets=3),
            fab.replace(steps=3, num_targets=2),
            square.replace(queries=30),
        )


def make_net() -> Classifier:
    return make_classifier("cnn", in_chans=1, num_classes=10, img_size=8, mean=[0.3], std=[0.38], width=8)


def make_data() -> RobustDataModule:
    sizes = {"batch_size": 64, "eval_batch_size": 16, "num_workers": 0, "num_val": 180}
    return RobustDataModule(name="digits", img_size=8, in_chans=1, **sizes)


def make_evaluation(data: RobustDataModule, batch_size: int, precision: str) -> Evaluation:
    attack, pgd = ShortAutoAttack(eps=EPS), make_attack("pgd", eps=EPS, steps=4)
    return Evaluation(
        evaluators=[
            CleanEvaluator("clean"),
            AttackEvaluator("autoattack", attack),
            AttackEvaluator("aimed", pgd, "random"),
            ExactCurve("curve", attack, (0.02, 0.05, 0.1)),
            BracketedCurve("bracketed", pgd, (0.02, 0.05, 0.1)),
        ],
        threat=Threat("linf", EPS),
        dataset=select_subset(data.test_set, "first:60"),
        loader=data.evaluation_loader,
        batch_size=batch_size,
        precision=precision,
    )


def main(weights: Path | str, run_dir: Path | str, batch_size: int | str, precision: str) -> None:
    torch.set_num_threads(1)
    if torch.distributed.is_torchelastic_launched():
        torch.distributed.init_process_group("gloo")
    net = make_net()
    net.load_state_dict(torch.load(weights))
    evaluation = make_evaluation(make_data(), int(batch_size), precision)
    evaluation.run(net, Path(run_dir), torch.device("cpu"), Workers.current())


if __name__ == "__main__":
    main(*sys.argv[1:])
