"""Both ways to the gradients on a CPU agree with fp64, and the faster one is taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsify.cpu import backward, kernel
from sparsify.cpu.backward import dense_masked_backward, masking_pays, moe_ffn_backward_cpu
from sparsify.cpu.experts import Experts
from sparsify.kernels.reference import ACTIVATIONS

# tokens, hidden_size, width, out_features, num_experts, top_k: one token, primes, K = 1, K = E, one expert.
SHAPES = [
    (1, 16, 8, 16, 4, 2), (13, 7, 5, 3, 3, 3), (53, 33, 17, 29, 5, 1), (40, 64, 24, 48, 1, 1), (0, 8, 4, 8, 2, 1),
]  # fmt: skip
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


Layer = tuple[Tensor, Tensor, Tensor, Experts]
Check = Callable[[list[Tensor], Tensor, Layer, float], None]
Needs = Callable[[Experts], list[bool]]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("gated", "biased"), [(False, True), (True, True), (True, False)])
def test_masked_gradients(
    shape: tuple[int, ...], gated: bool, biased: bool, dtype: torch.dtype, make_layer: Callable[..., Layer],
    require_exact: Check, needs_of: Needs,
) -> None:  # fmt: skip
    """Protects: every formula, with experts that no token chose, and tokens that are not contiguous."""
    x, weights, ids, experts = make_layer(*shape, gated=gated, biased=biased, dtype=dtype)
    layer = (x.t().contiguous().t(), weights.to(torch.promote_types(dtype, torch.float32)), ids, experts)
    grad = torch.randn(len(x), shape[3]).to(dtype)
    require_exact(dense_masked_backward(grad, *layer, needs_of(experts)), grad, layer, BOUNDS[dtype])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_unused_slots(
    activation: str, make_layer: Callable[..., Layer], require_exact: Check, needs_of: Needs
) -> None:
    """Protects: a slot of -1 gets and gives no gradient, next to the chosen expert 0 too; a token without any is 0."""
    x, weights, ids, experts = make_layer(11, 12, 6, 10, 5, 2, activation=activation, gated=activation == "silu")
    ids[0], ids[4] = torch.tensor([0, -1]), -1
    layer, grad = (x, weights, ids.masked_fill(ids == 3, -1), experts), torch.randn(11, 10)
    found = dense_masked_backward(grad, *layer, needs_of(experts))
    require_exact(found, grad, layer, 2e-6)
    assert not found[0][4].any()
    assert not found[1][ids < 0].any()


def test_what_was_not_chosen_may_overflow(make_layer: Callable[..., Layer], needs_of: Needs) -> None:
    """Protects: an expert without a token leaves no NaN behind, as when experts run one after another."""
    x, weights, ids, experts = make_layer(9, 12, 6, 10, 5, 2)
    ids = ids.masked_fill(ids == 3, -1)
    experts.up_proj[3] = torch.finfo(x.dtype).max
    assert not (x @ experts.up_proj[3].t()).isfinite().all()
    found = dense_masked_backward(torch.randn(9, 10), x, weights, ids, experts, needs_of(experts))
    assert all(bool(gradient.isfinite().all()) for gradient in found)


def test_only_what_is_needed(make_layer: Callable[..., Layer]) -> None:
    """Protects: frozen weights cost nothing, and a bias that is not there is no error."""
    x, weights, ids, experts = make_layer(9, 12, 6, 10, 5, 2, gated=True)
    for place in (0, 1, 3, 4, 5, 6, 7, 8):
        found = dense_masked_backward(torch.randn(9, 10), x, weights, ids, experts, [i == place for i in range(9)])
        assert [i for i, gradient in enumerate(found) if gradient.numel()] == [place]
    x, weights, ids, experts = make_layer(9, 12, 6, 10, 5, 2, biased=False)
    found = dense_masked_backward(torch.randn(9, 10), x, weights, ids, experts, [True] * 9)
    assert [i for i, gradient in enumerate(found) if gradient.numel()] == [0, 1, 3, 7]


def test_many_small_experts_are_masked(
    make_layer: Callable[..., Layer], needs_of: Needs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: the choice without a kernel: 48 experts of 32 neurons at once, 4 of 512 one after another."""
    small, large = make_layer(256, 64, 32, 64, 48, 8), make_layer(256, 512, 512, 512, 4, 1)
    assert [masking_pays(layer[0], layer[2], layer[3]) for layer in (small, large)] == [True, False]
    many = torch.empty(1 << 14, 64), torch.empty(1 << 14, 8, dtype=torch.int64), make_layer(1, 64, 1, 64, 2048, 8)[3]
    assert not masking_pays(*many)  # temporary tensors of 128 MB
    taken: list[str] = []
    monkeypatch.setattr(kernel, "covers", lambda *_: False)
    monkeypatch.setattr(backward, "dense_masked_backward", lambda *_: taken.append("masked"))
    monkeypatch.setattr(backward, "moe_ffn_backward_reference", lambda *_: taken.append("one after another"))
    for x, weights, ids, experts in (small, large):
        moe_ffn_backward_cpu(x, x, weights, ids, *experts, needs_of(experts))
    assert taken == ["masked", "one after another"]


@pytest.mark.skipif(not kernel.kernel_status().available, reason=kernel.kernel_status().reason)
def test_narrow_experts_of_which_few_run_go_to_the_kernel(
    make_layer: Callable[..., Layer], needs_of: Needs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: the choice with a kernel; what it is slower at, or does not know, is left to torch."""
    monkeypatch.setattr(kernel, "run_backward", lambda *_: "by the kernel")

    def taken(layer: Layer) -> bool:
        x, weights, ids, experts = layer
        return moe_ffn_backward_cpu(x, x, weights, ids, *experts, needs_of(experts)) == "by the kernel"

    assert taken(make_layer(16, 64, 32, 64, 48, 8))
    assert not taken(make_layer(16, 64, 32, 64, 4, 3))  # most of them run
    assert not taken(make_layer(16, 600, 600, 600, 4, 1))  # wide
    assert not taken(make_layer(0, 64, 32, 64, 48, 8))
    assert not taken(make_layer(16, 64, 32, 64, 48, 8, dtype=torch.bfloat16))
