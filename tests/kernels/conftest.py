"""Kernels run on the GPU if there is one, else in Triton's interpreter (`tests/conftest.py` turns it on)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.kernels import common
from sparsify.kernels.reference import moe_ffn_backward_reference, moe_ffn_reference

_POISONED = ("empty", "empty_like")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is NaN, or an index far outside of everything: what nobody wrote cannot pass for a result."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def fill(*args, **kwargs) -> Tensor:
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor.fill_(1) if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).min // 2)

        return fill

    for name in _POISONED:
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were started, in order."""
    names: list[str] = []
    launch = common.launch

    def record(kernel, programs, *args, **kwargs) -> None:
        names.extend([kernel.__name__] * bool(programs))
        launch(kernel, programs, *args, **kwargs)

    monkeypatch.setattr(common, "launch", record)
    return names


@dataclass(frozen=True)
class Problem:
    """Nine tensors of `sparsify::moe_ffn`, its activation and a gradient of its output."""

    tensors: tuple[Any, ...]
    activation: str
    grad: Tensor

    @property
    def arguments(self) -> list[Any]:
        return [*self.tensors, self.activation]

    def forward(self, run: Callable[..., Tensor] = moe_ffn_reference) -> Tensor:
        return run(*self.arguments)

    def backward(self, run: Callable[..., list[Tensor]] = moe_ffn_backward_reference, needs=None) -> list[Tensor]:
        return run(self.grad, *self.arguments, [True] * 9 if needs is None else needs)

    def to(self, dtype: torch.dtype) -> Problem:
        def cast(tensor: Tensor | None) -> Tensor | None:
            return tensor.to(dtype) if tensor is not None and tensor.is_floating_point() else tensor

        return Problem(tuple(cast(t) for t in self.tensors), self.activation, self.grad.to(dtype))


@pytest.fixture
def problem(device: torch.device) -> Callable[..., Problem]:
    """Makes a problem; a share of `unused` slots has no expert, and with `crowd` only the first experts are chosen."""

    def make(
        tokens: int,
        top_k: int,
        experts: int,
        size: int = 19,
        neurons: int = 23,
        features: int = 17,
        *,
        gated: bool = False,
        bias: bool = True,
        activation: str = "gelu",
        dtype: torch.dtype = torch.float32,
        unused: float = 0.2,
        crowd: int | None = None,
    ) -> Problem:
        def weight(*shape: int) -> Tensor:
            return torch.randn(shape) / shape[-1] ** 0.5

        ids = torch.rand(tokens, crowd or experts).argsort(-1)[:, :top_k]
        ids[torch.rand(tokens, top_k) < unused] = -1
        tensors = (
            torch.randn(tokens, size),
            torch.rand(tokens, top_k),
            ids,
            weight(experts, neurons, size),
            torch.randn(experts, neurons) if bias else None,
            weight(experts, neurons, size) if gated else None,
            torch.randn(experts, neurons) if gated and bias else None,
            weight(experts, features, neurons),
            torch.randn(experts, features) if bias else None,
        )
        there = tuple(None if tensor is None else tensor.to(device) for tensor in tensors)
        return Problem(there, activation, torch.randn(tokens, features, device=device)).to(dtype)

    return make


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """Largest difference by the largest value expected. NaN where one is NaN."""

    def measure(found: Tensor, expected: Tensor) -> float:
        assert found.shape == expected.shape
        if not expected.numel():
            return 0.0
        largest = expected.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        return ((found.double() - expected.double()).abs().amax() / largest).item()

    return measure
