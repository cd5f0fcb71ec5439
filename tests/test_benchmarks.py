"""The benchmark runs anywhere, without files, and says on what and how it was run."""

from __future__ import annotations

import copy
import importlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ares_lightning.models import make_classifier
from ares_lightning.models.resnet20 import ResNet20

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "attacks.py"


def run_benchmark(output: Path, *arguments: str) -> dict:
    settings = ["--n", "8", "--batch-size", "4", "--repeats", "2", "--threads", "1"]
    command = [sys.executable, str(SCRIPT), *settings, "--output", str(output), *arguments]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert str(output) in printed
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    output = tmp_path_factory.mktemp("benchmark") / "digits.json"
    return run_benchmark(output, "--attacks", "pgd", "--epochs", "1")


def test_the_report_says_on_what_and_how_it_was_run(report):
    assert report["command"].startswith("python benchmarks/attacks.py --n 8")
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert report["hardware"]["device"]
    assert report["hardware"]["threads"] == 1
    assert report["subject"]["images"] == 8
    assert report["subject"]["eps"] == 0.1
    assert report["ares"]["network"] == "3 of 3 batch norms folded"
    assert {"date", "revision", "memory", "repeats"} <= report.keys()


def test_every_contender_has_the_same_columns_and_ours_comes_first(report):
    (contest,) = report["contests"]
    rows = contest["rows"]
    assert [row["package"] for row in rows][:2] == ["ares_lightning"] * 2
    assert rows[0]["times"] == 1
    for row in rows:
        assert row.keys() == rows[0].keys()
        assert len(row["seconds"]) == 2
        assert row["median_seconds"] > 0
        assert len(row["robust_accuracy"]) == len(contest["budgets"]) == 1
        assert 0 <= row["robust_accuracy"][0] <= report["subject"]["clean_accuracy"]
        assert row["largest_distance"] <= 0.1 + 1e-6


def test_passes_are_counted_by_what_reaches_the_network(report):
    rows = {row["package"]: row for row in report["contests"][0]["rows"]}
    ours = rows["ares_lightning"]
    assert 1 <= ours["forwards_per_image"] <= 12
    assert ours["backwards_per_image"] <= 10
    if "foolbox" in rows:
        assert rows["foolbox"]["backwards_per_image"] == 10


def test_loading_is_measured_beside_torchvision(tmp_path):
    script = SCRIPT.with_name("loading.py")
    small = ["--n", "40", "--epochs", "1", "--workers", "1", "--output", str(tmp_path / "loading.json")]
    subprocess.run([sys.executable, str(script), *small], check=True, capture_output=True)
    report = json.loads((tmp_path / "loading.json").read_text())
    assert report["images"] == 40
    assert set(report["times"]) == {"torchvision", "torchvision, tensors"}
    assert all(len(rates) == 1 and rates[0] > 0 for rates in report["images_per_second"].values())


def test_a_training_step_is_measured_beside_the_published_one(tmp_path):
    output = tmp_path / "training.json"
    small = ["--networks", "resnet18", "--img-size", "32", "--batch-size", "2", "--rounds", "2", "--threads", "1"]
    command = [sys.executable, str(SCRIPT.with_name("training.py")), *small, "--output", str(output)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    report = json.loads(output.read_text())
    assert report["hardware"]["threads"] == 1
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]
    (network,) = report["networks"]
    rows = {(row["step"], row["precision"]): row for row in network["rows"]}
    assert list(rows) == [("published", "float32"), ("plain", "float32"), ("ours", "float32"), ("ours", "bf16")]
    for row in rows.values():
        assert len(row["seconds"]) == len(row["times"]) == 2
        assert row["share_of_matrix_rate"] > 0
        assert f"| {row['images_per_second']:.3g} |" in printed
    assert rows["published", "float32"]["times"] == [1, 1]
    assert rows["published", "float32"]["forwards"] == pytest.approx(13, abs=0.1)
    assert rows["plain", "float32"]["forwards"] == pytest.approx(3, abs=0.1)
    for precision in "float32", "bf16":
        assert rows["ours", precision]["forwards"] == pytest.approx(9, abs=0.1)


