"""A `SparseModel` as a folder and back: `graph.json` says what it is, `model.safetensors` holds its numbers.

Reading executes nothing that the files hold: tensors come through safetensors, graphs through `graph_format`, routers
from the catalogue. The two files belong together: the tensors carry the SHA-256 of `graph.json`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sparsify.errors import LoadError, OutputError
from sparsify.expert_units import ExpertUnits
from sparsify.graph_format import (
    FormatError,
    check_path,
    decode_graph,
    decode_tree_spec,
    decode_value,
    encode_graph,
    encode_tree_spec,
    encode_value,
)
from sparsify.output_folder import output_folder
from sparsify.passes.module_cover import ModuleCover
from sparsify.routers import ROUTERS, Router
from sparsify.sparse_model import SparseModel, SparseModelInfo

GRAPH_FILE = "graph.json"
TENSOR_FILE = "model.safetensors"
FORMAT_VERSION = 3

# What torch, json and this file raise when a well-formed JSON document does not have the expected shape.
_MALFORMED = (AttributeError, AssertionError, IndexError, KeyError, RuntimeError, SyntaxError, TypeError, ValueError)


_ROUTERS = {router.__name__: router for router in ROUTERS}


def save_model(sparse: SparseModel, folder: Path) -> None:
    """Write `sparse` to `folder`, which is made if need be. Other files there are left alone.

    Parameters and buffers keep their values, dtypes, devices, order of dimensions in memory, `requires_grad` and
    sharing; example inputs are written, the report is not. The files appear together, or the folder stays as it was.
    The same model gives the same bytes.

    Raises:
        OutputError: the folder cannot be written, or the model holds what the format has no words for.
    """
    try:
        document, tensors = _encode_model(sparse)
    except FormatError as error:
        raise OutputError(
            f"the model cannot be saved to {folder}: {error}. Save the state_dict() instead, or keep that part of the "
            "model out of the conversion."
        ) from error
    graph = json.dumps(document, indent=1, allow_nan=False).encode()
    try:
        with output_folder(folder) as staging:
            (staging / GRAPH_FILE).write_bytes(graph)
            # One entry only: safetensors writes several in an order that changes from run to run.
            save_file(tensors, staging / TENSOR_FILE, metadata={"graph_sha256": _sha256(graph)})
            shutil.copymode(staging / GRAPH_FILE, staging / TENSOR_FILE)  # safetensors shuts everybody else out
    except safetensors.SafetensorError as error:
        raise OutputError(
            f"{TENSOR_FILE} cannot be written to {folder}: {error}. Nothing was changed there; free some space, or "
            "choose a folder on another disk."
        ) from error


def load_model(folder: Path) -> SparseModel:
    """Read the model that `save_model` wrote to `folder`. Its report is None.

    Raises:
        LoadError: the folder holds no saved model, one of another version, a damaged one, one that needs a package or a
            device that is not there, or one that names code that a file may not call.
    """
    try:
        graph = (folder / GRAPH_FILE).read_bytes()
        document = _parse(graph, folder)
        with safetensors.safe_open(folder / TENSOR_FILE, framework="pt") as file:
            _check_pair(file.metadata(), graph)
            return _decode_model(document, file)
    except LoadError:
        raise
    except FileNotFoundError as error:
        raise LoadError(
            f"{folder} holds no saved model: {GRAPH_FILE} or {TENSOR_FILE} is missing ({error}). Give the folder that "
            "save() wrote, with both files."
        ) from error
    except OSError as error:
        raise LoadError(f"{folder} cannot be read: {error}. Check that you may read it.") from error
    except safetensors.SafetensorError as error:
        raise LoadError(
            f"{folder / TENSOR_FILE} is damaged or incomplete: {error}. Copy it again, or save the model again."
        ) from error
    except FormatError as error:
        raise LoadError(
            f"the model in {folder} is refused: {error}. If the files are not from save(), do not use them."
        ) from error
    except _MALFORMED as error:
        raise LoadError(
            f"{folder / GRAPH_FILE} is damaged: {type(error).__name__}: {error}. Copy it again, or save the model "
            "again."
        ) from error


def _parse(graph: bytes, folder: Path) -> dict[str, Any]:
    document = json.loads(graph)
    if not isinstance(document, dict) or document.get("format") != "sparsify":
        raise LoadError(f"{folder / GRAPH_FILE} is no model of sparsify. Give the folder that save() wrote.")
    version = document["format_version"]
    if version != FORMAT_VERSION:
        raise LoadError(
            f"{folder / GRAPH_FILE} has format version {version} (sparsify {document.get('sparsify_version')}); this "
            f"sparsify reads version {FORMAT_VERSION}. Install the version that wrote it, or convert the model again."
        )
    return document


def _check_pair(metadata: dict[str, str] | None, graph: bytes) -> None:
    if (metadata or {}).get("graph_sha256") != _sha256(graph):
        raise FormatError(
            f"{GRAPH_FILE} and {TENSOR_FILE} are not of one save, or one was edited; copy both files of one save"
        )


def _encode_model(sparse: SparseModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON document and the tensors, by their names in the file."""
    tensors: dict[str, Tensor] = {}
    info = sparse.info
    leaves, spec = pytree.tree_flatten((info.args, info.kwargs))
    document = {
        "format": "sparsify",
        "format_version": FORMAT_VERSION,
        "sparsify_version": _package_version(),
        "torch_version": torch.__version__,
        "training": sparse.training,
        "num_shared_experts": info.num_shared_experts,
        "shards": dict(info.shards),
        "covers": {name: asdict(cover) for name, cover in info.covers.items()},
        "example_inputs": {
            "spec": encode_tree_spec(spec),
            # A state dict has no name with a slash.
            "leaves": [_encode_leaf(leaf, f"example_inputs/{i}", tensors) for i, leaf in enumerate(leaves)],
        },
        "modules": _encode_modules(sparse),
        "tensors": _encode_state(sparse, tensors),
        "graph": encode_graph(sparse.graph, sparse),
    }
    return document, _unshared(tensors)


