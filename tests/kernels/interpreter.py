"""Triton's kernels on a machine without a GPU: in the interpreter, in a process of their own.

Triton reads TRITON_INTERPRET when it is imported, and then can no longer compile. So a file of
Triton tests holds its cases in classes, and one test that runs them in the interpreter; on a
machine with a GPU the cases also run directly:

    class TestForward:
        __test__ = interpreter.KERNELS_RUN
        pytestmark = interpreter.MARKS

    def test_in_the_interpreter() -> None:
        interpreter.run_cases(__file__)

The interpreter computes float32 and float16 right, bfloat16 wrong (Triton 3.6 to 3.9).
"""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
KERNELS_RUN = INTERPRETED or torch.cuda.is_available()
MARKS = [] if INTERPRETED else [pytest.mark.gpu]
"""Of the classes: `pytest -m gpu` runs them on a GPU."""


def _patch_language_once() -> None:
    """Triton puts its interpreted functions in place at each call of a function inside of a kernel,
    where its kernel has done so already: two fifths of the time that the decoder's tests take.
    """
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    scopes: list[Any] = []
    patched: set[frozenset[int]] = set()

    @functools.cache
    def modules(function: Any) -> frozenset[int]:
        """Which of Triton's modules the function sees: those are what is patched for it."""
        seen = function.__globals__.values()
        return frozenset(
            id(value)
            for value in seen
            if inspect.ismodule(value) and value in (language, language.core)
        )

    def patch_once(function: Any) -> Any:
        # A kernel that has ended took back all of its changes.
        if not (scopes and getattr(scopes[0], "_changes", None)):
            patched.clear()
            scopes[:] = [patch(function)]
        elif modules(function) not in patched:
            patch(function)
        patched.add(modules(function))
        return scopes[0]

    interpreter._patch_lang = patch_once


if INTERPRETED:
    _patch_language_once()


def run_cases(path: str) -> None:
    """Run the tests of a file in a new process under the interpreter; fail where one fails."""
    process = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", path, "-q", "--no-header", "-p", "no:cacheprovider"),
            *("-k", "not test_in_the_interpreter"),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode != 0:
        pytest.fail(process.stdout[-6000:] + process.stderr[-2000:], pytrace=False)
