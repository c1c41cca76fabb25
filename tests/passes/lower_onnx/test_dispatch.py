"""`sparsify::Dispatch` in onnxruntime against numpy's stable argsort."""

from __future__ import annotations

import numpy as np
import pytest

E, D = 5, 17


def _ids(tokens: int, top_k: int, kind: str) -> np.ndarray:
    rng = np.random.default_rng(tokens)
    ids = np.argsort(rng.random((tokens, E)), axis=1)[:, :top_k].astype(np.int64)
    if kind == "one expert":
        ids[:] = 3
    if kind == "unused slots":
        ids[rng.random(ids.shape) < 0.4] = -1
    if kind == "nothing used":
        ids[:] = -1
    return ids


@pytest.mark.parametrize("kind", ["mixed", "one expert", "unused slots", "nothing used"])
@pytest.mark.parametrize("top_k", [1, 2, E])
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_equals_a_stable_sort(run_placeholder, tokens: int, top_k: int, kind: str) -> None:
    """Rows are grouped by expert, in the order of the tokens, unused slots last; counts and offsets fit them."""
    ids = _ids(tokens, top_k, kind)
    x = np.random.default_rng(0).standard_normal((tokens, D)).astype(np.float32)
    parts = E if kind in ("mixed", "one expert") else E + 1
    outputs = (np.float32, np.int64, np.int32, np.int64)
    attributes = {"num_experts": E, "num_parts": parts, "top_k": top_k}
    rows, order, offsets, counts = run_placeholder("Dispatch", {"x": x, "ids": ids}, attributes, outputs)

    key = np.where(ids < 0, E, ids).reshape(-1)
    expected_order = np.argsort(key, kind="stable")
    expected_counts = np.bincount(key, minlength=parts)
    np.testing.assert_array_equal(order, expected_order)
    np.testing.assert_array_equal(counts, expected_counts)
    np.testing.assert_array_equal(offsets, np.concatenate([[0], np.cumsum(expected_counts)[:E]]))
    assert rows.shape == (tokens * top_k, D)  # every row that the experts see, and not one more
    np.testing.assert_array_equal(rows, x[expected_order // top_k])


def test_sorts_many_rows_stably(run_placeholder) -> None:
    """The lowering rests on TopK giving the lower index first among equals, also where it sorts in several threads."""
    ids = np.random.default_rng(1).integers(0, E, (20_000, 1))
    attributes = {"num_experts": E, "num_parts": E, "top_k": 1}
    x = np.zeros((len(ids), 1), np.float32)
    order = run_placeholder("Dispatch", {"x": x, "ids": ids}, attributes, (np.float32, np.int64, np.int32, np.int64))[1]
    np.testing.assert_array_equal(order, np.argsort(ids[:, 0], kind="stable"))
