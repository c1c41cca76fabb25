"""Dense against sparse: how long one call takes, in PyTorch and in onnxruntime, at several sizes of the inputs.

The two models take turns, round after round, so that a machine that grows slower or faster does so for both; the order
changes with every round. In onnxruntime one session is alive at a time: the threads of an idle session spin and take
the cores from the one that is measured.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsify.cpu.onnx_library import onnx_ops_library
from sparsify.passes.lower_onnx.flat_graph import FlatGraph, axis_names, flatten_graph, free_sizes, resize_inputs
from sparsify.passes.lower_onnx.fused_op import uses_own_ops
from sparsify.passes.thread_ids import own_inputs
from sparsify.sparse_model import SparseModel

# What one model is timed for in one round and size: until both are reached.
_MIN_RUNS = 3
_MIN_SECONDS = 0.2
# By the number of dynamic sizes, of which the first is the batch and the second the sequence.
_DEFAULT_SIZES: dict[int, tuple[tuple[int, ...], ...]] = {
    0: ((),),
    1: ((1,), (8,), (32,)),
    2: ((1, 16), (1, 128), (8, 128)),
}

Call = Callable[[], object]


@dataclass(frozen=True)
class Machine:
    """Where the times were taken.

    Attributes:
        cpu: the model.
        cores: logical ones.
        threads: that a call may use, the same for both models and both runtimes.
        torch: version.
        onnxruntime: version; "" where no ONNX file was timed.
    """

    cpu: str
    cores: int
    threads: int
    torch: str
    onnxruntime: str


@dataclass(frozen=True)
class Timing:
    """Both models in one runtime at one size.

    Attributes:
        runtime: "pytorch", or "onnxruntime" with the execution provider.
        sizes: the dynamic sizes of the inputs, by name of the axis.
        dense_ms: milliseconds a call, one median a round.
        sparse_ms: the same of the converted model.
    """

    runtime: str
    sizes: Mapping[str, int]
    dense_ms: tuple[float, ...]
    sparse_ms: tuple[float, ...]

    @property
    def dense(self) -> float:
        """Median over the rounds, in milliseconds."""
        return statistics.median(self.dense_ms)

    @property
    def sparse(self) -> float:
        """Median over the rounds, in milliseconds."""
        return statistics.median(self.sparse_ms)

    @property
    def speedup(self) -> float:
        """Time of the dense model over that of the converted one: above 1 the converted one is faster."""
        return self.dense / self.sparse

    @property
    def speedup_range(self) -> tuple[float, float]:
        """The least and the greatest speedup of a round."""
        ratios = [dense / sparse for dense, sparse in zip(self.dense_ms, self.sparse_ms, strict=True)]
        return min(ratios), max(ratios)


@dataclass(frozen=True)
class BenchReport:
    """All timings, and the machine they were taken on."""

    machine: Machine
    timings: tuple[Timing, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values, with the medians and the speedup of every timing."""
        timings = [
            {
                **dataclasses.asdict(timing),
                "dense_median_ms": timing.dense,
                "sparse_median_ms": timing.sparse,
                "speedup": timing.speedup,
            }
            for timing in self.timings
        ]
        return {"machine": dataclasses.asdict(self.machine), "timings": timings}

    def __str__(self) -> str:
        rows = [("runtime", "inputs", "dense ms", "sparse ms", "speedup", "(rounds)"), *map(timing_cells, self.timings)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(cells))
            for cells in (list(zip(row, widths, strict=True)) for row in rows)
        ]
        return "\n".join([describe_machine(self.machine), *lines])


def timing_cells(timing: Timing) -> tuple[str, ...]:
    """One timing as text: runtime, inputs, dense ms, sparse ms, speedup, its range over the rounds."""
    low, high = timing.speedup_range
    return (
        timing.runtime,
        _describe_sizes(timing.sizes),
        _short_ms(timing.dense),
        _short_ms(timing.sparse),
        f"{timing.speedup:.2f}x",
        f"({low:.2f}-{high:.2f})",
    )


