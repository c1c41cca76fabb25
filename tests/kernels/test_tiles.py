"""`sparsify.kernels.tiles`: the table, and that what it names fits."""

from __future__ import annotations

import pytest
import torch

from sparsify.kernels.tiles import fp32_precision, row_tile, skips_sorting, weight_grad_tile

M = [0.1, 1, 8, 9, 16, 17, 64, 65, 128, 129, 5000]


def test_the_table():
    """Protects: the rows of section 7.5 of the reference."""
    found = [(tile.rows, tile.cols, tile.inner, tile.group) for tile in (row_tile(m, 2, 227 * 1024) for m in M)]
    assert found == (
        [(16, 64, 128, 1)] * 3
        + [(32, 128, 64, 1)] * 2
        + [(64, 128, 64, 8)] * 2
        + [(128, 128, 64, 8)] * 2
        + [(128, 128, 64, 16)] * 2
    )


@pytest.mark.parametrize("m", M)
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("shared_memory", [64 * 1024, 99 * 1024, 163 * 1024, 227 * 1024])
def test_tiles_fit_and_share_their_rows(m, element_size, shared_memory):
    """Protects: a layout serves all kernels of a call, no tile needs more memory than there is."""
    tiles = [row_tile(m, element_size, shared_memory, accumulators=n) for n in (1, 2)]
    assert len({tile.rows for tile in tiles}) == 1
    for products, tile in enumerate(tiles, 1):
        buffers = tile.stages - (tile.rows < 64)
        assert tile.shared_memory(element_size, products, buffers) <= shared_memory
        assert tile.rows * tile.cols * products / tile.warps <= 2048, "accumulators of a warp spill"
    sums = weight_grad_tile(m, element_size, shared_memory)
    assert sums.shared_memory(element_size, 1, -(-sums.stages // 2)) <= shared_memory


def test_wide_elements_take_smaller_blocks():
    """Protects: fp32 needs no more shared memory than bf16, and fewer accumulators."""
    assert [row_tile(m, 4, 99 * 1024).inner for m in M] == [32] * 5 + [16] * 6
    assert row_tile(200, 4, 99 * 1024).cols == row_tile(200, 2, 99 * 1024).cols // 2
    assert weight_grad_tile(200, 4, 99 * 1024).inner == weight_grad_tile(200, 2, 99 * 1024).inner // 2


def test_few_pairs_are_not_sorted():
    """Protects: up to 4 tokens, or a quarter as many pairs as experts."""
    assert skips_sorting(4, 8, 8)
    assert not skips_sorting(5, 8, 8)
    assert skips_sorting(8, 2, 64)
    assert not skips_sorting(9, 2, 64)


def test_fp32_is_exact_unless_the_user_says_otherwise():
    """Protects: tf32 is never the default."""
    before = torch.get_float32_matmul_precision()
    assert fp32_precision() == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert fp32_precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
