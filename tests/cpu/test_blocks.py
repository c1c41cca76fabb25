"""Weights in blocks: laid out as said, and computed with as right and repeatably as with weights in rows."""

from __future__ import annotations

import pytest
import torch

from sparsify.cpu import kernel
from sparsify.cpu.blocks import experts_in_blocks, in_blocks, kept_blocks

needs_kernel = pytest.mark.skipif(not kernel.kernel_status().available, reason=kernel.kernel_status().reason)

# tokens, hidden_size, width, out_features, num_experts, top_k: one token, primes, K = 1, K = E; tiles of every height;
# blocks that fill a vector, all of them, one and a part; several blocks, segments, chunks.
SHAPES = [
    (1, 64, 48, 64, 4, 2), (1, 7, 5, 3, 3, 3), (53, 101, 67, 71, 3, 1), (37, 33, 17, 29, 5, 3), (20, 64, 96, 128, 1, 1),
    (300, 96, 130, 64, 2, 2), (64, 48, 129, 47, 8, 2), (11, 1, 1, 1, 2, 1), (1100, 9, 131, 7, 3, 2),
    (2100, 9, 5, 7, 3, 2), (301, 101, 67, 71, 5, 3), (67, 37, 8, 96, 16, 16), (130, 40, 24, 100, 12, 3),  # by tokens
    # eight neurons, whose down_proj stays in registers: outputs in pairs of vectors, one, a part; projections in rows
    (130, 70, 8, 100, 24, 7), (300, 33, 8, 3, 20, 7), (1, 70, 16, 40, 9, 4), (130, 5, 15, 40, 9, 4),
    # half a vector wide, of AVX-512, AVX2 and neither; outputs too; an odd number of inputs, and one
    (67, 37, 8, 8, 16, 4), (5, 37, 8, 72, 4, 2), (67, 37, 4, 4, 16, 4), (67, 36, 2, 2, 16, 4), (9, 1, 8, 8, 3, 2),
]  # fmt: skip


