"""`sparsify::moe_ffn` as an op: autograd, opcheck, torch.compile, torch.export, autocast, frozen weights, DDP."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from sparsify import ops
from sparsify.kernels.reference import ACTIVATIONS, moe_ffn_backward_reference


class Experts(nn.Module):
    """A fused layer whose router is a linear layer with softmax weights, so that every input has a gradient."""

    def __init__(self, gated: bool = True, bias: bool = True, activation: str = "silu") -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.up_proj, self.down_proj = nn.Parameter(torch.randn(4, 6, 8)), nn.Parameter(torch.randn(4, 8, 6))
        self.gate_proj = nn.Parameter(torch.randn(4, 6, 8)) if gated else None
        self.up_bias = nn.Parameter(torch.randn(4, 6)) if bias else None
        self.gate_bias = nn.Parameter(torch.randn(4, 6)) if bias and gated else None
        self.down_bias = nn.Parameter(torch.randn(4, 8)) if bias else None
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        return ops.moe_ffn(
            x, weights, ids, self.up_proj, self.up_bias, self.gate_proj, self.gate_bias, self.down_proj,
            self.down_bias, self.activation,
        )  # fmt: skip


def arguments(tokens: int, dtype: torch.dtype, gated: bool, bias: bool, activation: str) -> tuple[Any, ...]:
    """Inputs of the op with gradients; slot 0 of token 0 is not used, and expert 3 has no token."""
    layer = Experts(gated, bias, activation).to(dtype)
    ids = torch.rand(tokens, 3).argsort(-1)[:, :2]
    ids[:1, :1] = -1
    x, weights = (torch.randn(tokens, n, dtype=dtype, requires_grad=True) for n in (8, 2))
    weighted = (layer.up_proj, layer.up_bias, layer.gate_proj, layer.gate_bias, layer.down_proj, layer.down_bias)
    return x, weights, ids, *weighted, activation


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation: str, gated: bool, bias: bool) -> None:
    """Protects: the formula of every gradient, in float64 against finite differences."""
    args = arguments(5, torch.float64, gated, bias, activation)
    places = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.requires_grad]

    def run(*tensors: Tensor) -> Tensor:
        given = dict(zip(places, tensors, strict=True))
        return ops.moe_ffn(*(given.get(i, arg) for i, arg in enumerate(args)))

    assert torch.autograd.gradcheck(run, [args[i] for i in places])


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(tokens: int, gated: bool) -> None:
    """Protects: schema, fake kernels and autograd registration, at T = 0 and 1 too."""
    args = arguments(tokens, torch.float32, gated, gated, "gelu")
    torch.library.opcheck(torch.ops.sparsify.moe_ffn.default, args)
    detached = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
    needs = [isinstance(arg, Tensor) and arg.requires_grad for arg in args[:9]]
    grad = torch.randn(tokens, 8)
    torch.library.opcheck(torch.ops.sparsify.moe_ffn_backward.default, (grad, *detached, needs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rounds_no_more_than_the_dense_layer(activation: str, gated: bool, dtype: torch.dtype) -> None:
    """Protects: narrow dtypes. All experts are the dense layer, whose own error in that dtype is the measure."""
    act, size, experts, tokens = ACTIVATIONS[activation], 96, 4, 37
    x = torch.randn(tokens, size).to(dtype)
    up, gate, down = ((torch.randn(experts, size, size) / size**0.5).to(dtype) for _ in range(3))

    def dense(x: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
        first = x @ up.flatten(0, 1).t()
        hidden = act(x @ gate.flatten(0, 1).t()) * first if gated else act(first)
        return hidden @ down.transpose(0, 1).flatten(1).t()

    exact = dense(*(tensor.double() for tensor in (x, up, gate, down)))
    ids = torch.arange(experts).expand(tokens, -1)
    ours = ops.moe_ffn(x, torch.ones(ids.shape), ids, up, None, gate if gated else None, None, down, None, activation)
    errors = [float((y.double() - exact).norm()) for y in (ours, dense(x, up, gate, down))]
    assert ours.dtype == dtype
    assert errors[0] <= 2 * errors[1]


def test_an_unknown_activation_is_refused() -> None:
    """Protects: the message."""
    args = arguments(3, torch.float32, False, False, "mish")
    with pytest.raises(ValueError, match=r"relu, squared_relu, gelu, gelu_tanh, silu, got 'mish'"):
        ops.moe_ffn(*args)


def test_compile_without_breaks_or_recompiles() -> None:
    """Protects: torch.compile of forward and backward in one graph, for any number of tokens."""
    layer = Experts()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (5, 9, 17, 2):
        x = torch.randn(tokens, 8)
        layer.zero_grad()
        layer(x).square().sum().backward()
        expected = {name: parameter.grad for name, parameter in layer.named_parameters()}
        layer.zero_grad()
        y = compiled(x)
        y.square().sum().backward()
        torch.testing.assert_close(y, layer(x))
        torch.testing.assert_close({name: parameter.grad for name, parameter in layer.named_parameters()}, expected)
    assert counter.frame_count == 1


def test_dynamo_stays_out_of_the_kernel() -> None:
    """Protects: eager code within a compiled function; Dynamo would break to pieces on the kernel's Python."""
    args = arguments(5, torch.float32, gated=True, bias=True, activation="silu")
    eager: Any = torch.compiler.disable(lambda: ops.moe_ffn(*args), recursive=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(torch.compile(lambda: eager() * 1, backend="eager")(), ops.moe_ffn(*args))
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert all("torch.compiler.disable" in reason for reason in breaks)


def test_export_round_trip(tmp_path: Path) -> None:
    """Protects: torch.export with dynamic tokens, and `.pt2` files."""
    layer = Experts().eval()
    shapes = ({0: torch.export.Dim("tokens", min=2)},)
    program = torch.export.export(layer, (torch.randn(5, 8),), dynamic_shapes=shapes)
    assert [str(node.target) for node in program.graph.nodes].count("sparsify.moe_ffn.default") == 1
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for tokens in (2, 11):
        x = torch.randn(tokens, 8)
        torch.testing.assert_close(loaded(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Protects: mixed inputs run in the dtype that autocast was asked for, and gradients return in that of weights."""
    layer, x = Experts(), torch.randn(6, 8)
    expected = layer(x).detach()
    with torch.autocast("cpu", dtype):
        y = layer(x)
        mixed = ops.moe_ffn(x.to(dtype), *arguments(6, torch.float32, True, True, "silu")[1:])
    assert y.dtype == mixed.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))
    y.float().sum().backward()
    assert {getattr(parameter.grad, "dtype", None) for parameter in layer.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype):
        assert Experts().double()(x.double()).dtype == torch.float64


def test_autocast_of_an_expert_linear() -> None:
    """Protects: the unfused chain under autocast."""
    offsets = torch.tensor([0, 2, 3], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.expert_linear(torch.randn(3, 4, dtype=torch.bfloat16), torch.randn(2, 5, 4), torch.randn(2, 5), offsets)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("frozen", ["up_proj", "router", "all but x"])
def test_frozen_weights(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: adapters on frozen experts: what is frozen gets no gradient and costs none; the rest is right."""
    layer, x = Experts(), torch.randn(5, 8, requires_grad=True)
    layer(x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in layer.named_parameters()} | {"x": x.grad}
    layer.zero_grad()
    x.grad = None
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not (frozen == "all but x" or name.startswith(frozen)))
    layer(x).square().sum().backward()
    for name, parameter in [*layer.named_parameters(), ("x", x)]:
        assert (parameter.grad is not None) == parameter.requires_grad
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name])
    args = arguments(5, torch.float32, True, True, "silu")
    needs = [False] * 9
    needs[4] = True
    grads = torch.ops.sparsify.moe_ffn_backward(torch.randn(5, 8), *args, needs)
    assert [grad.numel() > 0 for grad in grads] == needs


