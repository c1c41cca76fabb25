"""`has_bf16_products`: rounding only where it buys speed."""

from __future__ import annotations

import pytest
import torch

from sparsify.passes.split.bf16_products import has_bf16_products

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
