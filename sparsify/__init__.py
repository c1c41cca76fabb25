"""Turn the feed-forward layers of a trained dense PyTorch model into routed experts, and export them to ONNX."""

from __future__ import annotations

from sparsify.api import Inspection, inspect, sparsify
from sparsify.average_models import average_models
from sparsify.config import SparsifyConfig
from sparsify.cpu.onnx_library import onnx_ops_library
from sparsify.distillation import DistillReport, distill
from sparsify.label_posterior import label_posterior
from sparsify.partial_model import PartialSparseModel
from sparsify.passes.export_onnx import ExportReport, LayerExport, export_onnx
from sparsify.passes.lower_onnx.translation_table import onnx_translation_table
from sparsify.passes.match_ffn import FFNMatch, Rejection
from sparsify.passes.plan import ConversionPlan, LayerPlan
from sparsify.passes.verify_onnx import OnnxParity, verify_onnx
from sparsify.report import FFNReport, MetricReport, Report
from sparsify.sparse_model import SparseModel

__all__ = [
    "ConversionPlan",
    "DistillReport",
    "ExportReport",
    "FFNMatch",
    "FFNReport",
    "Inspection",
    "LayerExport",
    "LayerPlan",
    "MetricReport",
    "OnnxParity",
    "PartialSparseModel",
    "Rejection",
    "Report",
    "SparseModel",
    "SparsifyConfig",
    "average_models",
    "distill",
    "export_onnx",
    "inspect",
    "label_posterior",
    "onnx_ops_library",
    "onnx_translation_table",
    "sparsify",
    "verify_onnx",
]
