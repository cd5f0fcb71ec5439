"""A few adversarial examples for the report, the same however the verdicts came about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ares_lightning.atomic import replacing
from ares_lightning.attacks import Threat
from ares_lightning.evaluation.asking import Asking, Question

NUM_EXAMPLES = 8


def write_examples(
    path: Path, asking: Asking, answered: Sequence[tuple[Question, pa.Table]], threat: Threat
) -> None:
    """Write the first images of each class, then others, that the first attack at the threat model has broken.

    They are made again, from seed and sample id, so that they do not depend on which process or which run met them
    first. Writes nothing where no attack at the threat model has broken any.
    """
    for question, rows in answered:
        at_threat = _at(rows, threat)
        if not len(at_threat):
            continue
        examples = []
        for stage in question.evaluator.stages:
            own = at_threat
            if stage.key is not None:
                attack, eps = stage.key
                own = own.filter((own["attack"].to_numpy() == attack) & (own["eps"].to_numpy() == eps))
            ids = sorted(set(_chosen(at_threat)) & set(own["sample_id"].to_pylist()))
            for (clean, labels, sample_ids), answers in asking.again(question, stage, ids) if ids else ():
                answer = next(each for each in answers if Threat(str(each.norm), each.eps) == threat)
                examples += [
                    {
                        "clean": clean[i].float().cpu().numpy(),
                        "adversarial": answer.outcome.images[i].float().cpu().numpy(),
                        "label": int(labels[i]),
                        "clean_prediction": int(answer.outcome.clean_prediction[i]),
                        "adversarial_prediction": int(answer.outcome.adversarial_prediction[i]),
                        "sample_name": question.dataset.sample_name(int(sample_ids[i])),
                    }
                    for i in answer.outcome.broken.nonzero().squeeze(1).tolist()
                ]
        if not examples:
            continue
        examples.sort(key=lambda example: (example["label"], example["sample_name"]))
        name = getattr(question.evaluator, "attack", question.evaluator).name
        columns: dict[str, Any] = {
            key: np.stack([np.asarray(example[key]) for example in examples]) for key in examples[0]
        }
        about: dict[str, Any] = {"attack": name, "norm": threat.norm, "eps": threat.eps}
        with replacing(path) as file:
            np.savez(file, **columns, **about, classes=np.asarray(question.dataset.classes))
        return


def _at(rows: pa.Table, threat: Threat) -> pa.Table:
    """Return the rows of images that an attack, not mere noise, has broken at a threat model."""
    columns = {name: rows[name].to_numpy() for name in ("norm", "eps", "broken", "distance", "attack", "forwards")}
    is_new = (columns["forwards"] > 0) & (columns["attack"] != "noise")
    at_threat = (columns["norm"] == threat.norm) & (columns["eps"] == threat.eps)
    return rows.filter(at_threat & columns["broken"] & (columns["distance"] > 0) & is_new)


def _chosen(rows: pa.Table) -> list[int]:
    """Return ids of NUM_EXAMPLES samples: the first of each class, then others, in the order of their ids."""
    ids, labels = (rows[name].to_numpy() for name in ("sample_id", "label"))
    order = np.argsort(ids, kind="stable")
    firsts = {int(labels[i]): int(ids[i]) for i in order[::-1]}
    others = [int(ids[i]) for i in order if int(ids[i]) not in firsts.values()]
    return [*sorted(firsts.values()), *others][:NUM_EXAMPLES]
