"""The fused ops as PyTorch sees them: schemas, shapes without data, gradients, devices.

Each op is opaque: `torch.compile` and `torch.export` keep it as one node of the graph. What runs
is the host function of the op's folder, `cpu.py` (C++) for tensors on the CPU and `gpu.py` (Triton)
for those on CUDA, imported at the first call. Under `TRITON_INTERPRET=1` the Triton kernels run on
the CPU, and `gpu.py` serves both.

A host function has the name and the arguments of its op without the op's name:
`pixel_decoder/gpu.py` holds `forward` and `backward`, `flow_matching_loss/gpu.py` holds `forward`.
Neither sees autocast or autograd, and tensors may have any strides; what they return is new and
contiguous. Gradients cannot be differentiated again, which is a clear error.

dtypes. The loss: prediction and target float32, bfloat16 or float16, in any pair; table and
timestep_weight are converted to float32. The decoder computes in the dtype of `tokens`, and so does
the velocity come; x and the parameters may have any of the three dtypes, sums and the small
tensors are float32 inside, and a gradient has the dtype of what it belongs to.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from deco_fast.kernels.autocast import without_autocast

fused_ops: Final = torch.ops.deco_fast
"""What this file registers: `fused_ops.pixel_decoder(…)`."""

INTERPRETED: Final = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether this process runs Triton kernels in Triton's interpreter, on the CPU."""

_TAGS: Final = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_contiguous_strides)


def within_transform() -> bool:
    """Whether this is inside of `torch.func.grad`, `vmap` and the like, or of forward-mode AD.

    `torch.library.register_autograd` has no rules for these, so there the reference computes.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@functools.cache
def _host(op: str, device_type: str) -> ModuleType:
    module = "cpu" if device_type == "cpu" and not INTERPRETED else "gpu"
    return importlib.import_module(f"deco_fast.kernels.{op}.{module}")


def _define(
    name: str, schema: str, function: str, device_types: Sequence[str] = ("cpu", "cuda")
) -> None:
    """Define deco_fast::name, computed on each device by this host function of the op's folder."""
    torch.library.define(f"deco_fast::{name}", schema, tags=_TAGS)
    op = name.removesuffix("_backward")
    for device_type in device_types:

        def implementation(*arguments: Any, device_type: str = device_type) -> Any:
            host = getattr(_host(op, device_type), function)
            if not torch.is_autocast_enabled(device_type):
                return host(*arguments)
            with without_autocast(device_type):
                return host(*arguments)

        torch.library.impl(f"deco_fast::{name}", device_type, implementation)


def _not_differentiable_again(name: str) -> Callable[..., None]:
    """The gradient of a gradient: none of the kernels has one."""

    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError(
            f"the gradient of deco_fast::{name} cannot be differentiated again; use "
            'deco_fast.ops.use_backend("reference") for second derivatives'
        )

    return backward


# --- flow_matching_loss -------------------------------------------------------------------------
# The last result is the gradient of the total with respect to the prediction, made in the same
# pass, empty without `with_gradient`. A float16 prediction's is float32: it is of the order of
# 1/(number of values), which float16 cannot hold before a loss scale has been applied.

_define(
    "flow_matching_loss",
    "(Tensor prediction, Tensor target, Tensor table, float weight, Tensor? timestep_weight, "
    "bool with_gradient) -> (Tensor total, Tensor flow_matching, Tensor frequency, "
    "Tensor gradient)",
    "forward",
)


def loss_gradient_dtype(prediction: Tensor) -> torch.dtype:
    """How the gradient of the loss with respect to this prediction is kept."""
    return torch.float32 if prediction.dtype == torch.float16 else prediction.dtype


