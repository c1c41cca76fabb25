"""The whole of MiniLM in PyTorch on this CPU, dense and as experts, beside what Amdahl's law allows.

    python benchmarks/cpu_model.py           4 of 16 experts, about a minute and a half

`bound` is the dense model's time over the same time less what its FFNs save, each timed alone, router included. Of the
speedup of the model, `reached` is the share of that bound.
"""

from __future__ import annotations

from typing import Annotated

import typer

from sparsify import sparsify
from sparsify.bench import bench, describe_machine
from sparsify.models.load import load

SIZES = ((8, 64), (32, 128))  # texts, tokens of each


def main(
    model: Annotated[str, typer.Argument(help="what `sparsify convert` takes")] = "minilm",
    rounds: Annotated[int, typer.Option(help="turns of the two models")] = 9,
) -> None:
    """Convert without training, time, and print a table."""
    dense = load(model)
    tokens = [texts * length for texts, length in SIZES]
    batches = None if dense.calibration is None else dense.calibration()
    sparse = sparsify(
        dense.model, dense.args, dense.kwargs, calibration=batches, num_experts=16, top_k=4, select="all",
        distill_steps=0, target_tokens=tokens,
    )  # fmt: skip
    report = bench(dense.model, sparse, sizes=SIZES, rounds=rounds)
    print(f"{describe_machine(report.machine)}\n")
    print("| tokens | dense ms | sparse ms | speedup | FFNs alone, ms | bound | reached |")
    print("|---" * 7 + "|")
    for timing, count in zip(report.timings, tokens, strict=True):
        times = [time for ffn in sparse.report.ffns for time in ffn.times if time.tokens == count]
        before = 1e3 * sum(time.dense or 0 for time in times)
        after = 1e3 * sum(time.experts or 0 for time in times)
        bound = timing.dense / (timing.dense - before + after)
        cells = [f"{count}", f"{timing.dense:.1f}", f"{timing.sparse:.1f}", f"{timing.speedup:.2f}",
                 f"{before:.1f} -> {after:.1f}", f"{bound:.2f}", f"{timing.speedup / bound:.0%}"]  # fmt: skip
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
