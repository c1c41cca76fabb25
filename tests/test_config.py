"""`SparsifyConfig`: refuses what cannot work, and says what is allowed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from sparsify import SparsifyConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 16, "top_k": 20}, r"top_k must be between 1 and num_experts \(16\), got 20"),
        ({"top_k": 0}, r"top_k must be between 1 and num_experts \(16\), got 0"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"num_experts": 8, "top_k": 2, "num_shared_experts": 3}, r"between 0 and top_k \(2\).*got 3"),
            ({"distill_steps": -1}, "distill_steps must be at least 0, got -1"),
        ({"router_hidden_size": 0}, "router_hidden_size must be at least 1, got 0"),
        ({"max_calibration_tokens": 0}, "max_calibration_tokens must be at least 1, got 0"),
        ({"ridge": 0.0}, r"ridge must be above 0, got 0\.0"),
        ({"num_experts": 8.0, "top_k": 2}, r"num_experts must be a whole number, got 8\.0"),
        ({"top_k": True}, "top_k must be a whole number, got True"),
        ({"select": True}, "select must be a preset, a glob pattern.* got True"),
        ({"select": None}, "select must be a preset.* got None"),
        ({"select": ()}, r"select must be a preset.* got \(\)"),
        ({"select": ("a", 1)}, r"select must be a preset.* got \('a', 1\)"),
        ({"select": 0}, "select as a number of FFNs must be at least 1, got 0"),
        ({"select": 0.0}, r"select as a fraction of the FFNs must be above 0 and at most 1, got 0\.0"),
        ({"select": 1.5}, r"above 0 and at most 1, got 1\.5"),
        ({"select": float("nan")}, "above 0 and at most 1, got nan"),
        ({"overrides": {"*": {"experts": 8}}}, r"overrides\['\*'\] .* num_shared_experts, expert_widths, got.*"),
        ({"overrides": {"*": 8}}, r"overrides\['\*'\] must give numbers for some of .* got 8"),
        ({"overrides": {"*": {"num_experts": 0}}}, r"overrides\['\*'\]: num_experts must be at least 1, got 0"),
        ({"overrides": {"*": {"top_k": "4"}}}, r"overrides\['\*'\]: top_k must be a whole number, got '4'"),
        ({"overrides": {"*": {"num_experts": 4, "top_k": 5}}}, r"overrides\['\*'\]: top_k must be between 1 .*4"),
        ({"overrides": {"*": {"expert_widths": [8, 0]}}}, r"overrides\['\*'\]: every one of expert_widths .* got 0"),
        ({"expert_widths": []}, r"expert_widths must list the neurons of every expert.* got \[\]"),
        ({"expert_widths": 768}, "expert_widths must list the neurons of every expert.* got 768"),
        ({"expert_widths": [64, 0], "top_k": 1}, "every one of expert_widths must be at least 1, got 0"),
        ({"expert_widths": [64, 0.5], "top_k": 1}, r"every one of expert_widths must be a whole number, got 0\.5"),
        ({"expert_widths": [64, 64], "num_experts": 3, "top_k": 1}, "are 2 experts, but num_experts=3; leave"),
        ({"expert_widths": [64, 64]}, r"top_k must be between 1 and num_experts \(2\), got 4"),
        ({"expert_widths": [64, 64], "top_k": 1, "start": "upcycle"}, "start='upcycle' copies all of them"),
        ({"expert_widths": [64, 32], "top_k": 1, "router": "smear"}, "'smear' adds up the weights of experts"),
        ({"expert_widths": [64, 64], "top_k": 1, "budget": 0.5}, "budget= chooses among equal parts"),
        ({"overrides": "*:top_k=2"}, r"overrides must map glob patterns .* got '\*:top_k=2'"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    """Protects: a bad option fails where it is given, with the allowed values in the message."""
    with pytest.raises(ValueError, match=message):
        SparsifyConfig(**options)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "shared"),
    [(16, 4, 1), (16, 1, 0), (16, 16, 0), (1, 1, 0), (8, 2, 1), (16, 8, 4), (8, 6, 5), (8, 7, 6), (16, 15, 14)],
)
def test_shared_experts_by_default(num_experts: int, top_k: int, shared: int) -> None:
    """Protects: shared experts where routing leaves room for them, and at least one routed beside them."""
    assert SparsifyConfig(num_experts=num_experts, top_k=top_k).shared == shared
    assert SparsifyConfig(num_experts=num_experts, top_k=top_k, router="top-k").shared == min(1, shared)


def test_is_frozen() -> None:
    """Protects: a config can be shared and logged."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        SparsifyConfig().top_k = 2  # pyright: ignore[reportAttributeAccessIssue] - the point of the test


