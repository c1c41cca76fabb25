"""How long a layer takes on this CPU, dense and as experts: what chooses the form of the op, and what `plan` asks.

    seconds = calls * call + sum over products (multiply-adds / rate(rows)) + values written and read / values
              + values of rows gathered, scattered and summed / moved

`rate(rows)` is a small table of multiply-adds per second for products with 1, 4, 16, 64 and 256 rows, log-linear in
between and constant beyond. It is measured on weights that come from memory rather than from a cache, so a product of
few rows is charged for the bytes of its weights. With uniform routing T tokens touch A = E (1 - (1 - K / E)^T) experts,
of T K / A rows each.

The numbers are those of a file where there is one (`SPARSIFY_COSTS` names it, or `Costs.measure().save()` wrote it to
the cache folder) and otherwise `BUILT_IN`, measured elsewhere. Nothing is measured unasked.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import operator
import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from sparsify.cpu import packed
from sparsify.cpu.build import cache_folder, processor
from sparsify.cpu.built_in_costs import BUILT_IN
from sparsify.cpu.forms import FORMS, PACKING
from sparsify.cpu.kernel import kernel_status

ROWS = (1, 4, 16, 64, 256)
# Neurons of an expert that the tables `fused_slim` and `fused`, and those of blocks, were measured with.
FUSED_WIDTHS = (16, 384)
_FORMAT = 3  # of files
# The table that a form of one product after another is charged by.
_TABLES = {"sorted_linears": "expert", "sorted_packed": "expert_packed"}


@dataclasses.dataclass(frozen=True)
class FFNShape:
    """The sizes of a layer that decide what it costs.

    Attributes:
        hidden_size: D, inputs.
        intermediate_size: neurons of all experts together, as of the dense layer.
        out_features: D_out.
        num_experts: E.
        top_k: K, experts of a token.
        gated: three weights instead of two.
        dtype: float32 or bfloat16.
    """

    hidden_size: int
    intermediate_size: int
    out_features: int
    num_experts: int
    top_k: int
    gated: bool
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one thread count reaches in one dtype.

    Attributes:
        call: seconds that a torch op costs before it computes.
        values: values per second of activations, read and written.
        moved: values per second of rows of tokens that are brought into another order, read and written.
        tables: multiply-adds per second for each of `ROWS`: `dense`, `dense_packed`, `expert`, `expert_packed`,
            `batched`, `fused`, `fused_slim`, `fused_blocks` and `fused_blocks_slim`; a table may be missing where the
            machine has no such kernel.
    """

    call: float
    values: float
    moved: float
    tables: Mapping[str, tuple[float, ...]]

    def seconds(self, table: str, multiply_adds: float, rows: float) -> float:
        """Time of products with `rows` rows each."""
        rates = self.tables[table]
        place = min(max(math.log(max(rows, 1.0), 4), 0.0), len(ROWS) - 1.0)
        below = min(int(place), len(ROWS) - 2)
        share = place - below
        rate = math.exp((1 - share) * math.log(rates[below]) + share * math.log(rates[below + 1]))
        if rows < 1:
            rate *= rows
        return multiply_adds / rate


