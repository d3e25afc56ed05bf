"""The C++ extension; it may be absent. The headers csrc/*_op.h say what the functions take."""

from torch import Tensor

sources: int

def instruction_set() -> str: ...
def has_fast_bfloat16() -> bool: ...
def has_matrix_unit() -> bool: ...
def flow_matching_loss_forward(
    prediction: Tensor,
    target: Tensor,
    table: Tensor,
    weight: float,
    timestep_weight: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def flow_matching_loss(
    prediction: Tensor,
    target: Tensor,
    table: Tensor,
    weight: float,
    timestep_weight: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def matmul(a: Tensor, b: Tensor, c: Tensor, add: bool) -> None: ...
def prefers_matmul(a: Tensor) -> bool: ...
def has_block_products() -> bool: ...
def pack_weight(weight: Tensor, split: bool) -> Tensor: ...
def packed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, swiglu: bool
) -> Tensor: ...
def pixel_decoder_forward(
    x: Tensor,
    y: Tensor,
    weights: list[Tensor],
    patch_size: int,
    first_pixel: int,
    velocity: Tensor,
) -> None: ...
def pixel_decoder_backward(
    grad_velocity: Tensor,
    x: Tensor,
    y: Tensor,
    weights: list[Tensor],
    patch_size: int,
    first_pixel: int,
    grad_y: Tensor,
    grad_x: Tensor | None,
) -> list[Tensor]: ...
