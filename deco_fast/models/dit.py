"""A DiT block: attention and SwiGLU, both under AdaLN modulation."""

from __future__ import annotations

from torch import Tensor, nn

from deco_fast import ops
from deco_fast.models.attention import Attention
from deco_fast.models.config import DeCoConfig
from deco_fast.models.norm import RMSNorm


class SwiGLU(nn.Module):
    """w2(silu(w1 x) · w3 x), without biases (B.3)."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, inner_size, bias=False)
        self.w3 = nn.Linear(hidden_size, inner_size, bias=False)
        self.w2 = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return ops.swiglu(x, self.w1.weight, self.w3.weight, self.w2.weight)


class DiTBlock(nn.Module):
    """x += gate₁·Attention(modulate(norm x)); x += gate₂·SwiGLU(modulate(norm x)) (B.3)."""

    def __init__(self, config: DeCoConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size)
        self.attention = Attention(config.hidden_size, config.num_heads)
        self.norm2 = RMSNorm(config.hidden_size)
        self.mlp = SwiGLU(config.hidden_size, config.mlp_hidden_size)
        self.modulation = nn.Linear(config.hidden_size, 6 * config.hidden_size)

    def forward(self, x: Tensor, condition: Tensor, rotary: Tensor) -> Tensor:
        """Tokens x (B, L, D) under the activated condition (B, 1, D) to (B, L, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        attended = self.attention(_norm_modulate(x, self.norm1, shift1, scale1), rotary)
        x = x + gate1 * attended
        return x + gate2 * self.mlp(_norm_modulate(x, self.norm2, shift2, scale2))


def _norm_modulate(x: Tensor, norm: RMSNorm, shift: Tensor, scale: Tensor) -> Tensor:
    return ops.norm_modulate(x, norm.weight, shift, scale, norm.eps)
