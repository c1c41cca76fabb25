"""Predictions follow the formula, files are read and refused, and the choice is the same every time."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from sparsify.cpu import cost_model
from sparsify.cpu.cost_model import ROWS, Costs, FFNShape, Rates
from sparsify.cpu.forms import FORMS

ALL = ("fused", "fused_blocks", *FORMS)


def make_costs(**tables: float) -> Costs:
    """The same rate for all rows; 1 us a call."""
    rates = {name: tuple([tables.get(name, 1e10)] * len(ROWS)) for name in
             ("dense", "dense_packed", "expert", "expert_packed", "batched", "fused", "fused_slim", "fused_blocks",
              "fused_blocks_slim")}  # fmt: skip
    return Costs("none", "test", {("float32", torch.get_num_threads()): Rates(1e-6, 1e9, 4e9, rates)})


def shape(num_experts: int = 8, top_k: int = 2, gated: bool = False) -> FFNShape:
    return FFNShape(768, 3072, 768, num_experts, top_k, gated, torch.float32)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """No test reads or writes the costs of this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SPARSIFY_COSTS", raising=False)
    cost_model.current_costs.cache_clear()
    yield
    cost_model.current_costs.cache_clear()


def test_dense_by_hand():
    """Protects: the formula, with and without a gate."""
    costs = make_costs(dense_packed=2e10)
    plain = 3e-6 + 64 * 768 * 3072 * 2 / 2e10 + 2 * 64 * 3072 / 1e9
    assert costs.dense_seconds(shape(), 64) == pytest.approx(plain)
    gated = 5e-6 + 64 * 768 * 3072 * 3 / 2e10 + 4 * 64 * 3072 / 1e9
    assert costs.dense_seconds(shape(gated=True), 64) == pytest.approx(gated)


def test_fused_by_hand():
    """Protects: experts cost their pairs, not all weights."""
    form, seconds = make_costs().experts(shape(), 64, ["fused"])
    assert form == "fused"
    assert seconds == pytest.approx(2e-6 + 128 * 384 * 1536 / 1e10)


def test_narrow_experts_cost_their_rows():
    """Protects: a pair costs no less because its expert is narrow; between two widths its time is linear."""
    wide, slim = 8 * 384 * 1536 / 1e10, 8 * 16 * 1536 / 1e9  # of T = 1, K = 8; slim at a tenth of the rate
    costs = make_costs(fused_slim=1e9)

    def seconds(width: int, costs: Costs = costs) -> float:
        layer = FFNShape(768, 16 * width, 768, 16, 8, False, torch.float32)
        return costs.experts(layer, 1, ["fused"])[1] - 2e-6

    assert seconds(384) == pytest.approx(wide)
    assert seconds(16) == pytest.approx(slim)
    assert seconds(200) == pytest.approx((wide + slim) / 2)
    assert seconds(8) == pytest.approx(slim - (wide - slim) * 8 / 368)
    assert seconds(768) == pytest.approx(2 * wide)
    assert seconds(1, make_costs(fused_slim=1e14)) == pytest.approx(wide / 384)


def test_rate_between_rows():
    """Protects: the table is read at the rows it was measured for, log-linear in between, constant beyond."""
    rates = Rates(0, 1, 1, {"dense": (1.0, 4.0, 16.0, 64.0, 256.0)})
    for rows, rate in ((1, 1), (2, 2), (4, 4), (8, 8), (256, 256), (5000, 256)):
        assert rates.seconds("dense", 1.0, rows) == pytest.approx(1 / rate)


def test_each_form_is_chosen_where_it_is_fastest():
    """Protects: a form is charged by its own table."""
    forms = ("fused", "fused_blocks", "dense_masked", "padded_bmm", "sorted_packed")
    for form, table in zip(forms, ("fused", "fused_blocks", "dense_packed", "batched", "expert_packed"), strict=True):
        assert make_costs(**{table: 1e14}).experts(shape(), 1024, ALL)[0] == form
    assert make_costs(expert=1e14).experts(shape(), 1, ["token_loop", "sorted_linears"])[0] == "token_loop"
    assert make_costs(expert=1e14).experts(shape(), 1024, ["token_loop", "sorted_linears"])[0] == "sorted_linears"


def test_a_copy_of_the_weights_must_pay():
    """Protects: memory is not doubled for a few percent."""
    assert make_costs(expert_packed=1.15e10).experts(shape(), 1024, ["fused", "sorted_packed"])[0] == "fused"
    assert make_costs(expert_packed=3e10).experts(shape(), 1024, ["fused", "sorted_packed"])[0] == "sorted_packed"
    assert make_costs(fused_blocks=1.05e10).experts(shape(), 1024, ["fused", "fused_blocks"])[0] == "fused"
    assert make_costs(fused_blocks=1.2e10).experts(shape(), 1024, ["fused", "fused_blocks"])[0] == "fused_blocks"


