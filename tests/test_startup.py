"""Commands start without the large packages that they do not need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SLOW_TO_IMPORT = ("gradio", "pandas", "scipy", "sklearn", "torch._dynamo", "transformers")

DRAW = f"""
import sys, torch
before = set(sys.modules)
from deco_fast.cli import app, evaluate, train
from deco_fast.cli.sample import main
assert main(["--num=1", "--steps=1", "--device=cpu", "--out", sys.argv[1]]) == 0
print(sorted((set(sys.modules) - before).intersection({SLOW_TO_IMPORT})))
"""


def test_drawing_imports_neither_a_compiler_nor_what_other_commands_need(tmp_path: Path) -> None:
    out = tmp_path / "images"
    result = subprocess.run(
        [sys.executable, "-c", DRAW, str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
    assert (out / "grid.png").exists()
