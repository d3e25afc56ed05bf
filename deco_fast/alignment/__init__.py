"""Representation alignment (REPA): the DiT's tokens are drawn towards DINOv2's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deco_fast.alignment.projector import Projector, alignment_loss
from deco_fast.errors import UserError

if TYPE_CHECKING:
    from deco_fast.alignment.dinov2 import DINOv2

__all__ = ["Projector", "alignment_loss", "load_encoder"]


def load_encoder(
    path: str,
    patch_size: int = 16,
    precision: str = "bf16",
    purpose: str = "REPA",
    option: str = "--repa",
    instead: str = "train without REPA by --repa off",
    size: str = "b",
) -> DINOv2:
    """The frozen encoder from a weight file.

    Args:
        path, purpose, option, instead, size: as for `deco_fast.alignment.weights.load_dinov2`.
        patch_size, precision: as for `DINOv2`.

    Raises:
        UserError: there are no such weights, or transformers is not installed.
    """
    try:
        # Imported here, as transformers is optional and takes seconds.
        from deco_fast.alignment.dinov2 import DINOv2
        from deco_fast.alignment.weights import load_dinov2
    except ImportError as error:
        raise UserError(
            f"{purpose} needs the package transformers: pip install 'deco-fast[repa]', or {instead}"
        ) from error
    return DINOv2(load_dinov2(path, purpose, option, instead, size), patch_size, precision)
