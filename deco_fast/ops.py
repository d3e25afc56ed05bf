"""The ops that DeCo spends its time in, whatever backend computes them.

`python -m deco_fast.ops` prints which backends this machine has.
"""

from __future__ import annotations

from itertools import chain

import torch

from deco_fast.errors import UserError
from deco_fast.kernels.memory import keep_block_inputs
from deco_fast.kernels.pixel_decoder.reference import PixelDecoderParameters, PositionKind
from deco_fast.kernels.registry import (
    backend_for,
    backends,
    check_backend,
    implementation,
    use_backend,
)

__all__ = [
    "PixelDecoderParameters",
    "backend_for",
    "backends",
    "check_backend",
    "flow_matching_loss",
    "keep_block_inputs",
    "linear_upsample",
    "norm_modulate",
    "pixel_decoder",
    "qk_norm_rope",
    "swiglu",
    "use_backend",
]


def linear_upsample(
    tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, patch_size: int
) -> torch.Tensor:
    """Give every pixel its own condition vector (spec B.5, `cond_embed`).

    Args:
        tokens: (B, L, D), the decoder's condition.
        weight: (p*p*C, D), rows pixel-major and channel-fast.
        bias: (p*p*C,).
        patch_size: p.

    Returns:
        (B*L, p*p, C).

    Raises:
        UserError: shapes do not fit.
    """
    _check_upsampling("linear_upsample", tokens, weight, bias, patch_size)
    result: torch.Tensor = implementation("linear_upsample", tokens)(
        tokens, weight, bias, patch_size
    )
    return result


def pixel_decoder(
    x: torch.Tensor,
    tokens: torch.Tensor,
    parameters: PixelDecoderParameters,
    patch_size: int,
    position: PositionKind = "product",
) -> torch.Tensor:
    """The whole pixel decoder, upsampling included (spec B.5).

    Args:
        x: (B, 3, H, W), the noisy image; H and W divisible by `patch_size`.
        tokens: (B, L, D) with L = H*W/p², row-major, the condition silu(t + s).
        parameters: the decoder's weights.
        patch_size: p.
        position: the features of a pixel's place inside its patch: "product", the class model's,
            or "axial", the text model's.

    Returns:
        The velocity, (B, 3, H, W).

    Raises:
        UserError: shapes do not fit, or the tensors are on several devices.
    """
    blocks = chain.from_iterable(parameters.blocks)
    others = (tensor for tensor in parameters if isinstance(tensor, torch.Tensor))
    _check_one_device("pixel_decoder", x, tokens, *others, *blocks)
    weight, bias = parameters.upsample_weight, parameters.upsample_bias
    _check_upsampling("pixel_decoder", tokens, weight, bias, patch_size)
    _check_image(x, tokens, parameters.output_weight.shape[0], patch_size)
    result: torch.Tensor = implementation("pixel_decoder", x)(
        x, tokens, parameters, patch_size, position
    )
    return result


