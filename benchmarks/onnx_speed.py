"""One FFN layer, and two whole models, in onnxruntime on this CPU: dense, `com.microsoft.MoE`, and what we export.

    python benchmarks/onnx_speed.py --prepare            writes the ONNX files of all cases (minutes, any machine load)
    python benchmarks/onnx_speed.py --minutes 4.5        times one case after another; repeat until it says "all done"
    python benchmarks/onnx_speed.py --quick              D=768 F=3072, 16 experts of which 4 run, two threads, a minute
    python benchmarks/onnx_speed.py --report             tables and plot from the times that there are
    python benchmarks/onnx_speed.py --runs 3             times what was timed twice more, and tells the spread

Every case is kept in out/onnx_speed as it ends, so a run may stop anywhere. One session is alive at a time, as the
threads of an idle one take the cores; the files take turns, round after round, and the median of the rounds counts.
GELU is the exact one, but in the MoE op, which has the tanh form alone. SmolLM2 has SwiGLU, for which the op is exact;
it runs without a cache of keys, so 1x1 is a first token. Tables go to out/onnx.md, .json and .png.
"""

from __future__ import annotations

import itertools
import json
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import onnxruntime
import torch
import typer
from onnx_tables import LOADS, write_tables
from torch import Tensor, fx, nn

from sparsify import SparseModel, SparsifyConfig, export_onnx, onnx_ops_library, sparsify
from sparsify.cpu.cost_model import processor_name
from sparsify.models.load import load
from sparsify.passes.fuse_moe import MOE_FFN
from sparsify.passes.lower_onnx.lowerings import Lowering
from sparsify.routers import MLPRouter
from sparsify.sparse_model import SIZES_KEY, SparseModelInfo

_MOST_RUNS = 9
_TOKENS = (1, 4, 16, 64, 128, 512, 2048)
_EXACT: tuple[Lowering, ...] = ("expert_chain", "sorted_split", "dense_masked", "fused_op")
_ROUTER = 64  # hidden size, the default of the config
_PEAK_TOKENS = 512
# Prints the bytes that a process took for one file, beside onnxruntime. getrusage would tell those of its parent.
_PEAK = """
import json, re, sys
import numpy as np, onnxruntime
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024
before = peak()
options = onnxruntime.SessionOptions()
if sys.argv[3:]:
    options.register_custom_ops_library(sys.argv[3])
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
shapes = json.loads(sys.argv[2])
session.run(None, {name: np.ones(shape, dtype) for name, (shape, dtype) in shapes.items()})
print(peak() - before)
"""


class Layer(NamedTuple):
    """One FFN layer of F = 4 D neurons; sizes are numbers of tokens."""

    hidden_size: int
    num_experts: int
    top_k: int
    threads: tuple[int, ...] = (2, 1)

    @property
    def key(self) -> str:
        """The name of its file."""
        return f"layer-{self.hidden_size}-{self.num_experts}-{self.top_k}"

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """Of the input, but for its features."""
        return [(tokens,) for tokens in _TOKENS]

    def write(self, folder: Path) -> None:
        """Write the dense file, one for every exact lowering, and one with the op."""
        torch.manual_seed(0)
        dense = _Dense(self).eval()
        sparse = _sparse(dense, self, "gelu")
        for name in _EXACT:
            export_onnx(sparse, folder / f"{name}.onnx", lowering=name, verify=name == "expert_chain")
        op = _sparse(dense, self, "gelu_tanh")
        export_onnx(op, folder / "MoE.onnx", lowering="moe_op", dense=dense, verify=False)
        os.replace(folder / "MoE.dense.onnx", folder / "dense.onnx")

    def feeds(self, size: Sequence[int]) -> dict[str, np.ndarray]:
        """Random tokens."""
        return {"x": np.random.default_rng().standard_normal((*size, self.hidden_size), np.float32)}


class Model(NamedTuple):
    """A whole model; sizes are batch and sequence."""

    name: str
    num_experts: int
    top_k: int
    lowerings: tuple[Lowering, ...]
    sizes: list[tuple[int, ...]]
    threads: tuple[int, ...] = (2, 1)

    @property
    def key(self) -> str:
        """The name of its file."""
        return self.name

    def write(self, folder: Path) -> None:
        """Convert without calibration, which changes quality and not speed, and export."""
        dense = load(self.name)
        config = SparsifyConfig(self.num_experts, self.top_k, select="all", refit=False)
        sparse = sparsify(dense.model, dense.args, dense.kwargs, config=config)
        for name in self.lowerings:
            first = name == self.lowerings[0]
            path = folder / f"{'MoE' if name == 'moe_op' else name}.onnx"
            report = export_onnx(sparse, path, lowering=name, dense=dense.model if first else None, verify=False)
            if report.dense_path:
                os.replace(report.dense_path, folder / "dense.onnx")

    def feeds(self, size: Sequence[int]) -> dict[str, np.ndarray]:
        """Random token ids, and a mask of ones."""
        ids = np.random.default_rng().integers(1000, 20000, size)
        return {"input_ids": ids, "attention_mask": np.ones(size, np.int64), "token_type_ids": np.zeros(size, np.int64)}


