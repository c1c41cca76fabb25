"""The compiled kernel: loaded and checked at first use, called on data pointers.

It divides its work among the threads of the OpenMP runtime that torch itself runs on, whose entry points are looked up
in the process: a second runtime would spin beside the first on the same cores. Where there is none to be found, the
kernel runs on one thread and is used only where torch has one thread too.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
import threading
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.cpu import build
from sparsify.cpu.blocks import experts_in_blocks
from sparsify.cpu.experts import Experts
from sparsify.cpu.kernel_backward import call_backward
from sparsify.cpu.matrices import ACTIVATION_NUMBERS, NO_MATRICES, matrices_of
from sparsify.kernels.reference import moe_ffn_backward_reference, moe_ffn_reference

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_PACK = struct.Struct("51q").pack
_FINE, _BAD_EXPERT, _NO_MEMORY, _STALE = range(4)
# Below so many operations a second thread costs more than it saves.
_SMALL = 1 << 18
# Tests set it: memory that was never written is NaN.
_poison = False
# Hidden size, width, outputs, experts, top_k, tokens, gated: panels, rows left, odd sizes, a wide expert, a narrow one
_CHECKS = (
    (37, 19, 23, 3, 2, 53, False), (32, 16, 32, 4, 1, 5, True), (40, 150, 33, 3, 2, 13, False),
    (40, 8, 35, 6, 3, 53, True),
)  # fmt: skip
_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


class KernelStatus(NamedTuple):
    """Whether the compiled kernel runs here.

    Attributes:
        available: it was compiled, loaded and gives the right results.
        reason: where it is, or why there is none.
        threaded: it can use the threads of torch.
    """

    available: bool
    reason: str
    threaded: bool


class StaleBlocksError(Exception):
    """The weights are no longer those that the blocks were made of."""


class _Kernel(NamedTuple):
    status: KernelStatus
    call: Callable[[bytes], int] | None
    backward: Callable[[bytes], int] | None
    parallel: int
    barrier: int


def kernel_status() -> KernelStatus:
    """Compile the kernel if that was not tried yet, and say what came of it."""
    return _kernel().status


def covers(x: Tensor, experts: Experts) -> bool:
    """Whether the kernel runs here and knows these dtypes and layouts."""
    dtype, status = x.dtype, _kernel().status
    if dtype not in _BOUNDS or not status.available or not (status.threaded or torch.get_num_threads() == 1):
        return False
    return not [t for t in experts[:6] if t is not None and (t.dtype != dtype or t.stride(-1) != 1)]


def run(
    x: Tensor,
    routing_weights: Tensor,
    expert_ids: Tensor,
    experts: Experts,
    blocks: Experts | None = None,
    *,
    new: bool = False,
) -> Tensor:
    """See `sparsify::moe_ffn`; only where `covers` says so.

    Args:
        x: see there, as are `routing_weights`, `expert_ids` and `experts`.
        routing_weights: see `x`.
        expert_ids: see `x`.
        experts: see `x`.
        blocks: `experts_in_blocks` of them, in fp32, which are then read in their place.
        new: they were made for this call, so that no one looks whether the experts are still those.

    Raises:
        IndexError: an expert id is not in `[-1, E)`.
        MemoryError: there is no memory for the hidden values.
        StaleBlocksError: the experts were written to since.
    """
    return _call(_kernel(), x, routing_weights, expert_ids, experts, blocks, None if new else experts)


def _call(
    kernel: _Kernel, x: Tensor, routing_weights: Tensor, expert_ids: Tensor, experts: Experts, blocks: Experts | None,
    source: Experts | None,
) -> Tensor:  # fmt: skip
    (num_experts, width, hidden_size), outputs = experts.up_proj.shape, experts.down_proj.shape[1]
    num_tokens, top_k = expert_ids.shape
    # The kernel reads the memory of what is named here. Conversions that change nothing would cost microseconds.
    x = x if x.stride(1) == 1 else x.contiguous()
    weights = routing_weights if routing_weights.dtype == torch.float32 else routing_weights.float()
    weights, ids = weights.contiguous(), expert_ids.contiguous()
    size = x.element_size()
    y = x.new_empty((num_tokens, outputs))
    threads = _threads(kernel, num_tokens * top_k * width * (hidden_size + outputs))
    packed = _PACK(
        x.data_ptr(), x.stride(0) * size, weights.data_ptr(), ids.data_ptr(), y.data_ptr(),
        num_tokens, hidden_size, width, outputs, num_experts, top_k,
        ACTIVATION_NUMBERS[experts.activation], size == 2, threads, _poison,
        kernel.parallel, kernel.barrier,
        *matrices_of(blocks or experts, size), blocks is not None, 0, 0,
        *(matrices_of(source, size) if blocks and source else NO_MATRICES),
        blocks is not None and blocks.up_proj.dim() == experts.up_proj.dim(),
    )  # fmt: skip
    assert kernel.call is not None
    _require_fine(kernel.call(packed), ids, num_experts)
    return y


def run_backward(
    grad: Tensor, x: Tensor, routing_weights: Tensor, expert_ids: Tensor, experts: Experts, needs: list[bool]
) -> list[Tensor]:
    """See `sparsify::moe_ffn_backward`; only in fp32, where `covers` says so and there are tokens.

    Raises:
        IndexError: an expert id is not in `[-1, E)`.
        MemoryError: there is no memory for the hidden values.
    """
    return _call_backward(_kernel(), grad, x, routing_weights, expert_ids, experts, needs)


def _call_backward(
    kernel: _Kernel, grad: Tensor, x: Tensor, routing_weights: Tensor, expert_ids: Tensor, experts: Experts,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    assert kernel.backward is not None
    num_experts, width, hidden_size = experts.up_proj.shape
    threads = _threads(kernel, expert_ids.numel() * width * hidden_size)
    status, grads = call_backward(
        kernel.backward, grad, x, routing_weights, expert_ids, experts, needs,
        threads=threads, parallel=kernel.parallel, poison=_poison,
    )  # fmt: skip
    _require_fine(status, expert_ids, num_experts)
    return grads


def _threads(kernel: _Kernel, operations: int) -> int:
    """On how many to run, which is one where there is nothing to run on others with."""
    return torch.get_num_threads() if kernel.parallel and operations >= _SMALL else 1


def _require_fine(status: int, ids: Tensor, num_experts: int) -> None:
    if status == _FINE:
        return
    if status == _BAD_EXPERT:
        raise IndexError(f"expert_ids must lie in [-1, {num_experts}), got {int(ids.min())} to {int(ids.max())}")
    if status == _STALE:
        raise StaleBlocksError
    raise MemoryError(f"no memory for the hidden values of {len(ids)} tokens")


@functools.cache
def _load() -> _Kernel:
    """Compile, load, look up the threads, check."""
    try:
        with build.library() as path:
            library, where = ctypes.CDLL(str(path)), str(path)
            calls = library.sparsify_moe_ffn, library.sparsify_moe_ffn_backward
    except (build.BuildError, OSError, AttributeError) as failure:
        return _without(str(failure))
    for call in calls:
        call.argtypes, call.restype = [ctypes.c_char_p], ctypes.c_int
    parallel, barrier = _openmp()
    kernel = _Kernel(KernelStatus(True, where, parallel != 0), *calls, parallel, barrier)
    wrong = _self_check(kernel)
    return _without(wrong) if wrong else kernel


def _without(reason: str) -> _Kernel:
    message = f"sparsify: the compiled CPU kernel is not used ({reason}); experts run in plain torch ops, more slowly"
    if reason != "SPARSIFY_NO_COMPILE is set":
        warnings.warn(message, stacklevel=2)
    _log.warning(message)
    return _Kernel(KernelStatus(False, reason, False), None, None, 0, 0)


@functools.cache
def _kernel() -> _Kernel:
    """What was loaded; threads that ask for it first load it once."""
    with _lock:
        return _load()


def _openmp() -> tuple[int, int]:
    """Addresses of GOMP_parallel and GOMP_barrier in the runtime of torch, or zeros."""
    if "OpenMP" not in torch.__config__.parallel_info().partition("ATen parallel backend:")[2].partition("\n")[0]:
        return 0, 0
    process = ctypes.CDLL(None)
    try:
        return tuple(ctypes.cast(getattr(process, name), ctypes.c_void_p).value or 0
                     for name in ("GOMP_parallel", "GOMP_barrier"))  # pyright: ignore[reportReturnType]  # fmt: skip
    except AttributeError:
        return 0, 0


def _self_check(kernel: _Kernel) -> str:
    """What is wrong with the results on small problems, if anything."""
    generator = torch.Generator().manual_seed(0)
    for dtype, bound in _BOUNDS.items():
        for hidden_size, width, outputs, num_experts, top_k, tokens, gated in _CHECKS:

            def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

            experts = Experts(
                random(num_experts, width, hidden_size), random(num_experts, width),
                random(num_experts, width, hidden_size) if gated else None, None,
                random(num_experts, outputs, width), random(num_experts, outputs), "silu" if gated else "gelu",
            )  # fmt: skip
            x, weights = random(tokens, hidden_size), torch.rand((tokens, top_k), generator=generator)
            ids = torch.randint(-1, num_experts, (tokens, top_k), generator=generator)
            errors = _errors(kernel, x, weights, ids, experts)
            if not max(errors) <= bound:
                return (
                    f"its results are wrong: relative error {max(errors):.1e} in {dtype}, at most {bound:.0e} expected"
                )
    return ""


def _errors(kernel: _Kernel, x: Tensor, weights: Tensor, ids: Tensor, experts: Experts) -> list[float]:
    """Of all that the kernel computes for a layer, relative to the largest value of each."""
    tokens, routing, exact = x.double(), weights.double(), experts.double()
    expected = moe_ffn_reference(tokens, routing, ids, *exact)
    if x.dtype != torch.float32:
        return [_error(_call(kernel, x, weights, ids, experts, None, None), expected)]
    blocks, grad = experts_in_blocks(experts), torch.ones_like(expected)
    found = [_call(kernel, x, weights, ids, experts, form, experts) for form in (None, blocks)]
    needs = [True, True, False, *(part is not None for part in experts[:6])]
    gradients = _call_backward(kernel, grad.float(), x, weights, ids, experts, needs)
    wanted = [expected, expected, *moe_ffn_backward_reference(grad, tokens, routing, ids, *exact, needs)]
    return [_error(*pair) for pair in zip([*found, *gradients], wanted, strict=True) if pair[0].numel()]


def _error(found: Tensor, expected: Tensor) -> float:
    error = (found.double() - expected).abs().max() / expected.abs().max()
    return float(error.nan_to_num(torch.inf))
