"""The rules by which a layer gets its lowering."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparsify.passes.find_layers import LayerFacts
from sparsify.passes.lower_onnx.choose_lowering import Target, check_options, choose_lowering, why_not_moe_op

FACTS = LayerFacts(
    num_experts=16,
    top_k=4,
    hidden_size=64,
    output_size=64,
    expert_size=48,
    dtype=torch.float32,
    activation="relu",
    gated=False,
    plain_router=True,
    irregular=None,
)
NOW = (1, 31, 1)


@pytest.mark.parametrize(
    ("change", "target", "lowering"),
    [
        ({}, "ort-cpu", "sorted_split"),
        ({"expert_size": 47}, "ort-cpu", "moe_op"),
        ({"num_experts": 64}, "ort-cpu", "sorted_split"),
        ({"num_experts": 65}, "ort-cpu", "moe_op"),
        ({"expert_size": 47, "activation": "gelu"}, "ort-cpu", "sorted_split"),
        ({"expert_size": 1, "num_experts": 999}, "portable", "sorted_split"),
        ({}, "ort-cuda", "moe_op"),
        ({"activation": "gelu"}, "ort-cuda", "sorted_split"),
    ],
)
def test_auto_takes_the_faster_exact_lowering(change: dict, target: Target, lowering: str) -> None:
    """Each rule decides at its boundary."""
    chosen, reason = choose_lowering(replace(FACTS, **change), target, NOW)
    assert chosen == lowering
    assert reason


@pytest.mark.parametrize(
    ("change", "target", "runtime", "reason"),
    [
        ({"activation": "gelu"}, "ort-cpu", NOW, "tanh form"),
        ({"activation": "squared_relu"}, "ort-cpu", NOW, "no activation squared_relu"),
        ({"activation": "relu", "gated": True}, "ort-cpu", NOW, "no gated activation relu"),
        ({"activation": "gelu_tanh", "gated": True}, "ort-cpu", NOW, "no gated activation gelu_tanh"),
        ({"plain_router": False}, "ort-cpu", NOW, "its router may leave slots unused"),
        ({"irregular": "its activation regroups tokens"}, "ort-cpu", NOW, "its activation regroups tokens"),
        ({"output_size": 63}, "ort-cpu", NOW, "not 63 for 64"),
        ({}, "portable", NOW, "standard ops only"),
        ({"dtype": torch.float16}, "ort-cpu", NOW, "garbage before onnxruntime 1.32"),
        ({"dtype": torch.bfloat16}, "ort-cpu", (1, 32), "no CPU kernel for bfloat16"),
        ({"dtype": torch.float64}, "ort-cpu", NOW, "no CPU kernel for float64"),
        ({"dtype": torch.float64}, "ort-cuda", NOW, "no CUDA kernel for float64"),
        ({"hidden_size": 62, "output_size": 62}, "ort-cuda", NOW, "multiples of 4, not 62 and 48"),
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
    assert choose_lowering(replace(FACTS, **change), target, runtime)[0] == "sorted_split"


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
        check_options("tpu", "auto")
    with pytest.raises(ValueError, match="lowering must be one of auto, sorted_split, moe_op, got 'loop'"):
        check_options("portable", "loop")
