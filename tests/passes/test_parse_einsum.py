"""`parse_einsum`: which equations are a linear layer along one dimension."""

from __future__ import annotations

import pytest

from sparsify.passes.parse_einsum import Contraction, parse_einsum


@pytest.mark.parametrize(
    ("equation", "matrix", "rank", "expected"),
    [
        ("bsd,fd->bsf", 1, 3, Contraction(-1, -1, False)),
        ("bsd, df -> bsf", 1, 3, Contraction(-1, -1, True)),
        ("df,bsd->bsf", 0, 3, Contraction(-1, -1, True)),
        ("...d,df->...f", 1, 4, Contraction(-1, -1, True)),
        ("bdhw,fd->bfhw", 1, 4, Contraction(-3, -3, False)),
        ("bd,fd->fb", 1, 2, Contraction(-1, -2, False)),
        ("bsd,fd->bf", 1, 3, None),
        ("abd,fd->baf", 1, 3, None),
        ("bd,bd->bd", 1, 2, None),
        ("bd,ed->b", 1, 2, None),
        ("bsd,fd", 1, 3, None),
    ],
)
def test_equations(equation: str, matrix: int, rank: int, expected: Contraction | None) -> None:
    """Protects: the dimensions that are summed and brought in, and every near miss."""
    assert parse_einsum(equation, matrix, rank) == expected
