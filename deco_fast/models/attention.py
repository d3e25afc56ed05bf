"""Attention of the DiT: QK-norm, rotary embedding, and one function for the product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn import attention as registry

from deco_fast import ops
from deco_fast.models.norm import RMSNorm

try:
    import flash_attn
except ImportError:
    flash_attn = None


# FlashAttention 3 is Hopper's; 4 takes its place on Blackwell.
_TORCH_SWITCH = {9: "FA3", 10: "FA4"}


def activate_flash_attention(device: torch.device) -> str | None:
    """Have `scaled_dot_product_attention` use FlashAttention 3 or 4 where that is installed.

    For the commands, once at their start: it changes torch for the whole process. A choice that
    was made before is left alone.

    Returns:
        The name of what is active, "FA3" or "FA4", or None for torch's own kernels.
    """
    active = registry.current_flash_attention_impl()
    if active is not None or device.type != "cuda":
        return active
    name = _TORCH_SWITCH.get(torch.cuda.get_device_capability(device)[0])
    if name in registry.list_flash_attention_impls():
        try:
            registry.activate_flash_attention_impl(name)
        except (ImportError, RuntimeError):  # the package is not installed, or is another version
            return None
    return registry.current_flash_attention_impl()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √head_dim) v for (B, heads, L, head_dim), unmasked.

    FlashAttention 3 or 4 where `activate_flash_attention` found it; else flash-attn 2 where it is
    installed and takes the tensors (CUDA, bf16 or fp16, head size a multiple of 8 up to 256); else
    torch's own choice of kernel. All of these take DeCo-XL's head size of 72 as it is.
    """
    head_dim = q.shape[-1]
    if (
        flash_attn is not None
        and q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and registry.current_flash_attention_impl() is None
    ):
        out = flash_attn.flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention; q and k are normalised per head, then rotated (B.3)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.q_norm = RMSNorm(hidden_size // num_heads)
        self.k_norm = RMSNorm(hidden_size // num_heads)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        """x (B, L, D) to (B, L, D); text comes without a rotary table (L, head_dim/2, 2)."""
        if rotary is None:
            q, k, v = rearrange(self.qkv(x), "b l (n h d) -> n b h l d", n=3, h=self.num_heads)
            q, k = self.q_norm(q), self.k_norm(k)
        else:
            q, k, v = ops.qk_norm_rope(
                self.qkv(x), self.q_norm.weight, self.k_norm.weight, rotary, self.q_norm.eps
            )
        return self.proj(rearrange(attention(q, k, v), "b h l d -> b l (h d)"))


class JointAttention(nn.Module):
    """Image tokens attend to image and text; k_norm is that of both, rotation the image's (B.3)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv_x = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.kv_y = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.q_norm = RMSNorm(hidden_size // num_heads)
        self.k_norm = RMSNorm(hidden_size // num_heads)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def text_keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised keys, and values, of text (B, T, D): each (B, heads, T, head_dim)."""
        k, v = rearrange(self.kv_y(text), "b t (n h d) -> n b h t d", n=2, h=self.num_heads)
        return self.k_norm(k), v

    def forward(self, x: Tensor, text: Tensor, rotary: Tensor) -> Tensor:
        """x (B, L, D), text (B, T, D) and the rotary table (L, head_dim/2, 2) to (B, L, D)."""
        q, k, v = ops.qk_norm_rope(
            self.qkv_x(x), self.q_norm.weight, self.k_norm.weight, rotary, self.q_norm.eps
        )
        text_k, text_v = self.text_keys_values(text)
        out = attention(q, torch.cat([k, text_k], dim=2), torch.cat([v, text_v], dim=2))
        return self.proj(rearrange(out, "b h l d -> b l (h d)"))
