"""Weights packed by oneDNN once and kept while they live unchanged, as an inference engine does; each is a second copy.

The ops are private to torch, so they are tried before they are used. A packed weight is dropped when its storage is
freed and packed anew when the weight was written to (`Tensor._version`; writing through `.data` escapes that counter:
set `SPARSIFY_NO_PREPACK=1` where that happens or where the memory is not to be spent).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class _Entry(NamedTuple):
    storage: StorageWeakRef
    version: int
    packed: Tensor


_cache: dict[tuple[Any, ...], _Entry] = {}


def allowed() -> bool:
    """Whether packed copies may be made; `SPARSIFY_NO_PREPACK=1` forbids them."""
    return os.environ.get("SPARSIFY_NO_PREPACK", "") in ("", "0")


@functools.cache
def supported(dtype: torch.dtype) -> bool:
    """Whether this build of torch packs weights of `dtype` and multiplies with them correctly."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    with torch.random.fork_rng(devices=[]):
        x, weight = torch.randn(3, 32).to(dtype), torch.randn(16, 32).to(dtype)
    try:
        y = apply(x, pack(weight, weight.shape), None)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool(torch.allclose(y.double(), x.double() @ weight.double().t(), rtol=0.02, atol=0.05))


def pack(weight: Tensor, like: torch.Size, rows: int = 1) -> Tensor:
    """`weight` seen as `[N, D]` in oneDNN's layout for products with about `rows` rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().reshape(like), rows)


def apply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`[T, D]` by a packed `[N, D]` to `[T, N]`."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def cached(weight: Tensor, name: str, make: Callable[[], Tensor]) -> Tensor:
    """The packed form `name` of `weight`, made once.

    Args:
        weight: what is packed; a view counts as its part of the storage.
        name: tells several forms of one weight apart.
        make: packs it.
    """
    storage = weight.untyped_storage()
    key = (name, storage.data_ptr(), weight.storage_offset(), weight.shape, weight.stride(), weight.dtype)
    version = 0 if weight.is_inference() else weight._version
    entry = _cache.get(key)
    if entry is not None and entry.version == version and not entry.storage.expired():
        return entry.packed
    drop_dead()
    with torch.no_grad():
        packed = make()
    _cache[key] = _Entry(StorageWeakRef(storage), version, packed)
    return packed


def drop_dead() -> None:
    """Free the packed forms of weights that are gone."""
    for key in [key for key, entry in _cache.items() if entry.storage.expired()]:
        del _cache[key]
