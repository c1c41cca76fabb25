"""`make_plan`: which FFNs become experts, and the reasons of the others."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn, randn

from sparsify import SparsifyConfig
from sparsify.errors import SelectionError
from sparsify.passes.capture import capture
from sparsify.passes.match_ffn import FFNMatch, match_ffn
from sparsify.passes.plan import make_plan


def ffn(hidden_size: int, neurons: int, out_features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(hidden_size, neurons), nn.ReLU(), nn.Linear(neurons, out_features))


@pytest.fixture(scope="module")
def matches() -> list[FFNMatch]:
    """Two block FFNs of 512 and 70 neurons, and a head."""
    model = nn.ModuleDict({"wide": ffn(16, 512, 16), "narrow": ffn(16, 70, 16), "head": ffn(16, 512, 3)})
    model.forward = lambda x: model["head"](model["narrow"](model["wide"](x)))
    return match_ffn(capture(model, (randn(2, 16),)))[0]


def converted(matches: list[FFNMatch], **options: Any) -> list[str]:
    return [layer.name for layer in make_plan(matches, SparsifyConfig(**options)).layers if layer.converts]


def test_auto(matches: list[FFNMatch]) -> None:
    """Protects: what is too small or no block stays dense, with a reason that says how to convert it all the same."""
    plan = make_plan(matches, SparsifyConfig(num_experts=8, top_k=2)).layers
    assert [layer.name for layer in plan if layer.converts] == ["wide"]
    assert "too small to pay: 8 experts of 9 neurons" in plan[1].reason
    assert "maps 16 to 3 features; convert it by name" in plan[2].reason


@pytest.mark.parametrize(
    ("select", "names"),
    [
        ("all", ["wide", "narrow", "head"]),
        ("*a*", ["narrow", "head"]),
        (("wide", "head"), ["wide", "head"]),
        (lambda match: match.intermediate_size > 100, ["wide", "head"]),
    ],
)
def test_select(matches: list[FFNMatch], select: Any, names: list[str]) -> None:
    """Protects: "all", globs, several globs, predicates."""
    assert converted(matches, num_experts=8, top_k=2, select=select) == names


def test_a_pattern_that_matches_nothing(matches: list[FFNMatch]) -> None:
    """Protects: a typing error is no silent no-op; the message lists the names."""
    with pytest.raises(SelectionError, match=r"'layer\.\*' matches none of the 3 FFNs: wide, narrow, head"):
        make_plan(matches, SparsifyConfig(select="layer.*"))


def test_too_many_experts_for_an_ffn_that_was_asked_for(matches: list[FFNMatch]) -> None:
    """Protects: the message says which count works."""
    with pytest.raises(SelectionError, match=r"narrow has 70 neurons, too few for num_experts=128.* at most 70 work"):
        make_plan(matches, SparsifyConfig(num_experts=128, top_k=1, select="narrow"))


def test_neurons_that_do_not_divide(matches: list[FFNMatch]) -> None:
    """Protects: 70 neurons on 16 experts of 5 leave 10 places of padding, and the plan says so."""
    plan = make_plan(matches, SparsifyConfig(num_experts=16, top_k=1, select="narrow"))
    assert "experts of 5 neurons, 10 of them padding" in plan.layers[1].reason
