"""How much memory and time a conversion takes beside the weights (Linux).

    python benchmarks/memory.py meta          capture, match and plan a Llama of 1.2 billion parameters without weights
    python benchmarks/memory.py smollm2       convert SmolLM2-135M, fp32
    python benchmarks/memory.py minilm        convert all-MiniLM-L6-v2, fp32
    python benchmarks/memory.py random-1b     convert a random Llama of 1.2 billion parameters, bf16

The peak is that of the resident memory during the conversion, less what the process held before the model was loaded,
after a tiny model was converted so that all code is there.
"""

from __future__ import annotations

import gc
import re
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify import SparsifyConfig, sparsify
from sparsify.models.load import load
from sparsify.passes.capture import capture
from sparsify.passes.match_ffn import match_ffn
from sparsify.passes.normalize_linear import NormalizeLinearPass
from sparsify.passes.plan import make_plan

_MIB = 2**20


def main(
    model: Annotated[str, typer.Argument(help="meta, smollm2, minilm or random-1b")],
    tokens: Annotated[int, typer.Option(help="calibration tokens; 0 converts from the weights alone")] = 0,
) -> None:
    """Measure one model and print one line."""
    _warm_up()
    before = _resident()
    if model == "meta":
        _plan_without_weights(before)
        return
    dense, kwargs, batches = _random(tokens) if model == "random-1b" else _real(model, tokens)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in dense.parameters()) / _MIB
    gc.collect()
    _reset_peak()
    start = time.perf_counter()
    config = SparsifyConfig(num_experts=8, top_k=6)
    sparse = sparsify(dense, kwargs=kwargs, config=config, calibration=batches, consume_model=True)
    seconds, peak = time.perf_counter() - start, _peak() - before
    print(
        f"{model}: {len(sparse.report.converted)} layers, {sparse.report.calibration_tokens} calibration tokens, "
        f"{seconds:.0f} s; weights {weights:.0f} MiB, peak {peak:.0f} MiB = {peak / weights:.2f} times the weights; "
        f"worst receipt {sparse.report.max_receipt:.1e}"
    )


def _warm_up() -> None:
    """Load the code that a conversion loads: it is no part of what a model costs."""
    config = LlamaConfig(hidden_size=128, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(1000, (8, 64)), "use_cache": False} for _ in range(4)]
    sparsify(model, kwargs=batches[0], calibration=batches, select="all", distill_steps=20)
    gc.collect()


def _plan_without_weights(before: float) -> None:
    with torch.device("meta"):
        model = _llama(torch.float32)
        ids = torch.zeros(2, 16, dtype=torch.int64)
    _reset_peak()
    start = time.perf_counter()
    graph_module = NormalizeLinearPass()(capture(model, (), {"input_ids": ids, "use_cache": False})).graph_module
    matches, _ = match_ffn(graph_module)
    plan = make_plan(matches, SparsifyConfig())
    seconds = time.perf_counter() - start
    print(
        f"meta: {sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters, "
        f"{sum(layer.converts for layer in plan.layers)} of {len(matches)} FFNs planned in {seconds:.1f} s; "
        f"peak {_peak():.0f} MiB in all, {_peak() - before:.0f} MiB over the imports"
    )


def _real(name: str, tokens: int) -> tuple[nn.Module, dict[str, object], list[dict[str, object]] | None]:
    dense = load(name)
    assert dense.calibration is not None
    batches: list[dict[str, object]] = []
    for batch in dense.calibration() if tokens else ():
        batches.append(dict(batch))
        tokens -= int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
        if tokens <= 0:
            break
    return dense.model, dict(dense.kwargs), batches or None


def _random(tokens: int) -> tuple[nn.Module, dict[str, object], list[dict[str, object]] | None]:
    torch.manual_seed(0)
    model, ids = _llama(torch.bfloat16), torch.randint(0, 1000, (max(2, tokens // 64), 64))
    batches: list[dict[str, object]] = [{"input_ids": part, "use_cache": False} for part in ids.split(2)]
    return model, {"input_ids": ids[:2, :16], "use_cache": False}, batches if tokens else None


def _llama(dtype: torch.dtype) -> nn.Module:
    """The shape of Llama-3.2-1B."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def _status(field: str) -> float:
    """A line of /proc/self/status, in MiB."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) / 1024 if found else float("nan")


def _resident() -> float:
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    typer.run(main)
