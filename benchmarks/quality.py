"""What a conversion costs in quality: our methods, published ones and bounds, at the same FLOPs, on the same data.

    python benchmarks/quality.py minilm                                       every method and budget, three seeds
    python benchmarks/quality.py smollm2 --budget 0.75 --method ours --seeds 1
    python benchmarks/quality.py minilm --eval-text FILE                      judged on a text of yours
    python benchmarks/quality.py minilm --method ours --experts 48            finer experts

Budgets are shares of the multiply-adds of the FFNs; router and shared experts count. Calibration and evaluation are
disjoint by document, and options were chosen on a third set (`--split development`). Every cell is written to
out/quality/MODEL.json when it is done, and cells that are there are not run again; the tables and the plot of quality
against measured latency are made from the file.
"""

from __future__ import annotations

import copy
import gc
import itertools
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, cast
from unittest import mock

import torch
import typer
from quality_methods import METHODS, Method, Size, ffn_size, importance_by_layer, router_width
from quality_subjects import Subject, load_subject
from quality_tables import plot, tables

from sparsify import SparseModel, SparsifyConfig, distill, sparsify
from sparsify.bench import describe_machine, read_machine
from sparsify.models.text import Split
from sparsify.passes.heap import trim_heap

_BUDGETS = (0.125, 0.25, 0.5, 0.75)
_EXPERT_SIZE = 48  # neurons
_DEFAULTS = {"effort": 1, "experts": None}  # of cells that were made before there was a choice
_FEWEST, _ROUNDS, _TIMED_SECONDS = 4, 30, 4.0
_TRIAL_STEPS = 20
_TRAINED_ROWS = 16  # of a batch
_TRAINED_TEXT = 10  # times the calibration text
_MIB = 2**20


def main(
    model: Annotated[str, typer.Argument(help="minilm, smollm2, gpt or vit")],
    budget: Annotated[list[float] | None, typer.Option(help="share of the FFN FLOPs")] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(METHODS)}")] = None,
    seeds: int = 3,
    distill_minutes: Annotated[float, typer.Option(help="of light training after the conversion, end to end")] = 0,
    experts: Annotated[int | None, typer.Option(help="parts of an FFN; by default of 48 neurons each")] = None,
    effort: Annotated[int, typer.Option(help="times the calibration text and the steps of the training in blocks")] = 1,
    split: Annotated[str, typer.Option(help="held_out, or development to choose options by")] = "held_out",
    eval_text: Annotated[Path | None, typer.Option(help="judge on this text instead")] = None,
    out: Path = Path("out/quality"),
) -> None:
    """Convert, judge and time; print the tables."""
    unknown = [name for name in method or () if name not in METHODS]
    if unknown or split not in ("held_out", "development"):
        raise typer.BadParameter(f"{unknown or split} is not known; methods are {', '.join(METHODS)}")
    subject = load_subject(model, cast("Split", split), eval_text)
    size = ffn_size(subject)
    file = out / f"{model}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    table: dict[str, Any] = {"machine": describe_machine(read_machine(with_onnxruntime=False)), "data": subject.data}
    table["dense"] = {name: evaluate(subject.model) for name, evaluate in subject.metrics.items()}
    table["cells"] = json.loads(file.read_text())["cells"] if file.is_file() else []
    same: dict[str, Any] = {"minutes": distill_minutes, "effort": effort, "experts": experts, "data": subject.data}
    for own in _cells(budget or _BUDGETS, method or list(METHODS), seeds):
        key = own | same
        if any(all(cell.get(name, _DEFAULTS.get(name)) == key[name] for name in key) for cell in table["cells"]):
            continue
        cell = key | _cell(subject, size, METHODS[key["method"]], key)
        print(json.dumps(cell), flush=True)
        table["cells"].append(cell)
        file.write_text(json.dumps(table, indent=1))
    text = tables(table, subject.higher_is_better)
    print(text)
    file.with_suffix(".md").write_text(text)
    plot(table, subject.higher_is_better, file.with_suffix(".png"))


def _cells(budgets: Iterable[float], methods: Iterable[str], seeds: int) -> Iterator[dict[str, Any]]:
    for budget, method, seed in itertools.product(budgets, methods, range(seeds)):
        yield {"budget": budget, "method": method, "seed": seed}


