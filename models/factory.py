"""A model that the user's own function builds, given as `package.module:factory`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from sparsify.models.dense_model import Batch, DenseModel

_ALLOWED = "(model, args), (model, args, kwargs) or (model, args, kwargs, calibration)"


def load(spec: str) -> DenseModel:
    """Calls the factory, which takes no arguments and returns a model, example inputs and perhaps calibration batches.

    Of two or more calibration batches the last is held out; otherwise the example inputs are.

    Args:
        spec: `package.module:factory`; modules of the current directory are found.

    Raises:
        ValueError: there is no such function, or it returns something else.
    """
    model, args, kwargs, batches = _checked(spec, _find(spec)())
    example: Batch = (args, kwargs)
    calibrating, held_out = (batches[:-1], batches[-1:]) if len(batches) > 1 else (batches, [example])
    return DenseModel(
        name=spec.rpartition(":")[2],
        model=model.eval(),
        args=args,
        kwargs=kwargs,
        calibration=(lambda: iter(calibrating)) if calibrating else None,
        held_out=held_out,
        metric=None,
        data=f"{len(calibrating)} batches to calibrate, {len(held_out)} held out, from {spec}",
    )


def _find(spec: str) -> Callable[[], Any]:
    module_name, _, function_name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        # As `python -m` does: the script's own folder is not the one the user works in.
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{spec!r}: {error}; modules are looked for in {here} and among the installed packages"
        ) from error
    factory = getattr(module, function_name, None)
    if not callable(factory):
        public = ", ".join(name for name in vars(module) if not name.startswith("_"))
        raise ValueError(f"{spec!r}: {module_name} has no function {function_name!r}; it has {public}")
    return factory


def _checked(spec: str, result: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], list[Batch]]:
    if not isinstance(result, tuple) or not 2 <= len(result) <= 4:
        raise ValueError(f"{spec!r} returned {_shape(result)}; a factory returns {_ALLOWED}")
    model, args, kwargs, calibration = (*result, *(None, None)[len(result) - 2 :])
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec!r} returned {type(model).__name__} as the model, which must be a torch.nn.Module")
    if not isinstance(args, tuple):
        raise ValueError(f"{spec!r} returned {type(args).__name__} as args, which must be a tuple: {_ALLOWED}")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ValueError(f"{spec!r} returned {type(kwargs).__name__} as kwargs, which must be a dict: {_ALLOWED}")
    return model, args, kwargs or {}, list(calibration if calibration is not None else ())


def _shape(result: Any) -> str:
    if not isinstance(result, tuple):
        return type(result).__name__
    return f"a tuple of {len(result)}: ({', '.join(type(item).__name__ for item in result)})"
