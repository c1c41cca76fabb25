"""`model_lines`: which line of an error is the model's."""

from __future__ import annotations

import os

import pytest
import torch

from sparsify.passes.model_lines import error_line, first_line, is_model_code

TORCH_FILE = os.path.join(torch.__path__[0], "nn", "functional.py")


def test_an_error_that_names_the_line_in_its_message() -> None:
    """Protects: an error of the tracer itself, whose traceback has no frame of the model; torch files do not count."""
    error = RuntimeError(
        f'''
        While executing %add
          File "{__file__}", line 1, in forward
          File "{TORCH_FILE}", line 2, in linear'''
    )
    code = "which line of an error is the model's"
    assert error_line(error).startswith(f'`"""`model_lines`: {code}."""` (test_model_lines.py:1): RuntimeError: While')


def test_an_error_without_a_line() -> None:
    """Protects: the type and the first line that is not empty, or a word for an empty message."""
    assert error_line(ValueError("\n  first\nsecond")) == "ValueError: first"
    assert first_line(ValueError()) == "ValueError: no message"


@pytest.mark.parametrize(
    ("filename", "is_model"),
    [
        (TORCH_FILE, False),
        (os.path.join(os.path.dirname(torch.__path__[0]), "torchvision", "models", "vgg.py"), True),
        ("<string>", False),
        ("/home/user/model.py", True),
    ],
)
def test_what_is_model_code(filename: str, is_model: bool) -> None:
    """Protects: packages whose names begin with "torch" are models, torch itself is none."""
    assert is_model_code(filename) == is_model