def _cell(subject: Subject, size: Size, method: Method, key: dict[str, Any]) -> dict[str, Any]:
    batches = subject.calibration(key["seed"], key["effort"])
    _reset_peak()
    before, start = _peak(), time.perf_counter()
    sparse = _convert(subject, size, method, key, batches)
    seconds, peak = time.perf_counter() - start, _peak() - before
    if key["minutes"]:
        _train(sparse, subject, 60 * key["minutes"], key["seed"])
    flops = [sum(getattr(ffn, side) for ffn in sparse.report.ffns) for side in ("flops_before", "flops_after")]
    dense_ms, sparse_ms = _times(subject, sparse)
    weights = sum(p.numel() * p.element_size() for p in subject.model.parameters()) / _MIB
    return {
        "share": flops[1] / flops[0],
        "scores": {name: evaluate(sparse) for name, evaluate in subject.metrics.items()},
        "layer_errors": [ffn.error for ffn in sparse.report.converted],
        "tokens": sparse.report.calibration_tokens,
        "seconds": seconds,
        "peak_over_weights": peak / weights,
        "dense_ms": dense_ms,
        "sparse_ms": sparse_ms,
    }


def _train(sparse: SparseModel, subject: Subject, seconds: float, seed: int) -> None:
    """As many steps as fit into the time, by that of the first few, made on a copy. Most text is seen once."""
    batches = [part for batch in subject.calibration(seed, _TRAINED_TEXT) for part in _rows(batch)]
    ends: list[float] = []

    def note(*_: object) -> None:
        ends.append(time.perf_counter())

    copied = copy.deepcopy(sparse)
    trial = distill(copied, subject.model, batches, steps=_TRIAL_STEPS, loss=subject.loss, seed=seed, progress=note)
    a_step = (ends[-1] - ends[0]) / (len(ends) - 1)
    beginning = trial.seconds - _TRIAL_STEPS * a_step
    steps = max(1, int((seconds - beginning) / a_step))
    print(distill(sparse, subject.model, batches, steps=steps, loss=subject.loss, seed=seed), flush=True)


def _rows(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Smaller batches: more steps in the same time."""
    parts = [tensor.split(_TRAINED_ROWS) for tensor in batch.values()]
    return [dict(zip(batch, values, strict=True)) for values in zip(*parts, strict=True)]


def _convert(subject: Subject, size: Size, method: Method, key: dict[str, Any], batches: list[Any]) -> SparseModel:
    experts = key["experts"] or max(16, size.neurons // _EXPERT_SIZE)
    more = {name: key["effort"] * getattr(SparsifyConfig, name) for name in ("distill_steps", "max_calibration_tokens")}
    options: dict[str, Any] = {**more, **method.options, "num_experts": experts, "select": "all", "seed": key["seed"]}
    options["router_hidden_size"] = router_width(size.hidden)
    if method.allocates:
        return sparsify(subject.model, (), subject.example, calibration=batches, budget=key["budget"], **options)
    if method.prepare is not None:
        method.prepare(subject, batches)
    fits = [k for k in range(1, experts) if method.share(size, experts, k) <= key["budget"]]
    if not fits:
        raise typer.BadParameter(f"the router alone of {key['method']} exceeds {key['budget']:.1%}")
    options |= {"top_k": max(fits), "num_shared_experts": method.num_shared(experts, max(fits))}
    if method.uneven:
        scores = importance_by_layer(subject, batches, experts)
        uneven = method.uneven(scores, max(fits)).items()
        shared = {name: method.num_shared(experts, k) for name, k in uneven}
        options["overrides"] = {name: {"top_k": k, "num_shared_experts": shared[name]} for name, k in uneven}
    # Another function in the place of ours: the rest of the pipeline is the same for all.
    with mock.patch("sparsify.passes.make_experts.split_ffn", method.split):
        calibration = batches if method.calibrates else None
        return sparsify(subject.model, (), subject.example, calibration=calibration, **options)


def _times(subject: Subject, sparse: SparseModel) -> tuple[float, float]:
    """Medians of interleaved rounds, in milliseconds."""
    found: list[tuple[float, float]] = []
    start = time.perf_counter()
    with torch.no_grad():
        while len(found) < _FEWEST or (len(found) < _ROUNDS and time.perf_counter() - start < _TIMED_SECONDS):
            found.append((_milliseconds(subject.model, subject.timed), _milliseconds(sparse, subject.timed)))
    dense, ours = zip(*found[1:], strict=True)
    return statistics.median(dense), statistics.median(ours)


def _milliseconds(model: torch.nn.Module, batch: dict[str, Any]) -> float:
    start = time.perf_counter()
    model(**batch)
    return 1e3 * (time.perf_counter() - start)


def _reset_peak() -> None:
    gc.collect()
    trim_heap()  # else what an earlier cell left counts as there before
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    """Highest resident memory since the reset, in MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    typer.run(main)