@torch.library.register_fake("deco_fast::flow_matching_loss")
def _(
    prediction: Tensor,
    target: Tensor,
    table: Tensor,
    weight: float,
    timestep_weight: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = prediction.shape if with_gradient else (0,)
    gradient = prediction.new_empty(shape, dtype=loss_gradient_dtype(prediction))
    total, flow_matching, frequency = (
        prediction.new_empty((), dtype=torch.float32) for _ in range(3)
    )
    return total, flow_matching, frequency, gradient


torch.library.define(
    "deco_fast::flow_matching_loss_backward",
    "(Tensor grad_total, Tensor gradient, ScalarType dtype) -> Tensor",
    tags=_TAGS,
)


@torch.library.impl("deco_fast::flow_matching_loss_backward", ("cpu", "cuda"))
def _(grad_total: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return (gradient * grad_total).to(dtype)


@torch.library.register_fake("deco_fast::flow_matching_loss_backward")
def _(grad_total: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


def _loss_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    prediction, target = inputs[:2]
    _, flow_matching, frequency, gradient = output
    # Not the gradient: as a differentiable result it leads a second derivative to the error below,
    # where it would be silently zero otherwise.
    ctx.mark_non_differentiable(flow_matching, frequency)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient)
    ctx.dtypes = prediction.dtype, target.dtype


def _loss_backward(ctx: Any, grad_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    for_prediction, for_target = ctx.needs_input_grad[:2]
    prediction_dtype, target_dtype = ctx.dtypes
    others = (None, None, None, None)
    if grad_total is None:
        return None, None, *others
    if not for_target and gradient.dtype == prediction_dtype and _is_last_use(grad_total):
        gradient = gradient.detach()
        if not gradient.is_cpu or INTERPRETED:
            return _host("flow_matching_loss", "cuda").scale_(gradient, grad_total), None, *others
        return gradient.mul_(grad_total), None, *others
    op = fused_ops.flow_matching_loss_backward
    grad_prediction = op(grad_total, gradient, prediction_dtype) if for_prediction else None
    grad_target = op(-grad_total, gradient, target_dtype) if for_target else None
    return grad_prediction, grad_target, *others


def _is_last_use(grad: Tensor) -> bool:
    """Whether what was saved for this backward pass may be overwritten: the graph is freed after
    it, and nothing records it."""
    recorded = torch.is_grad_enabled() or type(grad) is not Tensor
    return not (recorded or torch._C._autograd._get_current_graph_task_keep_graph())


torch.library.register_autograd(
    "deco_fast::flow_matching_loss", _loss_backward, setup_context=_loss_setup_context
)
torch.library.register_autograd(
    "deco_fast::flow_matching_loss_backward", _not_differentiable_again("flow_matching_loss")
)


_PLAIN: Final = (Tensor, torch.nn.Parameter)


def flow_matching_loss(
    prediction: Tensor,
    target: Tensor,
    table: Tensor,
    weight: float,
    timestep_weight: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fused_ops.flow_matching_loss`, by the shorter way where nobody looks at the dispatcher.

    On a CPU the dispatcher's Python takes a fifth of the whole time at 4×256×256: the kernel has
    just driven it out of the caches. Autograd's Python took 5% more, so that this is C++ as well.
    """
    arguments = (prediction, target, table, weight, timestep_weight, with_gradient)
    op = fused_ops.flow_matching_loss
    in_cpp = _in_cpp(prediction) and _in_cpp(target)
    if in_cpp and _nobody_looks(prediction, target):
        op = _host("flow_matching_loss", "cpu").differentiable
    result: tuple[Tensor, Tensor, Tensor, Tensor] = op(*arguments)
    return result


def _nobody_looks(prediction: Tensor, target: Tensor) -> bool:
    """Whether neither a compiler, nor a mode, nor a kind of tensor asks which ops are called."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and type(prediction) in _PLAIN
        and type(target) in _PLAIN
    )


# --- pixel_decoder ------------------------------------------------------------------------------
# `small` lists all parameters but the two of the upsampling: pixel_embedder_weight,
# pixel_embedder_bias, input_proj_weight, input_proj_bias, the eight of each block in the order of
# BlockParameters, output_weight, output_bias. `position` is the kind of position features
# (`reference.pixel_position_features`). With `keep_y`, for the backward pass, there is `y`: the
# upsampled tokens, flat, in whatever order the implementation wrote them. With `keep_inputs` a GPU
# also keeps `block_inputs`, the residuals between blocks, in the dtype of y.

_define(
    "pixel_decoder",
    "(Tensor x, Tensor tokens, Tensor upsample_weight, Tensor upsample_bias, Tensor[] small, "
    "int patch_size, str position, bool keep_y, bool keep_inputs) -> "
    "(Tensor velocity, Tensor y, Tensor block_inputs)",
    "forward",
)
_define(
    "pixel_decoder_backward",
    "(Tensor grad_velocity, Tensor x, Tensor tokens, Tensor y, Tensor block_inputs, "
    "Tensor upsample_weight, Tensor upsample_bias, Tensor[] small, int patch_size, "
    "str position, bool need_x_grad) -> (Tensor grad_x, Tensor grad_tokens, "
    "Tensor grad_upsample_weight, Tensor grad_upsample_bias, Tensor[] grad_small)",
    "backward",
)


def condition_dtype(tokens: Tensor) -> torch.dtype:
    """How the upsampled tokens are kept: CPUs have no arithmetic in float16 to speak of."""
    if tokens.dtype == torch.float16 and _in_cpp(tokens):
        return torch.float32
    return tokens.dtype


def block_inputs_shape(y: Tensor, small: Sequence[Tensor], keep_inputs: bool) -> tuple[int, ...]:
    """Of block_inputs: (blocks - 1, pixels, C), the first block's being made from the pixels.

    `y` is all of it.
    """
    if not keep_inputs or _in_cpp(y):
        return (0,)
    channels = small[3].shape[0]
    return (len(small) - 6) // 8 - 1, y.numel() // channels, channels


def _in_cpp(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not INTERPRETED


@torch.library.register_fake("deco_fast::pixel_decoder")
def _(
    x: Tensor,
    tokens: Tensor,
    upsample_weight: Tensor,
    upsample_bias: Tensor,
    small: Sequence[Tensor],
    patch_size: int,
    position: str,
    keep_y: bool,
    keep_inputs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, _ = tokens.shape
    y = tokens.new_empty(batch * length * upsample_bias.shape[0], dtype=condition_dtype(tokens))
    block_inputs = y.new_empty(block_inputs_shape(y, small, keep_inputs))
    return tokens.new_empty(x.shape), y if keep_y else y.new_empty(0), block_inputs


@torch.library.register_fake("deco_fast::pixel_decoder_backward")
def _(
    grad_velocity: Tensor,
    x: Tensor,
    tokens: Tensor,
    y: Tensor,
    block_inputs: Tensor,
    upsample_weight: Tensor,
    upsample_bias: Tensor,
    small: Sequence[Tensor],
    patch_size: int,
    position: str,
    need_x_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    def like(tensor: Tensor) -> Tensor:
        return tensor.new_empty(tensor.shape)

    grad_x = like(x) if need_x_grad else x.new_empty(0)
    grads = like(tokens), like(upsample_weight), like(upsample_bias)
    return grad_x, *grads, [like(tensor) for tensor in small]


def _decoder_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, tokens, upsample_weight, upsample_bias, small, patch_size, position, *_ = inputs
    _, y, block_inputs = output
    ctx.mark_non_differentiable(y, block_inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, tokens, y, block_inputs, upsample_weight, upsample_bias, *small)
    ctx.patch_size, ctx.position = patch_size, position


def _decoder_backward(ctx: Any, grad_velocity: Tensor | None, *_: None) -> tuple[Any, ...]:
    x, tokens, y, block_inputs, upsample_weight, upsample_bias, *small = ctx.saved_tensors
    if grad_velocity is None:
        return None, None, None, None, [None] * len(small), None, None, None, None
    need_x_grad = ctx.needs_input_grad[0]
    grad_x, *grads, grad_small = fused_ops.pixel_decoder_backward(
        *(grad_velocity, x, tokens, y, block_inputs, upsample_weight, upsample_bias, small),
        *(ctx.patch_size, ctx.position, need_x_grad),
    )
    return grad_x if need_x_grad else None, *grads, grad_small, None, None, None, None


torch.library.register_autograd(
    "deco_fast::pixel_decoder", _decoder_backward, setup_context=_decoder_setup_context
)
torch.library.register_autograd(
    "deco_fast::pixel_decoder_backward", _not_differentiable_again("pixel_decoder")
)


# --- qk_norm_rope, norm_modulate ----------------------------------------------------------------
# On CUDA alone: a CPU computes them as torch's own operations.

_ON_GPU: Final = ("cpu", "cuda") if INTERPRETED else ("cuda",)

_define(
    "qk_norm_rope",
    "(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor rotary, float eps) "
    "-> (Tensor q, Tensor k, Tensor v)",
    "forward",
    _ON_GPU,
)
_define(
    "qk_norm_rope_backward",
    "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor qkv, Tensor q_weight, Tensor k_weight, "
    "Tensor rotary, float eps) -> (Tensor grad_qkv, Tensor grad_q_weight, Tensor grad_k_weight)",
    "backward",
    _ON_GPU,
)


@torch.library.register_fake("deco_fast::qk_norm_rope")
def _(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rotary: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    head_size = q_weight.shape[0]
    shape = batch, tokens, width // (3 * head_size), head_size
    return qkv.new_empty(shape), qkv.new_empty(shape), qkv.new_empty(shape)


@torch.library.register_fake("deco_fast::qk_norm_rope_backward")
def _(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rotary: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        qkv.new_empty(qkv.shape),
        q_weight.new_empty(q_weight.shape),
        k_weight.new_empty(k_weight.shape),
    )


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, eps = inputs
    ctx.save_for_backward(*tensors)
    ctx.eps = eps


def _qk_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    gradients = fused_ops.qk_norm_rope_backward(*grads, *ctx.saved_tensors, ctx.eps)
    return *gradients, None, None


torch.library.register_autograd("deco_fast::qk_norm_rope", _qk_backward, setup_context=_keep_inputs)
torch.library.register_autograd(
    "deco_fast::qk_norm_rope_backward", _not_differentiable_again("qk_norm_rope")
)

_define(
    "norm_modulate",
    "(Tensor x, Tensor weight, Tensor shift, Tensor scale, float eps) -> Tensor",
    "forward",
    _ON_GPU,
)
_define(
    "norm_modulate_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor shift, Tensor scale, float eps) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_shift, Tensor grad_scale)",
    "backward",
    _ON_GPU,
)


@torch.library.register_fake("deco_fast::norm_modulate")
def _(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("deco_fast::norm_modulate_backward")
def _(
    grad: Tensor, x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        shift.new_empty(shift.shape),
        scale.new_empty(scale.shape),
    )


def _norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *fused_ops.norm_modulate_backward(grad, *ctx.saved_tensors, ctx.eps), None


torch.library.register_autograd(
    "deco_fast::norm_modulate", _norm_backward, setup_context=_keep_inputs
)
torch.library.register_autograd(
    "deco_fast::norm_modulate_backward", _not_differentiable_again("norm_modulate")
)


# --- packed_linear ------------------------------------------------------------------------------
# For inference on a CPU: no gradients. `weight` is laid out by `packed_linear/cpu.py`.

_define(
    "packed_linear",
    "(Tensor x, Tensor weight, Tensor? bias, int out_features, bool swiglu) -> Tensor",
    "forward",
    device_types=("cpu",),
)


@torch.library.register_fake("deco_fast::packed_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, swiglu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features // 2 if swiglu else out_features)
