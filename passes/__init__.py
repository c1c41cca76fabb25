"""The compiler: one transformation a file."""

from __future__ import annotations

if __name__ != "sparsify.passes":
    raise ImportError("import sparsify.passes, not the folder passes")