@pytest.mark.parametrize("outputs", [1, 5, 16, 63, 64, 65, 96, 128, 131, 768])
def test_layout(outputs):
    """Protects: every weight is where it is said to be, in few blocks, and padding is small and zero."""
    weight = torch.randn(3, outputs, 7)
    blocks = in_blocks(weight)
    _, number, inputs, size = blocks.shape
    assert blocks.is_contiguous()
    assert (inputs, number) == (7, -(-outputs // 64))
    assert size <= 64
    assert 0 <= number * size - outputs < number
    for n in range(outputs):
        assert torch.equal(blocks[:, n // size, :, n % size], weight[:, n])
    assert not blocks.transpose(2, 3).flatten(1, 2)[:, outputs:].any()


def test_no_outputs():
    """Protects: an empty layer has no block."""
    assert in_blocks(torch.randn(3, 0, 7)).shape[:3] == (3, 0, 7)


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.usefixtures("poison")
def test_equals_the_reference(shape, gated, biased, make_layer, error_of):
    """Protects: tails of every dimension, tiles of every height, and unwritten memory."""
    x, weights, ids, experts = layer = make_layer(*shape, gated=gated, biased=biased)
    assert error_of(kernel.run(x, weights, ids, experts, experts_in_blocks(experts)), layer) <= 1.5e-6


@needs_kernel
@pytest.mark.parametrize(
    ("tokens", "width", "num_experts"),
    # one tile, shared segments, whole segments; by tokens with one thread, with two, with any
    [(9, 900, 2), (380, 900, 2), (1500, 192, 40), (200, 100, 40), (400, 24, 40), (1500, 13, 40), (200, 8, 40)],
)
@pytest.mark.usefixtures("poison")
def test_same_bits_with_any_number_of_threads(tokens, width, num_experts, make_layer, error_of):
    """Protects: no sum depends on who computes it or how high its tile is."""
    x, weights, ids, experts = layer = make_layer(tokens, 256, width, 256, num_experts, 2, gated=True, biased=True)
    blocks, before = experts_in_blocks(experts), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(kernel.run(x, weights, ids, experts, blocks))
    finally:
        torch.set_num_threads(before)
    assert error_of(results[0], layer) <= 1.5e-6
    assert all(torch.equal(result, results[0]) for result in results)


@needs_kernel
def test_unused_slots(make_layer, error_of):
    """Protects: a slot of id -1 adds nothing, and a token may have none."""
    x, weights, ids, experts = make_layer(29, 40, 24, 72, 5, 3)
    ids[torch.rand(29, 3) < 0.4] = -1
    ids[0] = -1
    y = kernel.run(x, weights, ids, experts, experts_in_blocks(experts))
    assert error_of(y, (x, weights, ids, experts)) <= 1.5e-6
    assert not y[0].any()


@needs_kernel
@pytest.mark.parametrize("tokens", [3, 200])
@pytest.mark.parametrize("width", [24, 8])
def test_an_expert_named_twice(tokens, width, make_layer, error_of):
    """Protects: each slot counts, also where the rows of one token follow each other; by pairs and by tokens."""
    x, weights, ids, experts = make_layer(tokens, 40, width, 72, 5, 4)
    ids[::2, 1] = ids[::2, 0]
    ids[::3] = 2
    layer = (x, weights, ids, experts)
    assert error_of(kernel.run(x, weights, ids, experts, experts_in_blocks(experts)), layer) <= 1.5e-6


@needs_kernel
def test_an_expert_that_is_none(make_layer):
    """Protects: a wrong id reads no foreign memory; by pairs and by tokens."""
    for tokens in (3, 200):
        x, weights, ids, experts = make_layer(tokens, 16, 8, 12, 4, 2)
        for wrong in (4, -2, 2**40):
            ids[tokens - 1, 1] = wrong
            with pytest.raises(IndexError, match=r"must lie in \[-1, 4\)"):
                kernel.run(x, weights, ids, experts, experts_in_blocks(experts))


@needs_kernel
@pytest.mark.parametrize("tokens", [3, 200])
@pytest.mark.parametrize("written", ["up_proj", "gate_proj", "down_proj"])
def test_a_copy_that_is_stale(tokens, written, make_layer):
    """Protects: weights that were written to since are noticed, each of them and for each expert that runs."""
    x, weights, ids, experts = make_layer(tokens, 40, 24, 72, 5, 2, gated=True)
    ids[:] = torch.tensor([0, 3])
    blocks = experts_in_blocks(experts)
    getattr(experts, written)[[1, 2, 4]] += 1  # of experts that do not run here
    kernel.run(x, weights, ids, experts, blocks)
    getattr(experts, written)[3] += 1
    with pytest.raises(kernel.StaleBlocksError):
        kernel.run(x, weights, ids, experts, blocks)


@needs_kernel
@pytest.mark.parametrize("width", [8, 16])
def test_projections_of_few_neurons_stay_in_rows(width, make_layer, error_of):
    """Protects: they are no copy, so there is none to keep, and what is written to them counts at once."""
    x, weights, ids, experts = layer = make_layer(200, 40, width, 72, 5, 2, gated=True)
    blocks = experts_in_blocks(experts)
    assert blocks.up_proj is experts.up_proj
    assert blocks.gate_proj is experts.gate_proj
    experts.up_proj.mul_(1.5)
    assert error_of(kernel.run(x, weights, ids, experts, blocks), layer) <= 1.5e-6
    assert experts_in_blocks(make_layer(1, 16, width + 9, 12, 4, 2)[3]).up_proj.dim() == 4


@needs_kernel
def test_kept_while_weights_stay(make_layer):
    """Protects: one copy for all calls; none while weights change, as in training; one again when they stay."""
    experts = make_layer(1, 16, 24, 12, 4, 2, gated=True)[3]
    first = kept_blocks(experts)
    assert first is not None
    for name in ("up_proj", "gate_proj", "down_proj"):
        assert getattr(kept_blocks(experts), name) is getattr(first, name)
        for _ in range(3):
            getattr(experts, name).mul_(2)
            assert kept_blocks(experts) is None
        found = [kept_blocks(experts) for _ in range(20)]
        assert found[0] is None
        again = found[-1]
        assert again is not None
        assert torch.equal(getattr(again, name), in_blocks(getattr(experts, name)))
