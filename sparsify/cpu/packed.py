"""Weights packed once and kept while they live unchanged, as an inference engine does; each is a second copy.

A packed weight is dropped when its storage is freed or the weight was written to (`Tensor._version`). Writing through
`.data` escapes that counter: the compiled kernel notices it, what oneDNN packed does not. Set `SPARSIFY_NO_PREPACK=1`
where that happens or where the memory is not to be spent. The ops of oneDNN are private to torch, so they are tried
before they are used.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# A weight that was written to is likely to be trained, until it stays as it is for so many calls.
_UNCHANGED = 8


@dataclass
class _Entry:
    """What is known of a weight: `calls` until it counts as settled, and its packed forms by name."""

    storage: StorageWeakRef
    version: int
    calls: int
    forms: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


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
    forms = _entry(weight).forms
    if name not in forms:
        with torch.no_grad():
            forms[name] = make()
    return forms[name]


def settled(weight: Tensor) -> bool:
    """Whether a packed form is likely to last: the weight was never seen to change, or not in the last calls."""
    entry = _entry(weight)
    entry.calls = max(entry.calls - 1, 0)
    return not entry.calls


def forget(weight: Tensor) -> None:
    """Drop the packed forms of a weight that was written to unseen; `settled` takes that for a change."""
    _cache[_key(weight)] = _Entry(StorageWeakRef(weight.untyped_storage()), _version(weight), _UNCHANGED)


def _entry(weight: Tensor) -> _Entry:
    key, version = _key(weight), _version(weight)
    entry = _cache.get(key)
    if entry is not None and entry.version == version and not entry.storage.expired():
        return entry
    changed = entry is not None and not entry.storage.expired()
    drop_dead()
    _cache[key] = entry = _Entry(StorageWeakRef(weight.untyped_storage()), version, _UNCHANGED if changed else 0)
    return entry


def _key(weight: Tensor) -> tuple[Any, ...]:
    place = weight.untyped_storage().data_ptr(), weight.storage_offset()
    return *place, weight.shape, weight.stride(), weight.dtype


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def drop_dead() -> None:
    """Free the packed forms of weights that are gone."""
    for key in [key for key, entry in _cache.items() if entry.storage.expired()]:
        del _cache[key]
