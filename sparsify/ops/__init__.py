"""The ops of a Mixture-of-Experts layer, in the dispatcher as `torch.ops.sparsify.*`; one op a file."""

from __future__ import annotations

from sparsify.ops.combine import combine
from sparsify.ops.dispatch import dispatch
from sparsify.ops.expert_linear import expert_linear
from sparsify.ops.moe_ffn import moe_ffn

__all__ = ["combine", "dispatch", "expert_linear", "moe_ffn"]
