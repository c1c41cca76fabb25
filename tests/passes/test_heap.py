"""`trim_heap`: pages between blocks that are in use go back to the system."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from sparsify.passes.heap import trim_heap


def resident() -> float:
    """MiB."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_was_freed_between_kept_blocks_is_given_back() -> None:
    """Protects: the memory of a conversion, whose temporary values lie between the tokens that are kept."""
    kept, freed = [], []
    for _ in range(1000):
        freed.append(torch.ones(64 * 1024, dtype=torch.uint8))
        kept.append(torch.ones(1024, dtype=torch.uint8))
    before = resident()
    freed.clear()
    trim_heap()
    assert resident() < before - 40
    assert all(bool(block.all()) for block in kept)