def _short_ms(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def describe_machine(machine: Machine) -> str:
    """One line."""
    onnxruntime = f", onnxruntime {machine.onnxruntime}" if machine.onnxruntime else ""
    return f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads, torch {machine.torch}{onnxruntime}"


def bench(
    dense: nn.Module,
    sparse: SparseModel,
    *,
    sizes: Sequence[Sequence[int]] = (),
    dense_onnx: Path | None = None,
    sparse_onnx: Path | None = None,
    provider: str = "CPUExecutionProvider",
    rounds: int = 5,
    progress: Callable[[str, int, int], None] | None = None,
) -> BenchReport:
    """Time the converted model against the dense one, both in fp32 or whatever they hold, on as many threads.

    Args:
        dense: the model that was converted, in evaluation mode.
        sparse: its conversion.
        sizes: for every measurement the dynamic sizes of the inputs, in the order of `SparseModel.dynamic_dims()`:
            batch, or batch and sequence. None given: a few usual ones. The inputs are the example inputs, tiled.
        dense_onnx: the dense model as an ONNX file.
        sparse_onnx: the converted model as an ONNX file. Without both files onnxruntime is not measured.
        provider: the execution provider of onnxruntime.
        rounds: how often the two models take turns.
        progress: called as `progress("bench", done, total)`.

    Raises:
        ValueError: a size does not fit the inputs, the model does not run at it, or the provider is not there.
        ImportError: ONNX files are given, but onnxruntime is not installed.
    """
    flat = flatten_graph(sparse, sparse.info.args, sparse.info.kwargs, sparse.dynamic_dims())
    named_inputs = [(_named_sizes(flat, size), _resized(flat, size)) for size in _checked_sizes(flat, sizes)]
    for named, inputs in named_inputs:
        _require_runs(dense, flat, sparse, inputs, named)
    files = (dense_onnx, sparse_onnx) if dense_onnx is not None and sparse_onnx is not None else None
    steps = _Steps(progress, total=rounds * 2 * len(named_inputs) * (1 if files is None else 2))
    timings = _time_torch((dense, sparse), flat, sparse, named_inputs, rounds, steps)
    if files is not None:
        timings += _time_onnx(files, named_inputs, provider, rounds, steps)
    return BenchReport(read_machine(with_onnxruntime=files is not None), tuple(timings))


NamedInputs = tuple[dict[str, int], dict[str, Tensor]]


class _Steps:
    """Counts what is done for the progress bar."""

    def __init__(self, progress: Callable[[str, int, int], None] | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def advance(self) -> None:
        """One model was timed at one size in one round."""
        self._done += 1
        if self._progress is not None:
            self._progress("bench", self._done, self._total)


def _time_torch(
    models: tuple[nn.Module, nn.Module],
    flat: FlatGraph,
    sparse: SparseModel,
    named_inputs: Sequence[NamedInputs],
    rounds: int,
    steps: _Steps,
) -> list[Timing]:
    arguments = [_arguments(flat, sparse, inputs) for _, inputs in named_inputs]
    times: dict[tuple[int, int], list[float]] = {}
    for which, size in _turns(rounds, len(named_inputs)):
        args, kwargs = arguments[size]
        call = _no_grad_call(models[which], args, kwargs if which else own_inputs(models[0], kwargs))
        times.setdefault((which, size), []).append(_milliseconds(call))
        steps.advance()
    return _timings("pytorch", named_inputs, times)


def _time_onnx(
    files: tuple[Path, Path], named_inputs: Sequence[NamedInputs], provider: str, rounds: int, steps: _Steps
) -> list[Timing]:
    times: dict[tuple[int, int], list[float]] = {}
    for turn in range(rounds * 2):
        which = (turn + turn // 2) % 2
        # The session of the turn before is gone: nothing holds it after `_time_session`.
        for size, milliseconds in _time_session(files[which], named_inputs, provider, steps):
            times.setdefault((which, size), []).append(milliseconds)
    runtime = f"onnxruntime {provider.removesuffix('ExecutionProvider').lower()}"
    return _timings(runtime, named_inputs, times)


def _time_session(
    file: Path, named_inputs: Sequence[NamedInputs], provider: str, steps: _Steps
) -> Iterator[tuple[int, float]]:
    session = _open(file, provider)
    names = [value.name for value in session.get_inputs()]
    for size, (_, inputs) in enumerate(named_inputs):
        feed = {name: inputs[name].numpy() for name in names}
        yield size, _milliseconds(_session_call(session, feed))
        steps.advance()


def _turns(rounds: int, sizes: int) -> Iterator[tuple[int, int]]:
    """Who is timed next, 0 dense or 1 sparse, and at which size; in odd rounds sparse begins."""
    for turn in range(rounds * sizes):
        first = turn // sizes % 2
        yield first, turn % sizes
        yield 1 - first, turn % sizes


def _timings(
    runtime: str, named_inputs: Sequence[NamedInputs], times: Mapping[tuple[int, int], Sequence[float]]
) -> list[Timing]:
    return [
        Timing(runtime, named, tuple(times[0, size]), tuple(times[1, size]))
        for size, (named, _) in enumerate(named_inputs)
    ]


def _milliseconds(call: Call) -> float:
    """The median over several calls, after one that warms up."""
    call()
    seconds: list[float] = []
    while len(seconds) < _MIN_RUNS or sum(seconds) < _MIN_SECONDS:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def _no_grad_call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    def call() -> object:
        with torch.no_grad():
            return model(*args, **kwargs)

    return call


def _session_call(session: Any, feed: Mapping[str, Any]) -> Call:
    return lambda: session.run(None, feed)


def _open(file: Path, provider: str) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("timing ONNX files needs onnxruntime: pip install 'sparsify-moe[onnxruntime]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only: warnings about shapes are no news to a user
    if uses_own_ops(file):
        options.register_custom_ops_library(onnx_ops_library())
    if provider not in onnxruntime.get_available_providers():
        raise ValueError(
            f"onnxruntime has no {provider} here, it has {', '.join(onnxruntime.get_available_providers())}; "
            "convert for another target, or install onnxruntime-gpu"
        )
    session = onnxruntime.InferenceSession(str(file), options, providers=[provider])
    # It falls back without an error where a library of the provider is missing.
    if session.get_providers()[0] != provider:
        raise ValueError(f"onnxruntime could not start {provider} and would use {session.get_providers()[0]} instead")
    return session


def _checked_sizes(flat: FlatGraph, sizes: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    axes = _axes(flat)
    for size in sizes:
        if len(size) != len(axes) or any(number < 1 for number in size):
            given, wanted = "x".join(map(str, size)), " x ".join(axes) or "none, as all inputs are of fixed sizes"
            raise ValueError(f"the size {given} does not fit the inputs of the model; sizes to choose: {wanted}")
    free = free_sizes(flat)
    example = tuple(free[symbols[0]] for symbols in axes.values())
    return sizes or _DEFAULT_SIZES.get(len(axes), (example,))


def _axes(flat: FlatGraph) -> dict[str, list[str]]:
    """The sizes to choose, by readable name: the symbols that each stands for.

    A model that broadcasts one input over another, as a mask over tokens, leaves the batch of each free. They are one
    size here.
    """
    names, free = axis_names(flat), free_sizes(flat)
    places = [(symbol, name, dim) for name, dims in flat.size_names.items() for dim, symbol in dims.items()]
    first_batch = next((free[symbol] for symbol, _, dim in places if dim == 0 and symbol in free), None)
    axes: dict[str, list[str]] = {}
    for symbol in free:
        name, dim = next((name, dim) for other, name, dim in places if other == symbol)
        is_batch = dim == 0 and free[symbol] == first_batch
        axes.setdefault("batch" if is_batch else names[name][dim], []).append(symbol)
    return axes


def _named_sizes(flat: FlatGraph, size: Sequence[int]) -> dict[str, int]:
    return dict(zip(_axes(flat), size, strict=True))


def _resized(flat: FlatGraph, size: Sequence[int]) -> dict[str, Tensor]:
    sizes = {symbol: n for symbols, n in zip(_axes(flat).values(), size, strict=True) for symbol in symbols}
    return resize_inputs(flat, {symbol: sizes[symbol] for symbol in free_sizes(flat)})


def _arguments(
    flat: FlatGraph, sparse: SparseModel, inputs: Mapping[str, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example arguments of the model with `inputs` in the places of the tensors."""
    resized = {id(example): inputs[name] for name, example in flat.inputs.items()}
    return pytree.tree_map(lambda leaf: resized.get(id(leaf), leaf), (sparse.info.args, sparse.info.kwargs))


def _require_runs(
    dense: nn.Module, flat: FlatGraph, sparse: SparseModel, inputs: Mapping[str, Tensor], named: Mapping[str, int]
) -> None:
    args, kwargs = _arguments(flat, sparse, inputs)
    try:
        _no_grad_call(dense, args, own_inputs(dense, kwargs))()
    except (IndexError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the dense model does not run at {_describe_sizes(named)}: {type(error).__name__}: {error}; "
            "choose a size that it was made for"
        ) from error


def _describe_sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items()) or "as the example"


def read_machine(*, with_onnxruntime: bool) -> Machine:
    """What this process runs on."""
    version = ""
    if with_onnxruntime:
        import onnxruntime

        version = onnxruntime.__version__
    return Machine(_cpu_model(), os.cpu_count() or 1, torch.get_num_threads(), torch.__version__, version)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