@pytest.mark.parametrize("missing", ["fused", "expert_packed"])
def test_what_was_not_measured_is_not_chosen(missing):
    """Protects: costs that were measured without a compiler, or without packed weights, and are read with them."""
    full = make_costs(fused=1e14, fused_blocks=1e14, expert_packed=1e14)
    (place, rates), *_ = full.rates.items()
    tables = {name: table for name, table in rates.tables.items() if not name.startswith(missing)}
    costs = dataclasses.replace(full, rates={place: dataclasses.replace(rates, tables=tables)})
    for forms in (ALL, ("fused_new_blocks", *FORMS)):
        chosen = costs.experts(shape(), 1024, forms)[0]
        assert chosen in ("sorted_packed" if missing == "fused" else forms[:2])


def test_blocks_for_one_call_cost_two_copies():
    """Protects: packing is charged, so that few rows are not packed for; kept blocks cost no more than they do."""
    costs = make_costs(fused_blocks=1e14)
    forms = ["fused", "fused_new_blocks"]
    kept, new = (costs.experts(shape(), 512, [form])[1] for form in ("fused_blocks", "fused_new_blocks"))
    assert new - kept == pytest.approx(2 * 2 * 768 * 3072 / costs.for_dtype(torch.float32).moved)
    assert [costs.experts(shape(), tokens, forms)[0] for tokens in (1, 512)] == forms


@pytest.mark.parametrize("form", [*ALL, "fused_new_blocks"])
def test_more_tokens_cost_more(form):
    """Protects: no form is free at any size. A single row may cost more than four: it takes another path in oneDNN."""
    costs = Costs.load()
    for dtype in (torch.float32, torch.bfloat16) if "blocks" not in form else (torch.float32,):
        layer = FFNShape(768, 3072, 768, 8, 2, False, dtype)
        times = [costs.experts(layer, tokens, [form])[1] for tokens in (4, 16, 64, 512)]
        assert times == sorted(times)
        assert times[0] > 0


def test_built_in_numbers_say_that_experts_pay():
    """Protects: the default table is usable as it is."""
    costs = Costs.load()
    assert costs.source == "built in"
    for tokens in (1, 64, 1024):
        assert costs.experts(shape(), tokens, ["fused"])[1] < costs.dense_seconds(shape(), tokens)


def test_many_narrow_experts_are_run_together():
    """Protects: 96 of 192 experts of 8 neurons do not run one after another in rows."""
    layer = FFNShape(384, 1536, 384, 192, 96, False, torch.float32)
    assert Costs.load().experts(layer, 512, ["fused", *FORMS])[0] == "dense_masked"


def test_saved_and_loaded(tmp_path, monkeypatch):
    """Protects: a file gives back what was written; the environment names another; nothing half-written is left."""
    costs = make_costs(fused=3e10)
    assert cost_model.current_costs().source == "built in"
    own = costs.save()
    assert own == cost_model.machine_file()
    assert Costs.load().rates == costs.rates
    assert cost_model.current_costs().rates == costs.rates
    named = make_costs(fused=4e10).save(tmp_path / "other.json")
    monkeypatch.setenv("SPARSIFY_COSTS", str(named))
    assert Costs.load().source == str(named)
    assert Costs.load(own).rates == costs.rates
    assert [file.name for file in own.parent.iterdir()] == [own.name]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"format": 3, "rows": [], "rates": []}',
        '{"format": 2, "rows": [1, 4, 16, 64, 256], "machine": "older", "rates": []}',
    ],
)
def test_a_file_that_is_none(tmp_path, text):
    """Protects: an error names the file."""
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"costs\.json holds no costs of sparsify"):
        Costs.load(path)


def test_impossible_rates_are_refused(tmp_path):
    """Protects: a table of another length or with a 0 would divide by it."""
    path = make_costs().save(tmp_path / "costs.json")
    for bad in ([1.0], [0.0] * len(ROWS)):
        content = json.loads(path.read_text())
        content["rates"][0]["tables"]["dense"] = bad
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="positive numbers"):
            Costs.load(path)


def test_other_thread_counts_are_scaled():
    """Protects: a machine with many threads is not charged as if it had one, nor one as if it had many."""
    threads = torch.get_num_threads()
    costs = make_costs()
    many = costs.for_dtype(torch.float32, threads * 16)
    assert many.tables["fused"] == (4e10, 4e10, 4e10, 16e10, 16e10)
    assert costs.for_dtype(torch.float32, threads) is costs.rates["float32", threads]


def test_measures_this_machine(monkeypatch):
    """Protects: the measurement covers every table and its result can be saved and printed."""
    from sparsify.cpu import measure_costs

    monkeypatch.setattr(measure_costs, "_MEMORY", 20 << 20)
    monkeypatch.setattr(measure_costs, "_RUNS", 1)
    costs = Costs.measure()
    assert Costs.load(costs.save()).rates == costs.rates
    assert "fused" in str(costs) or not cost_model.kernel_status().available
    for rates in costs.rates.values():
        assert all(rate > 0 for table in rates.tables.values() for rate in table)
        assert rates.call > 0
