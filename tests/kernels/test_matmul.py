"""The CPU's large products against float64: every layout, instruction set, remainder and dtype."""

from __future__ import annotations

import itertools
import platform
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deco_fast.kernels import registry

pytestmark = pytest.mark.skipif(
    registry.extension_problem() is not None,
    reason=f"the C++ backend is not available: {registry.extension_problem()}",
)

DTYPES = [torch.float32, torch.bfloat16]
# Of the sum of magnitudes, for a sum itself may be anything.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}

# (M, K, N): less than a vector, whole blocks and not, and a depth that is summed in parts.
SHAPES = [
    *((1, 1, 1), (5, 7, 3), (48, 32, 32), (96, 64, 128)),
    *((49, 1031, 33), (97, 4099, 65)),
]


def operand(rows: int, columns: int, dtype: torch.dtype, turned: bool) -> Tensor:
    """A part of a larger matrix of NaN, so that reading beyond it shows."""
    shape = (columns + 3, rows + 5) if turned else (rows + 3, columns + 5)
    whole = torch.full(shape, torch.nan, dtype=dtype)
    part = (whole.T if turned else whole)[2 : 2 + rows, 1 : 1 + columns]
    return part.copy_(torch.randn(rows, columns))


def error(actual: Tensor, expected: Tensor, magnitude: Tensor) -> float:
    return float((actual.double() - expected).norm() / magnitude.norm())


def check(a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """The product in this dtype, and the product added to what is there."""
    from deco_fast import _C

    shape, product = (a.shape[0], b.shape[1]), a.double() @ b.double()
    magnitude = a.double().abs() @ b.double().abs()
    out = torch.full(shape, torch.nan, dtype=dtype)
    _C.matmul(a, b, out, False)
    assert error(out, product, magnitude) <= TOLERANCE[dtype]
    before = torch.randn(shape).to(dtype)
    out = before.clone()
    _C.matmul(a, b, out, True)
    magnitude += before.double().abs()
    assert error(out, before.double() + product, magnitude) <= TOLERANCE[dtype]


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    m, k, n = shape
    for turned_a, turned_b, result in itertools.product((False, True), (False, True), DTYPES):
        check(operand(m, k, dtype, turned_a), operand(k, n, dtype, turned_b), result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_columns_than_are_packed_at_a_time(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(operand(5, 40001, dtype, False), operand(40001, 250, dtype, False), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    m=st.integers(1, 120),
    k=st.integers(1, 120),
    n=st.integers(1, 120),
    turned=st.tuples(st.booleans(), st.booleans()),
)
def test_any_shape(dtype: torch.dtype, m: int, k: int, n: int, turned: tuple[bool, bool]) -> None:
    torch.manual_seed(m + k + n)
    check(operand(m, k, dtype, turned[0]), operand(k, n, dtype, turned[1]), dtype)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    from deco_fast import _C

    torch.manual_seed(0)
    a, b = torch.randn(100, 2000).to(dtype), torch.randn(2000, 300).to(dtype)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(torch.full((100, 300), torch.nan, dtype=dtype))
            _C.matmul(a, b, results[-1], False)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/cpuinfo names the maker")
def test_the_library_multiplies_where_it_is_faster(instruction_set: str) -> None:
    """bfloat16 with a matrix unit, float32 on Intel's processors and without AVX2."""
    from deco_fast import _C

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    float32, bfloat16 = (_C.prefers_matmul(torch.zeros(1, 1, dtype=dtype)) for dtype in DTYPES)
    assert bfloat16 == (x86 and instruction_set != "amx")
    assert float32 == (x86 and instruction_set != "baseline" and not intel)


class TestEitherPath:
    """`matmul`, by csrc/matmul.cpp and by the library."""

    @pytest.fixture(params=[False, True], ids=["library", "ours"], autouse=True)
    def _path(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        from deco_fast import _C

        monkeypatch.setattr(_C, "prefers_matmul", lambda a: request.param)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("turned", [False, True])
    @pytest.mark.parametrize("shape", [(50, 70, 20), (1, 1, 1)], ids=str)
    def test_product_and_sum(
        self, shape: tuple[int, int, int], dtype: torch.dtype, turned: bool
    ) -> None:
        from deco_fast.kernels.matmul.cpu import matmul

        torch.manual_seed(0)
        m, k, n = shape
        a, b = operand(m, k, dtype, turned), operand(k, n, dtype, not turned)
        product, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        out = torch.full((m, n), torch.nan, dtype=dtype)
        matmul(a, b, out)
        assert error(out, product, magnitude) <= TOLERANCE[dtype]
        total = torch.ones(m, n)
        matmul(a, b, total, add=True)
        assert error(total, 1 + product, 1 + magnitude) <= TOLERANCE[dtype]
        apart = [
            tensor.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2] for tensor in (a, b)
        ]
        assert all(1 not in tensor.stride() for tensor in apart)
        matmul(*apart, out.fill_(torch.nan))
        assert error(out, product, magnitude) <= TOLERANCE[dtype]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_sum_over_nothing(self, dtype: torch.dtype) -> None:
        """As the gradient of a weight for an empty batch is."""
        from deco_fast.kernels.matmul.cpu import matmul

        out = torch.full((3, 2), torch.nan, dtype=dtype)
        matmul(torch.zeros(3, 0, dtype=dtype), torch.zeros(0, 2, dtype=dtype), out)
        assert torch.equal(out, torch.zeros(3, 2, dtype=dtype))
        matmul(torch.zeros(0, 3, dtype=dtype), torch.zeros(3, 2, dtype=dtype), out[:0])
        total = torch.ones(3, 2)
        matmul(torch.zeros(3, 0, dtype=dtype), torch.zeros(0, 2, dtype=dtype), total, add=True)
        assert torch.equal(total, torch.ones(3, 2))


@pytest.mark.parametrize(
    ("a", "b", "c", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), torch.zeros(2, 5), "b must have 3 rows"),
        (torch.zeros(2, 3), torch.zeros(3, 5), torch.zeros(5, 2), "c must be"),
        (torch.zeros(2, 3), torch.zeros(3, 5).bfloat16(), torch.zeros(2, 5), "one dtype"),
        (torch.zeros(4, 6)[::2, ::2], torch.zeros(3, 5), torch.zeros(2, 5), "a must be a matrix"),
        (torch.zeros(2, 3).half(), torch.zeros(3, 5).half(), torch.zeros(2, 5), "take float32"),
    ],
)
def test_what_does_not_fit_is_refused(a: Tensor, b: Tensor, c: Tensor, message: str) -> None:
    from deco_fast import _C

    with pytest.raises(ValueError, match=message):
        _C.matmul(a, b, c, False)
