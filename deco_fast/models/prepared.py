"""The DiT's blocks prepared for inference: the same function, other layouts of the weights.

What depends on time and condition alone, the AdaLN modulation and the keys and values of a text,
comes from outside, for it can be computed before the sampling loop
(`deco_fast.sampling.condition_table`). What is left of a block:

- The weights of RMSNorm are part of the modulation's scale.
- The gate and the value of SwiGLU are one product.
- The channels of a head are reordered, [0, 2, 4, …, 1, 3, 5, …], in q and k alike, which leaves
  q·k as it is: the pairs that rotary embedding turns are then the halves of a head, and vectors
  need no shuffling. Where a fused kernel turns them (`ops.qk_norm_rope`), they stay where they are.
- On a CPU the weights are packed (`deco_fast.kernels.packed_linear`).

Nothing here is saved: a prepared block is derived from a `DiTBlock` or a `JointBlock` and
forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from deco_fast import ops
from deco_fast.kernels.capability import has_avx512
from deco_fast.kernels.packed_linear.cpu import can_pack, can_split, interleave, pack, packed_linear
from deco_fast.kernels.registry import is_allowed
from deco_fast.kernels.swiglu.joined import MULTIPLE, fill, join
from deco_fast.models.attention import JointAttention, attention
from deco_fast.models.dit import DiTBlock, FusedSwiGLU, JointBlock, ModulatedBlock, SwiGLU
from deco_fast.models.plain import plain

# Narrower layers are bound by the cost of a call, which is less for torch's own.
_PACK_FROM_WIDTH = 512


@dataclass(frozen=True)
class WeightLayout:
    """How weights lie in memory.

    Attributes:
        packed: for the block products of a CPU; else as in `nn.Linear`.
        three_products: float32 products as three bfloat16 ones, with packed weights.
        halves: whether the channels of a head are reordered.
    """

    packed: bool
    three_products: bool = False
    halves: bool = True

    @classmethod
    def best(cls, device: torch.device, dtype: torch.dtype, width: int) -> WeightLayout:
        """What is fastest here for layers of this width.

        Three products stand for one where `torch.set_float32_matmul_precision("high")` allows it,
        as torch's documentation defines that setting, and the processor has a matrix unit.
        """
        ours = device.type == "cpu" and width >= _PACK_FROM_WIDTH and is_allowed("cpp")
        if not ours or not can_pack(dtype):
            halves = ops.backend_for("qk_norm_rope", device.type) != "triton"
            return cls(packed=False, halves=halves)
        allowed = torch.get_float32_matmul_precision() != "highest"
        three_products = dtype == torch.float32 and allowed and can_split()
        if dtype == torch.float32 and not three_products and not has_avx512():
            # With AVX2 alone the library's float32 products are faster by a sixth.
            return cls(packed=False)
        return cls(packed=True, three_products=three_products)


class PackedLinear(nn.Module):
    """A linear layer with a packed weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None, layout: WeightLayout) -> None:
        super().__init__()
        self.out_features = len(weight)
        self.weight = nn.Buffer(pack(weight, three_products=layout.three_products))
        self.bias = None if bias is None else nn.Buffer(bias.float())

    def forward(self, x: Tensor) -> Tensor:
        """x (…, K) to (…, N)."""
        return packed_linear(x, self.weight, self.bias, self.out_features)


