"""`run_taught`: small experts in training give what the op gives, its gradients, and exact gains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsify.cpu import kernel_status
from sparsify.cpu.experts import Experts
from sparsify.kernels.reference import moe_ffn_backward_reference, moe_ffn_reference
from sparsify.passes.split.choice_loss import choice_gains
from sparsify.passes.taught_experts import TaughtRun, run_taught

E, WIDTH, D, D_OUT = 5, 3, 7, 11


def make(*, gated: bool, biased: bool, activation: str = "gelu", dtype: torch.dtype = torch.float64) -> Experts:
    shapes = [(E, WIDTH, D), (E, WIDTH)] * 2 + [(E, D_OUT, WIDTH), (E, D_OUT)]
    tensors: list[Tensor | None] = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    if not gated:
        tensors[2:4] = [None, None]
    if not biased:
        tensors[1::2] = [None] * 3
    return Experts(*tensors, activation)  # type: ignore[arg-type]


def ids_of(tokens: int, top_k: int) -> Tensor:
    return torch.rand(tokens, E).topk(top_k).indices


def run(x: Tensor, ids: Tensor, experts: Experts) -> tuple[Tensor, TaughtRun]:
    found = run_taught(x, ids, experts)
    assert found is not None
    return found


@pytest.mark.parametrize(("tokens", "top_k"), [(13, 2), (1, 1), (0, 2), (13, E)])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_the_op(tokens: int, top_k: int, activation: str, gated: bool, biased: bool, dtype: torch.dtype) -> None:
    """Protects: output and gradients, against the experts one after another; in fp64 with a mask, in fp32 without."""
    experts = make(gated=gated, biased=biased, activation=activation, dtype=dtype)
    x, ids = torch.randn(tokens, D).to(dtype), ids_of(tokens, top_k)
    if top_k > 1:
        ids[::2, 0] = -1  # slots that are not used
    ones, grad = torch.ones(ids.shape, dtype=x.dtype), torch.randn(tokens, D_OUT, dtype=x.dtype)
    y, ran = run(x.requires_grad_(), ids, experts)
    skips = dtype == torch.float32 and tokens > 0 and top_k < E and kernel_status().available
    assert (ran.hidden is None) == skips
    torch.testing.assert_close(y, moe_ffn_reference(x, ones, ids, *experts))
    tensors = [x, *(tensor for tensor in experts[:6] if tensor is not None)]
    needs = [tensor is not None for tensor in (x, None, None, *experts[:6])]
    wanted = moe_ffn_backward_reference(grad, x, ones, ids, *experts, needs)
    expected = [gradient for gradient, needed in zip(wanted, needs, strict=True) if needed]
    for found, reference in zip(torch.autograd.grad(y, tensors, grad), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-4), (torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)]
)
@pytest.mark.parametrize("biased", [False, True])
def test_gains_are_those_of_running_an_expert(dtype: torch.dtype, bound: float, biased: bool) -> None:
    """Protects: the lesson of the router: what an expert adds, whether it ran or not, for the rows that are asked."""
    experts, x, ids = make(gated=True, biased=biased, dtype=dtype), torch.randn(9, D).to(dtype), ids_of(9, 2)
    rows, error = torch.tensor([1, 4, 8]), torch.randn(3, D_OUT)
    _, found = run(x, ids, experts)
    exact, ones = experts.double(), torch.ones(9, 1).double()
    alone = [moe_ffn_reference(x.double(), ones, torch.full((9, 1), e), *exact) for e in range(E)]
    added = torch.stack(alone, dim=1)[rows].detach()  # [n, E, D_out]
    chosen = torch.zeros(9, E).scatter_(1, ids, 1.0)[rows]
    expected = choice_gains((added @ error.double().unsqueeze(2)).squeeze(2), added.square().sum(2), chosen)
    gains = found.gains(error, rows)
    assert gains.dtype == torch.float32
    assert (gains - expected).norm() <= bound * expected.norm()


def test_few_large_experts_run_as_the_op() -> None:
    """Protects: skipping stays where it pays."""
    experts = Experts(torch.randn(8, 512, 640), None, None, None, torch.randn(8, 64, 512), None, "relu")
    assert run_taught(torch.randn(4096, 640), torch.zeros(4096, 1, dtype=torch.int64), experts) is None
