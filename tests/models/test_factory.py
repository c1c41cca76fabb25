from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from sparsify.models.load import load


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Writes a module into a fresh current directory, which is not on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])

    def write(name: str, body: str) -> str:
        (tmp_path / f"{name}.py").write_text(
            f"import torch\nfrom torch import nn\n\n\ndef build():\n    return {body}\n\n\nvalue = 1\n"
        )
        return f"{name}:build"

    return write


def test_model_and_args(write_module):
    """The shortest factory; a module of the current directory is found."""
    dense = load(write_module("factory_short", "nn.Linear(4, 3).train(), (torch.ones(2, 4),)"))
    assert dense.name == "build"
    assert isinstance(dense.model, nn.Linear)
    assert not dense.model.training
    assert dense.kwargs == {}
    assert dense.calibration is None
    assert dense.metric is None
    [(args, kwargs)] = dense.held_out
    assert dense.model(*args, **kwargs).shape == (2, 3)


def test_the_last_calibration_batch_is_held_out(write_module):
    """What a conversion is scored on must not have calibrated it; calibration may be read more than once."""
    body = "nn.Linear(4, 3), (torch.ones(2, 4),), {}, (torch.full((2, 4), i) for i in range(3))"
    dense = load(write_module("factory_long", body))
    assert dense.calibration is not None
    for _ in range(2):
        assert [int(batch[0, 0]) for batch in dense.calibration()] == [0, 1]
    torch.testing.assert_close(dense.held_out[0], torch.full((2, 4), 2))


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("factory_bare", "nn.Linear(4, 3)", "returned Linear; a factory returns"),
        ("factory_one", "(nn.Linear(4, 3),)", "a tuple of 1"),
        ("factory_model", "(1, ())", "returned int as the model"),
        ("factory_args", "(nn.Linear(4, 3), torch.ones(2, 4))", "returned Tensor as args"),
        ("factory_kwargs", "(nn.Linear(4, 3), (), [1])", "returned list as kwargs"),
    ],
)
def test_anything_else_is_refused(write_module, name, body, message):
    """The message says what came back and what is allowed."""
    with pytest.raises(ValueError, match=message):
        load(write_module(name, body))


def test_a_missing_module_or_function_is_named(write_module):
    """A typing error in the command must be seen at once."""
    write_module("factory_names", "None")
    with pytest.raises(ValueError, match="No module named 'no_such_module'"):
        load("no_such_module:build")
    with pytest.raises(ValueError, match=r"has no function 'bild'; it has .*build"):
        load("factory_names:bild")
    with pytest.raises(ValueError, match="has no function 'value'"):
        load("factory_names:value")
