"""Turn the feed-forward layers of a trained dense PyTorch model into routed experts, and export them to ONNX."""

from __future__ import annotations

from sparsify.api import Inspection, inspect, sparsify
from sparsify.config import SparsifyConfig
from sparsify.passes.match_ffn import FFNMatch, Rejection
from sparsify.report import FFNReport, MetricReport, Report
from sparsify.sparse_model import SparseModel

__all__ = [
    "FFNMatch",
    "FFNReport",
    "Inspection",
    "MetricReport",
    "Rejection",
    "Report",
    "SparseModel",
    "SparsifyConfig",
    "inspect",
    "sparsify",
]