@pytest.mark.parametrize("select", ["auto", ["a.*", "b.*"], 4, 0.5, 1, 1.0])
def test_overrides_and_lists_leave_a_config_hashable(select: Any) -> None:
    """Protects: a config is a value: what the caller gave cannot change it later, and two equal ones hash alike."""
    numbers = {"num_experts": 8}
    given = {"*.0.*": numbers}
    first, second = (SparsifyConfig(select=select, overrides=given) for _ in range(2))
    numbers["num_experts"] = 2
    given.clear()
    assert hash(first) == hash(second)
    assert first == second
    assert first.for_layer("layers.0.ffn").num_experts == 8
    assert "num_experts=8" in repr(first)


def test_later_overrides_win_field_by_field() -> None:
    """Protects: a broad pattern first, exceptions after it; what no pattern names stays as in the config."""
    overrides = {"*.1*": {"num_experts": 32, "top_k": 8}, "*.11.*": {"top_k": 12, "num_shared_experts": 0}}
    config = SparsifyConfig(num_experts=16, top_k=4, seed=7, overrides=overrides)
    found = [config.for_layer(f"layers.{i}.ffn") for i in (0, 1, 11)]
    assert [(own.num_experts, own.top_k, own.shared) for own in found] == [(16, 4, 1), (32, 8, 2), (32, 12, 0)]
    assert all(own.seed == 7 and not own.overrides for own in found)


def test_overrides_that_do_not_fit_the_config() -> None:
    """Protects: what is fine in itself may not fit the numbers that it leaves alone."""
    config = SparsifyConfig(num_experts=16, top_k=4, overrides={"a": {"num_experts": 2}})
    with pytest.raises(ValueError, match=r"top_k must be between 1 and num_experts \(2\), got 4"):
        config.for_layer("a")
    assert config.for_layer("b").num_experts == 16


def test_a_config_is_made_again_from_its_fields() -> None:
    """Protects: the fields that conversion.json holds are arguments of `SparsifyConfig`."""
    config = SparsifyConfig(select=("a", "b"), overrides={"a": {"num_experts": 8}, "*": {"top_k": 2}})
    assert SparsifyConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert dataclasses.replace(config, seed=1).overrides == config.overrides


def test_num_experts_and_widths_follow_each_other() -> None:
    """Protects: whichever of the two is given last counts, for the whole config and in overrides; JSON and back."""
    widths = SparsifyConfig(expert_widths=[768, 384, 384], top_k=2)
    assert (widths.num_experts, widths.shared, widths.expert_widths) == (3, 1, (768, 384, 384))
    assert widths.widths_of(1536) == (768, 384, 384)
    parts = widths.with_options(num_experts=8)
    assert (parts.num_experts, parts.expert_widths, parts.widths_of(70)) == (8, None, (9,) * 8)
    assert parts.with_options(expert_widths=[64, 32], top_k=1).num_experts == 2
    assert widths.with_options(top_k=3).expert_widths == (768, 384, 384)
    assert SparsifyConfig(**json.loads(json.dumps(dataclasses.asdict(widths)))) == widths
    overrides = {"a*": {"expert_widths": [8, 4]}, "ab": {"num_experts": 6}}
    mixed = SparsifyConfig(num_experts=4, top_k=2, overrides=overrides)
    assert [mixed.for_layer(name).expert_widths for name in ("a", "ab", "b")] == [(8, 4), None, None]
    assert [mixed.for_layer(name).num_experts for name in ("a", "ab", "b")] == [2, 6, 4]
