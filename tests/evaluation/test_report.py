"""The report: its numbers are those of the run folders, it stands alone, and mistakes are told in one line."""

from __future__ import annotations

import io
import json
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ares_lightning.atomic import WriteError
from ares_lightning.evaluation.metrics import wilson_interval
from ares_lightning.evaluation.report import find_runs, write_figure, write_report
from ares_lightning.evaluation.report.__main__ import main
from ares_lightning.evaluation.report.rows import eps_text


def row(evaluator: str, right: int, eps: float | None, norm: str | None = "linf", **other: Any) -> dict[str, Any]:
    n = 200
    low, high = wilson_interval(right, n)
    metric = "clean_accuracy" if evaluator == "clean" else "robust_accuracy"
    known = {"set": "digits", "subset": None, "attack": "pgd", "seed": 0, "precision": "float32"}
    numbers = {"value": right / n, "n": n, "low": low, "high": high, "norm": norm, "eps": eps}
    return {"evaluator": evaluator, "metric": metric, **numbers, **known, **other}


FULL = [
    row("clean", 193, 0.0, None, attack="none"),
    row("pgd20", 131, 0.1),
    *(row("curve", right, eps) for eps, right in ((0.0, 193), (0.05, 160), (0.1, 127), (0.2, 41))),
    row("worst_case", 123, 0.1, attack=None),
]


def make_run(folder: Path, rows: object = FULL, name: str = "mine", bare: bool = False, eps: str = "0.1") -> Path:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(rows))
    if bare:
        return folder
    config = {
        "name": name,
        "model": {"name": "cnn"},
        "adv": {"name": "trades"},
        "threat": {"norm": "linf", "eps": eps},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "metrics.csv").write_text(
        "epoch,step,train/loss,val/clean_acc,val/robust_acc\n0,9,2.1,,\n0,9,,0.71,0.40\n1,19,,0.8125,0.5\n"
    )
    clean = np.full((2, 1, 8, 8), 0.5, np.float32)
    np.savez(
        folder / "examples.npz",
        clean=clean,
        adversarial=clean + np.float32(0.1),
        label=np.array([3, 0]),
        clean_prediction=np.array([3, 0]),
        adversarial_prediction=np.array([1, 0]),
        sample_name=np.array(["a<b>.png", "b.png"]),
        classes=np.array(["zero", "one", "two", "<three>"]),
        attack="pgd",
        norm="linf",
        eps=0.1,
    )
    return folder


def page_of(*runs: Path) -> str:
    """Return the report without the script of plotly itself, whose text is not ours."""
    page = write_report(runs, runs[0] / "page.html").read_text(encoding="utf-8")
    scripts = sorted(re.findall(r"<script>.*?</script>", page, flags=re.DOTALL), key=len)
    return page.replace(scripts[-1], "") if scripts and len(scripts[-1]) > 1_000_000 else page


