"""The largest submodules of a model that can be traced, for a model that cannot be traced as a whole.

1. Try the whole model. Else run it once, and record the inputs of the first call of every submodule that could hold an
   FFN, that is two weight matrices.
2. From the top down, trace each of them with these inputs. What is traced is a part; what is not gives a reason, and is
   opened. Containers that are never called are opened too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from sparsify.errors import CalibrationError, CaptureError
from sparsify.passes.calibrate import Call
from sparsify.passes.capture import DynamicShapes, capture, evaluation_mode, run_model
from sparsify.passes.foreign_values import refuse_foreign_inputs
from sparsify.passes.model_lines import error_line

NOT_CALLED = "not called with the example inputs"
_CONSTANTS = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class CapturedPart:
    """A submodule that was traced.

    Attributes:
        name: its path in the model, "" for the model itself; the first of several.
        graph_module: the graph, which shares its weights with the submodule and names them as the model does.
        args: the inputs of its first call, not copied.
        kwargs: the keyword inputs of its first call.
    """

    name: str
    graph_module: GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class SkippedPart:
    """A module whose own code was not traced; submodules of it may have been.

    Attributes:
        name: its path in the model, "" for the model itself.
        reason: the line of the model and the error, or why no attempt was made.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or 'the model itself'}: {self.reason}"


@dataclass(frozen=True)
class CapturedParts:
    """What was traced and what was not, in the order of the model. Modules too small for an FFN are in neither.

    Attributes:
        parts: one named "" if the model was traced as a whole.
        skipped: empty then; else the model itself comes first.
        error: why the model cannot be traced as a whole.
    """

    parts: tuple[CapturedPart, ...]
    skipped: tuple[SkippedPart, ...] = ()
    error: CaptureError | None = None


class PartOf(nn.Module):
    """A submodule under the path that it has in the model: its graph has the names of the whole model."""

    def __init__(self, path: str, module: nn.Module) -> None:
        """Hold `module` at `path`, within empty modules."""
        super().__init__()
        self._path = path
        owner: nn.Module = self
        *outer, name = path.split(".")
        for parent in outer:
            owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)
        owner.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the submodule returns."""
        return self.get_submodule(self._path)(*args, **kwargs)


def capture_parts(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: DynamicShapes = "auto",
) -> CapturedParts:
    """Trace the whole model, or else the largest submodules that can be traced.

    Args:
        model: any module that runs.
        args: example inputs.
        kwargs: example keyword inputs.
        dynamic_shapes: as in `capture`. Only with "auto" is a model taken apart, as they speak of its own inputs.

    Returns:
        One part named "" if the model can be traced as a whole. Else parts that share no module that could hold an FFN,
        and what was skipped.

    Raises:
        CaptureError: the example inputs do not fit the model; or it cannot be traced as a whole, and it is on the meta
            device, so that it cannot be run, or `dynamic_shapes` are given.
    """
    kwargs = kwargs or {}
    try:
        return CapturedParts((CapturedPart("", capture(model, args, kwargs, dynamic_shapes), args, kwargs),))
    except CaptureError as error:
        if dynamic_shapes != "auto" or any(parameter.is_meta for parameter in model.parameters()):
            raise
        whole = error
    with evaluation_mode(model), _recorded_calls(model) as calls:
        run_model(model, args, kwargs)
    search = _Search(calls)
    search.skipped.append(SkippedPart("", _reason(whole)))
    _open(model, "", search)
    return CapturedParts(tuple(search.parts), tuple(search.skipped), whole)


def record_calls(model: nn.Module, name: str, example: Call, batches: Iterable[Call]) -> Iterator[Call]:
    """What a submodule is called with while the model runs batches.

    Args:
        model: run in evaluation mode.
        name: path of the submodule.
        example: calls that differ from this one in more than the sizes and values of tensors are left out.
        batches: inputs of the model.

    Yields:
        Copies of the inputs, with the mask of the batch.

    Raises:
        CalibrationError: the model does not run on a batch.
    """
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    wanted = _signature(example.args, example.kwargs)

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _signature(args, kwargs) == wanted:
            found.append(pytree.tree_map_only(Tensor, torch.clone, (args, kwargs)))

    for index, batch in enumerate(batches):
        handle = model.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with evaluation_mode(model):
                run_model(model, batch.args, batch.kwargs)
        except CaptureError as error:
            raise CalibrationError(f"calibration batch {index}: {error}") from error
        finally:
            handle.remove()
        yield from (Call(args, kwargs, batch.mask) for args, kwargs in found)
        found.clear()


@dataclass
class _Call:
    """The first call of a module, and whether all others were alike but for the sizes and values of the tensors."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_uniform: bool = True