@dataclasses.dataclass(frozen=True, eq=False)
class Costs:
    """The rates of one machine.

    Attributes:
        machine: the processor they were measured on.
        source: where they come from, for people.
        rates: by dtype and number of threads, as `("float32", 2)`.
    """

    machine: str
    source: str
    rates: Mapping[tuple[str, int], Rates]

    @staticmethod
    def load(path: Path | None = None) -> Costs:
        """The file `path`, or the one that `SPARSIFY_COSTS` names, or this machine's, or the built-in numbers.

        Raises:
            ValueError: a file that was named is none of ours.
            OSError: it cannot be read.
        """
        named = path or (Path(os.environ["SPARSIFY_COSTS"]) if os.environ.get("SPARSIFY_COSTS") else None)
        if named is not None:
            return _read(named)
        own = machine_file()
        return _read(own) if own.is_file() else _parse(BUILT_IN, "built in")

    @staticmethod
    def measure() -> Costs:
        """Measure this machine with the present number of threads; a few seconds. Not saved: see `save`."""
        from sparsify.cpu.measure_costs import measure_rates

        threads, known = torch.get_num_threads(), Costs.load()
        kept = known.rates if known.machine == processor_name() else {}
        new = {(name, threads): measure_rates(getattr(torch, name)) for name in ("float32", "bfloat16")}
        return Costs(processor_name(), "measured", {**kept, **new})

    def save(self, path: Path | None = None) -> Path:
        """Write a file that `load` reads, by default this machine's, and let the op use it from now on."""
        path = path or machine_file()
        rates = [{"dtype": dtype, "threads": threads, "call": rate.call, "values": rate.values,
                  "moved": rate.moved, "tables": {name: list(table) for name, table in rate.tables.items()}}
                 for (dtype, threads), rate in sorted(self.rates.items())]  # fmt: skip
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            json.dump({"format": _FORMAT, "machine": self.machine, "rows": list(ROWS), "rates": rates}, file, indent=1)
        os.replace(file.name, path)
        current_costs.cache_clear()
        return path

    def for_dtype(self, dtype: torch.dtype, threads: int | None = None) -> Rates:
        """The rates for a number of threads, by default the present one.

        Where that number was not measured, the nearest is scaled: products in proportion, memory up to four times.
        """
        threads = threads or torch.get_num_threads()
        name = str(dtype).removeprefix("torch.")
        if not any(known == name for known, _ in self.rates):
            name = "bfloat16" if dtype == torch.float16 else "float32"
        nearest = min((count for known, count in self.rates if known == name), key=lambda count: abs(count - threads))
        rates, factor = self.rates[name, nearest], threads / nearest
        if factor == 1:
            return rates
        by_rows = [factor if rows > 16 else min(factor, 4.0) for rows in ROWS]
        scaled = {kind: tuple(map(operator.mul, table, by_rows)) for kind, table in rates.tables.items()}
        memory = min(factor, 4.0)
        return Rates(rates.call, rates.values * memory, rates.moved * memory, scaled)

    def dense_seconds(self, shape: FFNShape, tokens: int, *, packed: bool = True) -> float:
        """The dense layer.

        Args:
            shape: the layer.
            tokens: T.
            packed: with packed weights where that is faster, as an inference engine runs it; False is plain PyTorch.
        """
        rates = self.for_dtype(shape.dtype)
        tables = ("dense", "dense_packed") if packed else ("dense",)
        return min(_dense(shape, tokens, rates, table) for table in tables if table in rates.tables)

    def experts(self, shape: FFNShape, tokens: int, forms: Collection[str] | None = None) -> tuple[str, float]:
        """The fastest form of the experts, and its seconds.

        A form that keeps a packed copy of the weights must be faster by a factor (`PACKING`) to be chosen.

        Args:
            shape: the layer.
            tokens: T.
            forms: those that may be chosen; by default all that this machine and the options allow. What was not
                measured, as there was no compiler then, is left out.
        """
        rates = self.for_dtype(shape.dtype)
        allowed = available_forms(shape.dtype) if forms is None else forms
        times = {form: _experts(shape, tokens, rates, form) for form in allowed if _is_measured(form, rates)}
        return min(times.items(), key=lambda item: item[1] * PACKING.get(item[0], 1))

    def __str__(self) -> str:
        lines = [f"costs of {self.machine} ({self.source}), multiply-adds per nanosecond for {ROWS} rows"]
        for (dtype, threads), rates in sorted(self.rates.items()):
            head = f"{dtype}, {threads} threads: a call {rates.call * 1e6:.1f} us, "
            head += f"{rates.values / 1e9:.2f} values/ns, {rates.moved / 1e9:.2f} moved"
            lines.append(head)
            for name, table in rates.tables.items():
                lines.append(f"  {name:14}" + "".join(f"{rate / 1e9:8.1f}" for rate in table))
        return "\n".join(lines)


@functools.cache
def current_costs() -> Costs:
    """What `Costs.load()` gave when it was first asked, until `Costs.save`."""
    return Costs.load()


def available_forms(dtype: torch.dtype) -> list[str]:
    """The forms that can run here: those that begin with `fused` are of the compiled kernel."""
    pack = packed.allowed() and packed.supported(dtype)
    forms = [form for form in FORMS if pack or form not in PACKING]
    status = kernel_status()
    if not status.available or not (status.threaded or torch.get_num_threads() == 1) or dtype == torch.float16:
        return forms
    blocks = ["fused_blocks"] if packed.allowed() and dtype == torch.float32 else []
    return ["fused", *blocks, *forms]


def processor_name() -> str:
    """The processor, as people call it."""
    lines = processor().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), lines[0])