def test_the_published_step_is_that_of_its_description(monkeypatch):
    """The weights move along the gradient at the iterate of the largest loss, which its waste does not change."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    training = importlib.import_module("training")
    torch.manual_seed(0)
    net = make_classifier("cnn", in_chans=3, num_classes=10, img_size=8, mean=training.MEAN, std=training.STD)
    before = copy.deepcopy(net)
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([1, 2, 3, 4])
    seen = []
    net.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    training.published_step(net, images, labels, torch.optim.SGD(net.parameters(), lr=0.1))
    *normalised, raw, chosen = seen
    assert len(normalised) == training.STEPS
    iterates = [x * net.normalize.std + net.normalize.mean for x in normalised] + [raw]
    for x in iterates:
        assert 0 <= x.min() <= x.max() <= 1
        assert (x - images).abs().max() <= training.EPS + 1e-6
    with torch.no_grad():
        shown = torch.stack([*normalised, raw])
        losses = torch.stack([F.cross_entropy(before.eval().backbone(x), labels, reduction="none") for x in shown])
    best = torch.stack(iterates)[losses.argmax(0), torch.arange(4)]
    torch.testing.assert_close(chosen, before.normalize(best), rtol=1e-4, atol=1e-4)
    F.cross_entropy(before.train()(best), labels).backward()
    for new, old in zip(net.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.1 * old.grad, rtol=1e-3, atol=1e-4)


def test_the_data_page_shows_the_measured_loading():
    report = json.loads((SCRIPT.parent / "results" / "loading-cpu.json").read_text())
    page = " ".join((SCRIPT.parents[1] / "docs" / "data.md").read_text().split())
    for times in report["times"].values():
        assert f"{statistics.median(times):.2f} times ({min(times):.2f} to {max(times):.2f})" in page


def test_the_page_shows_the_results_as_they_are():
    printed = subprocess.run([sys.executable, str(SCRIPT.with_name("table.py"))], capture_output=True, text=True)
    page = (SCRIPT.parents[1] / "docs" / "attacks.md").read_text()
    assert printed.stdout.count("\n") > 5
    assert printed.stdout in page, "put what `python benchmarks/table.py` prints into docs/attacks.md"


def test_a_resnet20_is_read_from_published_weights_and_images_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    subjects = importlib.import_module("subjects")
    weights = {f"module.{key}": value for key, value in ResNet20().state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "weights.th")
    for k in range(8):
        (tmp_path / "images" / f"class{k % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (30 * k, 99, 0)).save(tmp_path / "images" / f"class{k % 2}" / f"{k}.png")
    subject = subjects.make_subject(
        "clean", tmp_path / "weights.th", tmp_path / "images", None, 4, 2, 0, 0, torch.device("cpu")
    )
    assert subject.images.shape == (4, 3, 32, 32)
    assert sorted(subject.labels.tolist()) == [0, 0, 1, 1], "the classes have equal shares"
    assert subject.folding == "19 of 19 batch norms folded"
    torch.testing.assert_close(subject.evaluated(subject.images), subject.network(subject.images))


def test_the_page_of_training_shows_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    tricks = importlib.import_module("tricks")
    report = json.loads((SCRIPT.parent / "results" / "tricks-cpu.json").read_text())
    page = (SCRIPT.parents[1] / "docs" / "training.md").read_text()
    assert tricks.table(report["rows"]) in page
    step = importlib.import_module("training")
    for device in ("cpu", "cuda"):
        measured = json.loads((SCRIPT.parent / "results" / f"training-{device}.json").read_text())
        assert step.table(measured).strip() in page


@pytest.mark.parametrize("kind", ["cifar10", "imagenet"])
def test_the_page_of_ares_bench_shows_what_it_cost(kind, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    bench = importlib.import_module("ares_bench")
    measured = json.loads((SCRIPT.parent / "results" / f"ares-bench-{kind}-cpu.json").read_text())
    page = (SCRIPT.parents[1] / "docs" / "ares-bench.md").read_text()
    assert bench.table(measured) in page
    if kind == "cifar10":
        assert f"{measured['seconds'] / 60:.0f} minutes" in page
    assert len(measured["runs"]) == len(measured["leaderboard"]) == 4
    assert all(row["failed"] == 0 and row["evaluators"] > 20 for row in measured["runs"])
    assert "Transfer" in measured["runs"][-1]["chapters"]


def test_an_empty_chapter_of_a_report_is_seen(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    bench = importlib.import_module("ares_bench")
    chart = '<h2>Curve</h2><script type="application/json" data-chart="c">{"data": {"a": CHOICE}}</script>'
    page = tmp_path / "report.html"
    page.write_text("<h2>Images</h2><table><tr><td>1</td></tr></table>" + chart.replace("CHOICE", '[{"x": [1]}]'))
    assert bench.check_chapters(page, {"Images", "Curve"}) == ["Images", "Curve"]
    page.write_text("<h2>Images</h2><table></table>" + chart.replace("CHOICE", "[]"))
    assert bench.chapters(page) == {"Images": False, "Curve": False}
    with pytest.raises(RuntimeError, match=r"empty chapters \['Images', 'Curve'\], missing \['Transfer'\]"):
        bench.check_chapters(page, {"Transfer"})
