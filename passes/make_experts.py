"""One dense FFN and a sample of its inputs -> routed experts and their router, by the start that the config names."""

from __future__ import annotations

from collections.abc import Sequence

from sparsify.config import SparsifyConfig
from sparsify.passes.split.dense_ffn import DenseFFN
from sparsify.passes.split.sample import Sample
from sparsify.passes.split.split_ffn import SplitResult, split_ffn
from sparsify.passes.upcycle_ffn import upcycle_ffn


def make_experts(
    dense: DenseFFN,
    original: DenseFFN,
    fit: Sample,
    measured: Sample,
    config: SparsifyConfig,
    branches: Sequence[DenseFFN] = (),
    *,
    may_refit: bool,
) -> SplitResult:
    """Divide the FFN or copy it, or copy `branches` (see `upcycle_ffn`); the others are those of `split_ffn`."""
    if config.start == "split":
        return split_ffn(dense, original, fit, measured, config, may_refit=may_refit)
    return upcycle_ffn(dense, original, measured, config, fit.ids, branches)
