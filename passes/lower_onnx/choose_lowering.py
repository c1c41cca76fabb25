"""Which lowering a layer gets: the fastest of those that are exact, at the token counts that the file is meant for.

`expert_chain` and `sorted_split` compute the chosen experts alone, in standard operators; `dense_masked` computes all
of them, which is faster where they are small; `moe_op` is one `com.microsoft::MoE` node. Where the op is exact is
measured (onnxruntime 1.23 to 1.32 on the CPU) or read in its source (CUDA). `fused_op` is the kernel of `sparsify/cpu`
as one node, which needs our library in the session; `dense`, `original`, and `moe_op` in place of an exact GELU,
compute something else than the model: the user must allow these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import cast, get_args

import torch

from sparsify.kernels.reference import ACTIVATIONS
from sparsify.passes.find_layers import LayerFacts
from sparsify.passes.lower_onnx.costs import predict_seconds
from sparsify.passes.lower_onnx.lowerings import BY_LEAVE, WHOLE, Leave, Lowering, Target, Version

# One token at a time, a few, and a batch of sequences.
DEFAULT_TOKENS = (1, 32, 512)

# Assumed when onnxruntime is not installed: the oldest release that the package supports.
_OLDEST = (1, 24)
_MOE_ACTIVATIONS = {"relu": "relu", "silu": "silu", "identity": "identity", "gelu_tanh": "gelu"}


@dataclass(frozen=True)
class LoweringTime:
    """Seconds of one layer with one lowering, at each of the stated token counts.

    Attributes:
        lowering: its name.
        predicted: by the cost model.
        measured: in onnxruntime on this machine; None if it was not asked for, or the layer cannot be run alone.
    """

    lowering: Lowering
    predicted: tuple[float, ...]
    measured: tuple[float, ...] | None = None

    @property
    def score(self) -> float:
        """What is compared: the geometric mean over the token counts, of the measured times where there are any."""
        times = self.measured or self.predicted
        return math.exp(sum(map(math.log, times)) / len(times))

    def __str__(self) -> str:
        times = "/".join(f"{seconds * 1e3:.3g}" for seconds in self.measured or self.predicted)
        return f"{self.lowering} {times} ms {'measured' if self.measured else 'predicted'}"


def refusals(
    facts: LayerFacts, target: Target, runtime: Version | None, allow: Collection[Leave | Lowering] = ()
) -> dict[Lowering, str | None]:
    """Every lowering, and why it would not compute what the model computes; None for those that are exact or allowed.

    Args:
        facts: of the layer.
        target: what will run the file.
        runtime: the version of onnxruntime, e.g. `(1, 31, 1)`; None if it is not known.
        allow: what a user has to allow; of `BY_LEAVE` what is not named is left out.
    """
    known = cast(tuple[Lowering, ...], get_args(Lowering))
    names: list[Lowering] = [name for name in known if name not in BY_LEAVE or name in allow]
    return {name: why_not(name, facts, target, runtime, allow) for name in names}


def choose_lowering(
    refused: Mapping[Lowering, str | None],
    facts: LayerFacts,
    target: Target,
    tokens: Sequence[int],
    measure: Callable[[Sequence[Lowering]], Sequence[Sequence[float] | None]] | None = None,
) -> tuple[Lowering, str, tuple[LoweringTime, ...]]:
    """Choose the fastest of the exact ones.

    Args:
        refused: from `refusals`.
        facts: of the layer.
        target: what will run the file.
        tokens: the token counts that count, equally.
        measure: times lowerings, at `tokens`, None for one that cannot be run alone; None to trust the cost model.

    Returns:
        The lowering, why, and the times; none for CUDA, of which nothing was measured.
    """
    lowerings: list[Lowering] = [name for name, reason in refused.items() if reason is None]
    if target == "ort-cuda":
        if "moe_op" in lowerings:
            return "moe_op", "one node, without host synchronisation", ()
        return "sorted_split", f"com.microsoft.MoE does not fit: {refused['moe_op']}; this waits for the GPU", ()
    predicted = [tuple(predict_seconds(name, facts, count) for count in tokens) for name in lowerings]
    measured = [None if each is None else tuple(each) for each in measure(lowerings)] if measure else None
    found = measured or [None] * len(lowerings)
    times = tuple(LoweringTime(*each) for each in zip(lowerings, predicted, found, strict=True))
    compared = [time for time in times if time.measured] or times  # seconds that were not measured say little beside
    best = min(compared, key=lambda time: time.score)
    return best.lowering, _reason(best, refused, tokens), times


def _reason(best: LoweringTime, refused: Mapping[Lowering, str | None], tokens: Sequence[int]) -> str:
    others = {reason: name for name, reason in refused.items() if reason is not None}  # one is enough of equal reasons
    excluded = "".join(f"; {name} does not fit: {reason}" for reason, name in others.items())
    at = f"at {', '.join(map(str, tokens))} tokens, as {'measured' if best.measured else 'predicted'}"
    if best.lowering in WHOLE:
        form = "with all its experts on" if best.lowering == "dense" else "as before the conversion"
        return f"as you allow: {form} it is the fastest {at}{excluded}"
    if best.lowering == "fused_op":
        return f"as you allow: sessions need onnx_ops_library(); the fastest {at}{excluded}"
    if best.lowering == "dense_masked":
        return f"all experts at once are faster than the chosen ones {at}{excluded}"
    return f"the fastest {at}{excluded}"


def why_not(
    lowering: Lowering,
    facts: LayerFacts,
    target: Target,
    runtime: Version | None,
    allow: Collection[Leave | Lowering] = (),
) -> str | None:
    """Say why a lowering would be wrong or would not load for a layer; None if it is right."""
    if lowering == "moe_op":
        return why_not_moe_op(facts, target, runtime, allow)
    if lowering == "fused_op":
        return why_not_fused_op(facts, target)
    if lowering in WHOLE and not facts.plain_router:
        return "its router weighs experts, so that all of them together are no dense FFN"
    return None if lowering == "sorted_split" else facts.irregular


def why_not_moe_op(
    facts: LayerFacts, target: Target, runtime: Version | None, allow: Collection[Leave | Lowering] = ()
) -> str | None:
    """Say why `com.microsoft::MoE` would be wrong or would not load for a layer; None if it is right."""
    if target == "portable":
        return "the target portable allows standard ops only"
    if facts.irregular is not None:
        return facts.irregular
    if moe_activation(facts.activation, facts.gated, tanh_gelu="tanh_gelu" in allow) is None:
        return _activation_reason(facts)
    if facts.units is not None:
        return "its experts differ in width, and those of the op do not"
    if not facts.plain_router:
        return "its router may leave slots unused or weigh experts by any number, which the op cannot express"
    if facts.output_size != facts.hidden_size:
        return f"the op returns as many features as it reads, not {facts.output_size} for {facts.hidden_size}"
    version = runtime or _OLDEST
    return _cpu_reason(facts, version) if target == "ort-cpu" else _cuda_reason(facts, version)


def why_not_fused_op(facts: LayerFacts, target: Target) -> str | None:
    """Say why `ai.sparsify::MoE` would be wrong or would not run for a layer; None if it is right."""
    if target != "ort-cpu":
        return "the op of ours runs in onnxruntime on the CPU alone"
    if facts.irregular is not None:
        return facts.irregular
    if facts.activation not in ACTIVATIONS:
        return f"the op of ours has no kernel for the activation {facts.activation}"
    return None if facts.dtype == torch.float32 else f"the op of ours has no kernel for {_plain(facts.dtype)}"


def moe_activation(activation: str, gated: bool, tanh_gelu: bool = False) -> str | None:
    """The `activation_type` of the op for an activation, None if it has none; `tanh_gelu` takes its GELU for exact."""
    if gated:
        return "swiglu" if activation == "silu" else None
    if activation == "gelu" and tanh_gelu:
        return "gelu"
    return _MOE_ACTIVATIONS.get(activation)


def check_options(target: str, lowering: str, tokens: Sequence[int], allow: Collection[str] = ()) -> None:
    """Raise `ValueError` for an unknown target, lowering or deviation, or token counts that are none."""
    known = cast(tuple[str, ...], get_args(Leave))
    if isinstance(allow, str) or any(name not in known for name in allow):
        raise ValueError(f"allow must hold some of {', '.join(known)}, such as [\"dense\"], got {allow!r}")
    if target not in get_args(Target):
        raise ValueError(f"target must be one of {', '.join(get_args(Target))}, got {target!r}")
    allowed = ("auto", *cast(tuple[str, ...], get_args(Lowering)))
    if lowering not in allowed:
        raise ValueError(f"lowering must be one of {', '.join(allowed)}, got {lowering!r}")
    if not tokens or any(isinstance(count, bool) or count < 1 for count in tokens):
        raise ValueError(f"target_tokens must be numbers of tokens of 1 and more, such as (1, 128), got {tokens!r}")


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
