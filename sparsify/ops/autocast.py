"""Autocast for our ops: as torch does for a linear layer, tokens and weights go to the autocast dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
_library = torch.library.Library("sparsify", "FRAGMENT")


def cast_inputs(name: str, kept: frozenset[int] = frozenset()) -> None:
    """Have autocast cast the floating inputs of an op; fp64 stays, as with torch's own ops.

    `torch.library.register_autocast` would cast to one dtype, whatever the user asks autocast for.

    Args:
        name: of the op in the namespace `sparsify`.
        kept: positions of inputs that keep their dtype.
    """
    for device, key in _KEYS.items():
        _library.impl(name, _kernel(name, device, key, kept), key)


def _kernel(name: str, device: str, key: str, kept: frozenset[int]) -> Any:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))  # pyright: ignore[reportPrivateUsage]

    def run(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        cast = [value if i in kept else _cast(value, device, dtype) for i, value in enumerate(args)]
        with torch._C._ExcludeDispatchKeyGuard(excluded):  # pyright: ignore[reportPrivateUsage]
            return getattr(torch.ops.sparsify, name).default(*cast)

    return run


def _cast(value: Any, device: str, dtype: torch.dtype) -> Any:
    eligible = isinstance(value, Tensor) and value.is_floating_point() and value.device.type == device
    return value.to(dtype) if eligible and value.dtype != torch.float64 else value
