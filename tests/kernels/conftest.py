"""What the tests of the C++ kernels share."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512_bf16", "amx"])
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each one that this CPU has, chosen for the test."""
    from deco_fast import _C

    monkeypatch.setenv("DECO_ISA", request.param)
    try:
        return _C.instruction_set()
    except ValueError as error:
        pytest.skip(str(error))
