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


CONVERSION = """
from sparsify import sparsify
from sparsify.models.bert import Bert, BertConfig

ids = torch.randint(0, 256, (2, 9))
model = Bert(BertConfig()).eval()
sparse = sparsify(model, (ids,), num_experts=4, top_k=4, calibration=[ids])
assert len(sparse.report.converted) == 2
torch.testing.assert_close(sparse(ids), model(ids), rtol=1e-4, atol=1e-5)
"""


def test_converts_without_the_optional_packages() -> None:
    """The core needs torch and what pip installs with it, nothing of the extras."""
    program = PROGRAM.format(module="sparsify") + CONVERSION
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["sparsify", "sparsify.cli", "sparsify.models.load"])
def test_imports_without_the_optional_packages_and_without_a_gpu(module: str) -> None:
    """Every extra is optional, and a worker that forks must not find CUDA initialised."""
    program = PROGRAM.format(module=module)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
