"""Whether products of bf16, summed in fp32, are faster than those of fp32 on this processor."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def bf16_products() -> Generator[None]:
    """Let matrix products of fp32 on the CPU round what they multiply to bf16.

    Without AMX oneDNN keeps fp32 (seen on an EPYC with AVX-512 BF16), which is still faster there than what torch calls
    otherwise.
    """
    products = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 - made at run time
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


def has_bf16_products(device: torch.device, dtype: torch.dtype) -> bool:
    """A CPU that has an instruction for them, and tensors of fp32 that autocast would round."""
    if device.type != "cpu" or dtype != torch.float32:
        return False
    known = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 may not have it
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
