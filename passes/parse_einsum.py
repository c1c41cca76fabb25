"""Read an einsum equation of a tensor and a matrix as a linear layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Contraction:
    """One dimension of a tensor is multiplied with a matrix.

    Attributes:
        x_dim: the dimension of the tensor that is summed over, counted from the end.
        out_dim: the dimension of the result that the matrix brings in, counted from the end.
        in_first: the matrix is `[in, out]`, not `[out, in]`.
    """

    x_dim: int
    out_dim: int
    in_first: bool


def parse_einsum(equation: str, matrix: int, rank: int) -> Contraction | None:
    """Read the equation.

    Args:
        equation: as in `torch.einsum`, of two operands.
        matrix: which of the operands (0 or 1) is the matrix.
        rank: of the other operand, which an ellipsis stands for in part.

    Returns:
        The contraction, or None where the equation is something else: a sum over two dimensions, an outer product, a
        result whose other dimensions are in another order.
    """
    left, arrow, result = equation.replace(" ", "").partition("->")
    operands = left.split(",")
    if not arrow or len(operands) != 2:
        return None
    weight, x = operands[matrix], operands[1 - matrix]
    named = len(x.replace("...", ""))
    free = "".join(chr(ord("0") + i) for i in range(rank - named)) if "..." in x else ""
    x, result = x.replace("...", free), result.replace("...", free)
    summed = [letter for letter in weight if letter in x and letter not in result]
    brought = [letter for letter in weight if letter in result and letter not in x]
    if len(weight) != 2 or len(summed) != 1 or len(brought) != 1 or len({*x}) != len(x):
        return None
    if x.replace(summed[0], "") != result.replace(brought[0], ""):
        return None
    return Contraction(x.index(summed[0]) - len(x), result.index(brought[0]) - len(result), weight[0] == summed[0])