@dataclass
class _Search:
    """What was recorded and what was found so far; `seen` also holds the modules within parts."""

    calls: Mapping[nn.Module, _Call]
    parts: list[CapturedPart] = field(default_factory=list[CapturedPart])
    skipped: list[SkippedPart] = field(default_factory=list[SkippedPart])
    seen: set[nn.Module] = field(default_factory=set[nn.Module])


def _open(module: nn.Module, name: str, search: _Search) -> None:
    for child_name, child in module.named_children():
        if child not in search.seen and _could_hold_ffn(child):
            _visit(child, f"{name}.{child_name}" if name else child_name, search)


def _visit(module: nn.Module, name: str, search: _Search) -> None:
    inner = [child for child in module.modules() if _could_hold_ffn(child)]
    shares = any(child in search.seen for child in inner)
    search.seen.add(module)
    if not any(child in search.calls for child in inner):
        search.skipped.append(SkippedPart(name, NOT_CALLED))
        return
    if module not in search.calls:
        _open(module, name, search)
        return
    try:
        search.parts.append(_capture_call(module, name, search.calls[module], shares))
    except CaptureError as error:
        search.skipped.append(SkippedPart(name, _reason(error)))
        _open(module, name, search)
        return
    search.seen.update(inner)


def _capture_call(module: nn.Module, name: str, call: _Call, shares: bool) -> CapturedPart:
    if shares:
        raise CaptureError("holds a module that was dealt with before, under another name")
    if not call.is_uniform:
        raise CaptureError("called again with inputs that differ in more than the sizes and values of tensors")
    refuse_foreign_inputs(module, call.args, call.kwargs)  # it knows the names of its inputs, PartOf does not
    return CapturedPart(name, capture(PartOf(name, module), call.args, call.kwargs), call.args, call.kwargs)


def _could_hold_ffn(module: nn.Module) -> bool:
    """Whether the module has at least two weights with two or more dimensions."""
    return sum(parameter.dim() >= 2 for parameter in module.parameters()) >= 2


@contextlib.contextmanager
def _recorded_calls(model: nn.Module) -> Generator[dict[nn.Module, _Call], None, None]:
    """The calls of the submodules that could hold an FFN, by module, filled while the model runs."""
    calls: dict[nn.Module, _Call] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = calls.setdefault(module, _Call(args, kwargs))
        first.is_uniform = first.is_uniform and _signature(args, kwargs) == _signature(first.args, first.kwargs)

    handles = [
        module.register_forward_pre_hook(record, with_kwargs=True)
        for module in model.modules()
        if module is not model and _could_hold_ffn(module)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[object, ...]:
    """All that tracing fixes in a call: structure, dtypes, numbers of dimensions, and values that are no tensors."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    return spec, *((leaf.dtype, leaf.dim()) if isinstance(leaf, Tensor) else _constant(leaf) for leaf in leaves)


def _constant(leaf: object) -> object:
    return leaf if isinstance(leaf, _CONSTANTS) else type(leaf)


def _reason(error: CaptureError) -> str:
    return str(error) if error.__cause__ is None else error_line(error.__cause__)