def machine_file() -> Path:
    """Where the costs of this machine are saved."""
    return cache_folder() / f"costs-{_FORMAT}-{hashlib.sha256(processor().encode()).hexdigest()[:16]}.json"


def _dense(shape: FFNShape, tokens: int, rates: Rates, table: str) -> float:
    up = tokens * shape.hidden_size * shape.intermediate_size * (2 if shape.gated else 1)
    down = tokens * shape.intermediate_size * shape.out_features
    values = 2 * tokens * shape.intermediate_size * (2 if shape.gated else 1)
    calls = 5 if shape.gated else 3
    return calls * rates.call + rates.seconds(table, up + down, tokens) + values / rates.values


def _experts(shape: FFNShape, tokens: int, rates: Rates, form: str) -> float:
    pairs, gates = tokens * shape.top_k, 2 if shape.gated else 1
    touched = shape.num_experts * (1 - (1 - min(1.0, shape.top_k / shape.num_experts)) ** tokens)
    rows = pairs / max(touched, 1e-9)
    width = shape.intermediate_size / shape.num_experts
    per_neuron = gates * shape.hidden_size + shape.out_features
    per_pair = width * per_neuron
    hidden = 2 * gates * pairs * width / rates.values
    # Rows are gathered; outputs are joined, scattered, weighted and summed, which reads and writes all of them.
    moved = pairs * (2 * shape.hidden_size + 7 * shape.out_features) / rates.moved
    if form == "fused_new_blocks":  # whose values are read and written in no order that memory likes: as two copies
        packing = 2 * shape.intermediate_size * per_neuron / rates.moved
        return packing + _experts(shape, tokens, rates, "fused_blocks")
    if form in ("fused", "fused_blocks"):
        return 2 * rates.call + _fused(rates, form, pairs * per_neuron, rows, width)
    if form == "dense_masked":
        masking = 2 * tokens * shape.intermediate_size / rates.values + 8 * rates.call
        return _dense(shape, tokens, rates, "dense_packed") + masking
    calls_each = 3 if not shape.gated else 5
    if form == "token_loop":
        return pairs * (calls_each + 4) * rates.call + rates.seconds("expert", pairs * per_pair, 1)
    if form == "padded_bmm":
        padded = rows + 2 * math.sqrt(rows)
        multiply_adds = shape.num_experts * padded * per_pair
        return 25 * rates.call + rates.seconds("batched", multiply_adds, padded) + 2 * (hidden + moved)
    calls = 15 + touched * (calls_each + 4)
    return calls * rates.call + rates.seconds(_TABLES[form], pairs * per_pair, rows) + hidden + moved


def _is_measured(form: str, rates: Rates) -> bool:
    if form.startswith("fused"):
        return form.replace("_new", "") in rates.tables
    return _TABLES.get(form, "expert") in rates.tables


def _fused(rates: Rates, form: str, per_neuron: float, rows: float, width: float) -> float:
    """A pair costs its products, by the table, and the moving of its rows, which counts where experts are narrow.

    So its time is linear in the width, through those that were measured. `per_neuron` are multiply-adds.
    """
    slim, wide = FUSED_WIDTHS
    least = rates.seconds(f"{form}_slim", slim * per_neuron, rows)
    most = rates.seconds(form, wide * per_neuron, rows)
    products = most * width / wide
    return max(products, least + (most - least) * (width - slim) / (wide - slim))


def _read(path: Path) -> Costs:
    try:
        return _parse(json.loads(path.read_text()), str(path))
    except (KeyError, TypeError, ValueError) as failure:
        message = f"{path} holds no costs of sparsify ({failure}): delete it, or measure and save anew"
        raise ValueError(message) from failure


def _parse(found: Mapping[str, Any], source: str) -> Costs:
    if found["format"] != _FORMAT or tuple(found["rows"]) != ROWS:
        raise ValueError("another format")
    rates = {
        (str(rate["dtype"]), int(rate["threads"])): Rates(
            float(rate["call"]),
            float(rate["values"]),
            float(rate["moved"]),
            {name: _table(table) for name, table in rate["tables"].items()},
        )
        for rate in found["rates"]
    }
    return Costs(str(found["machine"]), source, rates)


def _table(values: Collection[float]) -> tuple[float, ...]:
    table = tuple(float(value) for value in values)
    if len(table) != len(ROWS) or min(table) <= 0:
        raise ValueError(f"a table needs {len(ROWS)} positive numbers")
    return table
