"""The commands in a folder with small models: run in this process, or started as one of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from sparsify.cli import app

ROOT = Path(__file__).parent.parent.parent
FACTORY = """
import pathlib, sys

import torch
from torch import nn


def model():
    torch.manual_seed(0)
    ffn = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    batches = [torch.randn(4, 8, 16) for _ in range(3)]
    pathlib.Path("loaded").touch()
    return ffn, (torch.randn(2, 4, 16),), {}, batches


def wide():
    ffn = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    return ffn, (torch.randn(2, 4, 64),)


def labelled():
    labels = {"expert_labels": torch.tensor([1, 0])}
    ffn, args, _, batches = model()
    return ffn, args, labels, [((batch[:2],), labels) for batch in batches]
"""
# The program as installed, without the need to install it.
PROGRAM = "import sys; from sparsify.cli import app; sys.argv[0] = 'sparsify'; app()"


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with the factory; small matrices are quicker on one thread."""
    place = tmp_path_factory.mktemp("cli")
    (place / "tiny_factory.py").write_text(FACTORY)
    before, threads, path = Path.cwd(), torch.get_num_threads(), list(sys.path)
    os.chdir(place)
    torch.set_num_threads(1)
    yield place
    torch.set_num_threads(threads)
    os.chdir(before)
    sys.path[:] = path


@pytest.fixture(scope="session")
def options() -> tuple[str, ...]:
    """Of a small conversion."""
    return ("--experts", "4", "--top-k", "2", "--select", "all")


@pytest.fixture(scope="session")
def run() -> Callable[..., Result]:
    """Runs a command in this process."""
    return _run


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen]:
    """Starts a command as a process of its own."""
    return _start


@pytest.fixture(scope="session")
def refusal() -> Callable[..., str]:
    """The message of a command that is refused: on stderr, with code 2, and nothing else anywhere."""
    return _refusal


def _run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result


def _start(*arguments: object, before: str = "", program: str = PROGRAM, **options) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", before + program, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def _refusal(*arguments: object) -> str:
    result = _run(*arguments, code=2)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr
