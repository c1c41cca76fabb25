"""A random layer of experts, and what it computes in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsify.cpu import kernel
from sparsify.cpu.experts import Experts
from sparsify.kernels.reference import moe_ffn_backward_reference, moe_ffn_reference

Layer = tuple[Tensor, Tensor, Tensor, Experts]


@pytest.fixture
def make_layer() -> Callable[..., Layer]:
    """See `_make_layer`."""
    return _make_layer


@pytest.fixture
def error_of() -> Callable[[Tensor, Layer], float]:
    """The largest error of a result over the largest value, against the reference in fp64 on the same numbers."""
    return lambda y, layer: _relative_error(y, _exact(*layer))


@pytest.fixture
def require_exact() -> Callable[[list[Tensor], Tensor, Layer, float], None]:
    """That all nine gradients are right, relative to the largest value of each; see `_require_exact`."""
    return _require_exact


def _require_exact(found: list[Tensor], grad: Tensor, layer: Layer, bound: float) -> None:
    """Against the reference in fp64 on the same numbers."""
    x, weights, ids, experts = layer
    needs = _needs_of(experts)
    exact = moe_ffn_backward_reference(grad.double(), x.double(), weights.double(), ids, *experts.double(), needs)
    for place in (place for place, needed in enumerate(needs) if needed):
        ours, theirs = found[place], exact[place]
        assert ours.dtype == (weights if place == 1 else x).dtype
        assert ours.shape == theirs.shape
        size = float(theirs.abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=bound * size)


@pytest.fixture
def needs_of() -> Callable[[Experts], list[bool]]:
    """All gradients that there are."""
    return _needs_of


def _needs_of(experts: Experts) -> list[bool]:
    return [True, True, False, *(isinstance(part, Tensor) for part in experts[:6])]


def _make_layer(
    tokens: int,
    hidden_size: int,
    width: int,
    out_features: int,
    num_experts: int,
    top_k: int,
    activation: str = "gelu",
    gated: bool = False,
    biased: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Layer:
    """Tokens, routing weights, distinct random experts of every token, and the experts."""

    def weight(rows: int, columns: int) -> Tensor:
        return (torch.randn(num_experts, rows, columns) / columns**0.5).to(dtype)

    def bias(rows: int) -> Tensor | None:
        return (torch.randn(num_experts, rows) * 0.1).to(dtype) if biased else None

    experts = Experts(
        weight(width, hidden_size), bias(width),
        weight(width, hidden_size) if gated else None, bias(width) if gated else None,
        weight(out_features, width), bias(out_features), activation,
    )  # fmt: skip
    ids = torch.rand(tokens, num_experts).argsort(1)[:, :top_k]
    return torch.randn(tokens, hidden_size).to(dtype), torch.rand(tokens, top_k), ids, experts


def _exact(x: Tensor, routing_weights: Tensor, expert_ids: Tensor, experts: Experts) -> Tensor:
    """The reference on the same numbers in fp64."""
    return moe_ffn_reference(x.double(), routing_weights.double(), expert_ids, *experts.double())


def _relative_error(y: Tensor, expected: Tensor) -> float:
    """The largest error over the largest value."""
    if not expected.numel():
        return 0.0
    return float((y.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was never written is NaN, so that reading it shows."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args, **kwargs) -> Tensor:
            made = make(*args, **kwargs)
            return made.fill_(float("nan") if made.is_floating_point() else 99)

        return call

    monkeypatch.setattr(torch, "empty", filled(empty))
    monkeypatch.setattr(Tensor, "new_empty", filled(new_empty))
    monkeypatch.setattr(kernel, "_poison", True)
