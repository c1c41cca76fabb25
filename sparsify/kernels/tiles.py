"""Which tile a kernel uses: a table on m = T K / E, the tokens of one expert, so that nothing is tuned at run time.

The numbers follow the accumulators that fit into registers without spilling, found by compiling ahead of time
(`python benchmarks/gpu.py --compile-only`), and the shared memory of the device. No time was measured for them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

SMALLEST_SHARED_MEMORY = 99 * 1024
"""Bytes of shared memory that a program may use on every supported NVIDIA card."""


@dataclass(frozen=True)
class Tile:
    """A block of a matrix product, and how it is scheduled."""

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int
    group: int
    """Row tiles that go through all columns together."""

    def shared_memory(self, element_size: int, products: int, buffers: int) -> int:
        """Bytes of the operands in flight: one block of rows and `products` blocks of columns a buffer."""
        return buffers * (self.rows + products * self.cols) * self.inner * element_size


def row_tile(m: float, element_size: int, shared_memory: int, *, accumulators: int = 1) -> Tile:
    """Tile of the kernels whose rows are sorted pairs; its `rows` depend on `m` alone.

    Args:
        m: tokens of one expert on average.
        element_size: bytes.
        shared_memory: bytes that a program may use.
        accumulators: 2 for a gated first projection, or for an epilogue that holds as many values.
    """
    if m <= 8:
        tile = Tile(rows=16, cols=64, inner=128, warps=4, stages=4, group=1)
    elif m <= 16:
        tile = Tile(rows=32, cols=128, inner=64, warps=4, stages=4, group=1)
    elif m <= 64:
        tile = Tile(rows=64, cols=128, inner=64, warps=4, stages=3, group=8)
    else:
        tile = Tile(rows=128, cols=128, inner=64, warps=8, stages=3, group=8 if m <= 128 else 16)
    if accumulators > 1 and tile.rows >= 32:
        tile = replace(tile, cols=tile.cols // 2)
    if element_size > 2:
        # Exact products of fp32 run outside the tensor cores, which takes registers for the operands as well.
        cols = tile.cols // 2 if tile.rows >= 32 or accumulators > 1 else tile.cols
        tile = replace(tile, cols=cols, inner=16 if tile.rows >= 64 else 32)
    return _fit(tile, element_size, shared_memory, products=accumulators)


def weight_grad_tile(m: float, element_size: int, shared_memory: int) -> Tile:
    """Tile of the gradient of a weight, whose inner dimension is the rows of one expert.

    Five stages, as rows are loaded by an index that has to be loaded first: each of the two takes half of them.
    """
    if m <= 16:
        tile = Tile(rows=64, cols=64, inner=16, warps=4, stages=5, group=8)
    elif m <= 64:
        tile = Tile(rows=64, cols=128, inner=32, warps=4, stages=5, group=8)
    else:
        tile = Tile(rows=128, cols=128, inner=64, warps=8, stages=5, group=8)
    if element_size > 2:
        tile = replace(tile, inner=max(tile.inner // 2, 16), cols=64)
    return _fit(tile, element_size, shared_memory, products=1, stages_a_buffer=2)


def _fit(tile: Tile, element_size: int, shared_memory: int, products: int, stages_a_buffer: int = 1) -> Tile:
    """Take stages away until the operands fit.

    There is a buffer a stage where a group of warps multiplies out of shared memory, which takes 64 rows. Elsewhere the
    operands of the current step are in registers: one buffer less.
    """
    for stages in range(tile.stages, 1, -stages_a_buffer):
        buffers = -(-stages // stages_a_buffer) - (tile.rows < 64)
        if tile.shared_memory(element_size, products, buffers) <= shared_memory:
            return replace(tile, stages=stages)
    return replace(tile, stages=1)


def skips_sorting(num_tokens: int, top_k: int, num_experts: int) -> bool:
    """Whether there are so few pairs that a program for each beats sorting them."""
    return num_tokens <= 4 or 4 * num_tokens * top_k <= num_experts


def shared_memory_of(device: torch.device) -> int:
    """Bytes of shared memory that a program may use there."""
    if device.type != "cuda":
        return SMALLEST_SHARED_MEMORY
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", SMALLEST_SHARED_MEMORY)


def fp32_precision() -> str:
    """How products of fp32 are computed: exact, unless the user allowed tf32 for matrix products."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