Case = Layer | Model
_EXPERTS = ((16, 4), (8, 2), (64, 16), (8, 1), (16, 2), (64, 8))
CASES: tuple[Case, ...] = (
    *(Layer(768, *numbers) for numbers in _EXPERTS),
    *(Layer(384, *numbers) for numbers in _EXPERTS),
    Model("minilm", 16, 4, ("expert_chain", "fused_op"), [(1, 16), (1, 128), (8, 64), (32, 128)]),
    Model("smollm2", 8, 2, ("expert_chain", "moe_op", "fused_op"), [(1, 1), (1, 128), (1, 512)]),
    *(Layer(2048, *numbers) for numbers in _EXPERTS),
)


class _Dense(nn.Module):
    def __init__(self, case: Layer) -> None:
        super().__init__()
        self.up = nn.Linear(case.hidden_size, 4 * case.hidden_size)
        self.down = nn.Linear(4 * case.hidden_size, case.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class _Experts(nn.Module):
    """The neurons of a dense layer in equal parts, in their order: times depend on no better division."""

    def __init__(self, dense: _Dense, case: Layer) -> None:
        super().__init__()
        experts, hidden = case.num_experts, case.hidden_size
        width = 4 * hidden // experts
        self.up_proj = nn.Parameter(dense.up.weight.detach().reshape(experts, width, hidden))
        self.up_proj_bias = nn.Parameter(dense.up.bias.detach().reshape(experts, width))
        down = dense.down.weight.detach().reshape(hidden, experts, width).transpose(0, 1)
        self.down_proj = nn.Parameter(down.contiguous())
        self.bias = dense.down.bias


def main(
    quick: Annotated[bool, typer.Option(help="one layer, two threads")] = False,
    prepare: Annotated[bool, typer.Option(help="only write the files that are timed")] = False,
    report: Annotated[bool, typer.Option(help="only write the tables")] = False,
    minutes: Annotated[float, typer.Option(help="begin no case after so long")] = 1e9,
    rounds: Annotated[int, typer.Option(help="how often every file is loaded and timed")] = 3,
    seconds: Annotated[float, typer.Option(help="at least so long per file, round and size")] = 0.1,
    only: Annotated[str, typer.Option(help="cases whose name begins so")] = "",
    runs: Annotated[int, typer.Option(help="time each case so often, for the spread", min=1, max=_MOST_RUNS)] = 1,
    output: Annotated[Path, typer.Option(help="folder of the tables")] = Path("out"),
) -> None:
    """Time what was not timed yet, and write the tables."""
    onnx_ops_library()  # compiled before anything is timed
    start, folder = time.perf_counter(), output / ("onnx_quick" if quick else "onnx_speed")
    cases = (Layer(768, 16, 4, (2,)),) if quick else [case for case in CASES if case.key.startswith(only)]
    for run, case in [] if report else itertools.product(range(runs), cases):
        found = _results_of(case, folder)[run]
        if found.exists() and not quick:
            continue
        if time.perf_counter() - start > 60 * minutes:
            print(f"{case.key} and those after it are left; run it again")
            return
        files = _files(case, folder / "files" / case.key)
        if prepare:
            continue
        _write(found, json.dumps(_measure(case, files, rounds, seconds), indent=1))
        print(f"{case.key}: done, {time.perf_counter() - start:.0f} s", flush=True)
    kept = [[file for file in _results_of(case, folder) if file.exists()] for case in cases]
    results = [[json.loads(file.read_text()) for file in files] for files in kept if files]
    if results and not prepare:
        write_tables(results, output)
    print("all done")


def _results_of(case: Case, folder: Path) -> list[Path]:
    """Where the times of each run of a case are kept."""
    return [folder / f"{case.key}{f'.{run}' if run else ''}.json" for run in range(_MOST_RUNS)]


def _files(case: Case, folder: Path) -> dict[str, Path]:
    """The files of a case; written, if they are not there."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            case.write(Path(made))
            os.rename(made, folder)
    found = {file.stem: file for file in sorted(folder.glob("*.onnx"))}
    return {name: found[name] for name in ("dense", "MoE", *_EXACT) if name in found}


def _measure(case: Case, files: Mapping[str, Path], rounds: int, seconds: float) -> dict[str, Any]:
    machine = {"cpu": processor_name(), "onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    times: dict[str, dict[str, list[float]]] = {}
    for threads in case.threads:
        turns = [{name: _time(file, case, threads, seconds) for name, file in files.items()} for _ in range(rounds)]
        times[str(threads)] = {name: _medians([turn[name] for turn in turns]) for name in files}
    return {
        "case": {"kind": type(case).__name__, **case._asdict(), "sizes": case.sizes},
        "machine": machine,
        "ms": times,
        **_load_times(files, rounds),
        "bytes": {name: file.stat().st_size for name, file in files.items()},
        # /proc exists on Linux alone.
        "peak_bytes": {name: _peak(file, case) for name, file in files.items() if sys.platform == "linux"},
    }


def _medians(turns: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(times) * 1e3 for times in zip(*turns, strict=True)]


def _sparse(dense: _Dense, case: Layer, activation: str) -> SparseModel:
    """A converted model that is one layer, without the training of its router."""
    root = nn.Module()
    root.experts = _Experts(dense, case)
    root.router = MLPRouter(case.hidden_size, case.num_experts, case.top_k, _ROUTER)
    _balance(root.router, case.hidden_size)
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta[SIZES_KEY] = ("tokens", case.hidden_size)
    routed = graph.call_module("router", (x,))
    weights, ids = (graph.call_function(operator.getitem, (routed, i)) for i in range(2))
    parameters = [graph.get_attr(f"experts.{name}") for name in ("up_proj", "up_proj_bias", "down_proj")]
    y = graph.call_function(MOE_FFN, (x, weights, ids, *parameters[:2], None, None, parameters[2], None, activation))
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (y, graph.get_attr("experts.bias"))))
    sparse = SparseModel(root, graph)
    sparse.info = SparseModelInfo((torch.randn(8, case.hidden_size),), {}, {}, None)
    return sparse


@torch.no_grad()
def _balance(router: MLPRouter, hidden_size: int) -> None:
    """Give every expert its share of the tokens.

    Random weights choose a few of 8 experts nearly always, so that a layer would read fewer weights than a trained one.
    """
    logits = router.logits(torch.randn(4096, hidden_size))  # [T, E]
    deviation, mean = torch.std_mean(logits, 0)
    router.output.weight.div_(deviation[:, None])
    router.output.bias.sub_(mean).div_(deviation)


def _load_times(files: Mapping[str, Path], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds to load each file, as onnxruntime does by itself, and without its search for buffers to reuse."""
    for file in files.values():
        _open(file, 1)  # so that it lies in memory
    found: dict[str, dict[str, list[float]]] = {key: {name: [] for name in files} for key in LOADS}
    for _, name, (key, reuse) in itertools.product(range(rounds), files, LOADS.items()):
        start = time.perf_counter()
        _open(files[name], torch.get_num_threads(), reuse=reuse)
        found[key][name].append((time.perf_counter() - start) * 1e3)
    return {key: {name: statistics.median(own) for name, own in times.items()} for key, times in found.items()}


def _open(file: Path, threads: int, *, reuse: bool = True) -> Any:
    options = onnxruntime.SessionOptions()
    options.enable_mem_reuse = reuse
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    for library in _library(file):
        options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _library(file: Path) -> list[str]:
    """That of the ops of a file, if it needs one."""
    return [onnx_ops_library()] if file.stem == "fused_op" else []


def _time(file: Path, case: Case, threads: int, seconds: float) -> list[float]:
    """Median seconds of a call at every size."""
    session = _open(file, threads)
    known = [value.name for value in session.get_inputs()]
    times: list[float] = []
    for size in case.sizes:
        batches = [{name: array for name, array in case.feeds(size).items() if name in known} for _ in range(8)]
        times.append(_median(lambda feed: session.run(None, feed), batches, seconds))
    return times


def _median(run: Callable[[Any], object], batches: Sequence[Any], seconds: float) -> float:
    """Calls that take long are timed twice, short ones until `seconds` have passed."""
    run(batches[-1])
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        start = time.perf_counter()
        run(batches[len(times) % len(batches)])
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _peak(file: Path, case: Case) -> int:
    """Bytes that a process takes to load the file and to run one call, beside onnxruntime itself."""
    largest = max(size for size in case.sizes if np.prod(size) <= _PEAK_TOKENS)
    known = [value.name for value in _open(file, 1).get_inputs()]
    shapes = {name: (array.shape, str(array.dtype)) for name, array in case.feeds(largest).items() if name in known}
    command = [sys.executable, "-c", _PEAK, str(file), json.dumps(shapes), *_library(file)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


if __name__ == "__main__":
    typer.run(main)
