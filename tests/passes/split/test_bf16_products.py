"""Products of bf16: only where they buy speed, and only while they are asked for."""

from __future__ import annotations

import pytest
import torch

from sparsify.passes.split.bf16_products import bf16_products, has_bf16_products

CPU = torch.device("cpu")


@pytest.mark.parametrize("capability", ["avx512_bf16", "amx_bf16"])
def test_needs_an_instruction_and_fp32(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: fp64 and GPUs keep their precision, a processor without the instruction and an old torch theirs too."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True}, raising=False)
    assert has_bf16_products(CPU, torch.float32)
    assert not has_bf16_products(CPU, torch.float64)
    assert not has_bf16_products(torch.device("cuda"), torch.float32)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert not has_bf16_products(CPU, torch.float32)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not has_bf16_products(CPU, torch.float32)


@pytest.mark.skipif(not has_bf16_products(CPU, torch.float32), reason="no products of bf16 here")
def test_may_round_until_it_is_left() -> None:
    """Protects: the precision of everything that comes after, also when it is left by an error."""
    x, weight = torch.randn(256, 512), torch.randn(384, 512)
    exact = x.double() @ weight.double().t()
    error = [float(((x @ weight.t()) - exact).norm() / exact.norm())]
    with pytest.raises(KeyError), bf16_products():  # noqa: PT012 - what is measured lies before the error
        error.append(float(((x @ weight.t()) - exact).norm() / exact.norm()))
        raise KeyError
    error.append(float(((x @ weight.t()) - exact).norm() / exact.norm()))
    assert error[0] == error[2] < 1e-5
    least = 1e-4 if torch.cpu.get_capabilities().get("amx_bf16") else 0  # others may keep fp32
    assert least < error[1] < 1e-2
