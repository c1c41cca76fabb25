"""The compiled kernel: right, repeatable, on any number of threads, and never trusted unchecked."""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path

import pytest
import torch

from sparsify.cpu import build, kernel
from sparsify.kernels.reference import ACTIVATIONS

pytestmark = pytest.mark.skipif(not kernel.kernel_status().available, reason=kernel.kernel_status().reason)

# tokens, hidden_size, width, out_features, num_experts, top_k: one token, primes, K = 1, K = E; rows left over, one
# panel, several, several segments, several chunks; columns that
# fill no block, exactly one, more.
SHAPES = [
    (1, 64, 48, 64, 4, 2), (1, 7, 5, 3, 3, 3), (53, 101, 67, 71, 3, 1), (37, 33, 17, 29, 5, 3), (20, 64, 96, 100, 1, 1),
    (300, 96, 50, 64, 2, 2), (64, 48, 49, 47, 8, 2), (11, 1, 1, 1, 2, 1), (2100, 9, 5, 7, 3, 2),
]  # fmt: skip
BOUNDS = {torch.float32: 1.5e-6, torch.bfloat16: 1e-2}


@pytest.fixture
def threads():
    """Sets the number of threads, and resets it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.usefixtures("poison")
def test_equals_the_reference(dtype, shape, gated, biased, make_layer, error_of):
    """Protects: tails of every dimension, empty lanes and unwritten memory."""
    layer = make_layer(*shape, gated=gated, biased=biased, dtype=dtype)
    y = kernel.run(*layer)
    assert y.dtype == dtype
    assert error_of(y, layer) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.usefixtures("poison")
def test_activations(dtype, activation, gated, make_layer, error_of):
    """Protects: each activation, with large values too."""
    layer = make_layer(40, 32, 48, 32, 3, 2, activation=activation, gated=gated, dtype=dtype)
    assert error_of(kernel.run(*layer), layer) <= BOUNDS[dtype]
    large = (layer[0] * 30, *layer[1:])
    assert error_of(kernel.run(*large), large) <= BOUNDS[dtype]


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activation_to_the_last_places(activation, make_layer):
    """Protects: the polynomials; x is handed through, the down projection is the identity."""
    x = torch.linspace(-20, 20, 1003).unsqueeze(1)
    _, _, _, experts = make_layer(1, 1, 1, 1, 1, 1, activation=activation, biased=False)
    one = torch.ones(1, 1, 1)
    ids = torch.zeros(len(x), 1, dtype=torch.int64)
    y = kernel.run(x, torch.ones(len(x), 1), ids, experts._replace(up_proj=one, down_proj=one))
    expected = ACTIVATIONS[activation](x.double())
    assert float((y - expected).abs().div(expected.abs() + 1).max()) <= 3e-7


def test_not_a_number_stays(make_layer):
    """Protects: a token that is NaN is seen, and no other becomes so."""
    for activation in ACTIVATIONS:
        x, *rest = make_layer(20, 16, 8, 16, 2, 1, activation=activation)
        x[3] = float("nan")
        bad = kernel.run(x, *rest).isnan()
        assert bad[3].all()
        assert not bad[torch.arange(20) != 3].any()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("tokens", "width", "num_experts"), [(380, 900, 2), (1500, 192, 40)])  # shared segments, whole
@pytest.mark.usefixtures("poison")
def test_same_bits_with_any_number_of_threads(dtype, tokens, width, num_experts, threads, make_layer):
    """Protects: no sum depends on who computes it, and no phase starts before the last has ended."""
    layer = make_layer(tokens, 256, width, 256, num_experts, 2, dtype=dtype)  # long enough for threads to meet
    results = []
    for count in (1, 2, 3, 2, 3, 2):
        threads(count)
        results.append(kernel.run(*layer))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_second_thread_takes_part(threads, make_layer):
    """Protects: the kernel finds the runtime of torch, and only one is in the process."""
    assert kernel.kernel_status().threaded
    threads(2)
    kernel.run(*make_layer(64, 256, 192, 256, 8, 2))
    runtimes = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
    own = {path for path in runtimes if "/torch/" in path}
    assert len(own) == 1
    assert "omp" not in Path(kernel.kernel_status().reason).name


def test_strided_weights_and_rows(make_layer, error_of):
    """Protects: views are read where they lie."""
    x, weights, ids, experts = make_layer(20, 16, 8, 12, 4, 2)
    dense = experts.down_proj.transpose(0, 1).flatten(1).contiguous()  # [D_out, E * I]
    strided = experts._replace(down_proj=dense.view(12, 4, 8).transpose(0, 1))
    wide = torch.randn(20, 40)
    for rows in (wide[:, 5:21], wide.t()[:20, :16], wide[:1, :16].expand(20, 16)):
        layer = (rows, weights, ids.t().contiguous().t(), strided)
        assert kernel.covers(rows, strided)
        assert error_of(kernel.run(*layer), layer) <= 1e-6
    assert not kernel.covers(x, experts._replace(up_proj=experts.up_proj.transpose(1, 2).contiguous().transpose(1, 2)))


def test_an_expert_that_is_none(make_layer):
    """Protects: a wrong id reads no foreign memory."""
    x, weights, ids, experts = make_layer(20, 16, 8, 12, 4, 2)
    for wrong in (4, -2, 2**40):
        ids[7, 1] = wrong
        with pytest.raises(IndexError, match=r"must lie in \[-1, 4\)"):
            kernel.run(x, weights, ids, experts)


def test_routing_weights_of_other_dtypes(make_layer, error_of):
    """Protects: routers may compute in another dtype than the experts."""
    x, weights, ids, experts = make_layer(20, 16, 8, 12, 4, 2)
    for dtype in (torch.float64, torch.bfloat16):
        layer = (x, weights.to(dtype), ids, experts)
        assert error_of(kernel.run(*layer), layer) <= 1e-6


@pytest.fixture
def fresh(monkeypatch):
    """A process that has not loaded the kernel yet; what it loads is forgotten."""
    for cached in (kernel._kernel, kernel._load):
        cached.cache_clear()
    yield
    for cached in (kernel._kernel, kernel._load):
        cached.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_wrong_results_switch_it_off(monkeypatch):
    """Protects: a miscompiled kernel is found before it is used."""
    real = kernel._call
    monkeypatch.setattr(kernel, "_call", lambda *args: real(*args) * 1.001)
    with pytest.warns(UserWarning, match="its results are wrong: relative error"):
        status = kernel.kernel_status()
    assert not status.available
    assert "wrong" in status.reason


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler(monkeypatch, make_layer):
    """Protects: no compiler is a warning once, with the reason, and the layer still runs."""
    from sparsify.cpu.run import moe_ffn_cpu

    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.warns(UserWarning, match="no C compiler: no-such-compiler not found"):
        assert not kernel.kernel_status().available
    x, weights, ids, experts = make_layer(20, 16, 8, 12, 4, 2)
    assert moe_ffn_cpu(x, weights, ids, *experts).shape == (20, 12)


@pytest.mark.usefixtures("fresh")
def test_switched_off(monkeypatch, recwarn):
    """Protects: who switches it off is not warned about it."""
    monkeypatch.setenv("SPARSIFY_NO_COMPILE", "1")
    assert kernel.kernel_status() == kernel.KernelStatus(False, "SPARSIFY_NO_COMPILE is set", False)
    assert not recwarn.list


@pytest.mark.usefixtures("fresh")
def test_a_library_that_does_not_load(monkeypatch, tmp_path):
    """Protects: a damaged file in the cache is no crash."""
    damaged = tmp_path / "moe_ffn.so"
    damaged.write_text("not a library")

    @dataclasses.dataclass
    class Library:
        def __enter__(self):
            return damaged

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(build, "library", Library)
    with pytest.warns(UserWarning, match="not used"):
        assert not kernel.kernel_status().available


@pytest.mark.usefixtures("fresh")
def test_one_thread_where_the_runtime_is_another(monkeypatch, threads, make_layer):
    """Protects: without the threads of torch the kernel serves where torch has one thread, and only there."""
    monkeypatch.setattr(kernel, "_openmp", lambda: (0, 0))
    x, _, _, experts = make_layer(20, 16, 8, 12, 4, 2)
    threads(2)
    assert not kernel.covers(x, experts)
    threads(1)
    assert kernel.covers(x, experts)


def test_addresses_are_of_one_runtime():
    """Protects: both entry points come from the library that torch loaded."""
    addresses = kernel._openmp()
    process = ctypes.CDLL(None)
    assert addresses[0] == ctypes.cast(process.GOMP_parallel, ctypes.c_void_p).value
    assert all(addresses)
