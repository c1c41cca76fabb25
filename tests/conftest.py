"""Fixtures that every test may use."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read where kernels are defined, Triton's own too: before anything imports it, as torch._dynamo does.
    os.environ["TRITON_INTERPRET"] = "1"

from sparsify.models.dense_model import DenseModel
from sparsify.models.load import load


def pytest_configure() -> None:
    """Let the workers of pytest-xdist share the cores, and write lines as long as without them."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    os.environ.pop("COLUMNS", None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Makes every test start from the same random state, whichever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def minilm() -> DenseModel:
    """all-MiniLM-L6-v2, loaded once."""
    return load("minilm")


@pytest.fixture(scope="session")
def smollm2() -> DenseModel:
    """SmolLM2-135M-Instruct, loaded once: it takes seconds to widen the quantised weights."""
    return load("smollm2")
