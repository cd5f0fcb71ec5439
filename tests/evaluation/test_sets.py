"""Evaluations on other sets than the data's own: corrupted ones, and published ones in miniature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from photos import photo
from PIL import Image
from torch import Tensor, nn

from ares_lightning.attacks import Threat, make_attack
from ares_lightning.data import VARIANTS, RobustDataModule
from ares_lightning.data.alexnet import CLEAN_ERROR, ON_IMAGENET_3DCC, ON_IMAGENET_C
from ares_lightning.data.corruptions import COMMON, SEVERITIES
from ares_lightning.evaluation.corruption_error import (
    REFERENCES,
    corruption_errors,
    corruption_rows,
    mean_corruption_error,
    relative_mean_corruption_error,
)
from ares_lightning.evaluation.evaluators import AttackEvaluator, CleanEvaluator, SetsEvaluator
from ares_lightning.evaluation.report import write_report
from ares_lightning.evaluation.run import Evaluation
from ares_lightning.evaluation.sets import corrupted_sets, published_sets
from ares_lightning.models import ClassAnswers

CPU = torch.device("cpu")
WNIDS = {"n01440764": 0, "n01443537": 1, "n02123045": 281, "n01496331": 5}
"""Tench, goldfish, tabby, electric ray. Of these, goldfish and tabby are among ImageNet-R's 200 classes."""


