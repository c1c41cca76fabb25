"""`make_plan`: which FFNs become experts, and the reasons of the others. `fit_plan`: a plan that was given."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from torch import nn, randn

from sparsify import SparsifyConfig
from sparsify.errors import SelectionError
from sparsify.passes.capture import capture
from sparsify.passes.match_ffn import FFNMatch, match_ffn
from sparsify.passes.plan import ConversionPlan, LayerPlan, fit_plan, make_plan


def ffn(hidden_size: int, neurons: int, out_features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(hidden_size, neurons), nn.ReLU(), nn.Linear(neurons, out_features))


@pytest.fixture(scope="module")
def matches() -> list[FFNMatch]:
    """Two block FFNs of 512 and 70 neurons, and a head."""
    model = nn.ModuleDict({"wide": ffn(16, 512, 16), "narrow": ffn(16, 70, 16), "head": ffn(16, 512, 3)})
    model.forward = lambda x: model["head"](model["narrow"](model["wide"](x)))
    return match_ffn(capture(model, (randn(2, 16),)))[0]


def layers_of(matches: list[FFNMatch], **options: Any) -> tuple[LayerPlan, ...]:
    return make_plan(matches, SparsifyConfig(**options)).layers


def numbers(layers: tuple[LayerPlan, ...]) -> list[tuple[int, int, int]]:
    return [(layer.num_experts, layer.top_k, layer.num_shared_experts) for layer in layers]


def test_auto(matches: list[FFNMatch]) -> None:
    """Protects: what is too small or no block stays dense, with a reason that says how to convert it all the same."""
    plan = make_plan(matches, SparsifyConfig(num_experts=8, top_k=2)).layers
    assert [layer.name for layer in plan if layer.converts] == ["wide"]
    assert "too small to pay: 8 experts of 9 neurons" in plan[1].reason
    assert "maps 16 to 3 features; convert it by name" in plan[2].reason


@pytest.mark.parametrize("select", ["all", ("narrow", "head"), lambda match: match.name != "wide"])
def test_what_auto_leaves_dense_is_converted_on_demand(matches: list[FFNMatch], select: Any) -> None:
    """Protects: too small to pay, or no block, is no rejection: "all", its name and a predicate convert it."""
    layers = layers_of(matches, num_experts=8, top_k=2, select=select)
    assert [layer.converts for layer in layers[1:]] == [True, True]
    assert layers[2].reason.startswith("selected by ")


def test_what_select_leaves_out_says_so(matches: list[FFNMatch]) -> None:
    """Protects: a preset leaves an FFN dense for its own reason, and one that does not pay for that reason."""
    wide, narrow, head = layers_of(matches, num_experts=2, top_k=1, select=1)
    assert (wide.converts, narrow.converts, head.converts) == (False, True, False)
    assert wide.reason == "select=1 leaves it dense"
    assert narrow.reason == "selected by select=1; experts of 35 neurons"
    assert "not the FFN of a block" in head.reason
    assert layers_of(matches, num_experts=2, top_k=1, select="wide")[2].reason == "select='wide' leaves it dense"


def test_nothing_pays(matches: list[FFNMatch]) -> None:
    """Protects: a preset finds nothing that pays: all dense with the reason, as with "auto", and no error."""
    layers = layers_of(matches, num_experts=64, top_k=2, select="later")
    assert not any(layer.converts for layer in layers)
    assert "too small to pay" in layers[0].reason


def test_overrides(matches: list[FFNMatch]) -> None:
    """Protects: every FFN gets its own numbers, shared experts by the same rule, later patterns over earlier ones."""
    overrides = {"*": {"num_experts": 4}, "*a*": {"top_k": 1}, "head": {"top_k": 4}}
    layers = layers_of(matches, num_experts=8, top_k=2, select="all", overrides=overrides)
    assert numbers(layers) == [(4, 2, 1), (4, 1, 0), (4, 4, 0)]


def test_overrides_decide_what_pays(matches: list[FFNMatch]) -> None:
    """Protects: an FFN that is too small for the common number is converted where its own number is smaller."""
    layers = layers_of(matches, num_experts=8, top_k=2, overrides={"narrow": {"num_experts": 2}, "wide": {"top_k": 8}})
    assert numbers(layers) == [(8, 8, 0), (2, 2, 0), (0, 0, 0)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layer.*": {"top_k": 1}}, r"overrides='layer\.\*' matches none of the 3 FFNs: wide, narrow, head"),
        ({"n*": {"num_experts": 2}}, r"overrides of narrow do not fit .*: top_k must be between 1 and .*\(2\), got 4"),
        ({"head": {"num_shared_experts": 5}}, r"overrides of head .* num_shared_experts must be between 0 and .*\(4\)"),
        ({"narrow": {"num_experts": 128}}, r"narrow has 70 neurons, too few for num_experts=128"),
    ],
)
def test_overrides_that_do_not_fit(matches: list[FFNMatch], overrides: Any, message: str) -> None:
    """Protects: an override without effect or with numbers that cannot be is refused, and the FFN is named."""
    with pytest.raises(SelectionError, match=message):
        layers_of(matches, num_experts=8, top_k=4, select="all", overrides=overrides)


def test_too_many_experts_for_an_ffn_that_was_asked_for(matches: list[FFNMatch]) -> None:
    """Protects: the message says which count works."""
    with pytest.raises(SelectionError, match=r"narrow has 70 neurons, too few for num_experts=128.* at most 70 work"):
        make_plan(matches, SparsifyConfig(num_experts=128, top_k=1, select="narrow"))


def test_neurons_that_do_not_divide(matches: list[FFNMatch]) -> None:
    """Protects: 70 neurons on 16 experts of 5 leave 10 places of padding, and the plan says so."""
    plan = make_plan(matches, SparsifyConfig(num_experts=16, top_k=1, select="narrow"))
    assert "experts of 5 neurons, 10 of them padding" in plan.layers[1].reason


CONFIG = SparsifyConfig(num_experts=8, top_k=2)


def test_a_plan_survives_json(matches: list[FFNMatch]) -> None:
    """Protects: a plan is plain data: what is written is read again, through text, and prints a line an FFN."""
    plan = make_plan(matches, CONFIG)
    assert ConversionPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    wide, narrow, _ = str(plan).splitlines()
    assert wide == "wide: 2 of 8 experts, 1 shared, maps the hidden size to itself; experts of 64 neurons"
    assert narrow.startswith("narrow: dense, too small to pay")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 9}, r"wide: top_k must be between 1 and num_experts \(8\), got 9"),
        ({"num_experts": -1}, "wide: num_experts must be at least 1, got -1"),
        ({"num_experts": 8.5}, r"wide: num_experts must be a whole number, got 8\.5"),
        ({"num_experts": "8"}, "wide: num_experts must be a whole number, got '8'"),
        ({"num_shared_experts": 3}, r"wide: num_shared_experts must be between 0 and top_k \(2\)"),
        ({"experts": 8}, "no plan as .* 'experts'"),
    ],
)
def test_an_edit_that_cannot_be(matches: list[FFNMatch], change: dict[str, Any], message: str) -> None:
    """Protects: a slip in a file that was edited by hand is found when it is read."""
    document = make_plan(matches, CONFIG).to_json()
    document["layers"][0] |= change
    with pytest.raises(ValueError, match=message):
        ConversionPlan.from_json(document)


@pytest.mark.parametrize("document", [{}, {"layers": 1}, {"layers": [1]}, {"layers": [{"name": "a"}]}, []])
def test_a_document_that_is_no_plan(document: Any) -> None:
    """Protects: another JSON file is refused as what it is."""
    with pytest.raises(ValueError, match=r"no plan as ConversionPlan\.to_json\(\)"):
        ConversionPlan.from_json(document)


def test_a_given_plan(matches: list[FFNMatch]) -> None:
    """Protects: names decide, not the order; numbers are taken as they stand; no reason of before the edit is left."""
    wide, narrow, head = make_plan(matches, CONFIG).layers
    edited = ConversionPlan((head, replace(wide, num_experts=0), replace(narrow, num_experts=7, top_k=2)))
    layers = fit_plan(edited, matches, CONFIG).layers
    assert [layer.name for layer in layers] == ["wide", "narrow", "head"]
    assert numbers(layers) == [(0, 0, 0), (7, 2, 0), (0, 0, 0)]
    assert [layer.reason for layer in layers] == [
        "left dense by plan=",
        "converted by plan=; experts of 10 neurons",
        f"left dense by plan=: {head.reason}",
    ]


def test_a_plan_of_another_model(matches: list[FFNMatch]) -> None:
    """Protects: names that are missing, unknown or double are listed, and no FFN is planned by accident."""
    wide, narrow, head = make_plan(matches, CONFIG).layers
    plan = ConversionPlan((wide, replace(head, name="other"), wide))
    with pytest.raises(SelectionError, match=r"does not name narrow, head; .* no such FFN, other; .* once wide\. "):
        fit_plan(plan, matches, CONFIG)
    plan = ConversionPlan((wide, replace(narrow, num_experts=128, top_k=1), head))
    with pytest.raises(SelectionError, match=r"narrow has 70 neurons, too few for num_experts=128.* at most 70 work"):
        fit_plan(plan, matches, CONFIG)


def test_widths(matches: list[FFNMatch]) -> None:
    """Protects: widths that fit, in the plan and in words; those that do not fit leave "auto" dense, and say why."""
    wide, narrow, head = layers_of(matches, expert_widths=[256, 64, 64, 64, 64], top_k=2)
    assert wide.expert_widths == (256, 64, 64, 64, 64)
    assert (wide.num_experts, wide.top_k, wide.num_shared_experts) == (5, 2, 1)
    assert wide.reason.endswith("experts of 256, 4 x 64 neurons")
    assert "has 70 neurons, but expert_widths=[256, 64, 64, 64, 64] add up to 512" in narrow.reason
    assert "overrides={'narrow': {'expert_widths': [...]}}" in narrow.reason
    assert not head.converts
    with pytest.raises(SelectionError, match="narrow has 70 neurons, but expert_widths"):
        layers_of(matches, expert_widths=[256, 256], top_k=1, select="narrow")


def test_small_units_do_not_pay(matches: list[FFNMatch]) -> None:
    """Protects: widths whose common divisor is small stay dense with "auto", and are converted on demand."""
    assert "made of units of 2 (at least 32)" in layers_of(matches, expert_widths=[500, 2, 10], top_k=1)[0].reason
    by_name = layers_of(matches, expert_widths=[500, 2, 10], top_k=1, select="wide")
    assert by_name[0].expert_widths == (500, 2, 10)
    only_shared_is_odd = layers_of(matches, expert_widths=[130, 191, 191], top_k=2)
    assert only_shared_is_odd[0].converts


def test_overrides_with_and_without_widths(matches: list[FFNMatch]) -> None:
    """Protects: a number of experts in an override means equal parts again."""
    layers = layers_of(
        matches,
        expert_widths=[256, 256],
        top_k=1,
        select="all",
        overrides={"narrow": {"num_experts": 7}, "head": {"expert_widths": [384, 128]}},
    )
    assert [layer.expert_widths for layer in layers] == [(256, 256), (), (384, 128)]
    assert [layer.num_experts for layer in layers] == [2, 7, 2]
