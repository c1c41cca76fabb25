"""SparseModel -> an ONNX file that computes the chosen experts only, checked against the model before it is in place.

    copy the graph -> ops of ours become placeholders -> torch.onnx.export -> placeholders become nodes of the target

The work is done in a hidden folder beside the file; a failure at any point leaves what was there before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
from onnx_ir.passes import common
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, fx, nn

from sparsify.cpu.onnx_library import onnx_ops_library
from sparsify.errors import ExportError
from sparsify.partial_model import PartialSparseModel
from sparsify.passes.capture import capture
from sparsify.passes.find_layers import Layer, LayerFacts, find_layers
from sparsify.passes.fuse_moe import unfuse_moe
from sparsify.passes.lower_onnx.as_written import as_written, deviates, deviation_of, flat_model
from sparsify.passes.lower_onnx.choose_lowering import (
    DEFAULT_TOKENS,
    LoweringTime,
    check_options,
    choose_lowering,
    refusals,
    why_not,
)
from sparsify.passes.lower_onnx.emit_placeholders import emit_placeholders
from sparsify.passes.lower_onnx.expert_region import ExpertRegion, find_regions
from sparsify.passes.lower_onnx.flat_graph import flatten_graph, with_names
from sparsify.passes.lower_onnx.lower_placeholders import lower_layer, lower_placeholders
from sparsify.passes.lower_onnx.lowerings import WHOLE, Leave, Lowering, Target
from sparsify.passes.lower_onnx.measure_lowerings import measure_lowerings
from sparsify.passes.lower_onnx.metadata import QUANTIZED, FileLayer, conversions, metadata
from sparsify.passes.lower_onnx.name_nodes import mark_router, name_nodes
from sparsify.passes.lower_onnx.quantize_experts import BITS, BLOCK_OPSET, Quantized
from sparsify.passes.lower_onnx.quantize_experts import quantize_experts as quantize_experts_of
from sparsify.passes.lower_onnx.routing_outputs import with_routing_outputs
from sparsify.passes.lower_onnx.runtime import require_runtime, runtime_version
from sparsify.passes.lower_onnx.trace_onnx import trace_onnx
from sparsify.passes.lower_onnx.write_files import move_all, workshop, write_model
from sparsify.passes.original_weights import original_weights
from sparsify.passes.thread_ids import own_inputs
from sparsify.passes.verify_onnx import (
    OnnxParity,
    QuantizationError,
    compare_file,
    quantization_error,
    refuse_random,
    verify_written,
)
from sparsify.sparse_model import SparseModel

_Names = tuple["Sequence[str] | None", "Sequence[str] | None"]  # of inputs and outputs


@dataclass(frozen=True)
class LayerExport:
    """How a converted layer was written, why, and how long it takes with every lowering that was considered."""

    name: str
    lowering: Lowering
    reason: str
    times: tuple[LoweringTime, ...] = ()

    def __str__(self) -> str:
        times = "".join(f"\n    {time}" for time in self.times)
        return f"{self.name}: {self.lowering} ({self.reason}){times}"


@dataclass(frozen=True)
class QuantizedExperts:
    """What the rounding of the expert weights costs.

    Attributes:
        kind: "int8" or "int4".
        weight_error: the largest relative error of a weight (Frobenius norm).
        error: of outputs and routing against PyTorch; None with `verify=False`.
    """

    kind: Quantized
    weight_error: float
    error: QuantizationError | None

    def __str__(self) -> str:
        text = f"experts in {self.kind}: weights off by {self.weight_error:.1e}"
        if self.error is None:
            return text
        same = f"the same experts in {self.error.same_experts:.1%} of decisions"
        return f"{text}, outputs by {self.error.output_error:.1e} (relative L2), {same}"


@dataclass(frozen=True)
class ExportReport:
    """What `export_onnx` wrote.

    Attributes:
        path: the file.
        target: what it was written for.
        target_tokens: the token counts that the lowerings were chosen for.
        opset: the version of its standard operators.
        layers: the converted layers, in the order of the graph.
        parity: the comparison with PyTorch, before experts were quantised; None with `verify=False`.
        file_bytes: the size of the file and its external data.
        dense_path: the dense model beside it, if one was given.
        quantized: the error of quantised experts; None where they have the dtype of the model.
        deviation: by how much the outputs differ from the model's (max|difference| / max|output|, at the example
            inputs) because of what `allow` let the file compute instead; None where it does what the model does.
    """

    path: Path
    target: str
    target_tokens: tuple[int, ...]
    opset: int
    layers: tuple[LayerExport, ...]
    parity: OnnxParity | None
    file_bytes: int
    dense_path: Path | None
    quantized: QuantizedExperts | None = None
    deviation: float | None = None

    @property
    def load_seconds(self) -> float | None:
        """The time that onnxruntime took to load the file; None with `verify=False`."""
        return self.parity.load_seconds if self.parity else None

    def to_json(self) -> dict[str, Any]:
        """The report as plain values, for `json.dump`."""
        paths = {"path": str(self.path), "dense_path": str(self.dense_path) if self.dense_path else None}
        return {**dataclasses.asdict(self), **paths, "load_seconds": self.load_seconds}

    def __str__(self) -> str:
        tokens = ", ".join(map(str, self.target_tokens))
        size = f"{self.file_bytes / 1e6:.1f} MB, opset {self.opset}"
        lines = [f"{self.path}: {size}, for {self.target} at {tokens} tokens a call"]
        lines += [f"  {layer}" for layer in self.layers]
        lines.append(f"  {self.parity or 'not checked in onnxruntime'}")
        if self.deviation is not None:
            lines.append(f"  outputs moved by {self.deviation:.1e} (relative) through what was allowed")
        if self.quantized:
            lines.append(f"  {self.quantized}")
        if self.dense_path:
            lines.append(f"  dense model: {self.dense_path}")
        return "\n".join(lines)


def export_onnx(
    sparse: SparseModel,
    path: str | Path,
    *,
    target: Target = "ort-cpu",
    lowering: Literal["auto"] | Lowering = "auto",
    target_tokens: int | Sequence[int] = DEFAULT_TOKENS,
    measure: bool = False,
    allow: Collection[Leave] = (),
    routing_outputs: bool = False,
    opset: int = 20,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    quantize_experts: Quantized | None = None,
    dense: nn.Module | None = None,
    verify: bool = True,
) -> ExportReport:
    """Write the model as an ONNX file, run the file in onnxruntime, and compare.

    Inputs are named after the arguments of the model; outputs after the keys of its output, else `output`, `output_1`,
    ... unless `input_names` and `output_names` say otherwise. Batch, sequence and other dynamic dimensions stay
    dynamic. Weights of 2 GB and more go to `<path>.data`.

    Args:
        sparse: the model; it is left as it is.
        path: the file to write; missing folders are made.
        target: what will run it. "portable" keeps to standard operators.
        lowering: "expert_chain" and "sorted_split" compute the chosen experts in standard operators, "dense_masked"
            all experts at once, "moe_op" is one `com.microsoft::MoE` node a layer; "auto" takes the fastest one that
            is exact, layer by layer. "fused_op" is one node of ours a layer, in fp32, for which a session must register
            the library of `onnx_ops_library`. "dense" is a layer with all its experts on, and without its router;
            "original" is the FFN of `dense` that it was made from.
        target_tokens: how many tokens a call will have, or several such numbers: what "auto" chooses for.
        measure: "auto" times the lowerings of every layer in onnxruntime on this machine, and does not predict.
        allow: what the file may do where that is faster. "fused_op": need the library of `onnx_ops_library` in every
            session; it still computes what the model does, and mostly as the fastest. "dense": in place of a split
            layer the FFN of `dense` that it was made from, or, where that is not given, the layer with all its experts
            on, as by `set_top_k(num_experts)`; so no layer is slower than a dense one. "tanh_gelu": GELU by tanh where
            `com.microsoft::MoE` is taken, which has no other. The report says by how much outputs differ.
        routing_outputs: give the file two more outputs for every converted FFN, `<ffn>.expert_ids` and
            `<ffn>.routing_weights`, `[T, K]` each: which experts each token had, -1 for none, and how much they
            counted.
        opset: the version of the standard operators, 18 to the newest that onnxruntime loads.
        input_names: a name for every input tensor, in order.
        output_names: a name for every output tensor, in order.
        quantize_experts: "int8" or "int4" stores the weights of the experts so, with a scale for 32 features; the
            report says what it costs. onnxruntime runs them by `com.microsoft::MatMulNBits`; "portable" needs opset 21.
        dense: the dense model that `sparse` was made from; it is written to `<stem>.dense.onnx`, for comparison.
        verify: run the file and compare it with the model at several shapes.

    Returns:
        What was written, and the comparison.

    Raises:
        ValueError: an option is unknown, or there are not as many names as inputs or outputs.
        ExportError: the model cannot be exported, or draws random numbers, which `verify` cannot compare; or
            `lowering` does not fit a layer.
        VerificationError: the file computes something else than the model.
        OutputError: the file cannot be written.
        ImportError: `verify` or `measure` needs onnxruntime, which is not installed.
    """
    tokens = (target_tokens,) if isinstance(target_tokens, int) else tuple(target_tokens)
    check_options(target, lowering, tokens, allow)
    _check_quantized(quantize_experts, target, lowering, opset)
    if isinstance(sparse, PartialSparseModel):
        raise ExportError(
            f"{type(sparse.original).__name__} was not traced as a whole (see the notes of the report), and an ONNX "
            "file is a graph of all of it. Convert and export the largest submodule that can be traced, or rewrite "
            "the line that the notes name."
        )
    if verify or measure:
        require_runtime()
        if target == "ort-cpu" and (lowering == "fused_op" or "fused_op" in allow):
            onnx_ops_library()  # refuses before any work where it cannot be made
    if verify:
        refuse_random(sparse.graph)
    path, names = Path(path), (input_names, output_names)
    dense_path = path.with_name(f"{path.stem}.dense.onnx") if dense is not None else None
    with workshop(path) as staging:
        copied, kind = frozenset(sparse.info.shards), quantize_experts
        is_needed = dense is not None and (lowering == "original" or "dense" in allow)
        originals = original_weights(sparse, dense) if dense is not None and is_needed else None
        choice = _Choice(
            target, lowering, tokens, measure, tuple(allow), opset, routing_outputs, kind, copied, originals
        )
        model, layers, deviation = _sparse_onnx(sparse, choice, names)
        write_model(model, staging / path.name)
        if dense is not None and dense_path is not None:
            _export_dense(dense, sparse, staging / dense_path.name, opset, names, verify)
        parity = verify_written(sparse, staging / path.name, originals or {}) if verify else None
        quantized = None
        if quantize_experts is not None:
            quantized = _quantize(model, sparse, staging / path.name, quantize_experts, target, layers, verify)
        file_bytes = sum(file.stat().st_size for file in staging.glob(f"{path.name}*"))
        move_all(staging, path.parent)
    return ExportReport(path, target, tokens, opset, layers, parity, file_bytes, dense_path, quantized, deviation)


def _check_quantized(kind: str | None, target: str, lowering: str, opset: int) -> None:
    if kind is None:
        return
    if kind not in BITS:
        raise ValueError(f"quantize_experts must be one of {', '.join(BITS)} or None, got {kind!r}")
    if target == "portable" and opset < BLOCK_OPSET:
        raise ValueError(
            f"quantised experts need opset {BLOCK_OPSET} or later for the target portable, got opset={opset}"
        )
    if lowering in ("moe_op", "fused_op"):
        raise ValueError(f'{lowering} takes no quantised weights; use lowering="auto" with quantize_experts')


def _quantize(
    model: ir.Model,
    sparse: SparseModel,
    path: Path,
    kind: Quantized,
    target: Target,
    layers: Sequence[LayerExport],
    verify: bool,
) -> QuantizedExperts:
    """Write the file once more, with quantised experts; the one before it was exact, which shows that the rest is."""
    weight_error = quantize_experts_of(model, kind, target, [layer.name for layer in layers])
    model.metadata_props[QUANTIZED] = kind
    for old in path.parent.glob(f"{path.name}*"):
        old.unlink()
    write_model(model, path)
    return QuantizedExperts(kind, weight_error, quantization_error(sparse, path) if verify else None)


@dataclass(frozen=True)
class _Choice:
    """The options of an export by which layers get their lowerings."""

    target: Target
    lowering: Literal["auto"] | Lowering
    tokens: tuple[int, ...]
    measure: bool
    allow: tuple[Leave, ...]
    opset: int
    routing_outputs: bool
    quantized: Quantized | None
    copied: frozenset[str]  # layers whose experts are copies
    originals: Mapping[str, Mapping[str, Tensor]] | None  # weights by layer, None without a dense model


def _sparse_onnx(
    sparse: SparseModel, options: _Choice, names: _Names
) -> tuple[ir.Model, tuple[LayerExport, ...], float | None]:
    """The model, how its layers are written, and how far the allowed deviations move its outputs."""
    flat = flatten_graph(sparse, sparse.info.args, sparse.info.kwargs, sparse.dynamic_dims())
    flat = with_names(flat, *names)
    unfuse_moe(sparse, flat.graph)
    layers = find_layers(sparse, flat.graph)
    flat = with_routing_outputs(flat, layers) if options.routing_outputs else flat
    emit_placeholders(flat.graph, layers)
    model = trace_onnx(flat, options.opset)
    regions = find_regions(model.graph)
    expert_ids = [region.expert_ids for region in regions]
    for region in regions:
        mark_router(region)
    exports = _choose_all(layers, regions, options)
    originals = options.originals or {}
    for region, export in zip(regions, exports, strict=True):
        if export.lowering == "original":
            _set_weights(model.graph, originals[export.name])
        lower_layer(region, export.lowering)
    lower_placeholders(model)
    in_file = [
        FileLayer(export.name, export.lowering, export.reason, "" if export.lowering in WHOLE else str(ids.name))
        for export, ids in zip(exports, expert_ids, strict=True)
    ]
    entries = metadata(options.target, in_file, conversions(layers, sparse.info.report))
    moved = None
    if deviates(in_file, layers):
        moved = deviation_of(flat_model(sparse), as_written(sparse, in_file, originals))
    return _labelled(model, entries), exports, moved


def _choose_all(layers: Sequence[Layer], regions: Sequence[ExpertRegion], options: _Choice) -> tuple[LayerExport, ...]:
    """Layers with equal facts get the same lowering, and are measured once."""
    known: dict[tuple[LayerFacts, bool], LayerExport] = {}
    keys = [(layer.facts, layer.name in (options.originals or {})) for layer in layers]
    for key, layer, region in zip(keys, layers, regions, strict=True):
        if key not in known:
            known[key] = _choose(layer, region, options)
    return tuple(dataclasses.replace(known[key], name=layer.name) for key, layer in zip(keys, layers, strict=True))


def _choose(layer: Layer, region: ExpertRegion, options: _Choice) -> LayerExport:
    facts, runtime = layer.facts, runtime_version()
    if options.lowering != "auto":
        refused = why_not(options.lowering, facts, options.target, runtime, options.allow)
        refused = refused or _not_whole(options.lowering, layer, options)
        if refused is not None:
            raise ExportError(
                f'{layer.name} cannot be lowered as "{options.lowering}": {refused}. Use lowering="auto" or '
                '"sorted_split"'
            )
        return LayerExport(layer.name, options.lowering, "as asked")
    allow: list[Leave | Lowering] = [*options.allow]
    if "dense" in allow and options.originals is not None:
        allow[allow.index("dense")] = "original"
    refused = refusals(facts, options.target, runtime, allow)
    if options.quantized:
        refused |= {name: "it takes no quantised weights" for name in ("moe_op", "fused_op") if name in refused}
    for name in refused:
        refused[name] = refused[name] or _not_whole(name, layer, options)

    def measure(lowerings: Sequence[Lowering]) -> Sequence[Sequence[float] | None]:
        return measure_lowerings(region, options.opset, lowerings, options.tokens)

    chosen = choose_lowering(refused, facts, options.target, options.tokens, measure if options.measure else None)
    return LayerExport(layer.name, *chosen)


def _set_weights(graph: ir.Graph, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        graph.initializers[name].const_value = TorchTensor(weight, name=name)


def _not_whole(lowering: Lowering, layer: Layer, options: _Choice) -> str | None:
    """What besides its facts keeps a layer from being written as one FFN, None if nothing does."""
    if lowering not in WHOLE:
        return None
    if lowering == "original" and layer.name not in (options.originals or {}):
        return "dense= is not given, or has no FFN that its experts were made from"
    if layer.name in options.copied:
        return "its experts are copies, not parts of one FFN"
    if options.quantized:
        return "its experts are to be quantised"
    return "its routes are asked for" if options.routing_outputs else None


def _export_dense(dense: nn.Module, sparse: SparseModel, path: Path, opset: int, names: _Names, verify: bool) -> None:
    args, kwargs = sparse.info.args, own_inputs(dense, sparse.info.kwargs)
    captured = dense if isinstance(dense, fx.GraphModule) else capture(dense, args, kwargs)
    flat = with_names(flatten_graph(captured, args, kwargs, sparse.dynamic_dims()), *names)
    write_model(_labelled(trace_onnx(flat, opset), {}), path)
    if verify:
        compare_file(flat, path)


def _labelled(model: ir.Model, entries: dict[str, str]) -> ir.Model:
    """Replace what the exporter noted on every node (modules, stack traces with local paths) by names and entries."""
    name_nodes(model.graph)
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.update(entries)
    return model