def flow_matching_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    table: torch.Tensor,
    weight: float | torch.Tensor,
    timestep_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Flow matching plus weight × the frequency-aware loss; float32 inside (spec B.7).

    Args:
        prediction, target: velocities (B, 3, H, W), any H and W.
        table: frequency weights (3, 8, 8) of Y, Cb, Cr, from `losses.frequency_table`.
        weight: factor of the frequency term, 1 in the paper; a tensor () may be learned.
        timestep_weight: (B,) weights of the flow-matching term; None is 1.

    Returns:
        The differentiable total, and detached the flow-matching term mean(w·(v̂ − v)²) and the
        frequency term before its factor; each a scalar.

    Raises:
        UserError: shapes do not fit, or the tensors are on several devices.
    """
    _check_one_device("flow_matching_loss", prediction, target, table)
    _check_loss(prediction, target, table, timestep_weight)
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = implementation(
        "flow_matching_loss", prediction
    )(prediction, target, table, weight, timestep_weight)
    return result


def _check_one_device(op: str, *tensors: torch.Tensor) -> None:
    # torch's products take a tensor on `meta`, of a model that was not loaded whole, beside those
    # of a CPU, and return what was in the memory.
    if any(tensor.device != tensors[0].device for tensor in tensors):
        devices = ", ".join(sorted({str(tensor.device) for tensor in tensors}))
        raise UserError(
            f"{op} got tensors on several devices ({devices}): move them to one, and load the "
            "whole model"
        )


# The reference is plain PyTorch, which broadcasts: one target for all images, say, trained without
# a word where the kernels refused it. What may be wrong in a caller's tensors is refused here, for
# all backends alike; the kernels check again whatever they read by pointers.


def _check_upsampling(
    op: str, tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, patch_size: int
) -> None:
    if patch_size < 1:
        raise UserError(f"{op}: patch_size must be at least 1, not {patch_size}")
    if weight.ndim != 2 or weight.shape[0] % patch_size**2 or bias.shape != weight.shape[:1]:
        raise UserError(
            f"{op}: the upsampling's weight and bias must be (p²·C, D) and (p²·C,) with p = "
            f"{patch_size}, not {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if tokens.ndim != 3 or tokens.shape[2] != weight.shape[1]:
        raise UserError(
            f"{op}: tokens must be (B, L, {weight.shape[1]}), not {tuple(tokens.shape)}"
        )


def _check_image(x: torch.Tensor, tokens: torch.Tensor, channels: int, patch_size: int) -> None:
    if x.ndim != 4 or x.shape[1] != channels:
        raise UserError(f"pixel_decoder: x must be (B, {channels}, H, W), not {tuple(x.shape)}")
    batch, _, height, width = x.shape
    if height % patch_size or width % patch_size:
        raise UserError(
            f"pixel_decoder: height and width of x must be multiples of the patch size "
            f"{patch_size}, not {height} and {width}"
        )
    patches = (height // patch_size) * (width // patch_size)
    if tokens.shape[0] != batch or tokens.shape[1] != patches:
        raise UserError(
            f"pixel_decoder: x of {tuple(x.shape)} takes tokens of ({batch}, {patches}, D), one "
            f"for each patch of {patch_size}×{patch_size}, not {tuple(tokens.shape)}"
        )


def _check_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    table: torch.Tensor,
    timestep_weight: torch.Tensor | None,
) -> None:
    if prediction.shape != target.shape or prediction.ndim != 4 or prediction.shape[1] != 3:
        raise UserError(
            f"prediction and target must both be (B, 3, H, W), not {tuple(prediction.shape)} "
            f"and {tuple(target.shape)}"
        )
    if table.shape != (3, 8, 8):
        raise UserError(f"table must be (3, 8, 8), not {tuple(table.shape)}")
    if timestep_weight is not None and timestep_weight.shape != prediction.shape[:1]:
        raise UserError(
            f"timestep_weight must be one number for each of {len(prediction)} images, not "
            f"{tuple(timestep_weight.shape)}"
        )


def qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rotary: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys normalised per head, then rotated, and the values (spec B.3, B.4).

    Args:
        qkv: (B, L, 3*H*d), as the linear layer leaves it: q, k, v, each head by head.
        q_weight, k_weight: (d,), of RMSNorm.
        rotary: (L, d/2, 2), cosine and sine of the rotation of adjacent channels.
        eps: inside of the root.

    Returns:
        q, k, v, each (B, H, L, d), in any layout that attention takes.
    """
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = implementation("qk_norm_rope", qkv)(
        qkv, q_weight, k_weight, rotary, eps
    )
    return result


def norm_modulate(
    x: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """RMSNorm, then AdaLN's modulation: norm(x)·weight·(1 + scale) + shift (spec B.3).

    Args:
        x: (B, L, D).
        weight: (D,), of RMSNorm.
        shift, scale: (B, 1, D).
        eps: inside of the root.

    Returns:
        (B, L, D) in the dtype of x.
    """
    result: torch.Tensor = implementation("norm_modulate", x)(x, weight, shift, scale, eps)
    return result


def swiglu(x: torch.Tensor, w1: torch.Tensor, w3: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """The DiT's MLP, w2 (silu(w1 x) · w3 x), without biases (spec B.3).

    Args:
        x: (..., D).
        w1, w3: (I, D).
        w2: (D, I).

    Returns:
        (..., D).
    """
    result: torch.Tensor = implementation("swiglu", x)(x, w1, w3, w2)
    return result


if __name__ == "__main__":
    from deco_fast.kernels.report import main

    raise SystemExit(main())
