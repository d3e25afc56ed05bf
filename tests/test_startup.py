"""Commands start without the large packages that they do not need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SLOW_TO_IMPORT = ("gradio", "pandas", "scipy", "sklearn", "torch._dynamo", "transformers")

SCRIPT = """
import sys
from deco_fast.errors import run_script
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise {error}
sys.meta_path.insert(0, Interrupted())
run_script("deco_fast.cli.sample")
"""


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        ("KeyboardInterrupt", 130, "interrupted\n"),
        (
            "ModuleNotFoundError('No module', name='torch')",
            2,
            "error: the package torch is not installed: run make sample, or pip install -e .\n",
        ),
    ],
    ids=["interrupted", "without torch"],
)
def test_a_script_that_cannot_import_its_command_says_so_in_a_line(
    error: str, status: int, message: str
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(error=error)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (status, message)


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
