"""ONNX files -> the disk, whole or not at all: they are made in a hidden folder and renamed into place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from sparsify.errors import ExportError, OutputError

# A protobuf message ends at 2 GiB; names and nodes need a little of it.
_LARGEST_FILE = 2**31 - 2**27


@contextmanager
def workshop(path: Path) -> Generator[Path]:
    """A hidden folder beside `path`; making it shows, before any work, that files can be written there.

    Raises:
        OutputError: they cannot, or `path` is a folder.
    """
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; give the name of a file in it, such as model.onnx")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=path.parent, prefix=".sparsify-")
    with made as folder:
        yield Path(folder)


def write_model(model: ir.Model, path: Path) -> None:
    """Write a file, with `<path>.data` beside it if it is large, and check it.

    Raises:
        OutputError: it cannot be written.
        ExportError: it is no valid ONNX.
    """
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    external = f"{path.name}.data" if size > _LARGEST_FILE else None
    with _writing(path):
        ir.save(model, path, external_data=external)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the exported graph is not valid ONNX: {error}; report this model") from error


def move_all(workshop: Path, folder: Path) -> None:
    """Put the finished files in place, data before the model that refers to it; all of them, or none.

    Raises:
        OutputError: a file cannot be renamed.
    """
    kept = workshop / "kept"
    files = sorted(workshop.iterdir(), key=lambda file: file.suffix != ".data")
    with _writing(folder / files[-1].name):
        kept.mkdir()
        for file in files:
            if (folder / file.name).exists():
                _keep(folder / file.name, kept / file.name)
        try:
            for file in files:
                os.replace(file, folder / file.name)
        except BaseException:
            for old in kept.iterdir():
                os.replace(old, folder / old.name)
            raise


def _keep(file: Path, place: Path) -> None:
    """A second name for the content of a file; a copy where the disk knows no such names."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)


@contextmanager
def _writing(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        cause = error.strerror or str(error)
        raise OutputError(
            f"cannot write {path}: {cause}. Choose a folder on a disk with free space where you may write"
        ) from error