class PackedSwiGLU(nn.Module):
    """down(silu(gate x) · value x) with packed weights, activated before it reaches memory."""

    def __init__(self, mlp: SwiGLU | FusedSwiGLU, layout: WeightLayout) -> None:
        super().__init__()
        gate, value, down = mlp.gate_value_down()
        weight = interleave(gate, value)
        self.inner_size = len(weight) // 2
        self.gate_value = nn.Buffer(pack(weight, three_products=layout.three_products))
        rest = self.inner_size - down.shape[1]
        self.down = PackedLinear(F.pad(down, (0, rest)), None, layout)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, D) to (…, D)."""
        return self.down(packed_linear(x, self.gate_value, None, 2 * self.inner_size, swiglu=True))


class MergedSwiGLU(nn.Module):
    """down(silu(gate x) · value x) with gate and value in one product, as wide as GPUs like."""

    def __init__(self, mlp: SwiGLU | FusedSwiGLU) -> None:
        super().__init__()
        gate, value, down = mlp.gate_value_down()
        if isinstance(mlp, FusedSwiGLU) and len(gate) % MULTIPLE == 0:
            merged: Tensor = mlp.w12.weight  # as it is, and so no second copy
        else:
            merged = join(gate, value)
        self.gate_value = _linear(merged, None)
        self.down = _linear(fill(down), None)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, D) to (…, D)."""
        gate, value = self.gate_value(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class PreparedBlock(nn.Module):
    """A DiT block whose modulation and text are given; see the module's docstring."""

    def __init__(self, block: DiTBlock | JointBlock, layout: WeightLayout) -> None:
        super().__init__()
        attention = block.attention
        self.num_heads = attention.num_heads
        self.eps = block.norm1.eps
        self.halves = layout.halves
        stock = attention.qkv_x if isinstance(attention, JointAttention) else attention.qkv
        proj = plain(attention.proj)
        qkv: Tensor = plain(stock).weight
        q_norm: Tensor = attention.q_norm.weight
        k_norm: Tensor = attention.k_norm.weight
        if layout.halves:
            qkv = _halve_pairs_of_qk(qkv, self.num_heads)
            q_norm, k_norm = _halve_pairs(q_norm), _halve_pairs(k_norm)
        self.q_norm, self.k_norm = nn.Buffer(q_norm.detach()), nn.Buffer(k_norm.detach())
        self.mlp: nn.Module
        if layout.packed:
            self.qkv: nn.Module = PackedLinear(qkv, None, layout)
            self.proj: nn.Module = PackedLinear(proj.weight, proj.bias, layout)
            self.mlp = PackedSwiGLU(block.mlp, layout)
        else:
            self.qkv = _linear(qkv, None)
            self.proj = _linear(proj.weight, proj.bias)
            self.mlp = MergedSwiGLU(block.mlp)

    def forward(
        self,
        x: Tensor,
        rotary: Tensor,
        modulation: Tensor,
        texts: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The block.

        Args:
            x: tokens (B, L, D).
            rotary: from `prepared_rotary_table`.
            modulation: (B, 6, D), or (1, 6, D) for all: shift, scale and gate of attention, then of
                the MLP, the scales as `fold_norms` makes them.
            texts: keys and values of distinct texts, (P, 2, heads, T, head_dim), as
                `prepared_text_keys_values` makes them; None for a block that attends to no text.
            rows: (B,), which of the texts is that of an image.

        Returns:
            (B, L, D).
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, :, None].unbind(1)
        z = _norm_modulate(x, shift1, scale1, self.eps)
        x = x + gate1 * self._attend(z, rotary, texts, rows)
        return x + gate2 * self.mlp(_norm_modulate(x, shift2, scale2, self.eps))

    def _attend(
        self, x: Tensor, rotary: Tensor, texts: Tensor | None, rows: Tensor | None
    ) -> Tensor:
        if self.halves:
            q, k, v = rearrange(self.qkv(x), "b l (n h d) -> n b h l d", n=3, h=self.num_heads)
            q = _norm_rotate(q, self.q_norm, rotary, self.eps)
            k = _norm_rotate(k, self.k_norm, rotary, self.eps)
        else:
            q, k, v = ops.qk_norm_rope(self.qkv(x), self.q_norm, self.k_norm, rotary, self.eps)
        if texts is not None:
            assert rows is not None
            text_k, text_v = texts.index_select(0, rows).unbind(1)
            k, v = torch.cat([k, text_k], dim=2), torch.cat([v, text_v], dim=2)
        return self.proj(rearrange(attention(q, k, v), "b h l d -> b l (h d)"))


def prepared_rotary_table(rotary: Tensor, layout: WeightLayout) -> Tensor:
    """A rotary table (L, head_dim/2, 2) as blocks of this layout take it.

    With halves (2, L, head_dim/2), else as it is.
    """
    return rotary.permute(2, 0, 1).contiguous() if layout.halves else rotary


def prepared_text_keys_values(text: Tensor, block: JointBlock, layout: WeightLayout) -> Tensor:
    """Refined text (P, T, D) as the prepared form of a block takes it, (P, 2, heads, T, head_dim).

    The keys are normalised, their channels reordered where those of the image's are.
    """
    k, v = block.attention.text_keys_values(text)
    if layout.halves:
        k = rearrange(k, "... (d pair) -> ... (pair d)", pair=2)
    return torch.stack([k, v], dim=1)


def fold_norms(modulation: Tensor, block: ModulatedBlock) -> Tensor:
    """What a block's modulation layer says (…, 6·D) as its prepared form takes it, (…, 6, D).

    norm(x)·w·(1 + scale) + shift becomes norm(x)·scale' + shift; float32 inside.
    """
    parts = list(modulation.unflatten(-1, (6, -1)).unbind(-2))
    for i, norm in ((1, block.norm1), (4, block.norm2)):
        wide = _wide(norm.weight)
        parts[i] = (wide * (1 + parts[i].to(wide.dtype))).to(modulation.dtype)
    return torch.stack(parts, dim=-2)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalise(x: Tensor, eps: float) -> Tensor:
    x = _wide(x)
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def _norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return (_normalise(x, eps) * scale + shift).to(x.dtype)


def _norm_rotate(x: Tensor, weight: Tensor, rotary: Tensor, eps: float) -> Tensor:
    cos, sin = rotary
    first, second = (_normalise(x, eps) * weight).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.to(x.dtype)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer around tensors that are there."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _halve_pairs(x: Tensor) -> Tensor:
    """Even places of the first axis, then odd ones."""
    return rearrange(x, "(d pair) ... -> (pair d) ...", pair=2).contiguous()


def _halve_pairs_of_qk(weight: Tensor, num_heads: int) -> Tensor:
    q, k, v = weight.chunk(3)
    pairs = "(h d pair) k -> (h pair d) k"
    q, k = (rearrange(part, pairs, h=num_heads, pair=2) for part in (q, k))
    return torch.cat([q, k, v])
