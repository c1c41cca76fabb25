"""What the command `convert` leaves in a folder, and how `verify` and `bench` read it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sparsify.config import SparsifyConfig
from sparsify.errors import LoadError, OutputError

GRAPH = "graph.json"
WEIGHTS = "model.safetensors"
ONNX = "model.onnx"
DENSE_ONNX = "model.dense.onnx"
REPORT = "report.json"
PAGE = "report.html"
RECORD = "conversion.json"
_ALL = (GRAPH, WEIGHTS, ONNX, f"{ONNX}.data", DENSE_ONNX, f"{DENSE_ONNX}.data", REPORT, PAGE, RECORD)

_FORMAT = 1
_PACKAGES = ("sparsify-moe", "torch", "onnx", "onnxruntime", "onnxruntime-gpu", "transformers")


@dataclass(frozen=True)
class Conversion:
    """How a folder came about.

    Attributes:
        model: what names the dense model, for `sparsify.models.load`.
        config: fields of the `SparsifyConfig`.
        target: of the ONNX file; "" without one.
        files: names of the files of this conversion. Others in the folder are not its own.
        versions: of Python and of the packages that matter.
    """

    model: str
    config: Mapping[str, Any]
    target: str
    files: tuple[str, ...]
    versions: Mapping[str, str]


def describe(model: str, config: SparsifyConfig, target: str, files: Sequence[str]) -> Conversion:
    """The record of a conversion that this process did; a model folder is written down with its full path."""
    spec = str(Path(model).resolve()) if Path(model).is_dir() else model
    return Conversion(spec, dataclasses.asdict(config), target, tuple(sorted({*files, RECORD})), _versions())


def write_json(path: Path, value: object) -> None:
    """Writes plain values as indented JSON."""
    path.write_text(to_json(value) + "\n", encoding="utf-8")


def to_json(value: object) -> str:
    """Plain values as indented JSON. Numbers that are not finite become null, as JSON has no words for them."""
    return json.dumps(_finite(value), indent=1, allow_nan=False)


def write_conversion(folder: Path, conversion: Conversion) -> None:
    """Writes the record."""
    write_json(folder / RECORD, {"format": _FORMAT, **dataclasses.asdict(conversion)})


def read_conversion(folder: Path) -> Conversion:
    """Reads the record.

    Raises:
        LoadError: there is none, or it is damaged.
    """
    document = read_json(folder / RECORD)
    try:
        if document["format"] != _FORMAT:
            raise LoadError(
                f"{folder / RECORD} has format {document['format']}, this sparsify reads {_FORMAT}; convert again"
            )
        files = tuple(str(name) for name in document["files"])
        return Conversion(
            str(document["model"]), document["config"], str(document["target"]), files, document["versions"]
        )
    except (KeyError, TypeError) as error:
        raise LoadError(f"{folder / RECORD} is damaged: {error!r} is wrong or missing in it; convert again") from error


def worst_receipt(folder: Path) -> float:
    """The worst receipt in the report of a conversion; infinite where one is missing.

    Raises:
        LoadError: there is no report, or it is damaged.
    """
    report = read_json(folder / REPORT)
    try:
        receipts = [ffn["receipt"] for ffn in report["ffns"] if ffn["action"] == "converted"]
        return max((math.inf if receipt is None else float(receipt) for receipt in receipts), default=0.0)
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"{folder / REPORT} is damaged: {error!r}; convert again") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        LoadError: the file is missing or is something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(
            f"{path.parent} holds no conversion: {path.name} cannot be read ({error.strerror}). Give a folder that "
            "`sparsify convert` wrote"
        ) from error
    except ValueError as error:
        raise LoadError(f"{path} is damaged: {error}; convert again") from error
    if not isinstance(document, dict):
        raise LoadError(f"{path} is damaged: it holds no JSON object; convert again")
    return cast("dict[str, Any]", document)


def refuse_foreign_files(folder: Path) -> None:
    """Keeps a conversion from overwriting files that no conversion wrote, such as the weights of the dense model.

    Raises:
        OutputError: `folder` holds files with the names of ours, but no record of a conversion.
    """
    present = [name for name in _ALL if (folder / name).exists()]
    if present and RECORD not in present:
        raise OutputError(
            f"{folder} holds {', '.join(present)}, which no conversion wrote and which would be overwritten; choose "
            "another folder"
        )


def remove_stale_files(folder: Path, conversion: Conversion) -> None:
    """Removes what an earlier conversion left in `folder` and the present one did not write again."""
    for name in _ALL:
        if name not in conversion.files:
            (folder / name).unlink(missing_ok=True)


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _versions() -> dict[str, str]:
    found = {distribution.metadata["Name"]: distribution.version for distribution in importlib.metadata.distributions()}
    return {"python": platform.python_version(), **{name: found[name] for name in _PACKAGES if name in found}}
