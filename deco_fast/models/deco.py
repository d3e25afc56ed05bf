"""DeCo: a DiT for the low frequencies, a pixel decoder for the high ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deco_fast.kernels.layout import patchify
from deco_fast.models.card import ModelCard
from deco_fast.models.config import DeCoConfig
from deco_fast.models.decoder import PixelDecoder
from deco_fast.models.dit import DiTBlock
from deco_fast.models.embeddings import TimestepEmbedder, rotary_table
from deco_fast.models.presets import preset


class DeCo(nn.Module):
    """Class-conditional DeCo: `decode(x, encode(x, t, y))` is the velocity.

    Any height and width divisible by the patch size; the weights do not depend on them. They
    begin as published (specification B.8): at zero velocity, though no DiT block at zero.

    Attributes:
        config: the network's shape.
        card: what the tensors cannot tell, where it is known.
    """

    def __init__(self, config: DeCoConfig, card: ModelCard | None = None) -> None:
        super().__init__()
        self.config = config
        self.card = card
        self.patch_embedder = nn.Linear(
            config.in_channels * config.patch_size**2, config.hidden_size
        )
        self.timestep_embedder = TimestepEmbedder(config.hidden_size)
        self.class_embedder = nn.Embedding(config.num_classes + 1, config.hidden_size)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.decoder = PixelDecoder(config)
        nn.init.xavier_uniform_(self.patch_embedder.weight)
        nn.init.zeros_(self.patch_embedder.bias)
        nn.init.normal_(self.class_embedder.weight, std=config.class_embedding_std)

    @classmethod
    def from_preset(cls, name: str) -> DeCo:
        """A freshly initialised model: "deco-xl", "deco-xl-512", "deco-l" or "deco-digits".

        Raises:
            UserError: there is no such preset.
        """
        return cls(*preset(name))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, which inputs are cast to."""
        return self.patch_embedder.weight.dtype

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The velocity at x.

        Args:
            x: noisy images (B, C, H, W), about [−1, 1]; H and W divisible by the patch size.
            t: times (B,) in [0, 1]; 0 is noise, 1 is data.
            y: class labels (B,), int64; `config.num_classes` is the null class.

        Returns:
            (B, C, H, W) in the dtype of the weights.

        Raises:
            ValueError: a shape or dtype is wrong, or y is None.
        """
        return self.decode(x, self.encode(x, t, y))

    @overload
    def encode(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor: ...

    @overload
    def encode(
        self, x: Tensor, t: Tensor, y: Tensor, return_layers: Sequence[int]
    ) -> tuple[Tensor, tuple[Tensor, ...]]: ...

    def encode(
        self, x: Tensor, t: Tensor, y: Tensor, return_layers: Sequence[int] = ()
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """The DiT: noisy image, time and class to the decoder's condition silu(temb + s).

        Args:
            x, t, y: as in `forward`.
            return_layers: 1-based numbers of the blocks whose outputs are wanted as well, as
                REPA aligns one of them (8 in the paper) with DINOv2.

        Returns:
            (B, L, D); with return_layers a pair of it and those outputs, each (B, L, D).

        Raises:
            ValueError: as `forward`, or a layer does not exist.
        """
        self._check_image(x)
        self._check_conditions(x, t, y)
        for layer in return_layers:
            if not 1 <= layer <= self.config.depth:
                raise ValueError(
                    f"layer {layer} does not exist: blocks are 1 … {self.config.depth}"
                )
        p = self.config.patch_size
        rotary = rotary_table(
            x.shape[-2] // p, x.shape[-1] // p, self.config.head_dim, device=x.device
        )
        temb = self.timestep_embedder(t)[:, None]
        condition = F.silu(temb + self._embed_class(y)[:, None])
        s = self.patch_embedder(patchify(x.to(self.dtype), p))
        outputs: dict[int, Tensor] = {}
        for layer, block in enumerate(self.blocks, start=1):
            s = block(s, condition, rotary)
            if layer in return_layers:
                outputs[layer] = s
        tokens = F.silu(temb + s)
        if not return_layers:
            return tokens
        return tokens, tuple(outputs[layer] for layer in return_layers)

    def decode(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The pixel decoder: noisy image (B, C, H, W) and `encode`'s (B, L, D) to the velocity.

        Raises:
            ValueError: the image's shape is wrong, or the tokens are not those of such an image.
        """
        self._check_image(x)
        p = self.config.patch_size
        length = (x.shape[-2] // p) * (x.shape[-1] // p)
        expected = (x.shape[0], length, self.config.hidden_size)
        if tuple(tokens.shape) != expected:
            raise ValueError(f"tokens must be {expected} for this image, not {tuple(tokens.shape)}")
        return self.decoder(x.to(self.dtype), tokens)

    def _embed_class(self, y: Tensor) -> Tensor:
        try:
            return self.class_embedder(y)
        except IndexError as error:  # a GPU would have to be waited for to know
            raise ValueError(
                f"y must be labels 0 … {self.config.num_classes - 1}, or {self.config.num_classes} "
                f"for the null class, not {y.min()} … {y.max()}"
            ) from error

    def _check_image(self, x: Tensor) -> None:
        p, channels = self.config.patch_size, self.config.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"x must be (B, {channels}, H, W), not {tuple(x.shape)}")
        if x.shape[-2] % p or x.shape[-1] % p:
            raise ValueError(
                f"image size {x.shape[-2]}×{x.shape[-1]} is not divisible by the patch size {p}"
            )

    def _check_conditions(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        null = self.config.num_classes
        if y is None:
            raise ValueError(
                f"y must be class labels (B,), not None; the null class is {null} "
                "(config.num_classes)"
            )
        if y.dtype not in (torch.int64, torch.int32) or y.ndim != 1 or y.shape[0] != x.shape[0]:
            raise ValueError(
                f"y must be int64 labels ({x.shape[0]},), not {y.dtype} {tuple(y.shape)}"
            )
        if t.ndim != 1 or t.shape[0] != x.shape[0]:
            raise ValueError(f"t must be times ({x.shape[0]},), not {tuple(t.shape)}")
