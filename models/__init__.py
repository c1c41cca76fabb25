"""Dense models: small architectures for tests, and loaders of trained ones with the text to calibrate them on."""

from __future__ import annotations

if __name__ != "sparsify.models":
    raise ImportError("import sparsify.models, not the folder models")