def _decode_model(document: dict[str, Any], file: Any) -> SparseModel:
    sparse = SparseModel(nn.Module(), fx.Graph())
    _add_modules(sparse, document["modules"])
    _add_state(sparse, document["tensors"], file)
    for item in document["modules"]:
        if item["kind"] == "graph":
            nested = cast(fx.GraphModule, sparse.get_submodule(item["name"]))
            nested.graph = decode_graph(item["graph"], nested)
    sparse.graph = decode_graph(document["graph"], sparse)
    examples = document["example_inputs"]
    leaves = [_decode_leaf(leaf, file) for leaf in examples["leaves"]]
    args, kwargs = pytree.tree_unflatten(leaves, decode_tree_spec(examples["spec"]))
    shared = {name: int(document["num_shared_experts"][name]) for name in sparse.routers}
    covers = {name: _decode_cover(cover) for name, cover in document["covers"].items()}
    shards = {name: int(count) for name, count in document["shards"].items()}
    sparse.info = SparseModelInfo(args, kwargs, shared, None, covers, shards)
    sparse.train(document["training"] is True)
    return sparse


def _decode_cover(data: dict[str, Any]) -> ModuleCover:
    modules = tuple(check_path(path) for path in data["modules"])
    return ModuleCover(modules, str(data["obstacle"]), int(data["x_axis"]), int(data["down_axis"]))


def _encode_modules(sparse: SparseModel) -> list[dict[str, Any]]:
    """Every module in order, but what a router or an alias brings along."""
    first_names: dict[nn.Module, str] = {}
    whole: list[str] = []
    entries: list[dict[str, Any]] = []
    for name, module in sparse.named_modules(remove_duplicate=False):
        if not name or name.startswith(tuple(f"{parent}." for parent in whole)):
            continue
        entry = {"name": check_path(name), **_encode_module(module, first_names.get(module))}
        first_names.setdefault(module, name)
        entries.append(entry)
        if entry["kind"] in ("alias", "router", "units"):
            whole.append(name)
    return entries


def _encode_module(module: nn.Module, first_name: str | None) -> dict[str, Any]:
    if first_name is not None:
        return {"kind": "alias", "of": first_name}
    if isinstance(module, fx.GraphModule):
        return {"kind": "graph", "graph": encode_graph(module.graph, module)}
    if isinstance(module, ExpertUnits):
        return {"kind": "units", "sizes": list(module.sizes)}
    if not isinstance(module, Router):
        return {"kind": "container"}
    name = type(module).__name__
    if _ROUTERS.get(name) is not type(module):
        raise FormatError(f"the format knows the routers {', '.join(_ROUTERS)}, but not {name}")
    return {"kind": "router", "class": name, "options": module.options(), "weights": module.weights}


def _add_modules(sparse: SparseModel, entries: list[Any]) -> None:
    for entry in entries:
        parent, _, name = check_path(entry["name"]).rpartition(".")
        sparse.get_submodule(parent).add_module(name, _decode_module(entry, sparse))


def _decode_module(entry: Any, sparse: SparseModel) -> nn.Module:
    match entry:
        case {"kind": "alias", "of": str(name)}:
            return sparse.get_submodule(name)
        case {"kind": "graph"}:
            return fx.GraphModule(nn.Module(), fx.Graph())
        case {"kind": "container"}:
            return nn.Module()
        case {"kind": "units", "sizes": list(sizes)}:
            with torch.device("meta"):
                return ExpertUnits([int(size) for size in cast("list[int]", sizes)])
        case {"kind": "router", "class": str(name), "options": dict(options), "weights": str(weights)}:
            return _decode_router(name, cast("dict[str, Any]", options), weights)
        case _:
            raise FormatError(f"{entry!r:.80} is no module of a saved model")


