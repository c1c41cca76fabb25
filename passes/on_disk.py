"""Tensors that lie in temporary files, for calibration tokens that are larger than the model (Linux).

A file loses its name once it is mapped, so that it goes with its tensor. Pages that were read count as memory of the
process, though the system may take them back at any time; `drop_pages` gives them up.
"""

from __future__ import annotations

import ctypes
import functools
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify.errors import CalibrationError

_PREFIX = "sparsify-tokens-"
_SMALLEST = 1 << 16  # bytes: a file has its price too
_HELD = 1 << 23  # bytes of a file, about, whose rows are read before its pages are dropped
_SPARE = 2  # times the size that is asked for must be free
_MADV_DONTNEED = 4  # of madvise, in sys/mman.h. What was written to a shared mapping of a file stays in the file


def has_room(size: int) -> bool:
    """Whether files of `size` bytes in all may be written."""
    if sys.platform != "linux":
        return False
    try:
        return shutil.disk_usage(tempfile.gettempdir()).free > _SPARE * size
    except OSError:  # there is no folder for temporary files
        return False


class FileOfRows:
    """Rows that come one part after the other, and are read as one tensor."""

    def __init__(self) -> None:
        """Make the file.

        Raises:
            CalibrationError: it cannot be made.
        """
        self._shape, self._dtype = [0], torch.float32
        try:
            self._file = tempfile.NamedTemporaryFile(prefix=_PREFIX, buffering=0)  # noqa: SIM115 - `tensor` closes it
        except OSError as error:
            raise _refused(error) from error

    def append(self, rows: Tensor) -> None:
        """Write `rows` `[n, ...]`, all of one dtype and width.

        Raises:
            CalibrationError: there is no room.
        """
        self._shape, self._dtype = [self._shape[0] + len(rows), *rows.shape[1:]], rows.dtype
        left = rows.contiguous().flatten().view(torch.uint8).numpy().data
        try:
            while len(left):
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.close()
            raise _refused(error) from error

    def tensor(self) -> Tensor:
        """What was written, at least one row, as a tensor in the file."""
        size = math.prod(self._shape)
        with self._file:
            return torch.from_file(self._file.name, shared=True, size=size, dtype=self._dtype).view(self._shape)


def to_disk(tensor: Tensor) -> Tensor:
    """A contiguous copy in a file, or the tensor itself if it is small, in one already, or not on the CPU.

    Raises:
        CalibrationError: there is no room.
    """
    small = tensor.numel() * tensor.element_size() < _SMALLEST
    if small or tensor.device.type != "cpu" or lies_in_file(tensor):
        return tensor
    file = FileOfRows()
    file.append(tensor)
    return file.tensor()


def all_to_disk(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same views of memory that is moved to files: tensors that shared memory still do.

    Raises:
        CalibrationError: there is no room.
    """
    storages = [tensor.untyped_storage() for tensor in tensors]
    blocks = {storage.data_ptr(): storage for storage in storages}
    moved = {start: _storage_to_disk(storage) for start, storage in blocks.items()}
    return [
        tensor.new_empty(0).set_(moved[storage.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride())
        for tensor, storage in zip(tensors, storages, strict=True)
    ]


def _storage_to_disk(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    return to_disk(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)).untyped_storage()


def take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """`tensor[rows]`; from a file, in the order in which they lie there, so that few of its pages are held at once."""
    if not lies_in_file(tensor):
        return tensor.index_select(0, rows)
    taken = tensor.new_empty(len(rows), *tensor.shape[1:])
    parts = -(-tensor.untyped_storage().nbytes() // _HELD)
    for places in rows.argsort().tensor_split(parts):
        taken[places] = tensor.index_select(0, rows[places])
        drop_pages(tensor)
    return taken


def drop_pages(tensor: Tensor) -> None:
    """Take the pages of a tensor in a file out of this process, until they are read again; no other is touched."""
    if not lies_in_file(tensor):
        return
    storage = tensor.untyped_storage()
    _libc().madvise(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), _MADV_DONTNEED)


def lies_in_file(tensor: Tensor) -> bool:
    """In one of this module: mappings of others can be private, and would lose what was written to them."""
    path = tensor.untyped_storage().filename if tensor.device.type == "cpu" else None
    return path is not None and _PREFIX in path


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _refused(error: OSError) -> CalibrationError:
    return CalibrationError(
        f"calibration tokens cannot be kept in {tempfile.gettempdir()}: {error}. Set TMPDIR to a folder with room, or "
        "lower max_calibration_tokens."
    )
