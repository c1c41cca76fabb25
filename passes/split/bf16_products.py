"""Whether products of bf16, summed in fp32, are faster than those of fp32 on this processor."""

from __future__ import annotations

import torch


def has_bf16_products(device: torch.device, dtype: torch.dtype) -> bool:
    """A CPU that has an instruction for them, and tensors of fp32 that autocast would round."""
    if device.type != "cpu" or dtype != torch.float32:
        return False
    known = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 may not have it
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
