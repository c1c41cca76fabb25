"""The layer on a CPU: a fused kernel compiled at first use, the same in plain torch ops, and the costs that choose.

Environment: `SPARSIFY_NO_COMPILE=1` for no compiled kernel, `SPARSIFY_NO_PREPACK=1` for no packed copies of weights,
`SPARSIFY_COSTS=<file>` for other costs than this machine's.
"""

from __future__ import annotations

from sparsify.cpu.cost_model import Costs, FFNShape
from sparsify.cpu.kernel import KernelStatus, kernel_status

__all__ = ["Costs", "FFNShape", "KernelStatus", "kernel_status"]
