"""`SparsifyConfig`: refuses what cannot work, and says what is allowed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sparsify import SparsifyConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 16, "top_k": 20}, r"top_k must be between 1 and num_experts \(16\), got 20"),
        ({"top_k": 0}, r"top_k must be between 1 and num_experts \(16\), got 0"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"num_experts": 8, "top_k": 2, "num_shared_experts": 2}, r"between 0 and top_k - 1 \(1\).*got 2"),
        ({"router_hidden_size": 0}, "router_hidden_size must be at least 1, got 0"),
        ({"max_calibration_tokens": 0}, "max_calibration_tokens must be at least 1, got 0"),
        ({"ridge": 0.0}, r"ridge must be above 0, got 0\.0"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    """Protects: a bad option fails where it is given, with the allowed values in the message."""
    with pytest.raises(ValueError, match=message):
        SparsifyConfig(**options)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "shared"), [(16, 4, 1), (16, 1, 0), (16, 16, 0), (1, 1, 0), (8, 2, 1)]
)
def test_shared_experts_by_default(num_experts: int, top_k: int, shared: int) -> None:
    """Protects: one shared expert where routing leaves room for it."""
    assert SparsifyConfig(num_experts=num_experts, top_k=top_k).shared == shared


def test_is_frozen() -> None:
    """Protects: a config can be shared and logged."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        SparsifyConfig().top_k = 2  # pyright: ignore[reportAttributeAccessIssue] - the point of the test
