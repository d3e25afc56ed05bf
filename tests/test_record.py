"""`python -m benchmarks.record`: pieces that save as they go."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import profile_step, readme, record
from benchmarks.record import FIGURES, Piece, describe, gather, main, passed, pieces, run_piece

FIGURE = {
    "date": "2026-11-22T10:00:00+00:00",
    "commit": "abc",
    "machine": {
        "device": "a GPU",
        "threads": 2,
        "cpu_capability": "AVX2",
        "memory_bytes": 2**34,
        "system": "Linux",
        "versions": {"torch": "2.13.0"},
        "gemm_flops_per_second": {"bfloat16": 7e14},
        "copy_bytes_per_second": 4e12,
    },
    "comparisons": [
        {
            "title": "a task, bf16",
            "conditions": "batch 32",
            "flops": 10**12,
            "bytes": 10**9,
            "floor": 0.001,
            "bound": "compute",
            "rows": [{"variant": "triton, eager, bf16", "is_baseline": False, "median": 0.002}],
        }
    ],
}


def script(name: str, code: str) -> Piece:
    return Piece(name, (sys.executable, "-c", code), seconds=1)


def test_a_piece_leaves_its_output_and_its_status(tmp_path: Path) -> None:
    good, bad = script("good", "print('hello')"), script("bad", "raise SystemExit(3)")
    assert run_piece(good, tmp_path, 60) == 0
    assert run_piece(bad, tmp_path, 60) == 3
    assert "hello" in (tmp_path / "good" / "log.txt").read_text()
    assert passed(good, tmp_path)
    assert not passed(bad, tmp_path)
    assert not passed(script("never", ""), tmp_path)


def test_a_piece_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    endless = script("endless", "import time\nwhile True: time.sleep(1)")
    assert run_piece(endless, tmp_path, 0.5) == 124
    assert not passed(endless, tmp_path)


def test_a_piece_that_takes_too_long_may_save_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "saved"
    code = f"""
import time
print("ready", flush=True)
try:
    while True: time.sleep(0.1)
except KeyboardInterrupt:
    open({str(saved)!r}, "w").close()
{{}}
"""
    assert run_piece(script("saves", code.format("")), tmp_path, 3) == 124
    assert "ready" in (tmp_path / "saves" / "log.txt").read_text()
    assert saved.exists()
    # One that does not end then either is killed.
    monkeypatch.setattr(record, "SECONDS_TO_SAVE", 0.2)
    assert run_piece(script("stays", code.format("while True: time.sleep(1)")), tmp_path, 3) == 124


def test_what_a_piece_has_started_ends_with_it(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="Windows has no such locks")
    held, ready = tmp_path / "held", tmp_path / "ready"
    child = f"""
import fcntl, time
file = open({str(held)!r}, "w")
fcntl.flock(file, fcntl.LOCK_EX)
open({str(ready)!r}, "w").close()
time.sleep(600)
"""
    starts = f"""
