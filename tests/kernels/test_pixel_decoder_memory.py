"""What the pixel decoder keeps for its backward pass on a GPU, counted without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from deco_fast import ops
from deco_fast.errors import UserError
from deco_fast.kernels import memory, registration, registry
from deco_fast.kernels.pixel_decoder.reference import BlockParameters, PixelDecoderParameters

pytestmark = pytest.mark.skipif(
    registry.triton_problem() is not None, reason=f"{registry.triton_problem()}"
)

BATCH, PATCH, CHANNELS, HIDDEN = 4, 16, 32, 1152
PIXELS = BATCH * 256 * 256


@pytest.fixture(autouse=True)
def _fake_tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors without data on a CPU, which the interpreter's setting gives to Triton."""
    monkeypatch.setattr(registration, "INTERPRETED", True)
    monkeypatch.setattr(registry, "INTERPRETED", True)
    with FakeTensorMode():
        yield


def parameters(blocks: int, dtype: torch.dtype) -> PixelDecoderParameters:
    def tensor(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, requires_grad=True)

    c = CHANNELS
    shapes = (c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,), (c, c), (c,)
    return PixelDecoderParameters(
        *(tensor(PATCH**2 * c, HIDDEN), tensor(PATCH**2 * c)),
        *(tensor(c, 67), tensor(c), tensor(c, c), tensor(c)),
        tuple(BlockParameters(*(tensor(*shape) for shape in shapes)) for _ in range(blocks)),
        *(tensor(3, c), tensor(3)),
    )


def kept_bytes(backend: str, blocks: int, dtype: torch.dtype) -> int:
    """Bytes that a forward pass leaves for the backward pass beside what it was given."""
    p = parameters(blocks, dtype)
    x = torch.empty(BATCH, 3, 256, 256, dtype=dtype)
    tokens = torch.empty(BATCH, 256, HIDDEN, dtype=dtype, requires_grad=True)
    given = [x, tokens, *p[:6], *(tensor for block in p.blocks for tensor in block), *p[-2:]]
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        return tensor

    with (
        ops.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        velocity = ops.pixel_decoder(x, tokens, p, PATCH)
    assert velocity.requires_grad
    for tensor in given:
        storages.pop(tensor.untyped_storage()._cdata, None)
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [1, 3, 6])
def test_share_of_what_eager_keeps(blocks: int, dtype: torch.dtype) -> None:
    eager = kept_bytes("reference", blocks, dtype)
    condition = PIXELS * CHANNELS * dtype.itemsize
    assert kept_bytes("triton", blocks, dtype) == blocks * condition
    assert blocks * condition <= 0.1 * eager
    with ops.keep_block_inputs(False):
        assert kept_bytes("triton", blocks, dtype) == condition
    if blocks >= 3:
        assert condition <= 0.03 * eager


def test_nothing_is_kept_where_nothing_is_trained() -> None:
    calls: list[bool] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, arguments=(), kwargs=None):  # type: ignore[no-untyped-def]
            if "pixel_decoder" in str(op):
                calls.append(arguments[-1])
            return op(*arguments, **(kwargs or {}))

    p = parameters(3, torch.bfloat16)
    x = torch.empty(1, 3, 32, 32, dtype=torch.bfloat16)
    tokens = torch.empty(1, 4, HIDDEN, dtype=torch.bfloat16)
    with Recorder(), ops.use_backend("triton"):
        with torch.no_grad():
            ops.pixel_decoder(x, tokens, p, PATCH)
        ops.pixel_decoder(x, tokens, p, PATCH)
    assert calls == [False, True]


def test_an_unknown_value_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_keep", "yes")
    with pytest.raises(UserError, match="DECO_KEEP_BLOCK_INPUTS=yes: set 1"):
        memory.keeps_block_inputs()
