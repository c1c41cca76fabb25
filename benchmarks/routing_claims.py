"""Claims 2 and 3 of docs/routing.md: what the latency of a layer of copies depends on, in onnxruntime.

    python benchmarks/routing_claims.py                 about two minutes on 2 quiet cores

Claim 2: with K fixed, the latency of many tokens hardly grows with E where only chosen experts run, and grows with E
where all of them run times a mask. Claim 3: the latency of few tokens follows the number of distinct experts, as each
brings its weights from memory.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from onnxruntime import InferenceSession
from torch import nn

from sparsify import export_onnx, sparsify
from sparsify.bench import describe_machine, read_machine

D, F, TOP_K, MANY = 512, 2048, 2, 512


def main() -> None:
    """Print both tables."""
    print(f"{describe_machine(read_machine(with_onnxruntime=True))}\nD={D} F={F} K={TOP_K}, fp32, ms, medians\n")
    print(f"| E | chosen experts, T={MANY} | all experts and a mask |\n|---|---|---|")
    for experts in (4, 8, 16, 32):
        times = [_milliseconds(experts, lowering, MANY) for lowering in ("sorted_split", "dense_masked")]
        print(f"| {experts} | {times[0]:.1f} | {times[1]:.1f} |", flush=True)
    print("\n| T | distinct experts of 32, expected | chosen experts | ms an expert |\n|---|---|---|---|")
    for tokens in (1, 2, 4, 8, 16, 32):
        distinct = 32 * (1 - (1 - TOP_K / 32) ** tokens)
        time_taken = _milliseconds(32, "sorted_split", tokens)
        print(f"| {tokens} | {distinct:.1f} | {time_taken:.2f} | {time_taken / distinct:.3f} |", flush=True)


def _milliseconds(experts: int, lowering: Any, tokens: int) -> float:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D))
    sparse = sparsify(
        dense, (torch.randn(8, D),), select="all", start="upcycle", num_experts=experts, top_k=TOP_K
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(sparse, path, lowering=lowering, verify=False)
        session = InferenceSession(path, providers=["CPUExecutionProvider"])
    name, taken = session.get_inputs()[0].name, []
    for seed in range(9):  # other tokens in every call, so other experts are cold
        x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed)).numpy()
        start = time.perf_counter()
        session.run(None, {name: x})
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:]) * 1e3


if __name__ == "__main__":
    main()
