"""Inputs and outputs of a model that torch does not know: neither tensors, nor constants, nor pytrees of them.

1. Input: refused.
2. Output beside tensors, such as a cache of keys and values: traced as None, and reported.
3. Output that is a dataclass, or without any tensor beside it: refused, as it may hold all that matters.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Generator
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsify.errors import CaptureError

_CONSTANTS = (type(None), bool, int, float, str)
_INPUTS = (Tensor, *_CONSTANTS, nn.Module, torch.ScriptObject, torch.Generator)
_OUTPUTS = (Tensor, *_CONSTANTS, torch.SymInt, torch.SymFloat, torch.SymBool)
_REGISTER = "torch.export.register_dataclass, or torch.utils._pytree.register_pytree_node"


def refuse_foreign_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Do nothing if torch knows all inputs.

    Raises:
        CaptureError: it does not know one; the message names it.
    """
    named = {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
    for path, value in _foreign(named, _INPUTS).items():
        raise CaptureError(
            f"{type(model).__name__} cannot be traced: its input `{path}` is a {type(value).__name__}, in which torch "
            "finds no tensors. Leave it out, set it within the model, or, if it holds tensors, register the class "
            f"first ({_REGISTER})."
        )


def foreign_outputs(model: nn.Module, output: Any) -> tuple[str, ...]:
    """The outputs that can be left out, each with its path and class: "past_key_values (DynamicCache)".

    Raises:
        CaptureError: one cannot be left out.
    """
    foreign = _foreign(output, _OUTPUTS)
    has_tensor = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(output))
    for value in foreign.values():
        if has_tensor and not is_dataclass(value):
            continue
        raise CaptureError(
            f"{type(model).__name__} returns a {type(value).__name__}, in which torch finds no tensors. Register the "
            f"class first ({_REGISTER}), or return a tuple or dict."
        )
    return tuple(f"{path or 'output'} ({type(value).__name__})" for path, value in foreign.items())


@contextlib.contextmanager
def traceable_forward(model: nn.Module, drop_foreign: bool) -> Generator[None, None, None]:
    """For a while, let the model raise `ForwardError`, and perhaps return None for what torch does not know."""
    forward, own = model.forward, vars(model).get("forward")

    @functools.wraps(forward)
    def traceable(*args: Any, **kwargs: Any) -> Any:
        try:
            output = forward(*args, **kwargs)
        except Exception as error:
            raise ForwardError from error
        return pytree.tree_map(_known_or_none, output) if drop_foreign else output

    model.forward = traceable
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


class ForwardError(Exception):
    """An error of the model, its cause. Torch would print the whole graph up to there for the cause itself."""


def _known_or_none(leaf: object) -> object:
    return leaf if isinstance(leaf, _OUTPUTS) else None


def _foreign(tree: Any, known: tuple[type, ...]) -> dict[str, Any]:
    """Path -> value, of all that torch takes for a single value though it is none that it knows."""
    if all(isinstance(leaf, known) for leaf in pytree.tree_leaves(tree)):
        return {}
    paths, _ = pytree.tree_flatten_with_path(tree)
    return {_path(path): leaf for path, leaf in paths if not isinstance(leaf, known)}


def _path(path: Any) -> str:
    """`past[0].key` for `['past'][0].key`."""
    return re.sub(r"^\['(\w+)'\]|^\.", r"\1", pytree.keystr(path))
