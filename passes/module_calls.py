"""How the modules of a cover are called: whether one module with one input and one output can stand in their place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsify.passes.capture import evaluation_mode
from sparsify.passes.module_cover import ModuleCover

# Path of a module -> its first call: (args, kwargs) with shapes in place of tensors, and the shape of a tensor output.
ModuleCalls = Mapping[str, tuple[Any, Any]]


@torch.no_grad()
def observe_calls(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], covers: Iterable[ModuleCover]
) -> ModuleCalls:
    """Run the model once, in evaluation mode, and keep the shapes of the first call of every module of the covers."""
    calls: dict[str, tuple[Any, Any]] = {}

    def remember(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            shapes = pytree.tree_map(lambda leaf: leaf.shape if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            calls.setdefault(path, (shapes, output.shape if isinstance(output, Tensor) else None))

        return hook

    paths = {path for cover in covers for path in cover.modules}
    hooks = [model.get_submodule(path).register_forward_hook(remember(path), with_kwargs=True) for path in paths]
    try:
        with evaluation_mode(model):
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def misfit(cover: ModuleCover, calls: ModuleCalls) -> str | None:
    """Why experts cannot stand where the modules stand; None if they can."""
    if cover.obstacle:
        return cover.obstacle
    for path in cover.modules:
        if path not in calls:
            return f"{path} is not called as a module"
        (args, kwargs), output = calls[path]
        if len(args) + len(kwargs) != 1:
            return f"{path} is called with {len(args) + len(kwargs)} arguments, an FFN takes one"
        if output is None:
            return f"{path} returns something other than one tensor"
    (args, kwargs), _ = calls[cover.modules[0]]
    given, returned = [*args, *kwargs.values()][0], calls[cover.modules[-1]][1]
    if _without(given, cover.x_axis) != _without(returned, cover.down_axis):
        return f"{cover.modules[-1]} returns tokens in another shape than {cover.modules[0]} takes"
    return None


def parameter_name(cover: ModuleCover, calls: ModuleCalls) -> str:
    """What the callers of the first module call its input."""
    (_, kwargs), _ = calls[cover.modules[0]]
    return next(iter(kwargs), "x")


def _without(shape: torch.Size, axis: int) -> list[int]:
    kept = list(shape)
    del kept[axis]
    return kept