def test_gradients_that_are_not_needed_cost_nothing() -> None:
    """Protects: frozen experts on a CPU; two of the six products of a gradient step are those of x."""
    args = [
        arg.detach() if isinstance(arg, Tensor) else arg for arg in arguments(5, torch.float32, False, False, "silu")
    ]
    run: Any = moe_ffn_backward_reference
    flops: list[int] = []
    for needs in ([True] * 9, [True, *[False] * 8], [False] * 9):
        with FlopCounterMode(display=False) as counter:
            run(torch.randn(5, 8), *args, needs)
        flops.append(counter.get_total_flops())
    everything, for_x, nothing = flops
    assert 0 < nothing < for_x < everything


def test_gradient_that_is_expanded() -> None:
    """Protects: `y.sum().backward()`, whose gradient has strides of zero, and tokens that are not contiguous."""
    layer = Experts()
    x = torch.randn(8, 5).t().requires_grad_()
    layer(x).sum().backward()
    same = x.detach().contiguous().requires_grad_()
    layer(same).sum().backward()
    torch.testing.assert_close(x.grad, same.grad)


def test_ddp_with_two_processes(tmp_path: Path) -> None:
    """Protects: gradients averaged over two processes are those of both halves of the batch together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.manual_seed(1)
    layer, x = Experts().double(), torch.randn(12, 8, dtype=torch.float64)
    torch.save({"layer": layer.state_dict(), "x": x}, tmp_path / "given.pt")
    mp.spawn(_train_half, (port, str(tmp_path)), nprocs=2)
    (layer(x).square().sum() / 2).backward()
    grads = torch.load(tmp_path / "grads.pt", weights_only=True)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)


def _train_half(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    given = torch.load(Path(folder) / "given.pt", weights_only=True)
    layer = Experts().double()
    layer.load_state_dict(given["layer"])
    wrapped = nn.parallel.DistributedDataParallel(layer)
    wrapped(given["x"][rank::2]).square().sum().backward()
    if rank == 0:
        grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
        torch.save(grads, Path(folder) / "grads.pt")
    dist.destroy_process_group()
