"""`run_chosen`: the training of a block without the neurons that do not run is the same training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsify.cpu import kernel
from sparsify.passes.split.dense_ffn import DenseFFN
from sparsify.passes.split.distill_block import _Block  # pyright: ignore[reportPrivateUsage]
from sparsify.passes.split.experts import divide_unevenly
from sparsify.passes.split.fold_mean import fold_mean
from sparsify.passes.split.run_chosen import run_chosen
from sparsify.routers import MLPRouter

pytestmark = pytest.mark.skipif(not kernel.kernel_status().available, reason=kernel.kernel_status().reason)
Read = Callable[[nn.Module, int], DenseFFN]


class SwiGLU(nn.Module):
    """Gate before up, or up before gate."""

    def __init__(self, gate_first: bool, biased: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(7, 24, bias=biased), nn.Linear(7, 24, bias=biased)
        self.down, self.gate_first = nn.Linear(24, 5, bias=biased), gate_first

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_first:
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return self.down(self.up(x) * nn.functional.silu(self.gate(x)))


def block(
    dense: DenseFFN, num_shared: int, top_k: int = 1, sizes: tuple[int, ...] | None = None
) -> tuple[_Block, Tensor]:
    """Four experts of six neurons by lot, or of `sizes` units of three; a random router, and tokens."""
    torch.manual_seed(0)
    neurons, x = torch.randperm(24).view(4, 6), torch.randn(37, 7)
    shared, routed = neurons[:num_shared].flatten(), neurons[num_shared:]
    routed = routed if sizes is None else routed.reshape(-1, 3)
    experts = fold_mean(divide_unevenly(dense, shared, routed, sizes), dense.hidden(x).mean(0)[routed])
    return _Block(experts, MLPRouter(7, experts.num_routed, top_k, 8), x), x


@pytest.mark.parametrize("num_shared", [0, 1])
@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(7, 24), nn.GELU(), nn.Linear(24, 5)),
        nn.Sequential(nn.Linear(7, 24, bias=False), nn.ReLU(), nn.Linear(24, 5)),
        SwiGLU(True, True),
        SwiGLU(False, True),
        SwiGLU(True, False),
    ],
)
def test_same_errors_and_gradients_as_with_a_mask(module: nn.Module, num_shared: int, read: Read) -> None:
    """Protects: what is trained does not depend on what is skipped: every weight, shared ones and biases among them."""
    trained, x = block(read(module, 7), num_shared)
    assert trained._run is not None  # pyright: ignore[reportPrivateUsage]
    target = torch.randn(37, 5)
    found: list[tuple[Tensor, ...]] = []
    for run in (trained._run, None):  # pyright: ignore[reportPrivateUsage]
        trained._run = run  # pyright: ignore[reportPrivateUsage]
        errors = trained(x, target)
        parameters = [*trained.own_parameters(), *trained.router_parameters()]
        found.append((errors.detach(), *torch.autograd.grad(errors.sum(), parameters)))
    for skipped, masked in zip(*found, strict=True):
        torch.testing.assert_close(skipped, masked, rtol=1e-4, atol=1e-5 * float(masked.abs().max()))


def test_where_a_mask_stays(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: what the kernel does not know, or is slower at, is trained as ever."""

    def skips(module: nn.Module, *options: int | tuple[int, ...] | None) -> bool:
        return block(read(module, 7), *options)[0]._run is not None  # type: ignore[arg-type] # pyright: ignore

    plain = nn.Sequential(nn.Linear(7, 24), nn.GELU(), nn.Linear(24, 7))
    assert skips(plain, 0, 2)
    assert not skips(plain, 0, 3)  # three of four
    assert not skips(plain, 1, 2)  # with a shared one, too
    assert not skips(plain, 0, 1, (4, 1, 2, 1))
    assert not skips(nn.Sequential(nn.Linear(7, 24), nn.Mish(), nn.Linear(24, 7)), 0, 1)
    found, x = block(read(plain, 7), 0)
    experts = found._experts  # pyright: ignore[reportPrivateUsage]
    assert run_chosen(experts, x.double(), 1, 4) is None
    monkeypatch.setattr(kernel, "kernel_status", lambda: kernel.KernelStatus(False, "", False))
    assert run_chosen(experts, x, 1, 4) is None