import os, subprocess, sys
process = subprocess.Popen([sys.executable, "-c", {child!r}])
while not os.path.exists({str(ready)!r}): pass
"""
    assert run_piece(script("starts", starts), tmp_path, 60) == 0
    with held.open("r+") as file:
        deadline = time.monotonic() + 60
        while True:  # a process that was killed gives its lock back a moment later
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline
                time.sleep(0.1)


def test_a_folder_is_of_one_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "pieces", lambda *_: [script("good", "")])
    for commit, status in (("abc", 0), ("abc", 0), ("def", 2)):
        monkeypatch.setattr(record, "commit", lambda commit=commit: commit)
        assert main([str(tmp_path), "--device", "cpu"]) == status
    error = capsys.readouterr().err
    assert "is the record of commit abc on CPU, and this is commit def on CPU: choose" in error


def test_typed_again_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    figures = json.dumps(FIGURE)
    out = tmp_path / "out"
    write = f"open({str(out / 'first' / FIGURES)!r}, 'w').write({figures!r})"
    fails_once = f"import os; p = {str(marker)!r}\nif not os.path.exists(p): open(p, 'w'); 1 / 0"
    two = [script("first", write), script("second", fails_once)]
    monkeypatch.setattr(record, "pieces", lambda *_: two)
    arguments = [str(out), "--device", "cpu"]
    assert main(arguments) == 1
    assert "second                   failed with 1" in capsys.readouterr().out
    saved = json.loads((out / "record.json").read_text())
    assert saved["pieces"]["second"]["status"] == 1
    assert main(arguments) == 0
    assert "first                    passed before" in capsys.readouterr().out
    text = (out / "record.md").read_text()
    for part in ("a task, bf16", "triton, eager, bf16", "bfloat16 product 700,000", "commit: abc"):
        assert part in text


def test_nothing_is_begun_that_would_end_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = Piece("slow", (sys.executable, "-c", "1 / 0"), seconds=120)
    monkeypatch.setattr(record, "pieces", lambda *_: [slow])
    assert main([str(tmp_path), "--device", "cpu", "--minutes", "1"]) == 1
    assert "slow                     left for another time" in capsys.readouterr().out


def test_rates_of_all_pieces_come_together(tmp_path: Path) -> None:
    for name, dtype in (("one", "bfloat16"), ("two", "float32")):
        (tmp_path / name).mkdir()
        machine = {**FIGURE["machine"], "gemm_flops_per_second": {dtype: 1e12}}  # type: ignore[dict-item]
        (tmp_path / name / FIGURES).write_text(json.dumps({**FIGURE, "machine": machine}))
        (tmp_path / name / "status.json").write_text('{"status": 0, "seconds": 1.0}')
    gathered = gather(["one", "two", "absent"], tmp_path)
    assert gathered["machine"]["gemm_flops_per_second"] == {"bfloat16": 1e12, "float32": 1e12}
    assert len(gathered["comparisons"]) == 2
    assert "float32 product 1,000" in describe(gathered)


@pytest.mark.parametrize(("device", "trial"), [("cuda", False), ("cpu", True)])
def test_every_piece_names_what_exists(device: str, trial: bool, tmp_path: Path) -> None:
    chosen = list(pieces(device, trial, tmp_path))
    assert len({piece.name for piece in chosen}) == len(chosen)
    for piece in chosen:
        files = [word for word in piece.command if word.startswith(("tests", "benchmarks/"))]
        assert all((record.ROOT / file).exists() for file in files), piece
        assert piece.seconds < record.PIECE_SECONDS


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file" / "out"), "--device", "cpu"]) == 2
    assert "file is a file: choose another folder" in capsys.readouterr().err
    assert main([str(tmp_path), "--device", "cpu", "--only", "lunch"]) == 2
    assert "--only lunch: there is no such piece; choose install" in capsys.readouterr().err


def test_what_cannot_be_profiled_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "figures.json")
    (tmp_path / "file").write_text("kept")
    for message, arguments in {
        "unknown configuration 'c2i_l'": [out, "--config", "c2i_l"],
        "--ways graph: a CUDA graph needs a GPU": [out, "--ways", "graph"],
        "unknown key 'training.step'": [out, "--set", "training.step=3"],
        "--steps": [out, "--steps", "0"],
        "is a file": [str(tmp_path / "file" / "figures.json")],
    }.items():
        assert profile_step.main([*arguments, "--device", "cpu"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and message in error
    assert (tmp_path / "file").read_text() == "kept" and not (tmp_path / "figures.json").exists()


@pytest.mark.slow
def test_on_a_cpu_with_tiny_shapes(tmp_path: Path) -> None:
    arguments = [str(tmp_path), "--device", "cpu", "--trial", "--only"]
    assert main([*arguments, "backends", "profile", "loss"]) == 0
    saved = json.loads((tmp_path / "record.json").read_text())
    assert {row["variant"] for comparison in saved["comparisons"] for row in comparison["rows"]}
    assert saved["machine"]["versions"]["torch"]
    profile = saved["profiles"]["profile"]
    assert profile.keys() == {"reference", "fused"}
    assert all(times["step"] > 0 and times["host"] > 0 for times in profile.values())
    assert "| reference |" in (tmp_path / "record.md").read_text()


def test_the_readme_s_figures_are_those_of_the_records() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert readme.updated(text, readme.section(readme.load_records())) == text
    with pytest.raises(ValueError, match="the README has no lines"):
        readme.updated("nothing", "figures")


def test_the_readme_compares_with_the_better_baseline() -> None:
    def row(variant: str, median: float, is_baseline: bool) -> dict[str, object]:
        return {
            "variant": variant,
            "is_baseline": is_baseline,
            "median": median,
            "floor_fraction": 0.001 / median,
            "saved_for_backward": None,
            "peak_memory": 2**20 if is_baseline else 2**18,
        }

    rows = [
        row("reference, eager, bf16", 0.3, True),
        row("reference, torch.compile, bf16", 0.2, True),
        row("triton, eager, bf16", 0.1, False),
        row("triton, torch.compile, bf16", 0.05, False),
        row("engine, matmul precision high, torch.compile, bf16", 0.01, False),
        row("cpp limited to avx2, eager, bf16", 0.04, False),
    ]
    comparison = {**FIGURE["comparisons"][0], "rows": rows}  # type: ignore[dict-item]
    text = readme.section([{**FIGURE, "comparisons": [comparison]}])
    line, limited = text.splitlines()[-2:]
    assert "200 ms (reference, torch.compile)" in line
    assert "50 ms (triton, torch.compile)" in line
    assert "4.00×" in line
    assert "2%" in line
    assert "25.0%" in line
    assert "40 ms (cpp limited to avx2, eager)" in limited and "5.00×" in limited
    sampling = {**comparison, "title": "sampling, deco-xl"}
    assert "25.0%" not in readme.section([{**FIGURE, "comparisons": [sampling]}])
