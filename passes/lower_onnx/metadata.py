"""What a file of ours says about itself, in `metadata_props`.

Versions and target, how every layer was lowered, and how it was converted, with its receipt.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import onnx

from sparsify.errors import LoadError
from sparsify.passes.find_layers import Layer
from sparsify.report import Report

_VERSION, _TARGET, _LAYERS = "sparsify.version", "sparsify.target", "sparsify.layers"
_VERSIONS, _CONVERSION, QUANTIZED = "sparsify.versions", "sparsify.conversion", "sparsify.quantized"
_PACKAGES = ("torch", "onnx", "onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True)
class FileLayer:
    """A layer as the file holds it; `expert_ids` names the value `[T, K]` that its router chose."""

    name: str
    lowering: str
    reason: str
    expert_ids: str


@dataclass(frozen=True)
class Conversion:
    """How a layer was converted; its routed experts, as shared ones are plain nodes.

    Attributes:
        name: of the FFN.
        num_experts: E.
        top_k: K.
        expert_size: neurons of an expert; of the units that experts are made of, where these differ in width.
        activation: its name.
        num_shared_experts: parts that run for every token; None in a model that was loaded without its report.
        receipt: the largest relative error of the split with all experts on; None as above.
        expert_widths: neurons of each expert, where they differ in width.
    """

    name: str
    num_experts: int
    top_k: int
    expert_size: int
    activation: str
    num_shared_experts: int | None
    receipt: float | None
    expert_widths: tuple[int, ...] | None = None


def conversions(layers: Sequence[Layer], report: Report | None) -> list[Conversion]:
    """Read off the layers of a model, and its report where it has one."""
    known = {ffn.name: ffn for ffn in report.ffns} if report else {}
    found: list[Conversion] = []
    for layer in layers:
        facts, ffn = layer.facts, known.get(layer.name)
        size, shared = facts.expert_size, ffn.num_shared_experts if ffn else None
        receipt, widths = ffn.receipt if ffn else None, facts.widths
        uneven = None if facts.units is None else widths
        own = (layer.name, len(widths), facts.routed_k, size, facts.activation, shared, receipt, uneven)
        found.append(Conversion(*own))
    return found


def metadata(target: str, layers: Sequence[FileLayer], converted: Sequence[Conversion]) -> dict[str, str]:
    """The entries for `metadata_props`."""
    return {
        _VERSION: _version(),
        _TARGET: target,
        _LAYERS: json.dumps([asdict(layer) for layer in layers]),
        _CONVERSION: json.dumps([asdict(layer) for layer in converted]),
        _VERSIONS: json.dumps(_versions()),
    }


def read_target(model: onnx.ModelProto) -> str:
    """The target that the file was written for, "" in a file that is not ours."""
    return _entry(model, _TARGET)


def read_quantized(model: onnx.ModelProto) -> str:
    """The kind of its quantised expert weights, "" where they have the dtype of the model."""
    return _entry(model, QUANTIZED)


def read_layers(model: onnx.ModelProto) -> list[FileLayer]:
    """The layers, in the order of the graph; none in a file that is not ours.

    Raises:
        LoadError: the entry is not what this version writes.
    """
    entry = _entry(model, _LAYERS)
    try:
        return [FileLayer(**layer) for layer in json.loads(entry)] if entry else []
    except (TypeError, ValueError) as error:
        written, ours = _entry(model, _VERSION) or "unknown", _version()
        raise LoadError(
            f"the file was written by version {written} of sparsify, whose entry {_LAYERS} this one ({ours}) cannot "
            f"read ({error}); export the model again"
        ) from error


def _entry(model: onnx.ModelProto, key: str) -> str:
    return next((prop.value for prop in model.metadata_props if prop.key == key), "")


def _versions() -> dict[str, str]:
    """Of the packages that wrote the file; those that are not installed are left out."""
    found = {package: _version(package) for package in _PACKAGES}
    return {package: version for package, version in found.items() if version != "unknown"}


def _version(package: str = "sparsify-moe") -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
