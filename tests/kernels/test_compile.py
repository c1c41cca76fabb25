"""What the compiler makes of the kernels for cards that are not here: registers, shared memory, tensor cores.

In a process of its own, as kernels are defined for the interpreter here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent.parent.parent / "benchmarks" / "gpu_compile.py"


def test_kernels_compile_without_spilling():
    """Protects: no spills, shared memory within the limit, tensor cores and asynchronous copies, on a sample.

    `python benchmarks/gpu.py --compile-only` compiles everything.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(PROGRAM), "--sample"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    compiled = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0, result.stderr + "".join(f"{one}\n" for one in compiled if one["faults"])
    assert {one["capability"] for one in compiled} == {80, 90, 100, 120}
    assert {one["kernel"] for one in compiled} == {
        "up_kernel",
        "down_kernel",
        "combine_kernel",
        "decode_up_kernel",
        "decode_down_kernel",
        "hidden_grad_kernel",
        "weight_grad_kernel",
        "bias_grad_kernel",
        "routing_grad_kernel",
    }
