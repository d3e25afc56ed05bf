"""The chart of a benchmark record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chart
from benchmarks.comparison import Comparison, Row

pytest.importorskip("matplotlib", reason="the chart needs matplotlib")


def comparison(title: str, saved: bool) -> dict[str, Any]:
    def row(variant: str, median: float | None, mib: int, is_baseline: bool = True) -> Row:
        kept = mib * 2**20 if saved else None
        return Row(variant, is_baseline, median=median, saved_for_backward=kept)

    result = Comparison(title, "batch 4", 1, 1, 0.01, "compute")
    result.rows = [
        row("reference, eager, bf16 autocast", 0.9, 700),
        row("reference, torch.compile, bf16 autocast", 0.6, 500),
        row("cpp, eager, bf16 autocast", 0.125, 18, is_baseline=False),
        row("reference, eager, bf16", 0.8, 600),
        row("reference, torch.compile, bf16", None, 0),
        row("cpp limited to avx2, eager, bf16", 0.01, 16, is_baseline=False),
    ]
    return result.to_json()


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "record.json"
    content = {
        "date": "2026-11-22T20:00:00+00:00",
        "machine": {"device": "A processor", "threads": 2},
        "comparisons": [
            comparison("pixel decoder, forward, bf16", saved=False),
            comparison("pixel decoder, forward + backward, bf16", saved=True),
            comparison("sampling, deco-digits, bf16", saved=False),
        ],
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_the_fastest_of_each_way_is_drawn(record: Path) -> None:
    bars, where = chart.read_record(record)
    assert [bar.title for bar in bars] == [
        "pixel decoder, forward, bf16",
        "pixel decoder, forward + backward, bf16",
    ]
    assert bars[1].seconds == (0.8, 0.6, 0.125)
    assert bars[1].saved == (600 * 2**20, 500 * 2**20, 18 * 2**20)
    assert bars[0].saved == (None, None, None)
    assert where == "A processor, 2 threads, 2026-11-22"


def test_the_same_record_gives_the_same_small_chart(record: Path, tmp_path: Path) -> None:
    charts = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in charts:
        assert chart.main([str(record), str(path)]) == 0
    first, second = (path.read_text(encoding="utf-8") for path in charts)
    assert first == second
    assert len(first) < 100_000
    for label in ("125 ms", "600 ms", "800 ms", "18 MiB", "500 MiB", "A processor", "fused"):
        assert label in first
    assert "10 ms" not in first  # the lesser processor's
    assert "sampling" not in first


def test_a_png(record: Path, tmp_path: Path) -> None:
    assert chart.main([str(record), str(tmp_path / "chart.png")]) == 0
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("{", "is no record"), ("[]", "is no record")],
)
def test_what_is_no_record(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    if content is not None:
        path.write_text(content)
    assert chart.main([str(path), str(tmp_path / "chart.svg")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "chart.svg").exists()


def test_a_record_without_the_ops(
    record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(record.read_text(encoding="utf-8"))
    content["comparisons"] = content["comparisons"][2:]
    record.write_text(json.dumps(content), encoding="utf-8")
    assert chart.main([str(record), str(tmp_path / "chart.svg")]) == 2
    assert "no comparison of the decoder or the loss" in capsys.readouterr().err
    assert chart.main([str(record), "chart.pdf"]) == 2
    assert ".svg or .png" in capsys.readouterr().err
