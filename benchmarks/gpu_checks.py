"""Whether the expert kernels are right on this device: values, repeatability, launches, synchronisation, graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu_layers import Inputs, Shape, sparsify_layer
from torch import Tensor

from sparsify.kernels import common
from sparsify.kernels.moe_triton import moe_ffn_backward_triton, moe_ffn_triton
from sparsify.kernels.reference import ACTIVATIONS, moe_ffn_backward_reference, moe_ffn_reference

_NAMES = ("y", "x", "routing_weights", "expert_ids", "up", "up_bias", "gate", "gate_bias", "down", "down_bias")
# T, K, E, D, I, D_out: every row of the table of tiles, primes, K = 1, K = E, no sorting.
_SHAPES = ((3, 2, 5, 67, 71, 37), (37, 2, 5, 131, 67, 139), (150, 1, 1, 64, 128, 96), (900, 3, 4, 263, 130, 257))
_SMALL_SHAPES = ((3, 2, 5, 19, 23, 17), (37, 2, 5, 33, 40, 31))


@dataclass(frozen=True)
class Check:
    """A claim, whether it holds, and the figure behind it."""

    name: str
    passed: bool
    detail: str


def numerics(device: torch.device) -> Iterator[Check]:
    """Values and all gradients against float64, at most 1e-5 off in fp32; repeated bit by bit."""
    real = device.type == "cuda"
    # The interpreter multiplies bf16 wrongly.
    for dtype in (torch.float32, torch.float16, torch.bfloat16) if real else (torch.float32, torch.float16):
        for sizes in _SHAPES if real else _SMALL_SHAPES:
            for activation in ACTIVATIONS if real else ("silu",):
                yield from _numerics(sizes, activation, dtype, device)


def _numerics(sizes: tuple[int, ...], activation: str, dtype: torch.dtype, device: torch.device) -> Iterator[Check]:
    tokens, top_k, experts, size, neurons, features = sizes
    for gated in (False, True):
        ids = torch.rand(tokens, experts).argsort(-1)[:, :top_k]
        ids[torch.rand(tokens, top_k) < 0.1] = -1
        tensors = [
            torch.randn(tokens, size),
            torch.rand(tokens, top_k),
            ids,
            torch.randn(experts, neurons, size) / size**0.5,
            torch.randn(experts, neurons),
            torch.randn(experts, neurons, size) / size**0.5 if gated else None,
            torch.randn(experts, neurons) if gated else None,
            torch.randn(experts, features, neurons) / neurons**0.5,
            torch.randn(experts, features),
        ]
        given = [_cast(tensor, dtype, device) for tensor in (torch.randn(tokens, features), *tensors)]
        exact = _outputs(
            moe_ffn_reference, moe_ffn_backward_reference, [_cast(t, torch.float64) for t in given], activation
        )
        plain = _outputs(moe_ffn_reference, moe_ffn_backward_reference, given, activation)
        ours = _outputs(moe_ffn_triton, moe_ffn_backward_triton, given, activation)
        again = _outputs(moe_ffn_triton, moe_ffn_backward_triton, given, activation)
        worst, where = 0.0, ""
        for name, found, other, expected in zip(_NAMES, ours, plain, exact, strict=True):
            allowed = 1e-5 if dtype == torch.float32 else 2 * _error(other, expected) + _floor(dtype)
            share = _error(found, expected) / allowed
            # NaN compares as false, so ask for what must hold.
            worst, where = (worst, where) if share <= worst else (share, name)
        label = f"{str(dtype)[6:]} {activation} {'gated' if gated else 'plain'} {sizes}"
        yield Check(f"float64, {label}", worst <= 1, f"{worst:.2f} of what is allowed, at {where}")
        same = all(torch.equal(first, second) for first, second in zip(ours, again, strict=True))
        yield Check(f"bitwise repeat, {label}", same, "")


def _floor(dtype: torch.dtype) -> float:
    return 2e-4 if dtype == torch.float16 else 2e-3


def _cast(tensor: Any, dtype: torch.dtype, device: torch.device | None = None) -> Any:
    if tensor is None:
        return None
    return tensor.to(device=device or tensor.device, dtype=dtype if tensor.is_floating_point() else None)


def _outputs(forward: Callable[..., Tensor], backward: Callable[..., list[Tensor]], given: list[Any], activation: str):
    grad, *tensors = given
    return [forward(*tensors, activation), *backward(grad, *tensors, activation, [True] * 9)]


def _error(found: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    return ((found.double() - expected).abs().amax() / expected.abs().amax().clamp(min=1e-30)).item()


def launches(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """Kernels of ours in a forward: at most 4 for few tokens. On a GPU also all that the profiler sees."""
    for tokens, most in ((1, 4), (512, 3)):
        layer = sparsify_layer(Inputs.random(Shape(tokens, 64, 64, 8, 2), device, dtype)).run
        layer()
        names: list[str] = []
        launch = common.launch

        def record(kernel: Any, *args: Any, names: list[str] = names, launch: Any = launch, **kwargs: Any) -> None:
            names.append(kernel.__name__)
            launch(kernel, *args, **kwargs)

        common.launch = record
        try:
            layer()
        finally:
            common.launch = launch
        seen = f", {_device_kernels(layer)} on the device" if device.type == "cuda" else ""
        yield Check(f"launches at T={tokens}", len(names) <= most, f"{', '.join(names)}{seen}")


def _device_kernels(layer: Callable[[], Any]) -> int:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        layer()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events() or [])


def no_synchronisation(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """Forward and backward under `set_sync_debug_mode("error")`."""
    for tokens in (1, 512):
        layer = sparsify_layer(Inputs.random(Shape(tokens, 64, 64, 8, 2), device, dtype)).run
        layer().sum().backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer().sum().backward()
            problem = ""
        except RuntimeError as error:
            problem = str(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield Check(f"no synchronisation at T={tokens}", not problem, problem)


def graph_capture(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """A CUDA graph of forward and backward, replayed with other inputs and another routing."""
    for tokens in (1, 512):
        yield Check(f"CUDA graph at T={tokens}", *_graph_capture(Shape(tokens, 64, 64, 8, 2), device, dtype))


def _graph_capture(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    inputs, others = (Inputs.random(shape, device, dtype) for _ in range(2))
    layer, leaves = sparsify_layer(inputs).run, inputs.leaves()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(layer().sum(), leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            y = layer()
            grads = torch.autograd.grad(y.sum(), leaves)
    except RuntimeError as error:
        return False, str(error)
    with torch.no_grad():
        inputs.x.copy_(others.x)
        inputs.ids.copy_(others.ids)
        inputs.weights.copy_(others.weights)
    graph.replay()
    expected = layer()
    expected_grads = torch.autograd.grad(expected.sum(), leaves)
    same = [torch.equal(a, b) for a, b in zip((y, *grads), (expected, *expected_grads), strict=True)]
    return all(same), "" if all(same) else f"equal: {same}"