class Marked(nn.Module):
    """A classifier of 1000 classes that answers with 4 times the red and once the green level of the first pixels.

    Of the other classes the one with the smallest number comes next.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        red, green = ((images[:, c, :8, :8].mean((1, 2)) * 255).round().long() for c in (0, 1))
        logits = torch.zeros(len(images), 1000)
        logits[range(len(images)), (red * 4 + green).clamp(0, 999)] = 2.0
        return (logits - 0.001 * torch.arange(1000)) * self.scale + 0 * images.mean()


def mark(path: Path, answer: int) -> None:
    """Write an image that `Marked` takes for class `answer`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.array(photo(answer, 224, 224))
    pixels[:100, :100] = (answer // 4, answer % 4, 0)
    Image.fromarray(pixels).resize((256, 256), Image.Resampling.NEAREST).save(path)


@pytest.fixture
def imagenet(tmp_path) -> Path:
    root = tmp_path / "imagenet"
    for number, (wnid, label) in enumerate(WNIDS.items()):
        mark(root / "val" / wnid / f"ILSVRC2012_val_{number + 2:08d}.png", label)
    return root


def data_of(root: Path, **changes: Any) -> RobustDataModule:
    return RobustDataModule(
        **{
            "name": "imagenet",
            "root": root,
            "img_size": 224,
            "in_chans": 3,
            "batch_size": 4,
            "eval_batch_size": 4,
            "num_workers": 0,
            "num_val": 0,
            "training": False,
        }
        | changes
    )


def evaluate(data: RobustDataModule, evaluators: list[Any], run_dir: Path) -> list[dict[str, Any]]:
    evaluation = Evaluation(
        evaluators=evaluators,
        threat=Threat("linf", 4 / 255),
        dataset=data.test_set,
        loader=data.evaluation_loader,
        batch_size=4,
    )
    return evaluation.run(Marked(), run_dir, CPU, skipped=data.skipped).summary


def published(data: RobustDataModule, root: Path | None, **changes: Any) -> SetsEvaluator:
    usual = {"sets": None, "subset": None, "severities": SEVERITIES, "paths": {}}
    return SetsEvaluator(
        "ood", *published_sets(data, data.test_set, None if root is None else str(root), **usual | changes)
    )


def of(summary: list[dict[str, Any]], name: str, metric: str = "clean_accuracy") -> dict[str, Any]:
    (row,) = [row for row in summary if row["set"] == name and row["metric"] == metric]
    return row


def test_the_sets_that_are_there_are_asked_about_each_by_its_own_rule(imagenet, tmp_path):
    ood = tmp_path / "ood"
    # R: the answer tench (0) is none of its classes; of these the smallest label comes next, goldfish.
    mark(ood / "imagenet-r" / "n01443537" / "a.png", 0)
    mark(ood / "imagenet-r" / "n02123045" / "b.png", 0)
    # V2: folder 10 is class 10.
    mark(ood / "imagenetv2-matched-frequency-format-val" / "10" / "a.png", 10)
    mark(ood / "imagenetv2-matched-frequency-format-val" / "9" / "a.png", 10)
    mark(ood / "imagenetv2-matched-frequency-format-val" / "1" / "a.png", 1)
    for severity in SEVERITIES:
        for number, (wnid, label) in enumerate(WNIDS.items()):
            name = f"ILSVRC2012_val_{number + 2:08d}.png"
            mark(ood / "imagenet-c" / "fog" / str(severity) / wnid / name, label if number >= severity else 7)
    data = data_of(imagenet)
    summary = evaluate(data, [CleanEvaluator("clean"), published(data, ood)], tmp_path / "run")
    assert of([row for row in summary if row["evaluator"] == "clean"], "imagenet")["value"] == 1
    assert of(summary, "imagenet_r")["value"] == 0.5
    assert of(summary, "imagenet_v2")["value"] == pytest.approx(2 / 3)
    assert of(summary, "imagenet_200_r")["n"] == 2
    assert [of(summary, f"imagenet_c/fog/{s}")["value"] for s in SEVERITIES] == [0.75, 0.5, 0.25, 0, 0]
    assert of(summary, "imagenet_c", "mean_accuracy")["value"] == pytest.approx(0.3)
    assert not [row for row in summary if row["metric"] == "mce"], "fog alone is no mean corruption error"
    about = json.loads((tmp_path / "run" / "about.json").read_text())
    assert {"imagenet_a", "objectnet", "imagenet_hard"} <= set(about["not_found"])
    assert about["sets"][0] == {
        "set": "imagenet", "n": 4, "names_hash": about["sets"][0]["names_hash"],
        "preparation": "resize 256 (bicubic), crop 224",
    }  # fmt: skip
    rows = pd.read_parquet(tmp_path / "run" / "verdicts")
    assert set(rows["set"]) >= {"imagenet", "imagenet_r", "imagenet_c/fog/5"}
    (tmp_path / "run" / "config.yaml").write_text("data: {name: imagenet}")
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    for words in (
        "resize 256 (bicubic), crop 224",
        "Corruptions of imagenet_c",
        "nothing given or found for: imagenet_v2_t",
    ):
        assert words in page


def test_real_counts_every_right_label(imagenet, tmp_path):
    """File 2 has the ReaL labels 970 and 795, file 3 has 230 and 231, file 4 809, file 5 516 and 850."""
    for number, (wnid, answer) in enumerate(zip(WNIDS, (795, 970, 809, 850), strict=True)):
        mark(imagenet / "val" / wnid / f"ILSVRC2012_val_{number + 2:08d}.png", answer)
    data = data_of(imagenet, name="imagenet_real")
    summary = evaluate(data, [CleanEvaluator("clean")], tmp_path / "run")
    assert of(summary, "imagenet_real")["value"] == 0.75
    with pytest.raises(ValueError, match=r"^eval\.pgd: the images of imagenet_real have several right classes"):
        evaluate(data, [AttackEvaluator("pgd", make_attack("pgd", eps=0.1))], tmp_path / "attacked")


def test_an_attack_on_a_part_of_the_classes_stays_among_them(imagenet, tmp_path):
    data = data_of(imagenet, name="imagenet_200_r")
    evaluate(data, [AttackEvaluator("noise", make_attack("noise", eps=0.9))], tmp_path / "run")
    rows = pd.read_parquet(tmp_path / "run" / "verdicts")
    assert rows["clean_prediction"].max() < 200
    assert (rows["clean_prediction"] == rows["label"]).all()


def test_a_set_is_asked_about_once_and_each_time_it_has_changed(imagenet, tmp_path):
    folder = tmp_path / "ood" / "imagenet-r"
    mark(folder / "n02123045" / "a.png", 281)
    data = data_of(folder, name="imagenet_r")
    evaluators = lambda: [CleanEvaluator("clean"), published(data, tmp_path / "ood")]  # noqa: E731
    first = evaluate(data, evaluators(), tmp_path / "run")
    assert [(row["set"], row["n"]) for row in first] == [("imagenet_r", 1)] * 2, "the data's own set comes once"
    mark(folder / "n01443537" / "a.png", 0)  # comes before the other; its old verdict has another image now
    mark(folder / "n02123045" / "a.png", 0)
    data = data_of(folder, name="imagenet_r")
    again = evaluate(data, evaluators(), tmp_path / "run")
    assert [(row["n"], row["value"]) for row in again] == [(2, 0.5)] * 2
    mark(folder / "n01443537" / "a.png", 5)  # the same names, other pixels
    data = data_of(folder, name="imagenet_r")
    assert evaluate(data, [CleanEvaluator("clean")], tmp_path / "run")[0]["value"] == 0.5
    twice = {"sets": ["imagenet_r", "imagenet_r"], "severities": [3, 3]}
    data = data_of(imagenet)
    assert len(published(data, tmp_path / "ood", **twice).sets) == 2


def test_one_cell_of_corruptions_is_a_result_of_its_own(imagenet, tmp_path):
    for wnid, label in WNIDS.items():
        mark(tmp_path / "imagenet-c" / "fog" / "3" / wnid / "a.png", label)
    data = data_of(tmp_path, name="imagenet_c", corruption="fog", severity=3)
    evaluate(
        data, [CleanEvaluator("clean"), AttackEvaluator("noise", make_attack("noise", eps=0.1))], tmp_path / "run"
    )
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert "imagenet_c/fog/3</td>" in page
    assert "Corruptions of" not in page


def test_one_path_each_and_some_keys_alone(imagenet, tmp_path):
    mark(tmp_path / "elsewhere" / "n01443537" / "a.png", 1)
    data = data_of(imagenet)
    paths = {"imagenet_r": str(tmp_path / "elsewhere")}
    evaluator = published(data, None, sets=["imagenet_r"], paths=paths)
    assert [each.name for each in evaluator.sets] == ["imagenet", "imagenet_r"]
    assert evaluator.not_found == ()
    with pytest.raises(ValueError, match=r"^paths\.imagenet_a=.*: ImageNet-A is not there; it needs <wnid>/\*"):
        published(data, None, paths={"imagenet_a": str(tmp_path)})
    with pytest.raises(ValueError, match=r"^sets=imagenet_z: is no set for imagenet; expected some of imagenet_v2"):
        published(data, None, sets=["imagenet_z"])
    with pytest.raises(ValueError, match=r"^sets=imagenet_a: is not below root=None under its published name"):
        published(data, None, sets=["imagenet_a"])
    with pytest.raises(
        ValueError, match=r"^paths\.imagenet_r=.*: is not among sets=\['imagenet_a'\]; add it there"
    ):
        published(data, None, sets=["imagenet_a"], paths=paths)
    with pytest.raises(ValueError, match=r"^root=/gone: is no folder"):
        published(data, Path("/gone"))
    for severities in (3, [], [0], ["fog"]):
        with pytest.raises(ValueError, match=r"^severities=.*: expected a list of some of 1 to 5"):
            published(data, tmp_path, severities=severities)
    with pytest.raises(ValueError, match=r"^sets=imagenet_a: expected null, or a list"):
        published(data, None, sets="imagenet_a")


def test_a_network_of_other_classes_is_refused():
    with pytest.raises(ValueError, match=r"the network has 10 outputs where the set is about 1000 classes"):
        ClassAnswers(nn.Flatten(), torch.arange(1000))(torch.rand(2, 10))


def test_gradients_reach_the_output_that_counts():
    logits = torch.tensor([[1.0, 5.0, 3.0, 2.0]], requires_grad=True)
    answers = ClassAnswers(nn.Identity(), torch.tensor([0, -1, 1, 1]))(logits)
    assert answers.tolist() == [[1.0, 3.0]]
    assert torch.autograd.grad(answers[0, 1], logits)[0].tolist() == [[0, 0, 1, 0]]


def test_corruptions_made_on_the_fly_do_not_depend_on_batch_size(tmp_path):
    data = RobustDataModule(
        name="digits",
        img_size=8,
        in_chans=1,
        batch_size=8,
        eval_batch_size=8,
        num_workers=0,
        num_val=0,
        training=False,
    )
    found = corrupted_sets(data, data.test_set.take(range(30)), None, [1, 5])
    assert [each.name for each in found.sets][:3] == [
        "digits",
        "digits/gaussian_noise/1",
        "digits/gaussian_noise/5",
    ]
    assert len(found.sets) == 1 + 2 * 6
    one, seven = (
        torch.cat([images for images, _, _ in data.evaluation_loader(found.sets[1], batch_size=size)])
        for size in (1, 7)
    )
    assert one.equal(seven)
    assert len(corrupted_sets(data, data.test_set, "all", SEVERITIES).sets) == 1 + 19 * 5
    with pytest.raises(ValueError, match=r"^names=fog: expected null, all, or a list"):
        corrupted_sets(data, data.test_set, "fog", [1])
    with pytest.raises(ValueError, match=r"^names=rain: expected some of gaussian_noise"):
        corrupted_sets(data, data.test_set, ["rain"], [1])
    with pytest.raises(ValueError, match=r"^severities=\[7\]"):
        corrupted_sets(data, data.test_set, ["fog"], [7])
    assert len(corrupted_sets(data, data.test_set, ["fog", "fog"], [1, 1]).sets) == 2


# --- mean corruption errors --------------------------------------------------------------------------------------


def test_the_table_of_sets_says_which_have_a_mean_corruption_error():
    assert {key for key, variant in VARIANTS.items() if variant.metric == "mce"} == set(REFERENCES)
    assert set(REFERENCES["imagenet_3dcc"]) == set(VARIANTS["imagenet_3dcc"].corruptions)


def test_alexnet_has_exactly_a_hundred():
    assert mean_corruption_error(ON_IMAGENET_C) == 100
    assert relative_mean_corruption_error(ON_IMAGENET_C, CLEAN_ERROR) == 100
    assert mean_corruption_error(ON_IMAGENET_3DCC, ON_IMAGENET_3DCC) == 100


RESNET50 = (80, 82, 83, 75, 89, 78, 80, 78, 75, 66, 57, 71, 85, 77, 77)
"""Its corruption errors in the order of COMMON, rounded (README of hendrycks/robustness); the mCE there is 76.7."""


def test_the_published_errors_of_resnet50_give_its_published_mce():
    errors = {name: ce / 100 * ON_IMAGENET_C[name] for name, ce in zip(COMMON, RESNET50, strict=True)}
    assert mean_corruption_error(errors) == pytest.approx(76.7, abs=0.3)
    assert corruption_errors(errors) == pytest.approx(dict(zip(COMMON, RESNET50, strict=True)))
    with pytest.raises(ValueError, match=r"1 of 15 corruptions are missing: fog"):
        mean_corruption_error({name: error for name, error in errors.items() if name != "fog"})


def table(errors: dict[str, float], clean_error: float, n: int = 1000) -> pd.DataFrame:
    """Verdicts with these shares of errors, on ImageNet-C and on the clean images."""
    cells = {("imagenet", "", ""): clean_error}
    cells |= {("imagenet_c", name, str(s)): error for name, error in errors.items() for s in SEVERITIES}
    parts = [
        pd.DataFrame(
            {
                "set": "/".join(part for part in cell if part),
                "sample_id": range(n),
                "broken": np.arange(n) < round(error * n),
                "seed": 0,
                "precision": "fp32",
            }
        )
        for cell, error in cells.items()
    ]
    return pd.concat(parts, ignore_index=True)


def test_the_summary_has_mce_and_relative_mce_with_intervals():
    errors = {name: round(0.7 * error, 3) for name, error in ON_IMAGENET_C.items()}
    rows = {row["metric"]: row for row in corruption_rows("ood", table(errors, 0.25), None)}
    common = {name: errors[name] for name in COMMON}
    assert rows["mce"]["value"] * 100 == pytest.approx(mean_corruption_error(common))
    assert rows["relative_mce"]["value"] * 100 == pytest.approx(relative_mean_corruption_error(common, 0.25))
    assert rows["mean_accuracy"]["value"] == pytest.approx(1 - sum(common.values()) / 15), (
        "without the four extra ones"
    )
    for row in rows.values():
        assert row["low"] < row["value"] < row["high"]
        assert (row["n"], row["set"]) == (1000, "imagenet_c")
    always = {row["metric"]: row for row in corruption_rows("ood", table(dict.fromkeys(COMMON, 1.0), 1.0), None)}
    assert always["mean_accuracy"]["value"] == 0
    assert always["mean_accuracy"]["high"] > 0
    assert always["mce"]["high"] == pytest.approx(always["mce"]["value"])


def test_one_severity_less_is_no_mce():
    verdicts = table({name: 0.5 for name in COMMON}, 0.2)
    rows = corruption_rows("ood", verdicts[verdicts["set"] != "imagenet_c/fog/5"], None)
    assert {row["metric"] for row in rows} == {"mean_accuracy"}
