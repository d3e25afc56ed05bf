"""The products of the CPU backend: both libraries, in every layout that the decoder gives them."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from deco_fast.kernels.linear_upsample import cpu


def test_mkl_multiplies_where_avx2_is_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever made the processor; with AVX-512 that decides."""
    monkeypatch.setattr(cpu, "has_onednn", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(sys, "platform", "linux")
    found = {}
    for avx512, maker in itertools.product((False, True), ("GenuineIntel", "AuthenticAMD")):
        monkeypatch.setattr(cpu, "has_avx512", lambda avx512=avx512: avx512)
        monkeypatch.setattr(cpu.Path, "read_text", lambda path, maker=maker: maker)
        found[avx512, maker] = cpu._prefers_onednn.__wrapped__()
    assert [key for key, prefers in found.items() if prefers] == [(True, "AuthenticAMD")]


@pytest.mark.parametrize(("m", "n", "k"), [(64, 6, 24), (5, 7, 3), (1, 1, 1)])
@pytest.mark.parametrize("transposed", [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize("library", ["torch", "onednn"])
def test_product(m: int, n: int, k: int, transposed: tuple[bool, bool], library: str) -> None:
    if library == "onednn" and not cpu.has_onednn():
        pytest.skip("this build of torch has no oneDNN")
    multiply = {"torch": cpu.matmul_nt, "onednn": cpu.onednn_matmul_nt}[library]
    a, b = (
        torch.randn(columns, rows).T if turned else torch.randn(rows, columns)
        for (rows, columns), turned in zip([(m, k), (n, k)], transposed, strict=True)
    )
    result = multiply(a, b)
    assert result.is_contiguous()
    torch.testing.assert_close(result, (a.double() @ b.double().T).float())


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_bfloat16_product(fast: bool, turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, or widened some rows at a time where the processor is slow at that."""
    monkeypatch.setattr(cpu, "has_fast_bfloat16", lambda: fast)
    m, n, k = cpu._WIDENED_ROWS + 3, 5, 7
    a = (torch.randn(k, m).T if turned else torch.randn(m, k)).bfloat16()
    b = torch.randn(n, k).bfloat16()
    result = cpu.matmul_nt(a, b)
    assert result.is_contiguous()
    assert result.dtype == torch.bfloat16
    exact = a.double() @ b.double().T
    assert (result.double() - exact).norm() <= 4e-3 * exact.norm()


@pytest.mark.parametrize("prefers_onednn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_over_nothing(
    prefers_onednn: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the gradient of a weight for an empty batch is."""
    if prefers_onednn and not cpu.has_onednn():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(cpu, "_prefers_onednn", lambda: prefers_onednn)
    monkeypatch.setattr(cpu, "has_fast_bfloat16", lambda: False)
    result = cpu.matmul_nt(torch.zeros(3, 0, dtype=dtype), torch.zeros(2, 0, dtype=dtype))
    assert torch.equal(result, torch.zeros(3, 2, dtype=dtype))
