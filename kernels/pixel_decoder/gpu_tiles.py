"""How the pixel decoder's Triton kernels cut their work, by size, dtype and GPU.

The tables were found by compiling ahead of time (benchmarks/RECORDS.md has what was compared): no
forward kernel spills a register, and the backward kernels spill what `stack_bytes` states.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch

from deco_fast.kernels.pixel_decoder.gpu_kernels import MATRICES

_SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 103: 227 * 1024}
"""Bytes that one program can have, by compute capability, where that is more than 99 KiB."""

_OTHER_OPERANDS = 12 * 1024
"""Shared memory that the forward kernel needs beside the matrices."""


class Tile(NamedTuple):
    """How a kernel cuts its work."""

    pixels: int
    warps: int
    programs: int
    """Programs for each multiprocessor: as many as fit, for each takes tiles until none is left."""
    hoist: bool = True
    """Of the forward kernel: keep the matrices of all blocks loaded from tile to tile."""


_FORWARD = {
    # channels, whether in half precision
    (16, True): Tile(64, 4, 4),
    (32, True): Tile(64, 4, 2),
    # With the matrices of three blocks loaded, one program would fill a multiprocessor.
    (64, True): Tile(32, 8, 2, hoist=False),
    (16, False): Tile(64, 4, 2, hoist=False),
    (32, False): Tile(16, 8, 1, hoist=False),
    (64, False): Tile(16, 8, 1, hoist=False),
}
_BACKWARD = {
    (16, True): Tile(64, 4, 2),
    (32, True): Tile(64, 4, 2),
    (64, True): Tile(32, 8, 1),
    (16, False): Tile(16, 4, 4),
    (32, False): Tile(16, 8, 1),
    (64, False): Tile(16, 16, 1),
}
_SMALL_MEMORY_BACKWARD = {(64, True): Tile(16, 8, 1)}
"""Where a program can have 99 KiB of shared memory and no more."""
_ONLY_BLOCK_BACKWARD = {(32, True): Tile(32, 4, 2), (32, False): Tile(16, 16, 1)}
"""Of a single block, whose kernel has both the input projections and the output."""
_HOPPER_BACKWARD = {(16, False): Tile(32, 8, 1)}
"""On sm_90, where with tiles of 16 pixels the last block's kernel spills."""
_BLACKWELL_BACKWARD = {(32, True): Tile(64, 8, 1)}
"""With products in tensor memory (sm_100), half as many values to a thread."""

_STACK_BYTES = {(16, True): 64, (32, True): 64, (64, True): 64, (32, False): 64, (64, False): 896}
_AMPERE_STACK_BYTES = {(32, True): 640}
"""sm_80 and its kin, sm_120 among them, hold the matrices of products in registers, and so spill
them; elsewhere the matrices stay in shared memory."""


def _has_tensor_memory(capability: int) -> bool:
    return capability // 10 in (10, 11)


def candidates(tile: Tile) -> list[Tile]:
    """What DECO_AUTOTUNE=1 measures: the tile, then others with half to twice its size."""
    pixels = {max(16, tile.pixels // 2), tile.pixels, tile.pixels * 2}
    warps = {max(4, tile.warps // 2), tile.warps, min(16, tile.warps * 2)}
    programs = {max(1, tile.programs // 2), tile.programs, tile.programs + 1}
    others = [
        tile._replace(pixels=p, warps=w, programs=n)
        for p, w, n in itertools.product(sorted(pixels), sorted(warps), sorted(programs))
    ]
    return [tile, *(other for other in others if other != tile)]


def fits_shared_memory(channels: int, dtype: torch.dtype, capability: int) -> bool:
    """Whether the backward kernel's smallest tile fits into a GPU of this compute capability."""
    return channels < 64 or dtype != torch.float32 or capability in _SHARED_MEMORY


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
        if (self.channels, self.half, self.blocks) == (64, True, 1):
            # Its loop over blocks would be no loop, so that nothing keeps the registers free.
            return Tile(64, 8 if _has_tensor_memory(capability) else 4, 1)
        tile = _FORWARD[self.channels, self.half]
        matrices = self.blocks * MATRICES.value * self.channels**2 * self.dtype.itemsize
        too_large = matrices + _OTHER_OPERANDS > _SHARED_MEMORY.get(capability, 99 * 1024)
        # Each product that is written out has its own place in tensor memory, whose 512 columns
        # serve all programs of a multiprocessor: not enough for more than two blocks.
        too_many = _has_tensor_memory(capability) and self.blocks > 2
        if tile.hoist and (too_large or too_many):
            return tile._replace(hoist=False)
        return tile

    def backward_tile(self, capability: int) -> Tile:
        """Of the backward kernel."""
        key = self.channels, self.half
        if self.blocks == 1 and key in _ONLY_BLOCK_BACKWARD:
            return _ONLY_BLOCK_BACKWARD[key]
        if capability == 90 and key in _HOPPER_BACKWARD:
            return _HOPPER_BACKWARD[key]
        if _has_tensor_memory(capability) and key in _BLACKWELL_BACKWARD:
            return _BLACKWELL_BACKWARD[key]
        if capability not in _SHARED_MEMORY and key in _SMALL_MEMORY_BACKWARD:
            return _SMALL_MEMORY_BACKWARD[key]
        return _BACKWARD[key]

    def stack_bytes(self, capability: int) -> int:
        """Stack of a backward kernel's thread, which holds what it spills, at most."""
        key = self.channels, self.half
        if (capability < 90 or capability >= 120) and key in _AMPERE_STACK_BYTES:
            return _AMPERE_STACK_BYTES[key]
        return _STACK_BYTES.get(key, 0)

    def forward_constants(self, tile: Tile, interpreted: bool = False) -> dict[str, Any]:
        """The arguments that the forward kernel is compiled with."""
        return {
            "NUM_BLOCKS": self.blocks,
            "HOIST": tile.hoist,
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
