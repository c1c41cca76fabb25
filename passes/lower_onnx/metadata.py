"""What a file of ours says about itself, in `metadata_props`: version, target, and how every layer was lowered."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import onnx

from sparsify.errors import LoadError

_VERSION, _TARGET, _LAYERS = "sparsify.version", "sparsify.target", "sparsify.layers"


@dataclass(frozen=True)
class FileLayer:
    """A layer as the file holds it; `expert_ids` names the value `[T, K]` that its router chose."""

    name: str
    lowering: str
    reason: str
    expert_ids: str


def metadata(target: str, layers: Sequence[FileLayer]) -> dict[str, str]:
    """The entries for `metadata_props`."""
    return {_VERSION: _version(), _TARGET: target, _LAYERS: json.dumps([asdict(layer) for layer in layers])}


def read_target(model: onnx.ModelProto) -> str:
    """The target that the file was written for, "" in a file that is not ours."""
    return _entry(model, _TARGET)


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


def _version() -> str:
    try:
        return importlib.metadata.version("sparsify-moe")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
