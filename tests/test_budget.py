"""`budget=` as it is written, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from sparsify import SparsifyConfig
from sparsify.budget import Budget, read_budget


@pytest.mark.parametrize(
    ("given", "budget", "text"),
    [
        (0.5, Budget("share", 0.5), "50%"),
        ("0.125", Budget("share", 0.125), "12.5%"),
        ("25 %", Budget("share", 0.25), "25%"),
        ("12ms", Budget("ms", 12.0), "12ms"),
        (" 1.5 ms ", Budget("ms", 1.5), "1.5ms"),
        ("error<=0.1", Budget("error", 0.1), "error<=0.1"),
        ("error <= 1e-3", Budget("error", 0.001), "error<=0.001"),
    ],
)
def test_forms(given: object, budget: Budget, text: str) -> None:
    """Protects: every form of the documentation, and that what is printed can be given again."""
    assert read_budget(given) == budget
    assert str(budget) == text
    assert read_budget(text) == budget


@pytest.mark.parametrize("given", [0, 1, 1.5, -0.5, float("nan"), "150%", "0%", "12"])
def test_a_share_outside_of_0_to_1(given: object) -> None:
    """Protects: 12 is not taken for 12 ms; the message shows the other forms."""
    with pytest.raises(ValueError, match=r"must be between 0 and 1, got .*12ms.*error<=0\.1"):
        read_budget(given)


@pytest.mark.parametrize("given", ["12s", "fast", "error<0.1", "error<=0", "0ms", "-3ms", "1e999x", "", True, None])
def test_what_is_no_budget(given: object) -> None:
    """Protects: no guess; the message shows all forms."""
    with pytest.raises(ValueError, match=r"budget.*50%.*12ms.*error<=0\.1"):
        read_budget(given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "12ms"}, r"number, such as target_tokens=512; got \(\)"),
        ({"budget": "12ms", "target_tokens": (1, 512)}, r"one number.*got \(1, 512\)"),
        ({"budget": 0.5, "start": "upcycle"}, "not start='upcycle'"),
        ({"budget": 0.5, "num_experts": 1, "top_k": 1}, "num_experts must be at least 2, got 1"),
        ({"budget": 2.0}, "between 0 and 1, got 2.0"),
    ],
)
def test_configs(options: dict[str, Any], message: str) -> None:
    """Protects: a config is refused where it is made."""
    with pytest.raises(ValueError, match=message):
        SparsifyConfig(**options)
    assert SparsifyConfig(budget="12ms", target_tokens=512).limit == Budget("ms", 12.0)
