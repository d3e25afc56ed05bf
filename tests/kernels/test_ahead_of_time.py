"""Every Triton kernel as the GPUs' assemblers see it; no GPU is needed, and nothing is run."""

from __future__ import annotations

from pathlib import Path

import interpreter
import pytest

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")

import ahead_of_time

from deco_fast.kernels import registry
from deco_fast.kernels.specialisation import Specialisation

pytestmark = pytest.mark.skipif(
    interpreter.INTERPRETED, reason="under TRITON_INTERPRET=1 Triton cannot compile"
)

KERNELS = Path(registry.__file__).parent
OPS = sorted(path.parent.name for path in KERNELS.glob("*/gpu.py"))

# The quick part compiles one kernel of each op, for the cards with the least shared memory; the
# slow part what DeCo-XL trains with, on the paper's card and on Hopper. All of it takes half an
# hour on two cores: make soak.
QUICK = {
    (86, "flow_matching_loss fp32 and fp32"),
    (86, "pixel_decoder_forward bfloat16 C=32 blocks=3"),
}
SLOW = {
    (capability, name)
    for capability in (80, 90)
    for name in (
        "flow_matching_loss bf16 and fp32, weights and gradient",
        "flow_matching_loss fp32 and fp32, padded, weights and gradient",
        "pixel_decoder_forward bfloat16 C=32 blocks=3, keeping inputs",
        "pixel_decoder_backward bfloat16 C=32 first block",
        "pixel_decoder_backward bfloat16 C=32 middle block",
        "pixel_decoder_backward bfloat16 C=32 last block",
        "pixel_decoder_fold bfloat16 C=32",
        "qk_norm_rope_forward bf16 d=72",
        "qk_norm_rope_backward bf16 d=72",
        "norm_modulate_forward bf16 D=1152",
        "norm_modulate_backward bf16 D=1152",
        "norm_modulate_reduce bf16 D=1152",
    )
}

CASES = [
    (capability, specialisation)
    for op in OPS
    for capability in ahead_of_time.SHARED_MEMORY_LIMIT
    for specialisation in ahead_of_time.specialisations(op, capability)
]


def _case(capability: int, specialisation: Specialisation) -> object:
    case = (capability, specialisation.name)
    if case in QUICK:
        marks: tuple[pytest.MarkDecorator, ...] = ()
    else:
        marks = (pytest.mark.slow if case in SLOW else pytest.mark.soak,)
    name = f"sm_{capability} {specialisation.name}"
    return pytest.param(capability, specialisation, marks=marks, id=name)


def test_all_fused_ops_are_checked() -> None:
    assert {"flow_matching_loss", "pixel_decoder", "qk_norm_rope", "norm_modulate"} <= set(OPS)
    assert {(capability, s.name) for capability, s in CASES} >= QUICK | SLOW


def test_only_backward_kernels_may_spill() -> None:
    assert all("backward" in s.name for _, s in CASES if s.stack_bytes > 0)


@pytest.mark.parametrize(("capability", "specialisation"), [_case(*case) for case in CASES])
def test_kernel_fits_the_chip(capability: int, specialisation: Specialisation) -> None:
    compiled = ahead_of_time.compile_for(specialisation, capability)
    assert compiled.shared_bytes <= ahead_of_time.SHARED_MEMORY_LIMIT[capability]
    assert compiled.stack_bytes <= specialisation.stack_bytes
    # A program whose columns are taken waits for another one's end.
    columns = specialisation.programs * compiled.tensor_memory_columns
    assert columns <= ahead_of_time.TENSOR_MEMORY_COLUMNS
    if specialisation.tensor_cores:
        assert compiled.tensor_core_instructions > 0
