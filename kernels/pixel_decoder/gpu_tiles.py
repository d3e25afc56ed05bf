"""How the pixel decoder's Triton kernels cut their work, by size, dtype and GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from deco_fast.kernels.pixel_decoder.gpu_kernels import MATRICES


class Tile(NamedTuple):
    """How a kernel cuts its work."""

    pixels: int
    warps: int
    programs: int
    """Programs for each multiprocessor: as many as fit, for each takes tiles until none is left."""


_FORWARD = {
    # channels, whether in half precision
    (16, True): Tile(64, 4, 4),
    (32, True): Tile(64, 4, 2),
    (64, True): Tile(64, 4, 1),
    (16, False): Tile(64, 4, 2),
    (32, False): Tile(16, 8, 1),
    (64, False): Tile(16, 8, 1),
}
_BACKWARD = {
    (16, True): Tile(64, 4, 2),
    (32, True): Tile(64, 4, 2),
    (64, True): Tile(64, 8, 1),
    (16, False): Tile(32, 4, 2),
    (32, False): Tile(16, 8, 1),
    (64, False): Tile(16, 8, 1),
}

_SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Of one program, by compute capability; where it is not known, the least of these."""

_FORWARD_OPERANDS = 12 * 1024
"""Shared memory that the forward kernel needs beside the matrices."""


class Shape(NamedTuple):
    """What the kernels are compiled for."""

    channels: int
    blocks: int
    patch_size: int
    dtype: torch.dtype

    @property
    def half(self) -> bool:
        """Whether operands have 16 bits."""
        return self.dtype != torch.float32

    def forward_tile(self, capability: int) -> Tile:
        """Of the forward kernel."""
        return _FORWARD[self.channels, self.half]

    def backward_tile(self, capability: int) -> Tile:
        """Of the backward kernel."""
        return _BACKWARD[self.channels, self.half]

    def forward_constants(
        self, tile: Tile, capability: int, interpreted: bool = False
    ) -> dict[str, Any]:
        """The arguments that the forward kernel is compiled with."""
        matrices = self.blocks * MATRICES.value * self.channels**2 * self.dtype.itemsize
        available = _SHARED_MEMORY.get(capability, min(_SHARED_MEMORY.values()))
        hoist = self.half and matrices + _FORWARD_OPERANDS <= available and (capability < 100 or self.blocks <= 3)
        return {
            "NUM_BLOCKS": self.blocks,
            "HOIST": hoist,
            **self._constants(tile, interpreted),
        }

    def backward_constants(
        self, tile: Tile, block: int, interpreted: bool = False
    ) -> dict[str, Any]:
        """The arguments that the backward kernel is compiled with for one of the blocks."""
        return {
            "FIRST": block == 0,
            "LAST": block == self.blocks - 1,
            **self._constants(tile, interpreted),
        }

    def _constants(self, tile: Tile, interpreted: bool) -> dict[str, Any]:
        return {
            "C": self.channels,
            "P": self.patch_size,
            "BLOCK": tile.pixels,
            "APPROXIMATE": self.half and not interpreted,
        }
