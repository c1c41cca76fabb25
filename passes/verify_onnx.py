"""The receipt of an ONNX file: run it in onnxruntime, and compare it with the PyTorch model at several shapes.

Expert ids are compared first, as integers, one layer after the other; then the outputs. Where two experts score alike
to within rounding, the two runtimes may choose differently, and everything after that differs by right: such a near tie
is counted, and the outputs at that shape are not compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx.external_data_helper import uses_external_data
from torch import Tensor, nn
from torch.fx import Graph

from sparsify.errors import ExportError, LoadError, VerificationError
from sparsify.passes.find_layers import Layer, find_layers
from sparsify.passes.graph_values import op_name
from sparsify.passes.lower_onnx.as_written import as_written, deviates, flat_model
from sparsify.passes.lower_onnx.flat_graph import FlatGraph, with_names
from sparsify.passes.lower_onnx.fused_op import has_own_ops
from sparsify.passes.lower_onnx.lowerings import WHOLE
from sparsify.passes.lower_onnx.metadata import FileLayer, read_layers, read_quantized, read_target
from sparsify.passes.lower_onnx.probe import Reference, references
from sparsify.passes.lower_onnx.routing_outputs import has_routing_outputs, with_routing_outputs
from sparsify.passes.lower_onnx.runtime import open_session, require_runtime, run_session
from sparsify.passes.original_weights import original_weights
from sparsify.sparse_model import SparseModel

_OTHER_SHAPES = 3
_RANDOM = frozenset(
    {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "multinomial", "bernoulli",
     "normal", "uniform", "exponential", "poisson"}
)  # fmt: skip


@dataclass(frozen=True)
class OnnxParity:
    """How close a file is to the PyTorch model.

    Attributes:
        shapes: where the outputs were compared: the dynamic sizes of the inputs, by axis name.
        max_relative_error: the largest over outputs and shapes of max|difference| / max|reference|.
        tokens_checked: routing decisions compared, one a token and layer.
        expert_id_mismatches: decisions that differ; every one is a near tie, else there is no receipt.
        load_seconds: the time that onnxruntime took to load the file.
    """

    shapes: tuple[dict[str, int], ...]
    max_relative_error: float
    tokens_checked: int
    expert_id_mismatches: int
    load_seconds: float

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        ties = f" but for {self.expert_id_mismatches} near ties" if self.expert_id_mismatches else ""
        return (
            f"max relative error {self.max_relative_error:.1e} at {len(self.shapes)} shapes, expert ids equal in "
            f"{self.tokens_checked} decisions{ties}"
        )


@dataclass(frozen=True)
class _Bounds:
    """The largest relative error of an output, and the relative gap of the logits below which two experts tie."""

    error: float
    tie: float


@dataclass(frozen=True)
class _IdCheck:
    """The expert ids at one shape: decisions compared, and how many of them went the other way in a near tie."""

    decisions: int
    ties: int


def verify_onnx(sparse: SparseModel, path: str | Path, dense: nn.Module | None = None) -> OnnxParity:
    """Compare a file written by `export_onnx` with the model that it was exported from.

    Where the export was allowed to deviate, the model is compared that deviates alike: with all experts of a layer on,
    its original FFN, or GELU by tanh.

    Args:
        sparse: the model.
        path: the file.
        dense: the model that it was converted from, where the file holds some of its FFNs.

    Raises:
        ValueError: the file holds FFNs of the dense model, which is not given, or does not have them.
        VerificationError: expert ids or outputs differ, or the file belongs to another model.
        ExportError: onnxruntime cannot load or run the file, or the model draws random numbers.
        LoadError: the file is damaged, or no ONNX file.
        OSError: the file cannot be read.
        ImportError: onnxruntime is not installed.
    """
    return _verify(sparse, Path(path), lambda layers: _originals(sparse, layers, dense))


def verify_written(sparse: SparseModel, path: Path, originals: Mapping[str, Mapping[str, Tensor]]) -> OnnxParity:
    """`verify_onnx` where the `original_weights` of the layers are known, as in an export."""
    return _verify(sparse, path, lambda _: originals)


def _verify(
    sparse: SparseModel,
    path: Path,
    originals_of: Callable[[Sequence[FileLayer]], Mapping[str, Mapping[str, Tensor]]],
) -> OnnxParity:
    require_runtime()
    proto, flat = _load(path), flat_model(sparse)
    file_layers, layers = read_layers(proto), find_layers(flat.root, flat.graph)
    _check_layers(path, layers, file_layers)
    if deviates(file_layers, layers):
        flat = as_written(sparse, file_layers, originals_of(file_layers))
    return _compare(flat, path, proto)


def _originals(
    sparse: SparseModel, layers: Sequence[FileLayer], dense: nn.Module | None
) -> dict[str, dict[str, Tensor]]:
    wanted = [layer.name for layer in layers if layer.lowering == "original"]
    found = original_weights(sparse, dense) if wanted and dense is not None else {}
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"the file holds the original FFN of {', '.join(missing)}; give the dense model that was converted, as "
            "dense="
        )
    return found


@dataclass(frozen=True)
class QuantizationError:
    """How far a file with quantised experts is from the PyTorch model.

    Attributes:
        output_error: the largest over outputs and shapes of |difference| / |reference| (L2 norms).
        same_experts: the share of routing decisions, over layers and shapes, in which all experts are the same.
    """

    output_error: float
    same_experts: float


def quantization_error(sparse: SparseModel, path: Path) -> QuantizationError:
    """Run a file with quantised experts at up to four shapes.

    Raises:
        VerificationError: an output is not finite where that of the model is.
        ExportError: onnxruntime cannot load or run the file.
    """
    flat, proto = flat_model(sparse), _load(path)
    layers, file_layers = find_layers(flat.root, flat.graph), read_layers(proto)
    own = len(flat.output_names)  # routes may follow
    flat = _with_outputs_of(proto, path, flat, layers)
    cuda = read_target(proto) == "ort-cuda" and torch.cuda.is_available()
    _add_expert_ids(proto, file_layers)
    ids = [layer.expert_ids for layer in file_layers]
    error, same, decisions = 0.0, 0, 0
    with _stored(proto) as probe:
        session, _ = open_session(probe, path.parent, cuda, own_ops=has_own_ops(proto))
        for reference in itertools.islice(references(flat, layers), _OTHER_SHAPES + 1):
            found = run_session(session, [*ids, *flat.output_names], reference.inputs)
            for ours, theirs in zip(reference.expert_ids, found, strict=False):
                equal = (ours.cpu().sort(-1).values == theirs.sort(-1).values).all(-1)  # [T]
                same, decisions = same + int(equal.sum()), decisions + len(equal)
            errors = map(_l2_error, reference.outputs[:own], found[len(ids) :])
            error = max(error, *errors)
        del session
    if not math.isfinite(error):
        raise VerificationError(f"outputs of {path} are not finite with quantised experts; export it without")
    return QuantizationError(error, same / max(decisions, 1))


def _l2_error(ours: Tensor, theirs: Tensor) -> float:
    """Infinite where values that are not finite stand at different places."""
    ours, finite = ours.cpu().double(), ours.cpu().isfinite()
    if not torch.equal(finite, theirs.isfinite()):
        return torch.inf
    norm = ours[finite].norm().item()
    return (ours - theirs.double())[finite].norm().item() / (norm or 1.0)


def compare_file(flat: FlatGraph, path: Path) -> OnnxParity:
    """`verify_onnx` for a model that is flat already, and which may have no experts at all."""
    require_runtime()
    return _compare(flat, path, _load(path))


def _compare(flat: FlatGraph, path: Path, proto: onnx.ModelProto) -> OnnxParity:
    refuse_random(flat.graph)
    kind = read_quantized(proto)
    if kind:
        raise VerificationError(
            f"the experts of {path} are {kind}, so its outputs differ from the model's by their rounding, and later "
            "routers may choose other experts; the report of its export says how much. Export it without "
            "quantize_experts to compare"
        )
    layers = find_layers(flat.root, flat.graph)
    file_layers = [layer for layer in read_layers(proto) if layer.lowering not in WHOLE]
    _check_layers(path, layers, file_layers)
    flat = _with_outputs_of(proto, path, flat, layers)
    bounds, cuda = _bounds(layers, flat), read_target(proto) == "ort-cuda" and torch.cuda.is_available()
    _add_expert_ids(proto, file_layers)
    own_ops = has_own_ops(proto)
    with _stored(proto) as probe:
        del proto  # a copy of all weights; onnxruntime makes its own
        session, _ = open_session(probe, path.parent, cuda, own_ops=own_ops)
        clean, checks = _check_routing(flat, layers, session, [layer.expert_ids for layer in file_layers])
        del session
    if not clean:
        raise VerificationError(
            f"at each of {len(checks)} shapes some experts score alike to within rounding, so PyTorch and onnxruntime "
            "may choose differently and their outputs cannot be compared; calibrate the routers, or export the model "
            "in float32"
        )
    session, load_seconds = open_session(path, path.parent, cuda, own_ops=own_ops)
    error = max(_output_error(reference, _outputs(session, flat, reference), flat, bounds) for reference in clean)
    del session
    return OnnxParity(
        shapes=tuple(reference.sizes for reference in clean),
        max_relative_error=error,
        tokens_checked=sum(check.decisions for check in checks),
        expert_id_mismatches=sum(check.ties for check in checks),
        load_seconds=load_seconds,
    )


def _load(path: Path) -> onnx.ModelProto:
    """The graph of the file; weights that lie outside stay there."""
    try:
        return onnx.load(str(path), load_external_data=False)
    except OSError:
        raise
    except Exception as error:
        raise LoadError(f"{path} is no ONNX file, or is damaged: {error}; export the model again") from error


def _with_outputs_of(proto: onnx.ModelProto, path: Path, flat: FlatGraph, layers: Sequence[Layer]) -> FlatGraph:
    """Routes may be outputs too, and names may have been chosen at the export; the order is that of the model."""
    if has_routing_outputs([output.name for output in proto.graph.output], flat, layers):
        flat = with_routing_outputs(flat, layers)
    stored = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value.name for value in proto.graph.input if value.name not in stored]
    outputs = [value.name for value in proto.graph.output]
    if len(inputs) != len(flat.inputs) or len(outputs) != len(flat.output_names):
        raise VerificationError(
            f"{path} has {len(inputs)} inputs and {len(outputs)} outputs, but the model has {len(flat.inputs)} and "
            f"{len(flat.output_names)}; the file was not exported from this model, so export it again"
        )
    return with_names(flat, inputs, outputs)


def _check_routing(
    flat: FlatGraph, layers: Sequence[Layer], session: Any, names: Sequence[str]
) -> tuple[list[Reference], list[_IdCheck]]:
    """The shapes without a near tie, up to four, and the checks of every shape tried."""
    bounds = _bounds(layers, flat)
    checks: list[_IdCheck] = []
    clean: list[Reference] = []
    for reference in references(flat, layers):
        ids = run_session(session, names, reference.inputs) if names else []
        checks.append(_check_ids(reference, ids, layers, bounds))
        if not checks[-1].ties:
            clean.append(reference)
        if len(clean) > _OTHER_SHAPES:
            break
    return clean, checks


def refuse_random(graph: Graph) -> None:
    """Do nothing if two runs agree.

    Raises:
        ExportError: the model draws random numbers.
    """
    for node in graph.nodes:
        if op_name(node).rstrip("_") in _RANDOM:
            raise ExportError(
                f"the model draws random numbers (`{node.name}`), in onnxruntime others than in PyTorch, so the file "
                "cannot be compared. Pass the numbers as an input of the model, or export with verify=False"
            )


def _check_layers(path: Path, layers: Sequence[Layer], file_layers: Sequence[FileLayer]) -> None:
    ours, theirs = [layer.name for layer in layers], [layer.name for layer in file_layers]
    if ours != theirs:
        raise VerificationError(
            f"{path} holds the converted layers {theirs}, but the model has {ours}; the file was not exported from "
            "this model, so export it again"
        )


def _bounds(layers: Sequence[Layer], flat: FlatGraph) -> _Bounds:
    dtypes = {layer.facts.dtype for layer in layers} | {tensor.dtype for tensor in flat.inputs.values()}
    half = dtypes & {torch.float16, torch.bfloat16}
    return _Bounds(error=1e-2, tie=1e-2) if half else _Bounds(error=1e-4, tie=1e-5)


def _add_expert_ids(proto: onnx.ModelProto, layers: Sequence[FileLayer]) -> None:
    """Make the expert ids of every layer outputs."""
    taken = {output.name for output in proto.graph.output}
    for name in dict.fromkeys(layer.expert_ids for layer in layers):
        if name not in taken:
            proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None))


@contextlib.contextmanager
def _stored(proto: onnx.ModelProto) -> Generator[Path | bytes]:
    """The model for onnxruntime: a temporary file, so that its weights are not in memory once more.

    As bytes where the weights lie outside: they are found from the folder of the original, and the rest is small.
    """
    if any(uses_external_data(tensor) for tensor in proto.graph.initializer):
        yield proto.SerializeToString()
        return
    with tempfile.TemporaryDirectory(prefix="sparsify-") as folder:
        probe = Path(folder) / "probe.onnx"
        onnx.save(proto, str(probe))
        del proto
        yield probe


def _check_ids(reference: Reference, found: Sequence[Tensor], layers: Sequence[Layer], bounds: _Bounds) -> _IdCheck:
    """Compare layer by layer, up to the first near tie: after one, tokens differ and so may every later choice."""
    decisions = 0
    for layer, ours, theirs, gaps in zip(layers, reference.expert_ids, found, reference.gaps, strict=True):
        differs = (ours.cpu().sort(-1).values != theirs.sort(-1).values).any(-1)  # [T]
        decisions += len(differs)
        wrong = differs & (gaps.cpu() >= bounds.tie)
        if wrong.any():
            token = int(wrong.nonzero()[0])
            raise VerificationError(
                f"{layer.name}: {int(wrong.sum())} of {len(wrong)} tokens go to other experts in onnxruntime than in "
                f"PyTorch at {reference.sizes} (token {token}: {theirs[token].tolist()} instead of "
                f"{ours[token].tolist()}, logits {gaps[token]:.1e} apart); the file was not kept, report this model"
            )
        if differs.any():
            return _IdCheck(decisions, int(differs.sum()))
    return _IdCheck(decisions, 0)


def _outputs(session: Any, flat: FlatGraph, reference: Reference) -> list[Tensor]:
    return run_session(session, flat.output_names, reference.inputs)


def _output_error(reference: Reference, found: Sequence[Tensor], flat: FlatGraph, bounds: _Bounds) -> float:
    errors = [_relative_error(ours.cpu(), theirs) for ours, theirs in zip(reference.outputs, found, strict=True)]
    worst = max(errors)
    if not worst <= bounds.error:
        raise VerificationError(
            f"output {flat.output_names[errors.index(worst)]} differs by {worst:.1e} (relative to its largest value) "
            f"between onnxruntime and PyTorch at {reference.sizes}; {bounds.error:.0e} is allowed. The file was not "
            'kept; try lowering="sorted_split"'
        )
    return worst


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Infinite where shapes differ, or values that are not finite stand at different places."""
    if ours.shape != theirs.shape:
        return torch.inf
    ours, theirs = ours.double(), theirs.double()
    finite = ours.isfinite()
    if not torch.equal(finite, theirs.isfinite()):
        return torch.inf
    if not finite.any():
        return 0.0
    scale = ours[finite].abs().max().item()
    return (ours - theirs)[finite].abs().max().item() / (scale or 1.0)
