"""Time expert layers in turns, on a GPU by its own clock."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import gpu_checks
import torch
import triton
from gpu_layers import ANCHORS, DECODE, LAYERS, SMALL_LAYERS, SMALLEST, SPLITS, Inputs, Layer, Shape
from torch import Tensor

_L2_BYTES = 256 * 2**20
_WARM_UPS = 3


def measure(dtype_name: str, quick: bool, interpret: bool, repeats: int, cards: Sequence[Any]) -> dict[str, Any]:
    """Checks and rows, as they are written down."""
    torch.manual_seed(0)
    device = torch.device("cpu" if interpret else "cuda")
    # The interpreter multiplies bf16 wrongly.
    dtype = torch.float32 if interpret else getattr(torch, dtype_name)
    name = "the CPU, in Triton's interpreter" if interpret else torch.cuda.get_device_name()
    peak = None if interpret else next((card[1:] for card in cards if card[0] in name), None)
    checks: list[gpu_checks.Check] = []
    for check in _checks(device, dtype):
        checks.append(check)
        if not check.passed:
            print(f"failed: {check.name}: {check.detail}", file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = []
    for kind, shape in _shapes(quick, interpret):
        rows += _rows(kind, shape, device, dtype, 1 if interpret else repeats, peak)
        print(f"{kind} {shape}: done", file=sys.stderr, flush=True)
    return {
        "device": name,
        "software": f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}",
        "note": "Times in the interpreter say nothing." if interpret else f"{dtype_name}, median of {repeats}.",
        "checks": [asdict(check) for check in checks],
        "rows": rows,
    }


def _checks(device: torch.device, dtype: torch.dtype) -> Iterator[gpu_checks.Check]:
    yield from gpu_checks.numerics(device)
    yield from gpu_checks.launches(device, dtype)
    if device.type == "cuda":
        yield from gpu_checks.no_synchronisation(device, dtype)
        yield from gpu_checks.graph_capture(device, dtype)


def _shapes(quick: bool, interpret: bool) -> Iterator[tuple[str, Shape]]:
    if interpret:
        yield from (("prefill", shape) for shape in SMALLEST)
        yield "decode", Shape(1, 32, 16, 4, 2)
        return
    yield from (("prefill", shape) for shape in (*ANCHORS[4:6], SPLITS[0]) if quick)
    yield from (("prefill", shape) for shape in (*ANCHORS, *SPLITS) if not quick)
    yield from (("decode", shape) for shape in DECODE if not quick or shape.tokens in (1, 16))


def _rows(
    kind: str, shape: Shape, device: torch.device, dtype: torch.dtype, repeats: int, peak: tuple[float, float] | None
) -> list[dict[str, Any]]:
    """A row for each layer; a decode has no backward, and its rate is of the bytes of the experts chosen."""
    inputs = Inputs.random(shape, device, dtype)
    prepared = {
        name: _prepare(build, inputs, kind) for name, build in (LAYERS if kind == "prefill" else SMALL_LAYERS).items()
    }
    runs = {name: one for name, one in prepared.items() if not isinstance(one, str)}
    forward = _times({name: one.forward for name, one in runs.items()}, device, repeats)
    backward = _times({name: one.backward for name, one in runs.items() if one.backward is not None}, device, repeats)
    active_bytes = inputs.ids.unique().numel() * shape.expert_elements * inputs.x.element_size()
    rows: list[dict[str, Any]] = []
    for name, one in prepared.items():
        row: dict[str, Any] = {"kind": kind, "shape": str(shape), "layer": name, "failure": ""}
        share = 1.0
        if isinstance(one, str):
            row["failure"] = one
        else:
            share = one.share
        work = (shape.flops * share / 1e12, 2 * shape.flops * share / 1e12)
        best = peak and peak[0]
        if kind == "decode":
            all_bytes = shape.experts * shape.expert_elements * inputs.x.element_size()
            work = ((active_bytes if share == 1 else all_bytes) / 1e9, 0.0)
            best = peak and peak[1] * 1e3
        for way, seconds, amount in zip(("forward", "backward"), (forward, backward), work, strict=True):
            row |= _rate(way, seconds.get(name), amount, best)
        rows.append(row)
    _free(device)
    return rows


def _rate(way: str, seconds: float | None, amount: float, best: float | None) -> dict[str, float | None]:
    rate = None if seconds is None else amount / seconds
    share = None if rate is None or best is None else rate / best
    return {f"{way}_seconds": seconds, f"{way}_rate": rate, f"{way}_share": share}


@dataclass(frozen=True)
class Runs:
    """What is timed: the forward without a graph, and the backward of a forward made before."""

    forward: Callable[[], Any]
    backward: Callable[[], Any] | None
    share: float


def _prepare(build: Callable[[Inputs], Layer], inputs: Inputs, kind: str) -> Runs | str:
    """The runs, made once; or why not: a library that is absent, or declines the card, has a row as well."""
    try:
        return _made_once(build(inputs), backward=kind == "prefill")
    except Exception as error:
        _free(inputs.x.device)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _made_once(layer: Layer, *, backward: bool) -> Runs:
    def forward() -> Tensor:
        with torch.no_grad():
            return layer.run()

    forward()
    if not backward:
        return Runs(forward, None, layer.share)
    y = layer.run()
    grad = torch.randn_like(y)

    def run() -> None:
        torch.autograd.grad(y, layer.leaves, grad, retain_graph=True, allow_unused=True)

    run()
    return Runs(forward, run, layer.share)


def _times(runs: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds; the layers take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    flush = torch.empty(_L2_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    for turn in range(_WARM_UPS * (device.type == "cuda") + repeats):
        for name, run in runs.items():
            flush.zero_()
            elapsed = _time(run, device)
            if turn >= _WARM_UPS or device.type != "cuda":
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _time(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
