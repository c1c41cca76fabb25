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


@pytest.mark.parametrize("module", ["sparsify", "sparsify.cli", "sparsify.models.load", "sparsify.ops.moe_ffn"])
def test_imports_without_the_optional_packages_and_without_a_gpu(module: str) -> None:
    """Every extra is optional, and a worker that forks must not find CUDA initialised."""
    program = PROGRAM.format(module=module)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


FALLBACK = """
import importlib
import warnings

op = importlib.import_module("sparsify.ops.moe_ffn")  # the package holds the op under this name

x, weights, ids = torch.randn(5, 4), torch.rand(5, 2), torch.tensor([[0, 1]] * 5)
up, down = torch.randn(2, 3, 4), torch.randn(2, 4, 3)
arguments = (x, weights, ids, up, None, None, None, down, None, "relu")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    outputs = [op._moe_ffn_cuda(*arguments) for _ in range(2)]
    gradients = op._moe_ffn_backward_cuda(x, *arguments, [True] * 9)
assert [str(w.message).partition(":")[0] for w in caught] == [
    "Triton cannot be imported (import of triton halted; None in sys.modules)"
], caught
expected = op.moe_ffn_reference(*arguments)
assert all(torch.equal(y, expected) for y in outputs)
assert torch.equal(gradients[0], op.moe_ffn_backward_reference(x, *arguments, [True] * 9)[0])
"""


def test_a_gpu_without_triton_runs_plain_ops_and_says_so_once() -> None:
    """What the CUDA dispatch key calls, called by hand: without a GPU nothing else reaches it."""
    program = PROGRAM.format(module="sparsify.ops.moe_ffn") + FALLBACK
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
