"""nn.Module -> GraphModule, by `torch.export`, with every input dimension dynamic that the model allows to be.

The graph holds aten ops; weights are `get_attr` nodes that share storage with the model; nodes keep `nn_module_stack`.

With dynamic shapes "auto":

1. Every dimension of size 2 or more is free. What the model fixes on the way is recorded (see `fixed_dims`).
2. Where a condition does not let a size change, though torch keeps it a symbol, trace again with it fixed.
3. Where tracing fails, but does not with every dimension fixed, try with the first of every input free.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from sparsify.errors import CaptureError
from sparsify.passes.fixed_dims import SizeWatch, mark_fixed
from sparsify.passes.foreign_values import ForwardError, foreign_outputs, refuse_foreign_inputs, traceable_forward
from sparsify.passes.inline_grad_modes import InlineGradModesPass
from sparsify.passes.model_lines import error_frame, error_line, first_line

DynamicShapes = Literal["auto"] | dict[str, Any] | tuple[Any, ...] | list[Any] | ShapesCollection | None
_Dims = dict[tuple[int, int], str]  # (id of an input tensor, dimension) -> why it is fixed

_LEFT_OUT_KEY = "sparsify_left_out"  # in the `meta` of a captured graph module


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: DynamicShapes = "auto",
) -> GraphModule:
    """Trace `model` in evaluation mode. The model is left as it was, its training flags included.

    A model on the meta device is not run first, as it may ask for values; then it must return what torch knows.

    Args:
        model: any module that `torch.export` can trace.
        args: example inputs: pytrees of tensors, numbers, strings and None. Only tensors may change between calls, and
            of these no dimension that is 0 or 1 here: give at least 2 where it should stay dynamic.
        kwargs: example keyword inputs.
        dynamic_shapes: "auto" (every dimension that the model leaves free), or what `torch.export.export` takes.

    Returns:
        A graph module with the inputs and outputs (pytrees included) of the model. Objects in the output that torch
        does not know, such as a cache, are None instead; `left_out` lists them.

    Raises:
        CaptureError: the example inputs do not fit the model (the message holds the model's own error), or the model
            cannot be traced (the message names the line of the model).
    """
    kwargs = kwargs or {}
    with evaluation_mode(model):
        has_values = not any(parameter.is_meta for parameter in model.parameters())
        foreign = foreign_outputs(model, run_model(model, args, kwargs)) if has_values else ()
        try:
            with traceable_forward(model, drop_foreign=bool(foreign)):
                graph_module = _trace(model, args, kwargs, dynamic_shapes)
        except Exception as error:
            refuse_foreign_inputs(model, args, kwargs)
            raise CaptureError(_trace_message(model, error)) from error
    graph_module.meta[_LEFT_OUT_KEY] = foreign
    return graph_module


def left_out(graph_module: GraphModule) -> tuple[str, ...]:
    """Outputs of the model for which the captured graph returns None, such as "past_key_values (DynamicCache)"."""
    return graph_module.meta.get(_LEFT_OUT_KEY, ())


def _trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: DynamicShapes
) -> GraphModule:
    if dynamic_shapes != "auto":
        return _export(model, args, kwargs, dynamic_shapes, {})[0]
    try:
        return _trace_free(model, args, kwargs, {})
    except Exception as error:
        first = error
    fixed = dict.fromkeys(_dims(args, kwargs), f"tracing with every size free failed at {error_line(first)}")
    try:
        static = _trace_free(model, args, kwargs, fixed)
    except Exception:
        raise first from None
    try:
        return _trace_free(model, args, kwargs, {key: reason for key, reason in fixed.items() if key[1] > 0})
    except Exception:
        return static


def _trace_free(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], fixed: _Dims) -> GraphModule:
    """Trace with all dimensions free but the fixed ones, and those that cannot change anyway."""
    shapes = ShapesCollection()
    for tensor in _tensors(args, kwargs):
        free = [dim for dim, size in enumerate(tensor.shape) if size > 1 and (id(tensor), dim) not in fixed]
        shapes[tensor] = dict.fromkeys(free, Dim.AUTO)
    graph_module, implied = _export(model, args, kwargs, shapes, fixed)
    return _trace_free(model, args, kwargs, {**fixed, **implied}) if implied else graph_module


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, fixed: _Dims
) -> tuple[GraphModule, _Dims]:
    with SizeWatch() as watch:
        try:
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except ForwardError as stopped:
            raise stopped.__cause__ or stopped from None
    graph_module = _plain(exported.module())
    return graph_module, mark_fixed(graph_module, pytree.tree_leaves((args, kwargs)), watch, fixed)


def _plain(graph_module: GraphModule) -> GraphModule:
    """Drop what only checks: guards are code, not graph, and cannot be saved; shapes stay on the placeholders."""
    graph_module = InlineGradModesPass()(graph_module).graph_module
    graph = graph_module.graph
    checks = graph.find_nodes(op="call_module", target="_guards_fn")
    checks += graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default)
    for node in checks:
        graph.erase_node(node)
    plain = GraphModule(graph_module, graph_module.graph)
    plain.meta.update(graph_module.meta)
    return plain


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _dims(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[int, int]]:
    return [(id(tensor), dim) for tensor in _tensors(args, kwargs) for dim, size in enumerate(tensor.shape) if size > 1]


def run_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output for copies of the inputs, which the model may write to.

    Raises:
        CaptureError: the inputs do not fit.
    """
    args_copy, kwargs_copy = pytree.tree_map_only(Tensor, lambda tensor: tensor.clone(), (args, kwargs))
    try:
        with torch.no_grad():
            return model(*args_copy, **kwargs_copy)
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
    frame = error_frame(error)
    line = f"{frame.filename}:{frame.lineno}, `{frame.line}`" if frame else "somewhere in its forward"
    return (
        f"{type(model).__name__} cannot be traced: {line}: {first_line(error)}. torch.export must see the whole "
        "forward pass without branches on tensor values; rewrite that line with torch.where or torch.cond, or convert "
        "the submodule that holds the FFNs."
    )


@contextlib.contextmanager
def same_random_numbers() -> Generator[None, None, None]:
    """Two runs of a model that draws random numbers, as some do in evaluation mode too, draw the same ones within."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


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