def rows_of(page: str, table: str) -> list[list[str]]:
    body = re.search(rf'<table class="{table}".*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    assert body
    cells = [re.findall(r"<td.*?>(.*?)</td>", line, re.DOTALL) for line in body[1].split("</tr>")[:-1]]
    return [[" ".join(re.sub(r"<.*?>", " ", cell).split()) for cell in line] for line in cells]


def test_the_table_holds_every_row_of_the_summary(tmp_path: Path) -> None:
    table = rows_of(page_of(make_run(tmp_path / "run")), "all")
    assert len(table) == len(FULL)
    for cells, source in zip(table, FULL, strict=True):
        low, high = (float(bound) for bound in cells[6].split("–"))  # noqa: RUF001
        assert cells[0] == source["evaluator"]
        assert [float(cells[5]), low, high] == pytest.approx(
            [100 * source[k] for k in ("value", "low", "high")], abs=5e-3
        )
        assert int(cells[7]) == source["n"]


def test_the_headline_is_the_worst_case(tmp_path: Path) -> None:
    (cells,) = rows_of(page_of(make_run(tmp_path / "run")), "headline")
    assert cells[0] == "mine"
    assert cells[1].startswith("61.5 %")
    assert cells[1].endswith("n 200 worst case of all attacks")
    assert cells[2].startswith("96.5 %")
    assert cells[3:] == ["L-inf, eps 0.1", "cnn", "trades", "–"]  # noqa: RUF001


def test_without_a_worst_case_the_headline_is_the_strongest_attack_at_the_threat_model(tmp_path: Path) -> None:
    rows = [
        row("pgd20", 131, 8 / 255),
        row("fgsm", 140, 8 / 255),
        row("pgd20", 9, 16 / 255),
        row("cw", 5, 0.5, "l2"),
    ]
    (cells,) = rows_of(page_of(make_run(tmp_path / "run", rows, eps="8/255")), "headline")
    assert cells[1].startswith("65.5 %")
    assert cells[1].endswith("by pgd20")
    assert cells[3] == "L-inf, eps 8/255"


def test_the_curve_in_the_page_has_the_values_of_the_summary(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run"))
    drawn = re.findall(r'data-chart="([\w-]+)">(.*?)</script>', page)
    traces = {name: json.loads(figure)["data"] for name, figure in drawn}
    band, curve = traces["curve-linf"]
    assert (curve["x"], curve["y"]) == ([0.0, 0.05, 0.1, 0.2], [96.5, 80.0, 63.5, 20.5])
    assert band["y"] == [
        100 * FULL[at][k] for k, order in (("high", (2, 3, 4, 5)), ("low", (5, 4, 3, 2))) for at in order
    ]
    assert [trace["y"] for trace in traces["training"]] == [[71.0, 81.25], [40.0, 50.0]]


def test_the_page_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run"))
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(""", page)
    assert "default-src 'none'" in page


def test_what_comes_from_files_is_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    rows = [{**line, "set": hostile, "norm": line["norm"] and hostile} for line in FULL]
    page = page_of(make_run(tmp_path / "run", rows, name=hostile))
    assert hostile not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "&lt;three&gt;" in page
    assert "a&lt;b&gt;.png" in page


def test_runs_of_one_name_stay_apart_and_the_most_robust_comes_first(tmp_path: Path) -> None:
    weak = make_run(tmp_path / "m" / "r1", [*FULL[:-1], row("worst_case", 50, 0.1)])
    page = page_of(weak, make_run(tmp_path / "m" / "r2"), make_run(tmp_path / "other", name="other"))
    assert [cells[0] for cells in rows_of(page, "headline")] == ["mine (r2)", "other", "mine (r1)"]
    assert page.count('id="curve-linf"') == 1
    twins = page_of(make_run(tmp_path / "p" / "x", FULL, "twin"), make_run(tmp_path / "q" / "x", FULL, "twin"))
    assert {cells[0] for cells in rows_of(twins, "headline")} == {"twin (p/x)", "twin (q/x)"}


def test_norms_have_curves_of_their_own(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", [*FULL, row("curve", 150, 0.5, "l2"), row("curve", 90, 1.0, "l2")]))
    assert 'id="curve-linf"' in page
    assert 'id="curve-l2"' in page


def test_a_missing_part_leaves_no_trace(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", FULL[:2], bare=True))
    assert re.findall("<h2>(.*?)</h2>", page) == ["All results"]
    assert len(page) < 20_000  # and no plotly either
    (cells,) = rows_of(page, "headline")
    assert cells[0] == "run"
    assert cells[1] == "–"  # noqa: RUF001


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    pages = [write_report([run], tmp_path / name).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]
    assert str(tmp_path).encode() not in pages[0]


def test_a_full_disk_leaves_the_old_page_in_place(tmp_path: Path) -> None:
    run, output = make_run(tmp_path / "run"), tmp_path / "report.html"
    output.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
    try:
        with pytest.raises(WriteError, match=r"report\.html: cannot be written: File too large"):
            write_report([run], output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]


def test_the_figure_is_a_png_of_sensible_size(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", name="$b_{")]
    content = write_figure(runs, tmp_path / "new" / "curves.png").read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        assert image.size == (960, 660)
    assert len(content) > 10_000


def test_the_command_line_finds_runs_and_prints_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / "runs" / "m" / name) for name in ("b", "a")]
    assert find_runs([tmp_path, runs[0]]) == sorted(runs)
    assert main([str(tmp_path), "--figure", str(tmp_path / "c.png")]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "runs" / "m" / "report.html"),
        str(tmp_path / "c.png"),
    ]
    assert main([str(runs[0])]) == 0
    assert capsys.readouterr().out.strip() == str(runs[0] / "report.html")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("summary.json", b"[{", "summary.json: is not a summary"),
        ("summary.json", b'[{"evaluator": "clean"}]', "summary.json: is not a summary"),
        ("summary.json", b'{"clean": 1}', "summary.json: is not a summary"),
        ("summary.json", json.dumps([{**FULL[0], "value": None}]).encode(), "None is not a number"),
        ("summary.json", json.dumps([{**FULL[0], "value": float("nan")}]).encode(), "nan is not a number"),
        ("config.yaml", b"a: [", "config.yaml: is not readable YAML"),
        ("config.yaml", b"threat: {norm: linf, eps: large}", "config.yaml: threat.eps=large"),
        ("metrics.csv", b"epoch,val/clean_acc\n0,high\n", "metrics.csv: is not a readable table"),
        ("examples.npz", b"PK", "examples.npz: is not a readable file of examples"),
        ("about.json", b'{"sets": [{}]}', "about.json: is not what an evaluation writes"),
        ("about.json", b'{"run": {"versions": 3}}', "about.json: is not what an evaluation writes"),
        ("about.json", b'{"evaluators": [{"set": "x"}]}', "about.json: is not what an evaluation writes"),
        ("sanity.json", b'{"checks": [{"check": "a", "title": "b", "verdict": "good"}]}', "verdict=good"),
        ("sanity.json", b"[]", "sanity.json: is not what an evaluation writes"),
        ("verdicts/part-00000.parquet", b"PAR1", "part-00000.parquet: is not a readable verdict table"),
    ],
)
def test_a_broken_file_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes, said: str
) -> None:
    broken = make_run(tmp_path / "run") / file
    broken.parent.mkdir(exist_ok=True)
    broken.write_bytes(content)
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "report.html").exists()


def test_nothing_found_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path}: no run here or below (looked for summary.json)\n"
    assert main([str(tmp_path / "gone")]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'gone'}: does not exist\n"
    make_run(tmp_path / "run", FULL[:2])
    assert main([str(tmp_path), "--figure", str(tmp_path / "c.png")]) == 2
    assert "no run has a robustness curve" in capsys.readouterr().err


def test_budgets_are_written_as_the_field_writes_them() -> None:
    texts = [eps_text("linf", eps) for eps in (8 / 255, 0.0157, 0.1, 0.2, 0.0, 0.5 / 255)]
    assert texts == ["8/255", "0.0157", "0.1", "0.2", "0", "0.001961"]
    assert eps_text("l2", 128 / 255) == "0.502"
