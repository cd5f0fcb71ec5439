"""What takes minutes: the claims of the README on the real thing, and the full grid of invariants: `make proof`."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from networks import SmallNet, predicted

from ares_lightning.attacks import list_attacks, make_attack

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.proof

GRID = list(
    itertools.product(
        [row.name for row in list_attacks()],
        ["linf", "l2", "l1"],
        [torch.float32, torch.float64],
        [2, 3, 4, 10, 1000],
        [(6, 5), (5, 9)],
        [0, 1, 17],
        [False, True],
    )
)


@pytest.mark.parametrize(("name", "norm", "dtype", "num_classes", "size", "n", "targeted"), GRID)
def test_every_combination_keeps_the_contract(name, norm, dtype, num_classes, size, n, targeted):
    eps = {"linf": 0.1, "l2": 0.6, "l1": 3.0}[norm]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = SmallNet(num_classes=num_classes).to(device, dtype)
    images = torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(n), dtype=dtype).to(device)
    labels = predicted(net, images) if n else torch.empty(0, dtype=torch.int64, device=device)
    targets = (labels + 1) % num_classes if targeted else None
    outcome = make_attack(name, norm=norm, eps=eps)(net, images, labels, targets=targets)
    assert outcome.images.shape == images.shape
    assert outcome.images.dtype == dtype
    assert outcome.images.device == images.device
    if n:
        slack = 6e-8 if norm == "linf" else eps * (1e-5 if dtype == torch.float32 else 1e-9)
        assert outcome.images.min() >= 0
        assert outcome.images.max() <= 1
        assert outcome.distance.max() <= eps + slack
        prediction = predicted(net, outcome.images)
        assert torch.equal(outcome.broken, prediction == targets if targeted else prediction != labels)
        assert net.training


def accuracies(run_dir: Path) -> dict[str, float]:
    rows = json.loads((run_dir / "summary.json").read_text())
    return {row["evaluator"]: row["value"] for row in rows if row["evaluator"] != "curve"}


def test_make_demo_shows_what_the_readme_says():
    start = time.monotonic()
    subprocess.run(["make", "demo"], cwd=ROOT, check=True, capture_output=True)
    assert time.monotonic() - start < 120
    clean = accuracies(ROOT / "runs/demo/clean-trained")
    robust = accuracies(ROOT / "runs/demo/adversarially-trained")
    assert robust["clean"] >= 0.97
    assert robust["pgd20"] >= 0.85
    assert robust["pgd20"] >= clean["pgd20"] + 0.15
    page = (ROOT / "runs/demo/report.html").read_text()
    assert "clean-trained" in page
    assert "adversarially-trained" in page


def test_vit_b_trains_and_reports_in_five_minutes(tmp_path):
    start = time.monotonic()
    command = [sys.executable, "train.py", "model=vit_b", "adv=pgd", f"run_dir={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert time.monotonic() - start < 300
    assert (tmp_path / "report.html").exists()
