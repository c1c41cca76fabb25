"""Which lowering a layer gets: `moe_op` (one `com.microsoft::MoE` node) or `sorted_split` (standard ops, always exact).

The rules are measured (onnxruntime 1.23 to 1.32 on the CPU) or read in its source (CUDA).
"""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch

from sparsify.passes.find_layers import LayerFacts

Target = Literal["ort-cpu", "ort-cuda", "portable"]
Lowering = Literal["sorted_split", "moe_op"]
Version = tuple[int, ...]

# Assumed when onnxruntime is not installed: the oldest release that the package supports.
_OLDEST = (1, 24)
_MOE_ACTIVATIONS = {"relu": "relu", "silu": "silu", "identity": "identity", "gelu_tanh": "gelu"}
# Below these sizes, and above this number of experts, the per-expert nodes of the split cost more than they save.
_SMALL_EXPERT = 48
_MANY_EXPERTS = 64


def choose_lowering(facts: LayerFacts, target: Target, runtime: Version | None) -> tuple[Lowering, str]:
    """Choose the faster of the lowerings that are exact.

    Args:
        facts: of the layer.
        target: what will run the file.
        runtime: the version of onnxruntime, e.g. `(1, 31, 1)`; None if it is not known.

    Returns:
        The lowering, and why.
    """
    if target == "portable":
        return "sorted_split", "standard ops only"
    reason = why_not_moe_op(facts, target, runtime)
    if reason is not None:
        return "sorted_split", f"com.microsoft.MoE does not fit: {reason}"
    if target == "ort-cuda":
        return "moe_op", "one node, without host synchronisation"
    if facts.expert_size < _SMALL_EXPERT or facts.num_experts > _MANY_EXPERTS:
        return "moe_op", f"{facts.num_experts} experts of {facts.expert_size} neurons are too small to split"
    return "sorted_split", "faster than com.microsoft.MoE on the CPU at this size"


def why_not_moe_op(facts: LayerFacts, target: Target, runtime: Version | None) -> str | None:
    """Say why `com.microsoft::MoE` would be wrong or would not load for a layer; None if it is right."""
    if target == "portable":
        return "the target portable allows standard ops only"
    if facts.irregular is not None:
        return facts.irregular
    if moe_activation(facts.activation, facts.gated) is None:
        return _activation_reason(facts)
    if not facts.plain_router:
        return "its router may leave slots unused or weigh experts by any number, which the op cannot express"
    if facts.output_size != facts.hidden_size:
        return f"the op returns as many features as it reads, not {facts.output_size} for {facts.hidden_size}"
    version = runtime or _OLDEST
    return _cpu_reason(facts, version) if target == "ort-cpu" else _cuda_reason(facts, version)


def moe_activation(activation: str, gated: bool) -> str | None:
    """The `activation_type` of the op for an activation, None if it has none."""
    if gated:
        return "swiglu" if activation == "silu" else None
    return _MOE_ACTIVATIONS.get(activation)


def check_options(target: str, lowering: str) -> None:
    """Raise `ValueError` for an unknown target or lowering."""
    if target not in get_args(Target):
        raise ValueError(f"target must be one of {', '.join(get_args(Target))}, got {target!r}")
    allowed = ("auto", *cast(tuple[str, ...], get_args(Lowering)))
    if lowering not in allowed:
        raise ValueError(f"lowering must be one of {', '.join(allowed)}, got {lowering!r}")


def _activation_reason(facts: LayerFacts) -> str:
    if facts.activation == "gelu" and not facts.gated:
        return "its GELU is the tanh form, up to 4e-4 off the exact one"
    gate = "gated " if facts.gated else ""
    return f"it has no {gate}activation {facts.activation}"


def _cpu_reason(facts: LayerFacts, version: Version) -> str | None:
    if facts.dtype == torch.float32:
        return None
    if facts.dtype != torch.float16:
        return f"it has no CPU kernel for {_plain(facts.dtype)}"
    if version < (1, 32):
        return "its float16 CPU kernel computes garbage before onnxruntime 1.32"
    return None


def _cuda_reason(facts: LayerFacts, version: Version) -> str | None:
    if facts.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it has no CUDA kernel for {_plain(facts.dtype)}"
    if facts.gated and version < (1, 28):
        return "its CUDA kernel ignores the constants of SwiGLU before onnxruntime 1.28"
    step = 4 if facts.dtype == torch.float32 else 8
    sizes = (facts.hidden_size, facts.expert_size)
    if any(size < 16 or size % step for size in sizes):
        return f"its CUDA kernel needs sizes of at least 16 that are multiples of {step}, not {sizes[0]} and {sizes[1]}"
    return None


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