def _decode_router(name: str, options: dict[str, Any], weights: str) -> Router:
    if name not in _ROUTERS or weights not in ("native", "one", "sum"):
        raise FormatError(f"a router {name!r} with {weights!r} weights is not known here; a newer version may know it")
    if not all(isinstance(value, int | float | str | None) for value in options.values()):
        raise FormatError(f"the options {options!r:.80} of {name} are no plain values")
    with torch.device("meta"):  # neither memory nor random numbers: the weights come from the file
        router = _ROUTERS[name](**options)
    if options.keys() != router.options().keys():
        raise FormatError(f"the router {name} has other options than {', '.join(options)}")
    router.weights = weights
    return router


def _encode_state(sparse: SparseModel, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Describe every parameter and buffer, and put each once into `tensors`."""
    persistent = sparse.state_dict().keys()
    first_names: dict[int, str] = {}
    entries: list[dict[str, Any]] = []
    for prefix, module in sparse.named_modules():
        for kind, name, tensor in _own_state(module):
            path = check_path(f"{prefix}.{name}" if prefix else name)
            entry: dict[str, Any] = {"name": path, "kind": kind}
            if kind == "buffer":
                entry["persistent"] = path in persistent
            if id(tensor) in first_names:
                entries.append({**entry, "same_as": first_names[id(tensor)]})
                continue
            first_names[id(tensor)] = path
            entries.append({**entry, **_encode_tensor(tensor, path, tensors)})
    return entries


def _own_state(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        yield "parameter", name, parameter
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        yield "buffer", name, buffer


def _add_state(sparse: SparseModel, entries: list[Any], file: Any) -> None:
    loaded: dict[str, Tensor] = {}
    for entry in entries:
        path = check_path(entry["name"])
        tensor = loaded[entry["same_as"]] if "same_as" in entry else _decode_state(entry, file)
        loaded[path] = tensor
        parent, _, name = path.rpartition(".")
        module = sparse.get_submodule(parent)
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor, persistent=entry["persistent"] is True)
    missing = [name for name, parameter in sparse.named_parameters() if parameter.is_meta]
    if missing:
        raise FormatError(f"there are no weights for {', '.join(missing)}")


def _decode_state(entry: Any, file: Any) -> Tensor:
    tensor = _decode_tensor(entry, file)
    if entry["kind"] != "parameter":
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)


def _encode_leaf(leaf: object, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(leaf, Tensor):
        return _encode_tensor(leaf, name, tensors)
    return {"value": encode_value(leaf)}


def _decode_leaf(entry: Any, file: Any) -> Any:
    return decode_value(entry["value"], {}) if "value" in entry else _decode_tensor(entry, file)


def _encode_tensor(tensor: Tensor, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Describe `tensor` and put it into `tensors` under `name`, contiguous and on the CPU."""
    if not _is_storable(tensor):
        raise FormatError(
            f"{name} is a {type(tensor).__name__} with {tensor.layout}, {tensor.dtype} and device {tensor.device}, "
            "which safetensors cannot hold"
        )
    # Kernels may add up in another order where memory lies otherwise. A view of a larger matrix becomes dense.
    strides = torch.empty_like(tensor, device="meta").stride()
    order = sorted(range(tensor.dim()), key=lambda dim: strides[dim], reverse=True)
    tensors[name] = tensor.detach().cpu().contiguous()
    return {
        "data": name,
        "dtype": str(tensor.dtype),
        "shape": list(tensor.shape),
        "memory_order": order,
        "device": str(tensor.device),
        "requires_grad": tensor.requires_grad,
    }


def _is_storable(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
    return plain and not tensor.is_quantized and tensor.dtype not in (torch.complex32, torch.complex128)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy what shares a storage with a tensor before it: safetensors refuses tensors that overlap."""
    seen: set[int] = set()
    unshared: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        unshared[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return unshared


def _decode_tensor(entry: Any, file: Any) -> Tensor:
    name, order = entry["data"], entry["memory_order"]
    stored: Tensor = file.get_tensor(name)
    if [str(stored.dtype), list(stored.shape)] != [entry["dtype"], entry["shape"]]:
        raise FormatError(
            f"{name} should be {entry['dtype']} {entry['shape']} by {GRAPH_FILE}, but {TENSOR_FILE} holds "
            f"{stored.dtype} {list(stored.shape)}; copy both files of one save"
        )
    # A copy, because `stored` may be a window into the file, which is gone when the model is saved there again.
    dense = stored.permute(order).clone(memory_format=torch.contiguous_format)
    inverse = sorted(range(len(order)), key=lambda place: order[place])
    return _to_device(dense.permute(inverse), entry["device"]).requires_grad_(entry["requires_grad"] is True)


def _to_device(tensor: Tensor, device: str) -> Tensor:
    try:
        return tensor.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise FormatError(
            f"its tensors were on {device!r}, which is not usable here ({error}); convert or save the model on the CPU"
        ) from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _package_version() -> str:
    try:
        return importlib.metadata.version("sparsify-moe")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
