"""The compiled gradients: right, repeatable, on any number of threads, and only what is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from sparsify.cpu import kernel
from sparsify.cpu.experts import Experts
from sparsify.kernels.reference import ACTIVATIONS

pytestmark = pytest.mark.skipif(not kernel.kernel_status().available, reason=kernel.kernel_status().reason)

Layer = tuple[Tensor, Tensor, Tensor, Experts]
MakeLayer = Callable[..., Layer]
Check = Callable[[list[Tensor], Tensor, Layer, float], None]
Needs = Callable[[Experts], list[bool]]

# tokens, hidden_size, width, out_features, num_experts, top_k: one token, primes, K = 1, K = E, one expert; blocks half
# a vector wide, slices of one size and of two, columns that fill no tile, one, several.
SHAPES = [
    (1, 16, 8, 16, 4, 2), (13, 7, 5, 3, 3, 3), (53, 33, 17, 29, 5, 1), (40, 64, 24, 48, 1, 1), (11, 1, 1, 1, 2, 1),
    (210, 100, 8, 90, 24, 6), (64, 48, 130, 47, 8, 2), (128, 64, 96, 200, 4, 2), (300, 96, 50, 64, 2, 2),
    (300, 33, 8, 3, 5, 4), (130, 40, 16, 37, 12, 3), (70, 33, 12, 37, 9, 3),  # weights in rows
]  # fmt: skip
BOUND = 3e-6


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, and resets it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.usefixtures("poison")
def test_equals_the_reference(
    shape: tuple[int, ...], gated: bool, biased: bool, make_layer: MakeLayer, require_exact: Check, needs_of: Needs
) -> None:
    """Protects: tails of every dimension, experts without a token, unused slots, and memory that no one wrote."""
    x, weights, ids, experts = make_layer(*shape, gated=gated, biased=biased)
    ids = ids.masked_fill(ids == 1, -1)
    layer, grad = (x.t().contiguous().t(), weights, ids, experts), torch.randn(shape[0], shape[3])
    require_exact(kernel.run_backward(grad, *layer, needs_of(experts)), grad, layer, BOUND)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.usefixtures("poison")
def test_activations(
    activation: str, gated: bool, make_layer: MakeLayer, require_exact: Check, needs_of: Needs
) -> None:
    """Protects: each slope, with large values too."""
    x, weights, ids, experts = make_layer(40, 32, 48, 32, 3, 1, activation=activation, gated=gated)
    for rows in (x, x * 30):
        layer, grad = (rows, weights, ids, experts), torch.randn(40, 32)
        require_exact(kernel.run_backward(grad, *layer, needs_of(experts)), grad, layer, BOUND)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_slopes_to_the_last_places(activation: str, make_layer: MakeLayer) -> None:
    """Protects: the polynomials; x is handed through, the down projection is the identity."""
    x = torch.linspace(-20, 20, 1003).unsqueeze(1)
    _, _, _, experts = make_layer(1, 1, 1, 1, 1, 1, activation=activation, biased=False)
    one, ids = torch.ones(1, 1, 1), torch.zeros(len(x), 1, dtype=torch.int64)
    experts = experts._replace(up_proj=one, down_proj=one)
    needs = [True, *[False] * 8]
    slope = kernel.run_backward(torch.ones(len(x), 1), x, torch.ones(len(x), 1), ids, experts, needs)[0]
    z = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(ACTIVATIONS[activation](z).sum(), z)
    assert float((slope - expected).abs().max()) <= 5e-7


@pytest.mark.parametrize("shape", [(380, 64, 90, 64, 2, 1), (700, 64, 8, 64, 40, 4)])  # shared slices, many experts
@pytest.mark.usefixtures("poison")
def test_same_bits_with_any_number_of_threads(
    shape: tuple[int, ...], threads: Callable[[int], None], make_layer: MakeLayer, needs_of: Needs
) -> None:
    """Protects: no sum depends on who computes it."""
    layer = make_layer(*shape, gated=True)
    grad, results = torch.randn(shape[0], shape[3]), []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(kernel.run_backward(grad, *layer, needs_of(layer[3])))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.usefixtures("poison")
def test_down_by_neuron(make_layer: MakeLayer, require_exact: Check, needs_of: Needs) -> None:
    """Protects: a view of `[E, I, D_out]` is read where it lies, and its gradient lies the same way."""
    for shape in ((53, 33, 17, 29, 5, 1), (64, 48, 130, 47, 8, 2), (90, 40, 8, 40, 12, 3)):
        x, weights, ids, experts = make_layer(*shape)
        by_neuron = experts.down_proj.transpose(1, 2).contiguous().transpose(1, 2)
        layer, grad = (x, weights, ids, experts._replace(down_proj=by_neuron)), torch.randn(shape[0], shape[3])
        found = kernel.run_backward(grad, *layer, needs_of(experts))
        require_exact(found, grad, layer, BOUND)
        assert found[7].stride() == by_neuron.stride()


@pytest.mark.parametrize(("tokens", "width"), [(13, 150), (300, 8)])
@pytest.mark.usefixtures("poison")
def test_an_expert_in_two_slots_of_a_token(
    tokens: int, width: int, make_layer: MakeLayer, require_exact: Check, needs_of: Needs
) -> None:
    """Protects: both rows add to the gradient of the token, also of a wide expert, and with more rows than tokens."""
    x, weights, ids, experts = make_layer(tokens, 40, width, 33, 2, 2, gated=True)
    layer, grad = (x, weights, ids[:, :1].expand(tokens, 2), experts), torch.randn(tokens, 33)
    require_exact(kernel.run_backward(grad, *layer, needs_of(experts)), grad, layer, BOUND)


def test_strided_weights(make_layer: MakeLayer, require_exact: Check, needs_of: Needs) -> None:
    """Protects: views of the weights of a dense layer."""
    x, weights, ids, experts = make_layer(20, 16, 8, 12, 4, 2)
    dense = experts.down_proj.transpose(0, 1).flatten(1).contiguous()  # [D_out, E * I]
    layer = (x, weights, ids, experts._replace(down_proj=dense.view(12, 4, 8).transpose(0, 1)))
    grad = torch.randn(20, 24)[:, ::2]
    require_exact(kernel.run_backward(grad.contiguous(), *layer, needs_of(experts)), grad, layer, BOUND)


def test_only_what_is_needed(make_layer: MakeLayer) -> None:
    """Protects: frozen weights cost nothing, and a bias that is not there is no error."""
    x, weights, ids, experts = make_layer(9, 12, 6, 10, 5, 2, gated=True)
    for place in (0, 1, 3, 4, 5, 6, 7, 8):
        found = kernel.run_backward(torch.randn(9, 10), x, weights, ids, experts, [i == place for i in range(9)])
        assert [i for i, gradient in enumerate(found) if gradient.numel()] == [place]
    x, weights, ids, experts = make_layer(9, 12, 6, 10, 5, 2, biased=False)
    found = kernel.run_backward(torch.randn(9, 10), x, weights, ids, experts, [True] * 9)
    assert [i for i, gradient in enumerate(found) if gradient.numel()] == [0, 1, 3, 7]


def test_an_expert_that_is_none(make_layer: MakeLayer, needs_of: Needs) -> None:
    """Protects: a wrong id reads and writes no foreign memory."""
    x, weights, ids, experts = make_layer(20, 16, 8, 12, 4, 2)
    for wrong in (4, -2, 2**40):
        ids[7, 1] = wrong
        with pytest.raises(IndexError, match=r"must lie in \[-1, 4\)"):
            kernel.run_backward(torch.randn(20, 12), x, weights, ids, experts, needs_of(experts))
