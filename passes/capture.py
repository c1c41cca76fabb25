"""nn.Module -> GraphModule, by `torch.export`, with every input dimension dynamic that the model allows to be.

The graph holds aten ops; weights are `get_attr` nodes that share storage with the model; nodes keep `nn_module_stack`.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import traceback
from collections.abc import Generator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from sparsify.errors import CaptureError

DynamicShapes = Literal["auto"] | dict[str, Any] | tuple[Any, ...] | list[Any] | None


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: DynamicShapes = "auto",
) -> GraphModule:
    """Trace `model` in evaluation mode. The model is left as it was, its training flags included.

    Args:
        model: any module that `torch.export` can trace.
        args: example inputs. A dimension of size 0 or 1 becomes fixed: give at least 2 where it should stay dynamic.
        kwargs: example keyword inputs.
        dynamic_shapes: "auto" (every dimension that the model leaves free), or what `torch.export.export` takes.

    Returns:
        A graph module with the inputs and outputs (pytrees included) of the model.

    Raises:
        CaptureError: the example inputs do not fit the model (the message holds the model's own error), or the model
            cannot be traced (the message names the line of the model).
    """
    kwargs = kwargs or {}
    with evaluation_mode(model), torch.no_grad():
        _check_inputs(model, args, kwargs)
    shapes = _auto_shapes(model, args, kwargs) if dynamic_shapes == "auto" else dynamic_shapes
    with evaluation_mode(model):
        try:
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            raise CaptureError(_trace_message(model, error)) from error
    return _plain(exported.module())


def _plain(graph_module: GraphModule) -> GraphModule:
    """Drop what only checks: guards are code, not graph, and cannot be saved; shapes stay on the placeholders."""
    graph = graph_module.graph
    checks = graph.find_nodes(op="call_module", target="_guards_fn")
    checks += graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default)
    for node in checks:
        graph.erase_node(node)
    plain = GraphModule(graph_module, graph_module.graph)
    plain.meta.update(graph_module.meta)
    return plain


def _auto_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """`Dim.AUTO` on every dimension of every example tensor, by the names of the parameters of `forward`."""

    def spec(leaf: object) -> dict[int, Any] | None:
        return dict.fromkeys(range(leaf.dim()), torch.export.Dim.AUTO) if isinstance(leaf, Tensor) else None

    arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return pytree.tree_map(spec, dict(arguments))


def _check_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        model(*args, **kwargs)
    except Exception as error:
        given = ", ".join([*map(_describe, args), *(f"{name}={_describe(value)}" for name, value in kwargs.items())])
        raise CaptureError(
            f"the example inputs do not fit {type(model).__name__}: called with ({given}) it raised "
            f"{type(error).__name__}: {error}. Pass args and kwargs with which model(*args, **kwargs) runs."
        ) from error


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__


def _trace_message(model: nn.Module, error: Exception) -> str:
    return (
        f"{type(model).__name__} cannot be traced: {_model_line(error)}: {_first_line(error)}. torch.export must see "
        "the whole forward pass without branches on tensor values; rewrite that line with torch.where or torch.cond, "
        "or convert the submodule that holds the FFNs."
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _model_line(error: Exception) -> str:
    """The innermost line outside torch, found in the traceback or, for errors of the tracer, in the message."""
    frames = traceback.extract_tb(error.__traceback__)
    torch_root = torch.__path__[0]
    own = [frame for frame in frames if not frame.filename.startswith((torch_root, "<")) and frame.line]
    own = [frame for frame in own if not frame.filename.endswith(("passes/capture.py", "contextlib.py"))]
    if own and own[-1].name != "capture":
        return f"{own[-1].filename}:{own[-1].lineno}, `{own[-1].line}`"
    named = re.findall(r'File "([^"]+)", line (\d+), in', str(error))
    named = [(file, line) for file, line in named if not file.startswith(torch_root)]
    return f"{named[-1][0]}:{named[-1][1]}" if named else "somewhere in its forward"


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None, None, None]:
    """`model.eval()` for a while; flags differ by module, so each is restored on its own."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training
