"""What a conversion did -> the entries and notes of its `Report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from sparsify.passes.capture import left_out
from sparsify.passes.capture_parts import SkippedPart
from sparsify.passes.convert import ConvertedLayer
from sparsify.passes.fixed_dims import fixed_dims
from sparsify.passes.match_ffn import FFNMatch, Rejection
from sparsify.passes.plan import ConversionPlan, LayerPlan
from sparsify.report import FFNReport


def ffn_reports(
    matches: Sequence[FFNMatch],
    rejections: Sequence[Rejection],
    plan: ConversionPlan,
    results: Mapping[str, ConvertedLayer],
) -> tuple[FFNReport, ...]:
    """One entry for each FFN, then one for each near miss.

    Args:
        matches: every FFN.
        rejections: every near miss.
        plan: one entry per match.
        results: of the FFNs that were converted, by name.
    """
    reports = [
        _ffn_report(match, layer, results.get(match.name)) for match, layer in zip(matches, plan.layers, strict=True)
    ]
    refused = [FFNReport(r.name, "", "", 0, 0, "rejected", f"{r.reason} (node `{r.node}`)") for r in rejections]
    return (*reports, *refused)


def _ffn_report(match: FFNMatch, layer: LayerPlan, result: ConvertedLayer | None) -> FFNReport:
    report = FFNReport(
        name=match.name,
        kind=match.kind,
        activation=match.activation,
        hidden_size=match.hidden_size,
        intermediate_size=match.intermediate_size,
        action="dense",
        reason=layer.reason,
        flops_before=match.flops_per_token * len(match.sites),
        flops_after=match.flops_per_token * len(match.sites),
        parameters_before=match.num_parameters,
        parameters_after=match.num_parameters,
        times=layer.times,
    )
    if result is None:
        return report
    per_neuron = match.flops_per_token // match.intermediate_size
    per_site = result.neurons_per_token * per_neuron + result.router_flops
    return replace(
        report,
        action="converted",
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        num_shared_experts=layer.num_shared_experts,
        expert_widths=layer.expert_widths,
        receipt=result.receipt,
        error=result.error,
        error_before_refit=result.error_before_refit,
        tokens_per_expert=result.tokens_per_expert,
        flops_after=per_site * len(match.sites),
        parameters_after=result.num_parameters,
    )


def input_notes(graph_module: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """What does not hold for other inputs than the example: fixed sizes, constants, outputs that were left out."""
    notes: list[str] = []
    values = pytree.tree_leaves((args, kwargs))
    inputs = list(zip(graph_module.graph.find_nodes(op="placeholder"), values, strict=True))
    for node, value in inputs:
        notes += [
            f"input `{node.name}` has a fixed size of {size} in dimension {dim}, because the example has it: a size of "
            "0 or 1 cannot stay dynamic; give an example with at least 2"
            for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ())
            if size < 2
        ]
    notes += [str(fixed) for fixed in fixed_dims(graph_module)]
    constants = ", ".join(f"`{node.name}` = {value!r}" for node, value in inputs if not isinstance(value, Tensor))
    if constants:
        notes.append(f"inputs that are no tensors stay as in the example, whatever is passed: {constants}")
    notes += [
        f"output {output} is None in the converted model, because torch finds no tensors in that class; have the model "
        "return a tuple or dict instead, or register the class (torch.utils._pytree.register_pytree_node) to keep it"
        for output in left_out(graph_module)
    ]
    return notes


def part_notes(skipped: Sequence[SkippedPart]) -> list[str]:
    """Which modules were not traced, and why."""
    if not skipped:
        return []
    whole, *modules = skipped
    lead = "the model cannot be traced as a whole, so FFNs of its parts were converted; all else runs as it did"
    return [f"{lead}: {whole.reason}", *(f"not traced: {part}" for part in modules)]


def conversion_notes(
    plan: ConversionPlan, results: Mapping[str, ConvertedLayer], *, weights_only: bool, copies: bool
) -> list[str]:
    """What the quality and the speed of the result rest on."""
    if not any(layer.converts for layer in plan.layers):
        return ["nothing was converted: every FFN stays dense for the reason given; see select="]
    reasons: dict[str, list[str]] = {}
    for name, result in results.items():
        if result.unfused is not None:
            reasons.setdefault(result.unfused, []).append(name)
    notes = [
        f"no fused kernel, so experts run as a chain of ops, more slowly: {reason} ({', '.join(names)})"
        for reason, names in reasons.items()
    ]
    groups: dict[int, list[str]] = {}
    for name, result in results.items():
        if result.group is not None:
            groups.setdefault(result.group, []).append(name)
    for size, names in groups.items():
        group = f"the {size} tokens of each entry of the batch" if size else "all tokens of a call"
        notes.append(f"at the sizes of the example inputs {group} compete for experts ({', '.join(names)})")
    free = [name for name, result in results.items() if result.gap]
    if free:
        notes.append(
            "the routing weights scale the experts, or a capacity leaves tokens out, so the start is not the dense "
            f"model ({', '.join(free)}); the errors above say by how much, and exact_start=True makes it exact where "
            "all experts of a token run"
        )
    if weights_only and copies:
        notes += ["no calibration data was needed: every expert is a copy of its FFN"]
    elif weights_only:
        notes += [
            "no calibration data: experts, routers and means rest on the weights and on random tokens shaped like the "
            "example inputs, and down_proj was not refitted. The errors above are on the example inputs. Real "
            "calibration data lowers them; see README, section Limits, for what that is worth"
        ]
    return notes
