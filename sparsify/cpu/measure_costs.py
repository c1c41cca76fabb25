"""Measure `Rates`: median times of products of 1 to 256 rows on weights of about 64 MB, so that no cache holds them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor

from sparsify.cpu import kernel, packed
from sparsify.cpu.blocks import experts_in_blocks
from sparsify.cpu.cost_model import FUSED_WIDTHS, ROWS, Rates
from sparsify.cpu.experts import Experts

_MEMORY = 64 << 20
_RUNS = 5
_HIDDEN, _WIDE = 768, 3072
_SLIM, _NARROW = FUSED_WIDTHS
_SLIM_EXPERTS = 64


@torch.no_grad()
def measure_rates(dtype: torch.dtype) -> Rates:
    """The rates of `dtype` with the present number of threads."""
    size = torch.empty(0, dtype=dtype).element_size()
    total = _MEMORY // (_HIDDEN * size) // _WIDE * _WIDE
    weight = torch.randn(total, _HIDDEN).to(dtype)  # [N, D], cut in pieces of the width of a dense layer or an expert
    wide, narrow = weight.split(_WIDE), weight.split(_NARROW)
    plain = lambda x, piece: functional.linear(x, piece)  # noqa: E731
    tables = {
        "dense": _table(wide, _WIDE, plain, dtype),
        "expert": _table(narrow, _NARROW, plain, dtype),
        "batched": _batched_table(weight.view(-1, _NARROW, _HIDDEN), dtype),
    }
    if packed.supported(dtype):
        apply = lambda x, piece: packed.apply(x, piece, None)  # noqa: E731
        pack = lambda piece: packed.pack(piece, piece.shape, 16)  # noqa: E731
        tables["dense_packed"] = _table([*map(pack, wide)], _WIDE, apply, dtype)
        tables["expert_packed"] = _table([*map(pack, narrow)], _NARROW, apply, dtype)
    if kernel.kernel_status().available:
        for form in ["fused", "fused_blocks"] if dtype == torch.float32 else ["fused"]:
            tables[form] = _fused_table(weight, dtype, form)
            tables[f"{form}_slim"] = _slim_table(weight, dtype, form)
    row = torch.randn(1, 16).to(dtype)
    call = _seconds(lambda: [torch.relu(row) for _ in range(100)]) / 100 * 2  # of ops with more arguments: about twice
    values = torch.randn(1 << 20).to(dtype)
    order = torch.randperm(len(weight))
    moved = weight.numel() * 2 / _seconds(lambda: weight.index_select(0, order))
    return Rates(call, values.numel() * 2 / _seconds(lambda: functional.gelu(values)), moved, tables)


def _seconds(run: Callable[[], object]) -> float:
    """The least of `_RUNS` runs after one that does not count: what the machine can do when nobody disturbs it."""
    run()
    times: list[float] = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _table(
    pieces: Sequence[Tensor], width: int, product: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> tuple[float, ...]:
    """`pieces` are weights `[width, D]`, packed or not."""
    rates: list[float] = []
    for rows in ROWS:
        x = torch.randn(rows, _HIDDEN).to(dtype)
        seconds = _seconds(lambda x=x: [product(x, piece) for piece in pieces])
        rates.append(rows * _HIDDEN * width * len(pieces) / seconds)
    return tuple(rates)


def _batched_table(weight: Tensor, dtype: torch.dtype) -> tuple[float, ...]:
    """`weight` `[E, I, D]`."""
    rates: list[float] = []
    for rows in ROWS:
        x = torch.randn(len(weight), rows, _HIDDEN).to(dtype)
        rates.append(rows * weight.numel() / _seconds(lambda x=x: torch.bmm(x, weight.transpose(1, 2))))
    return tuple(rates)


def _fused_table(weight: Tensor, dtype: torch.dtype, form: str) -> tuple[float, ...]:
    """Half of `weight` as up_proj, half as down_proj; K = 1, every expert with the same rows."""
    num_experts = len(weight) // _NARROW // 2
    experts = _experts(weight, num_experts, _NARROW)
    ids = torch.arange(num_experts).unsqueeze(1)
    return tuple(_fused_rate(experts, ids.repeat(rows, 1), dtype, form) for rows in ROWS)


def _slim_table(weight: Tensor, dtype: torch.dtype, form: str) -> tuple[float, ...]:
    """Every token runs every other expert, so that most of the time goes into its rows of inputs and outputs."""
    experts = _experts(weight, _SLIM_EXPERTS, _SLIM)
    ids = torch.arange(_SLIM_EXPERTS).view(-1, 2).t()  # [2, E / 2]
    return tuple(_fused_rate(experts, ids.repeat(rows, 1), dtype, form) for rows in ROWS)


def _experts(weight: Tensor, num_experts: int, width: int) -> Experts:
    """The first rows of `weight` `[N, D]` as up_proj, those after them as down_proj."""
    up, down = weight[: 2 * num_experts * width].chunk(2)
    up, down = up.view(num_experts, width, _HIDDEN), down.view(num_experts, _HIDDEN, width)
    return Experts(up, None, None, None, down, None, "gelu")


def _fused_rate(experts: Experts, ids: Tensor, dtype: torch.dtype, form: str) -> float:
    """Of the kernel on as many tokens as `ids` `[T, K]` says."""
    blocks = experts_in_blocks(experts) if form == "fused_blocks" else None
    x, ones, ids = torch.randn(len(ids), _HIDDEN).to(dtype), torch.ones(ids.shape), ids.contiguous()
    return ids.numel() * 2 * experts.up_proj[0].numel() / _seconds(lambda: kernel.run(x, ones, ids, experts, blocks))
