"""A command goes on when its output cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

COMMAND = """
import os, sys
from tqdm import tqdm
from deco_fast.errors import UserError, run_command

@run_command
def main():
    with open(sys.argv[1], "w") as done:
        for number in tqdm(range(2000), disable="BAR" not in os.environ):
            print("32×32 images", number)
        print("and then", flush=True)
        for stream in (1, 2) if "BAR" in os.environ else ():
            os.write(stream, b"what a library says")
        done.write("done")
    if "NO_ERROR" not in os.environ:
        raise UserError("no")

sys.exit(main())
"""


def run(tmp_path: Path, stdout: int, **environment: str) -> tuple[int, bytes, bool]:
    """The status, what stderr got, and whether the command came to its end."""
    done = tmp_path / "done"
    result = subprocess.run(
        [sys.executable, "-c", COMMAND, str(done)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
    )
    return result.returncode, result.stderr, done.exists()


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nobody_reads_the_output(tmp_path: Path, unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = run(tmp_path, writer, PYTHONUNBUFFERED=unbuffered)
    finally:
        os.close(writer)
    assert result == (2, b"error: no\n", True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_the_log(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as log:
        assert run(tmp_path, log.fileno()) == (2, b"error: no\n", True)
        status, said, done = run(tmp_path, log.fileno(), NO_ERROR="1")
    assert (status, done) == (2, True)
    assert (
        said
        == b"error: the output could not be written (No space left on device): free some space\n"
    )


@pytest.mark.parametrize("encoding", ["ascii", "koi8-r"])
def test_an_encoding_that_lacks_a_sign(tmp_path: Path, encoding: str) -> None:
    with open(tmp_path / "log", "wb") as log:
        status = run(tmp_path, log.fileno(), PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert status == (2, b"error: no\n", True)
    assert (tmp_path / "log").read_bytes().startswith(b"32?32 images 0\n")


def test_an_encoding_that_lacks_a_sign_and_nobody_reads_it(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONUNBUFFERED": "1"}
    try:
        assert run(tmp_path, writer, **environment) == (2, b"error: no\n", True)
    finally:
        os.close(writer)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_no_output_at_all(tmp_path: Path, closed: str) -> None:
    """The streams' numbers are nobody else's, and a progress bar finds one to be shown on."""
    done = tmp_path / "done"
    shell = f'"{sys.executable}" -c "$COMMAND" {done} {closed}'
    environment = {**os.environ, "COMMAND": COMMAND, "BAR": "1"}
    assert subprocess.run(shell, shell=True, cwd=ROOT, env=environment).returncode == 2
    assert done.read_text() == "done"
