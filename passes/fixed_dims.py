"""Which input sizes the model fixed while it was traced, and the line of the model that did it.

`torch.export` gives every input size a symbol. An operation that only works for one value turns the symbol into that
number, and a branch on a size adds a condition. `SizeWatch` looks for both after every call of a torch function, while
the frames of the model are still on the stack.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import sympy
from torch import SymInt, Tensor
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.overrides import TorchFunctionMode

from sparsify.passes.model_lines import describe_line, is_model_code, running_line

_FIXED_KEY = "sparsify_fixed"  # in the `meta` of a placeholder: dimension -> why its size is fixed

_NEEDS = "needs exactly that size"
_RAN_WITH = "was traced with exactly that size"


@dataclass(frozen=True)
class FixedDim:
    """An input dimension that has the size of the example for good, though nothing but the model asks for it.

    Attributes:
        input: name of the input.
        dim: the dimension.
        size: its size, at least 2.
        reason: what fixed it, as a clause that names the line of the model.
    """

    input: str
    dim: int
    size: int
    reason: str

    def __str__(self) -> str:
        return f"input `{self.input}` has a fixed size of {self.size} in dimension {self.dim}: {self.reason}"


def fixed_dims(graph_module: GraphModule) -> tuple[FixedDim, ...]:
    """The dimensions that `capture` left free and the model fixed, in the order of the inputs.

    Args:
        graph_module: a captured model, converted or not; one that was loaded from a file has no record, and gives `()`.
    """
    return tuple(
        FixedDim(node.name, dim, int(node.meta["val"].shape[dim]), reason)
        for node in graph_module.graph.find_nodes(op="placeholder")
        for dim, reason in node.meta.get(_FIXED_KEY, {}).items()
    )


def mark_fixed(
    graph_module: GraphModule, inputs: Sequence[object], watch: SizeWatch, fixed: Mapping[tuple[int, int], str]
) -> dict[tuple[int, int], str]:
    """Record on the placeholders which dimensions are fixed.

    Args:
        graph_module: just traced.
        inputs: the example inputs, one a placeholder.
        watch: that was active then.
        fixed: the dimensions that were fixed beforehand, (id of the input, dimension) -> why.

    Returns:
        Further dimensions that cannot change, though the graph says that they may.
    """
    placeholders = zip(graph_module.graph.find_nodes(op="placeholder"), inputs, strict=True)
    tensors = [(node.meta, value) for node, value in placeholders if isinstance(value, Tensor)]
    traced = [(meta, dim, value, str(meta["val"].shape[dim])) for meta, value in tensors for dim in range(value.dim())]
    for meta, dim, value, _ in traced:
        reason = fixed.get((id(value), dim)) or watch.reason(meta["val"].shape[dim])
        meta.setdefault(_FIXED_KEY, {}).update({dim: reason} if reason else {})
    implied = watch.implied({size: value.shape[dim] for _, dim, value, size in traced})
    return {(id(value), dim): implied[size] for _, dim, value, size in traced if size in implied}


class SizeWatch(TorchFunctionMode):
    """Active while a model is traced, remembers which line of the model fixed which input size."""

    def __init__(self) -> None:
        super().__init__()
        self._shape_env: Any = None
        self._fixed: dict[Any, str] = {}  # symbol -> reason
        self._guard_reasons: list[str] = []  # one per guard
        self._known: set[Any] = set()  # symbols with a replacement

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the function, and see what Python code fixed before it, and what was fixed in it."""
        if self._shape_env is None:
            sizes = chain.from_iterable(value.shape for value in args if isinstance(value, Tensor))
            self._shape_env = next((size.node.shape_env for size in sizes if isinstance(size, SymInt)), None)
        self._look()
        result = func(*args, **(kwargs or {}))
        self._look()
        return result

    def reason(self, size: int | SymInt) -> str | None:
        """What made this size a number; None if it may change, or never could.

        Args:
            size: of a traced input.
        """
        if not isinstance(size, SymInt) or not is_concrete_int(size):
            return None
        self._look()
        return self._fixed.get(getattr(size.node, "_expr", None), f"the model {_NEEDS}")

    def implied(self, sizes: Mapping[str, int]) -> dict[str, str]:
        """Sizes that torch keeps as symbols though a condition, as `8*s0 = 96`, fixes them: symbol -> reason.

        Args:
            sizes: of the example inputs, by symbol.
        """
        self._look()
        env = self._shape_env
        found: dict[str, str] = {}
        for guard, reason in zip(env.guards if env else (), self._guard_reasons, strict=False):
            bounded = _bounded(env.replace(guard.expr), sizes)
            found = {**dict.fromkeys(bounded, reason), **found}
        return found

    def _look(self) -> None:
        env = self._shape_env
        if env is None or (len(env.guards) == len(self._guard_reasons) and len(env.replacements) == len(self._known)):
            return
        here = f"{running_line()} {_NEEDS}"
        for guard in env.guards[len(self._guard_reasons) :]:
            self._guard_reasons.append(_python_reason(guard.sloc) or here)
        # What Python code fixed between two calls has its own line; a symbol tied to another is fixed along with it.
        own = {
            symbol: _python_reason(env.replacements_slocs.get(symbol)) for symbol in {*env.replacements} - self._known
        }
        shared = next(filter(None, own.values()), here)
        self._known.update(own)
        for symbol in {*env.var_to_sources} - {*self._fixed}:
            if env.replace(symbol).is_number:
                self._fixed[symbol] = own.get(symbol) or shared


def _bounded(condition: Any, sizes: Mapping[str, int]) -> set[str]:
    """The symbols of an equation with a constant that doubling one of them breaks upwards, halving it downwards.

    `(s0//8)*(s1//8) = 16` is one; `s0 % 8 = 0` and `s0 = 2*s1` are not, and `(s0 + 511)//512 = 1` only near 512.
    """
    if not isinstance(condition, sympy.Eq) or not any(side.is_number for side in condition.args):
        return set()
    expression, constant = sorted(condition.args, key=lambda side: bool(side.is_number))
    values = {symbol: sizes[str(symbol)] for symbol in expression.free_symbols if str(symbol) in sizes}
    if len(values) < len(expression.free_symbols):
        return set()

    def at(symbol: Any, size: int) -> Any:
        return expression.subs({**values, symbol: size})

    with contextlib.suppress(ArithmeticError, TypeError):  # no number comes out, or none that can be compared
        if all(at(symbol, size // 2) < constant < at(symbol, 2 * size) for symbol, size in values.items()):
            return {str(symbol) for symbol in values}
    return set()


def _python_reason(location: Any) -> str | None:
    """Why, if the model's Python code read the size as a number, as a branch does; None for an operation of torch."""
    frame = getattr(location, "framework_loc", None)
    if not isinstance(frame, traceback.FrameSummary) or not is_model_code(frame.filename):
        return None
    return f"{describe_line(frame.filename, frame.lineno or 0)} {_RAN_WITH}"
