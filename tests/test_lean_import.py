"""Importing sparsify costs what it must and nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys

for name in ("transformers", "timm", "triton", "onnxruntime", "matplotlib"):
    sys.modules[name] = None  # importing it raises ImportError

import {module}
import torch

assert not torch.cuda.is_initialized(), "importing initialised CUDA"
"""


@pytest.mark.parametrize("module", ["sparsify", "sparsify.cli", "sparsify.models.load"])
def test_imports_without_the_optional_packages_and_without_a_gpu(module):
    """Every extra is optional, and a worker that forks must not find CUDA initialised."""
    program = PROGRAM.format(module=module)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
