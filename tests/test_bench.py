"""Timings that can be trusted: turns taken, one session alive, equal threads; no test here depends on a speed."""

from __future__ import annotations

import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsify import SparsifyConfig, sparsify
from sparsify import bench as module
from sparsify.bench import BenchReport, Machine, Timing, bench
from sparsify.passes.export_onnx import export_onnx


class Encoder(nn.Module):
    """An FFN between an embedding of eight positions and a sum, so that the sequence has a limit."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(8, 16)
        self.ffn = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x, scale):
        return self.ffn(x + self.positions(torch.arange(x.shape[1]))) * scale["by"]


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    dense = Encoder().eval()
    inputs = (torch.randn(2, 4, 16), {"by": torch.ones(2, 4, 1)})
    calibration = [(torch.randn(4, 8, 16), {"by": torch.ones(4, 8, 1)}) for _ in range(2)]
    config = SparsifyConfig(num_experts=4, top_k=2, select="all", router_hidden_size=4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # quicker for matrices as small as these
    sparse = sparsify(dense, inputs, config=config, calibration=[(batch, {}) for batch in calibration])
    torch.set_num_threads(threads)
    return dense, sparse


@pytest.fixture(scope="module")
def onnx_files(models, tmp_path_factory):
    dense, sparse = models
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return export_onnx(sparse, path, dense=dense, verify=False).dense_path, path


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "_MIN_SECONDS", 0)


def test_every_size_is_timed_in_both_runtimes(models, onnx_files):
    """One line a runtime and size, one time a round, and the progress reaches its end."""
    steps = []
    report = bench(
        *models,
        sizes=[(1, 3), (5, 8)],
        dense_onnx=onnx_files[0],
        sparse_onnx=onnx_files[1],
        rounds=2,
        progress=lambda *step: steps.append(step),
    )
    assert [(timing.runtime, dict(timing.sizes)) for timing in report.timings] == [
        (runtime, {"batch": batch, "sequence": sequence})
        for runtime in ("pytorch", "onnxruntime cpu")
        for batch, sequence in ((1, 3), (5, 8))
    ]
    for timing in report.timings:
        assert len(timing.dense_ms) == len(timing.sparse_ms) == 2
        assert min(timing.dense_ms + timing.sparse_ms) > 0
    assert steps == [("bench", done, 16) for done in range(1, 17)]
    assert report.machine.threads == torch.get_num_threads()
    assert report.machine.torch == torch.__version__
    assert report.machine.cpu
    assert report.machine.onnxruntime


def test_one_session_is_alive_at_a_time_with_equal_threads(models, onnx_files, monkeypatch):
    """The threads of an idle session spin and take the cores from the one that is measured."""
    opened: list[str] = []
    alive: weakref.WeakSet = weakref.WeakSet()
    original = module._open

    def watch(file, provider):
        gc_free = not alive
        session = original(file, provider)
        assert gc_free, "another session is still alive"
        assert session.get_session_options().intra_op_num_threads == torch.get_num_threads()
        alive.add(session)
        opened.append(file.name)
        return session

    gc.disable()  # a session must go when its turn ends, not when the collector comes by
    try:
        monkeypatch.setattr(module, "_open", watch)
        bench(*models, sizes=[(1, 3), (2, 2)], dense_onnx=onnx_files[0], sparse_onnx=onnx_files[1], rounds=3)
    finally:
        gc.enable()
    dense, sparse = onnx_files[0].name, onnx_files[1].name
    assert opened == [dense, sparse, sparse, dense, dense, sparse]


def test_the_models_take_turns():
    """In each round both are timed at every size, and who begins changes."""
    turns = list(module._turns(rounds=2, sizes=2))
    assert turns == [(0, 0), (1, 0), (0, 1), (1, 1), (1, 0), (0, 0), (1, 1), (0, 1)]


def test_inputs_of_any_structure_are_tiled(models):
    """Tensors deep in the arguments get the new sizes; the model runs on them."""
    dense, sparse = models
    shapes = []
    handle = dense.register_forward_pre_hook(lambda _, args: shapes.append((args[0].shape, args[1]["by"].shape)))
    bench(dense, sparse, sizes=[(3, 7)], rounds=1)
    handle.remove()
    assert set(shapes) == {((3, 7, 16), (3, 7, 1))}


def test_a_mask_has_the_batch_of_its_tokens():
    """Where a mask is broadcast its batch is a size of its own in the graph, but not to a user."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

        def forward(self, x, mask):
            return self.ffn(x), mask.float() * 2

    dense = Masked().eval()
    inputs = (torch.randn(2, 4, 16), torch.ones(2, 6))
    sparse = sparsify(dense, inputs, calibration=[inputs] * 2, num_experts=4, top_k=2, select="all")
    assert len({dims[0] for dims in sparse.dynamic_dims().values()}) == 2
    report = bench(dense, sparse, sizes=[(3, 5, 7)], rounds=1)
    [timing] = report.timings
    assert dict(timing.sizes) == {"batch": 3, "sequence": 5, "sequence_out": 7}


