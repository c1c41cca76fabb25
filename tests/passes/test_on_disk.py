"""Tensors in temporary files: the same values, little memory, and a clear word where there is no room."""

from __future__ import annotations

import re
import resource
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from sparsify.errors import CalibrationError
from sparsify.passes.on_disk import FileOfRows, all_to_disk, drop_pages, has_room, lies_in_file, take_rows, to_disk

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere tokens stay in memory")


def resident_of_files() -> float:
    """MiB."""
    found = re.search(r"^RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool])
def test_rows_come_back(dtype: torch.dtype) -> None:
    """Protects: every value and its place, also of parts that are empty or not contiguous."""
    rows = (torch.randn(70, 11) > 0 if dtype == torch.bool else torch.randn(70, 11)).to(dtype)
    file = FileOfRows()
    for part in (rows[:7], rows[7:7], rows[7:].t().contiguous().t()):
        file.append(part)
    assert torch.equal(file.tensor(), rows)


def test_no_file_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: the disk of the user; the name goes when the tensor is made, the room when it dies."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tensor = to_disk(torch.randn(300, 100))
    assert lies_in_file(tensor)
    assert not list(tmp_path.iterdir())


def test_pages_are_given_up_and_values_kept() -> None:
    """Protects: the memory of a conversion, and what was written to its tokens."""
    rows = torch.randn(2**20, 8)  # 32 MiB
    tensor = to_disk(rows)
    tensor[5] = rows[5] = 3.0
    assert torch.equal(tensor, rows)
    before = resident_of_files()
    drop_pages(tensor)
    assert resident_of_files() < before - 30
    assert torch.equal(tensor, rows)


def test_other_tensors_are_let_alone() -> None:
    """Protects: values in memory, which the same call to the system would erase; and small ones, which get no file."""
    tensor, own = torch.randn(2**16), torch.randn(2**16)
    expected = tensor.clone()
    drop_pages(tensor)
    assert torch.equal(tensor, expected)
    with tempfile.NamedTemporaryFile() as file:
        mapped = torch.from_file(file.name, shared=True, size=2**16).copy_(own)  # of someone else
        assert not lies_in_file(mapped)
    small = torch.randn(10)
    assert to_disk(small) is small
    assert to_disk(to_disk(own)).data_ptr() != own.data_ptr()


def test_views_still_share_memory() -> None:
    """Protects: a model that writes in place between two layers."""
    base = torch.randn(400, 100)
    expected = base.clone()
    whole, column, again = all_to_disk([base, base[:, 3], base.t()])
    assert all(map(lies_in_file, (whole, column, again)))
    assert torch.equal(whole, expected)
    assert torch.equal(column, expected[:, 3])
    whole.fill_(2.0)
    assert bool((column == 2.0).all())
    assert bool((again == 2.0).all())
    assert torch.equal(base, expected)


def test_rows_are_taken_in_any_order() -> None:
    """Protects: the tokens of a training step, some of them twice; few pages are held meanwhile."""
    rows = torch.randn(2**16, 128)  # 32 MiB
    chosen = torch.randint(len(rows), (3000,))
    tensor, before = to_disk(rows), resident_of_files()
    assert torch.equal(take_rows(tensor, chosen), rows[chosen])
    assert torch.equal(take_rows(rows, chosen), rows[chosen])
    assert len(take_rows(tensor, chosen[:0])) == 0
    assert resident_of_files() < before + 10


def test_no_room() -> None:
    """Protects: words in place of a traceback, or of a signal that kills the process."""
    assert not has_room(2**60)
    assert has_room(1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(CalibrationError, match=r"File too large\. Set TMPDIR"):
            to_disk(torch.randn(2**16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: the same where the folder is gone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(CalibrationError, match=r"cannot be kept in .*gone"):
        to_disk(torch.randn(2**16))
