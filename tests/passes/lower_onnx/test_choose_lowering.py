"""The rules by which a layer gets its lowering."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparsify.passes.find_layers import LayerFacts
from sparsify.passes.lower_onnx.choose_lowering import (
    DEFAULT_TOKENS,
    check_options,
    choose_lowering,
    refusals,
    why_not_moe_op,
)
from sparsify.passes.lower_onnx.lowerings import Lowering, Target

FACTS = LayerFacts(
    num_experts=16,
    top_k=4,
    hidden_size=768,
    output_size=768,
    expert_size=192,
    dtype=torch.float32,
    activation="relu",
    gated=False,
    plain_router=True,
    irregular=None,
)
NOW = (1, 31, 1)


@pytest.mark.parametrize(
    ("change", "target", "tokens", "lowering"),
    [
        ({}, "ort-cpu", (16,), "expert_chain"),
        ({}, "ort-cpu", (512,), "expert_chain"),
        ({"hidden_size": 64, "output_size": 64, "expert_size": 8}, "ort-cpu", (4,), "moe_op"),
        ({"hidden_size": 64, "output_size": 64, "expert_size": 8}, "portable", (4,), "dense_masked"),
        ({"num_experts": 256, "expert_size": 12, "top_k": 32}, "portable", (16,), "dense_masked"),
        ({"top_k": 16}, "portable", (1, 64), "dense_masked"),
        ({"irregular": "it regroups tokens"}, "ort-cpu", (4,), "sorted_split"),
        ({}, "ort-cuda", (4,), "moe_op"),
        ({"activation": "gelu"}, "ort-cuda", (4,), "sorted_split"),
    ],
)
def test_takes_the_fastest_exact_lowering(change: dict, target: Target, tokens: tuple, lowering: str) -> None:
    """Protects: large experts are skipped, small ones computed together, and what the user states decides."""
    facts = replace(FACTS, **change)
    chosen, reason, _ = choose_lowering(refusals(facts, target, NOW), facts, target, tokens)
    assert chosen == lowering
    assert reason


@pytest.mark.parametrize("expert_size", [8, 192])
@pytest.mark.parametrize("tokens", [1, 16, 512])
def test_what_is_allowed_is_taken_where_it_is_faster(expert_size: int, tokens: int) -> None:
    """Protects: with leave to be dense, a layer is predicted to take no longer than the dense one; large ones route."""
    facts = replace(FACTS, expert_size=expert_size, activation="gelu", router_weights=50_000)
    assert "dense" not in refusals(facts, "ort-cpu", NOW)
    refused = refusals(facts, "ort-cpu", NOW, ("dense", "tanh_gelu"))
    chosen, reason, times = choose_lowering(refused, facts, "ort-cpu", (tokens,))
    best = {time.lowering: time.score for time in times}
    assert set(best) == {"expert_chain", "sorted_split", "dense_masked", "moe_op", "dense"}
    assert best[chosen] == min(best.values())
    assert chosen == "expert_chain" if (expert_size, tokens) == (192, 512) else chosen in best
    assert (chosen == "dense") == reason.startswith("as you allow")


def test_measured_times_beat_predicted_ones() -> None:
    """Protects: `measure=True` keeps the winner of the measurement, and both times are in the report."""
    times: dict[Lowering, float] = {"expert_chain": 3.0, "sorted_split": 1.0, "dense_masked": 2.0}

    def measure(lowerings):
        return [(times[name], times[name]) for name in lowerings]

    refused = refusals(FACTS, "portable", NOW)
    chosen, reason, considered = choose_lowering(refused, FACTS, "portable", (16, 64), measure)
    assert chosen == "sorted_split"
    assert reason == (
        "the fastest at 16, 64 tokens, as measured; moe_op does not fit: the target portable allows standard ops only"
    )
    assert {str(time).split(" ", 1)[1] for time in considered} == {
        "3e+03/3e+03 ms measured", "1e+03/1e+03 ms measured", "2e+03/2e+03 ms measured"
    }  # fmt: skip
    assert all(time.predicted[0] < time.predicted[1] < 1 for time in considered)


@pytest.mark.parametrize(
    ("change", "target", "runtime", "reason"),
    [
        ({"activation": "gelu"}, "ort-cpu", NOW, "tanh form"),
        ({"activation": "squared_relu"}, "ort-cpu", NOW, "no activation squared_relu"),
        ({"activation": "relu", "gated": True}, "ort-cpu", NOW, "no gated activation relu"),
        ({"activation": "gelu_tanh", "gated": True}, "ort-cpu", NOW, "no gated activation gelu_tanh"),
        ({"plain_router": False}, "ort-cpu", NOW, "its router may leave slots unused"),
        ({"irregular": "its activation regroups tokens"}, "ort-cpu", NOW, "its activation regroups tokens"),
        ({"output_size": 63}, "ort-cpu", NOW, "not 63 for 768"),
        ({}, "portable", NOW, "standard ops only"),
        ({"dtype": torch.float16}, "ort-cpu", NOW, "garbage before onnxruntime 1.32"),
        ({"dtype": torch.bfloat16}, "ort-cpu", (1, 32), "no CPU kernel for bfloat16"),
        ({"dtype": torch.float64}, "ort-cpu", NOW, "no CPU kernel for float64"),
        ({"dtype": torch.float64}, "ort-cuda", NOW, "no CUDA kernel for float64"),
        ({"hidden_size": 62, "output_size": 62}, "ort-cuda", NOW, "multiples of 4, not 62 and 192"),
        ({"dtype": torch.float16, "expert_size": 20}, "ort-cuda", NOW, "multiples of 8"),
        ({"expert_size": 12}, "ort-cuda", NOW, "at least 16"),
        ({"activation": "silu", "gated": True}, "ort-cuda", (1, 27), "ignores the constants"),
        ({"activation": "silu", "gated": True}, "ort-cuda", None, "ignores the constants"),
    ],
)
def test_refuses_the_op_where_it_is_wrong(change: dict, target: Target, runtime: tuple | None, reason: str) -> None:
    """Every case computes something else, fails to load, or fails at run time; users read the reason."""
    refused = why_not_moe_op(replace(FACTS, **change), target, runtime)
    assert refused is not None
    assert reason in refused
    assert refusals(replace(FACTS, **change), target, runtime)["moe_op"] == refused


@pytest.mark.parametrize(
    ("change", "target", "runtime"),
    [
        ({"activation": "silu", "gated": True}, "ort-cpu", NOW),
        ({"activation": "gelu_tanh"}, "ort-cpu", NOW),
        ({"activation": "identity"}, "ort-cpu", None),
        ({"dtype": torch.float16}, "ort-cpu", (1, 32)),
        ({"dtype": torch.bfloat16}, "ort-cuda", NOW),
        ({"activation": "silu", "gated": True}, "ort-cuda", (1, 28)),
    ],
)
def test_accepts_the_op_where_it_is_exact(change: dict, target: Target, runtime: tuple | None) -> None:
    """A rule that refuses too much would cost speed in silence."""
    assert why_not_moe_op(replace(FACTS, **change), target, runtime) is None


def test_unknown_options_are_named() -> None:
    """The message holds what was given and what is allowed."""
    with pytest.raises(ValueError, match="target must be one of ort-cpu, ort-cuda, portable, got 'tpu'"):
        check_options("tpu", "auto", DEFAULT_TOKENS)
    with pytest.raises(ValueError, match=r"lowering must be one of auto, .*, dense, original, got 'loop'"):
        check_options("portable", "loop", DEFAULT_TOKENS)
    for allow in ("dense", ["gelu"]):
        with pytest.raises(ValueError, match=r"allow must hold some of dense, tanh_gelu, fused_op, such as \["):
            check_options("portable", "auto", DEFAULT_TOKENS, allow)


@pytest.mark.parametrize("tokens", [(), (0,), (True,), (16, -1)])
def test_token_counts_are_counts(tokens: tuple) -> None:
    """Protects: a cost at no tokens would choose by nothing."""
    with pytest.raises(ValueError, match=r"target_tokens must be numbers of tokens of 1 and more"):
        check_options("portable", "auto", tokens)
