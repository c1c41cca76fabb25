"""Lines of the model's own code, for messages: not those of torch or of this compiler."""

from __future__ import annotations

import inspect
import linecache
import os
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

_TORCH = os.path.join(torch.__path__[0], "")  # with the separator, or torchvision would be torch too
_LAYERS = os.path.join(_TORCH, "nn", "modules", "")
_PASSES = os.path.join(os.path.dirname(__file__), "")
_CAPTURE = os.path.join(_PASSES, "capture.py")


def is_model_code(filename: str) -> bool:
    """Whether a frame of this file belongs to the model: neither torch, nor the compiler, nor generated code."""
    return not filename.startswith((_TORCH, _PASSES, "<")) and not filename.endswith("contextlib.py")


def describe_line(filename: str, line: int) -> str:
    """A line of code and where it is, without the folder, which differs by machine."""
    return f"`{linecache.getline(filename, line).strip()}` ({Path(filename).name}:{line})"


def running_line() -> str:
    """The innermost line of the model that is traced; that of a torch layer if the model has no code of its own."""
    frames = list(_frames_since_capture())
    own = (frame for frame in frames if is_model_code(frame.f_code.co_filename))
    layers = (frame for frame in frames if frame.f_code.co_filename.startswith(_LAYERS))
    frame = next(own, None) or next(layers, None)
    return "the model" if frame is None else describe_line(frame.f_code.co_filename, frame.f_lineno)


def _frames_since_capture() -> Iterator[FrameType]:
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename != _CAPTURE:
        yield frame
        frame = frame.f_back


def error_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The innermost line of the model, found in the traceback or, for errors of the tracer, in the message."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [index for index, frame in enumerate(frames) if frame.filename == _CAPTURE]
    own = [frame for frame in frames[max(ours, default=-1) + 1 :] if is_model_code(frame.filename) and frame.line]
    if own:
        return own[-1]
    named = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', str(error))
    frames = [traceback.FrameSummary(file, int(line), name) for file, line, name in named if is_model_code(file)]
    return frames[-1] if frames else None


def error_line(error: BaseException) -> str:
    """The line of the model at which an error came up, without its folder, and the first line of the error."""
    frame = error_frame(error)
    line = f"{describe_line(frame.filename, frame.lineno or 0)}: " if frame else ""
    return line + first_line(error)


def first_line(error: BaseException) -> str:
    """The type of the error and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
