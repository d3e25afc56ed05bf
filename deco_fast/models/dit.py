"""DiT blocks: attention and SwiGLU, both under AdaLN modulation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from deco_fast import ops
from deco_fast.models.attention import Attention, JointAttention
from deco_fast.models.config import NetworkConfig
from deco_fast.models.norm import RMSNorm
from deco_fast.models.plain import is_plain, plain


class SwiGLU(nn.Module):
    """w2(silu(w1 x) · w3 x), without biases (B.3).

    One op, which reads the weights, unless a layer was replaced or has hooks.
    """

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, inner_size, bias=False)
        self.w3 = nn.Linear(hidden_size, inner_size, bias=False)
        self.w2 = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if all(map(is_plain, (self.w1, self.w3, self.w2))):
            return ops.swiglu(x, self.w1.weight, self.w3.weight, self.w2.weight)
        down: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return down

    def gate_value_down(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three weights: (inner, hidden), (inner, hidden), (hidden, inner)."""
        return plain(self.w1).weight, plain(self.w3).weight, plain(self.w2).weight


class FusedSwiGLU(nn.Module):
    """w3(silu(gate) · value) with [gate, value] = w12 x, without biases: the text model's (B.3)."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(hidden_size, 2 * inner_size, bias=False)
        self.w3 = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)

    def gate_value_down(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three weights: (inner, hidden), (inner, hidden), (hidden, inner)."""
        gate, value = plain(self.w12).weight.chunk(2)
        return gate, value, plain(self.w3).weight


def _norm_modulate(x: Tensor, norm: RMSNorm, shift: Tensor, scale: Tensor) -> Tensor:
    return ops.norm_modulate(x, norm.weight, shift, scale, norm.eps)


class ModulatedBlock(nn.Module):
    """x += gate₁·attention(modulate(norm x)); x += gate₂·mlp(modulate(norm x)) (B.3)."""

    def __init__(self, hidden_size: int, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = RMSNorm(hidden_size)
        self.attention = attention
        self.norm2 = RMSNorm(hidden_size)
        self.mlp = mlp
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, x: Tensor, condition: Tensor, *context: Tensor) -> Tensor:
        """Tokens x (B, L, D) under the activated condition (B, 1, D) to (B, L, D).

        `context` is what the attention takes beside its tokens.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        attended = self.attention(_norm_modulate(x, self.norm1, shift1, scale1), *context)
        x = x + gate1 * attended
        return x + gate2 * self.mlp(_norm_modulate(x, self.norm2, shift2, scale2))


class DiTBlock(ModulatedBlock):
    """A block of the class model; its context is the rotary table (L, head_dim/2, 2)."""

    attention: Attention
    mlp: SwiGLU

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(
            config.hidden_size,
            Attention(config.hidden_size, config.num_heads),
            SwiGLU(config.hidden_size, config.mlp_hidden_size),
        )


class TextBlock(ModulatedBlock):
    """A block that refines the text; no context, for text has no rotary embedding."""

    attention: Attention
    mlp: FusedSwiGLU

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(
            config.hidden_size,
            Attention(config.hidden_size, config.num_heads),
            FusedSwiGLU(config.hidden_size, config.mlp_hidden_size),
        )


class JointBlock(ModulatedBlock):
    """A block of the text model; its context is the text (B, T, D) and the rotary table."""

    attention: JointAttention
    mlp: FusedSwiGLU

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(
            config.hidden_size,
            JointAttention(config.hidden_size, config.num_heads),
            FusedSwiGLU(config.hidden_size, config.mlp_hidden_size),
        )
