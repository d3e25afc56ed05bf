"""What the class and the text model do alike: patches to the DiT, its tokens to the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deco_fast.flow import velocity
from deco_fast.kernels.layout import patchify
from deco_fast.models.card import ModelCard
from deco_fast.models.config import NetworkConfig
from deco_fast.models.embeddings import TimestepEmbedder


def check_bare(model: object) -> None:
    """Raise ValueError unless this is a network of ours, and not what torch wraps around one."""
    if not isinstance(model, DeCoNetwork):
        raise ValueError(
            f"a {type(model).__name__} is no DeCo network: pass the network itself, _orig_mod of a "
            "compiled one, module of a parallel one"
        )


class DeCoNetwork(nn.Module):
    """A DiT for the low frequencies, a decoder for the high ones.

    `to_velocity(decode(x, encode(x, t, y)), x, t)` is the velocity; where the network predicts the
    velocity itself, `to_velocity` changes nothing. Any height and width divisible by the patch
    size; the weights do not depend on them. `ClassConditional` and `DeCoT2I` say what the
    condition y is.

    Attributes:
        config: the network's shape.
        card: what the tensors cannot tell, where it is known.
    """

    config: NetworkConfig
    card: ModelCard | None
    patch_embedder: nn.Linear
    timestep_embedder: TimestepEmbedder
    blocks: nn.ModuleList
    decoder: nn.Module

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, which inputs are cast to."""
        return self.patch_embedder.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.patch_embedder.weight.device

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The velocity at x.

        Args:
            x: noisy images (B, C, H, W), about [−1, 1]; H and W divisible by the patch size.
            t: times (B,) in [0, 1]; 0 is noise, 1 is data.
            y: conditions (B, …): class labels (B,), int64, of which `config.num_classes` is the
                null class; or text features (B, text_length, text_size).

        Returns:
            (B, C, H, W) in the dtype of the weights.

        Raises:
            ValueError: a shape or dtype is wrong, or y is None.
        """
        return self.to_velocity(self.decode(x, self.encode(x, t, y)), x, t)

    @overload
    def encode(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor: ...

    @overload
    def encode(
        self, x: Tensor, t: Tensor, y: Tensor, return_layers: Sequence[int]
    ) -> tuple[Tensor, tuple[Tensor, ...]]: ...

    def encode(
        self, x: Tensor, t: Tensor, y: Tensor, return_layers: Sequence[int] = ()
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """The DiT: noisy image, time and condition to the decoder's condition.

        Args:
            x, t, y: as in `forward`.
            return_layers: 1-based numbers of the blocks whose outputs are wanted as well, as
                REPA aligns one of them (8 of the class models, 6 of the text model) with DINOv2.

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
        rotary = self.rotary_table(x.shape[-2] // p, x.shape[-1] // p, x.device)
        temb = self.timestep_embedder(t)[:, None]
        conditions = self._conditions(temb, y)
        s = self.patch_embedder(patchify(x.to(self.dtype), p))
        outputs: dict[int, Tensor] = {}
        for layer, block in enumerate(self.blocks, start=1):
            s = block(s, *conditions, rotary)
            if layer in return_layers:
                outputs[layer] = s
        tokens = self.decoder_condition(s, temb, *self.final_modulation(*conditions))
        if not return_layers:
            return tokens
        return tokens, tuple(outputs[layer] for layer in return_layers)

    def decode(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The decoder: noisy image (B, C, H, W) and `encode`'s (B, L, D) to the prediction.

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

    def final_modulation(self, *conditions: Tensor) -> tuple[Tensor, ...]:
        """What `decoder_condition` takes beside tokens and time: of most networks nothing.

        Args:
            conditions: as the blocks take them.
        """
        return ()

    def decoder_condition(self, s: Tensor, temb: Tensor, *modulation: Tensor) -> Tensor:
        """Tokens s (B, L, D) and time embedding (B, 1, D) to what `decode` takes: silu(temb + s).

        `modulation` is what `final_modulation` gives.
        """
        return F.silu(temb + s)

    def to_velocity(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """`decode`'s result at x (B, C, H, W) and times t (B,) as a velocity; here it is one."""
        return prediction

    def target(self, x: Tensor, noise: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """What the velocity at `noisy` is trained towards: x − noise, each (B, C, H, W) (B.7)."""
        return velocity(x, noise)

    def rotary_table(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        """The rotation of channel pairs on a grid of tokens, (height·width, head_dim/2, 2)."""
        raise NotImplementedError

    def _conditions(self, temb: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """What every block takes beside its tokens, from the time embedding (B, 1, D) and y."""
        raise NotImplementedError

    def _check_conditions(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        if t.ndim != 1 or t.shape[0] != x.shape[0]:
            raise ValueError(f"t must be times ({x.shape[0]},), not {tuple(t.shape)}")

    def _check_image(self, x: Tensor) -> None:
        p, channels = self.config.patch_size, self.config.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"x must be (B, {channels}, H, W), not {tuple(x.shape)}")
        if x.shape[-2] % p or x.shape[-1] % p:
            raise ValueError(
                f"image size {x.shape[-2]}×{x.shape[-1]} is not divisible by the patch size {p}"
            )
