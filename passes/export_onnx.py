"""SparseModel -> an ONNX file that computes the chosen experts only, checked against the model before it is in place.

    copy the graph -> ops of ours become placeholders -> torch.onnx.export -> placeholders become nodes of the target

The work is done in a hidden folder beside the file; a failure at any point leaves what was there before.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
from onnx_ir.passes import common
from torch import fx, nn

from sparsify.errors import ExportError, OutputError
from sparsify.partial_model import PartialSparseModel
from sparsify.passes.capture import capture
from sparsify.passes.find_layers import Layer, LayerFacts, find_layers
from sparsify.passes.fuse_moe import unfuse_moe
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
from sparsify.passes.lower_onnx.lowerings import Lowering, Target
from sparsify.passes.lower_onnx.measure_lowerings import measure_lowerings
from sparsify.passes.lower_onnx.metadata import QUANTIZED, FileLayer, conversions, metadata
from sparsify.passes.lower_onnx.name_nodes import mark_router, name_nodes
from sparsify.passes.lower_onnx.quantize_experts import BITS, BLOCK_OPSET, Quantized
from sparsify.passes.lower_onnx.quantize_experts import quantize_experts as quantize_experts_of
from sparsify.passes.lower_onnx.routing_outputs import with_routing_outputs
from sparsify.passes.lower_onnx.runtime import require_runtime, runtime_version
from sparsify.passes.lower_onnx.trace_onnx import trace_onnx
from sparsify.passes.verify_onnx import (
    OnnxParity,
    QuantizationError,
    compare_file,
    quantization_error,
    refuse_random,
    verify_onnx,
)
from sparsify.sparse_model import SparseModel

_Names = tuple["Sequence[str] | None", "Sequence[str] | None"]  # of inputs and outputs

# A protobuf message ends at 2 GiB; names and nodes need a little of it.
_LARGEST_FILE = 2**31 - 2**27


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
            is exact, layer by layer.
        target_tokens: how many tokens a call will have, or several such numbers: what "auto" chooses for.
        measure: "auto" times the lowerings of every layer in onnxruntime on this machine, and does not predict.
        routing_outputs: give the file two more outputs for every converted FFN, `<ffn>.expert_ids` and
            `<ffn>.routing_weights`, `[T, K]` each: which experts each token had, -1 for none, and how much they
            counted.
        opset: the version of the standard operators, 18 to the newest that onnxruntime loads.
        input_names: a name for every input tensor, in order.
        output_names: a name for every output tensor, in order.
        quantize_experts: "int8" or "int4" stores the weights of the experts so, with a scale for 32 features; the
            report says what it costs. onnxruntime runs them by `com.microsoft::MatMulNBits`; "portable" needs opset 21.
        dense: the dense model with the same inputs; it is written to `<stem>.dense.onnx`, for comparison.
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
    check_options(target, lowering, tokens)
    _check_quantized(quantize_experts, target, lowering, opset)
    if isinstance(sparse, PartialSparseModel):
        raise ExportError(
            f"{type(sparse.original).__name__} was not traced as a whole (see the notes of the report), and an ONNX "
            "file is a graph of all of it. Convert and export the largest submodule that can be traced, or rewrite "
            "the line that the notes name."
        )
    if verify or measure:
        require_runtime()
    if verify:
        refuse_random(sparse.graph)
    path, names = Path(path), (input_names, output_names)
    dense_path = path.with_name(f"{path.stem}.dense.onnx") if dense is not None else None
    with _workshop(path) as workshop:
        choice = _Choice(target, lowering, tokens, measure, opset, routing_outputs, quantize_experts)
        model, layers = _sparse_onnx(sparse, choice, names)
        _write(model, workshop / path.name)
        if dense is not None and dense_path is not None:
            _export_dense(dense, sparse, workshop / dense_path.name, opset, names, verify)
        parity = verify_onnx(sparse, workshop / path.name) if verify else None
        quantized = None
        if quantize_experts is not None:
            quantized = _quantize(model, sparse, workshop / path.name, quantize_experts, target, layers, verify)
        file_bytes = sum(file.stat().st_size for file in workshop.glob(f"{path.name}*"))
        _move_all(workshop, path.parent)
    return ExportReport(path, target, tokens, opset, layers, parity, file_bytes, dense_path, quantized)


def _check_quantized(kind: str | None, target: str, lowering: str, opset: int) -> None:
    if kind is None:
        return
    if kind not in BITS:
        raise ValueError(f"quantize_experts must be one of {', '.join(BITS)} or None, got {kind!r}")
    if target == "portable" and opset < BLOCK_OPSET:
        raise ValueError(
            f"quantised experts need opset {BLOCK_OPSET} or later for the target portable, got opset={opset}"
        )
    if lowering == "moe_op":
        raise ValueError('com.microsoft::MoE takes no quantised weights; use lowering="auto" with quantize_experts')


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
    _write(model, path)
    return QuantizedExperts(kind, weight_error, quantization_error(sparse, path) if verify else None)


@dataclass(frozen=True)
class _Choice:
    """The options of an export by which layers get their lowerings."""

    target: Target
    lowering: Literal["auto"] | Lowering
    tokens: tuple[int, ...]
    measure: bool
    opset: int
    routing_outputs: bool
    quantized: Quantized | None


def _sparse_onnx(sparse: SparseModel, options: _Choice, names: _Names) -> tuple[ir.Model, tuple[LayerExport, ...]]:
    flat = flatten_graph(sparse, sparse.info.args, sparse.info.kwargs, sparse.dynamic_dims())
    flat = with_names(flat, *names)
    unfuse_moe(sparse, flat.graph)
    layers = find_layers(sparse, flat.graph)
    flat = with_routing_outputs(flat, layers) if options.routing_outputs else flat
    emit_placeholders(flat.graph, layers)
    model = trace_onnx(flat, options.opset)
    regions = find_regions(model.graph)
    expert_ids = [region.expert_ids for region in regions]
    exports = _choose_all(layers, regions, options)
    for region, export in zip(regions, exports, strict=True):
        mark_router(region)
        lower_layer(region, export.lowering)
    lower_placeholders(model)
    in_file = [
        FileLayer(export.name, export.lowering, export.reason, str(ids.name))
        for export, ids in zip(exports, expert_ids, strict=True)
    ]
    entries = metadata(options.target, in_file, conversions(layers, sparse.info.report))
    return _labelled(model, entries), exports


def _choose_all(layers: Sequence[Layer], regions: Sequence[ExpertRegion], options: _Choice) -> tuple[LayerExport, ...]:
    """Layers with equal facts get the same lowering, and are measured once."""
    known: dict[LayerFacts, LayerExport] = {}
    for layer, region in zip(layers, regions, strict=True):
        if layer.facts not in known:
            known[layer.facts] = _choose(layer, region, options)
    return tuple(dataclasses.replace(known[layer.facts], name=layer.name) for layer in layers)


def _choose(layer: Layer, region: ExpertRegion, options: _Choice) -> LayerExport:
    facts, runtime = layer.facts, runtime_version()
    if options.lowering != "auto":
        refused = why_not(options.lowering, facts, options.target, runtime)
        if refused is not None:
            raise ExportError(
                f'{layer.name} cannot be lowered as "{options.lowering}": {refused}. Use lowering="auto" or '
                '"sorted_split"'
            )
        return LayerExport(layer.name, options.lowering, "as asked")
    refused = refusals(facts, options.target, runtime)
    if options.quantized:
        refused["moe_op"] = "it takes no quantised weights"

    def measure(lowerings: Sequence[Lowering]) -> Sequence[Sequence[float] | None]:
        return measure_lowerings(region, options.opset, lowerings, options.tokens)

    chosen = choose_lowering(refused, facts, options.target, options.tokens, measure if options.measure else None)
    return LayerExport(layer.name, *chosen)


def _export_dense(dense: nn.Module, sparse: SparseModel, path: Path, opset: int, names: _Names, verify: bool) -> None:
    args, kwargs = sparse.info.args, sparse.info.kwargs
    captured = dense if isinstance(dense, fx.GraphModule) else capture(dense, args, kwargs)
    flat = with_names(flatten_graph(captured, args, kwargs, sparse.dynamic_dims()), *names)
    _write(_labelled(trace_onnx(flat, opset), {}), path)
    if verify:
        compare_file(flat, path)


def _labelled(model: ir.Model, entries: dict[str, str]) -> ir.Model:
    """Replace what the exporter noted on every node (modules, stack traces with local paths) by names and entries."""
    name_nodes(model.graph)
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.update(entries)
    return model


@contextmanager
def _workshop(path: Path) -> Generator[Path]:
    """A hidden folder beside `path`; making it shows, before any work, that files can be written there."""
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; give the name of a file in it, such as model.onnx")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        workshop = tempfile.TemporaryDirectory(dir=path.parent, prefix=".sparsify-")
    with workshop as folder:
        yield Path(folder)


def _write(model: ir.Model, path: Path) -> None:
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    external = f"{path.name}.data" if size > _LARGEST_FILE else None
    with _writing(path):
        ir.save(model, path, external_data=external)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the exported graph is not valid ONNX: {error}; report this model") from error


def _move_all(workshop: Path, folder: Path) -> None:
    """Put the finished files in place, data before the model that refers to it; all of them, or none."""
    kept = workshop / "kept"
    files = sorted(workshop.iterdir(), key=lambda file: file.suffix != ".data")
    with _writing(folder / files[-1].name):
        kept.mkdir()
        for file in files:
            if (folder / file.name).exists():
                _keep(folder / file.name, kept / file.name)
        try:
            for file in files:
                os.replace(file, folder / file.name)
        except BaseException:
            for old in kept.iterdir():
                os.replace(old, folder / old.name)
            raise


def _keep(file: Path, place: Path) -> None:
    """A second name for the content of a file; a copy where the disk knows no such names."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)


@contextmanager
def _writing(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        cause = error.strerror or str(error)
        raise OutputError(
            f"cannot write {path}: {cause}. Choose a folder on a disk with free space where you may write"
        ) from error