def test_nothing_is_left_changed(models):
    """Threads are a setting of the whole process, gradients of the caller."""
    before = torch.get_num_threads(), torch.is_grad_enabled()
    bench(*models, sizes=[(1, 2)], rounds=1)
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == before


def test_the_dense_model_is_called_without_added_inputs():
    """Labels that only the converted model takes are kept from the dense one."""
    dense, labels = Encoder().ffn.eval(), {"expert_labels": torch.tensor([0, 1])}
    config = SparsifyConfig(start="upcycle", router="demix", num_experts=2, top_k=1, select="all")
    sparse = sparsify(dense, (torch.randn(2, 4, 16),), labels, config=config)
    assert len(bench(dense, sparse, sizes=[(3, 5)], rounds=1).timings) == 1


def test_without_onnx_files_only_pytorch_is_timed(models):
    """The converted file alone would have nothing to be compared with."""
    report = bench(*models, sizes=[(1, 2)], rounds=1)
    assert [timing.runtime for timing in report.timings] == ["pytorch"]
    assert report.machine.onnxruntime == ""


@pytest.mark.parametrize("size", [(8,), (1, 2, 3), (0, 4)])
def test_a_size_that_does_not_fit_the_inputs_is_refused(models, size):
    """The message names the sizes that can be chosen."""
    given = "x".join(map(str, size))
    with pytest.raises(ValueError, match=rf"the size {given} does not fit .* batch x sequence$"):
        bench(*models, sizes=[size])


def test_a_size_that_the_model_cannot_run_is_refused(models):
    """A sequence longer than the positions of the model is the user's choice, no defect."""
    with pytest.raises(ValueError, match=r"does not run at batch=1, sequence=9: IndexError.*choose a size"):
        bench(*models, sizes=[(1, 9)])


def test_a_missing_provider_is_refused(models, onnx_files):
    """Falling back to another device in silence would give figures of the wrong machine."""
    with pytest.raises(
        ValueError, match=r"onnxruntime has no FooExecutionProvider here, it has .*CPUExecutionProvider"
    ):
        bench(
            *models,
            sizes=[(1, 2)],
            dense_onnx=onnx_files[0],
            sparse_onnx=onnx_files[1],
            provider="FooExecutionProvider",
        )


def test_the_report_computes_medians_and_prints():
    """One slow round must not decide; the JSON holds the rounds and what follows from them."""
    timing = Timing("pytorch", {"batch": 8}, dense_ms=(4e3, 9e4, 6e3), sparse_ms=(2e3, 3e3, 6e4))
    assert (timing.dense, timing.sparse, timing.speedup) == (6e3, 3e3, 2.0)
    assert timing.speedup_range == (0.1, 30.0)
    report = BenchReport(Machine("A CPU", 4, 2, "2.14", "1.31"), (timing,))
    plain = json.loads(json.dumps(report.to_json()))
    assert plain["machine"]["threads"] == 2
    assert plain["timings"][0]["speedup"] == 2.0
    assert plain["timings"][0]["dense_ms"] == [4e3, 9e4, 6e3]
    first, head, row = str(report).splitlines()
    assert first == "A CPU, 4 cores, 2 threads, torch 2.14, onnxruntime 1.31"
    assert head.split() == ["runtime", "inputs", "dense", "ms", "sparse", "ms", "speedup", "(rounds)"]
    assert row.split() == ["pytorch", "batch=8", "6000", "3000", "2.00x", "(0.10-30.00)"]


def test_the_cpu_is_named_where_linux_does_not_tell(monkeypatch):
    """Other systems have no /proc/cpuinfo, and some machines no name in it."""
    monkeypatch.setattr(module, "Path", lambda _: SimpleNamespace(read_text=lambda encoding: "processor: 0\n"))
    assert module._cpu_model()
