"""Every spelling of a linear layer whose features are last -> `aten.linear(x, W, b)`.

1. addmm(b, x, W) -> linear(x, t(W), b)                    W is [in, out], as in GPT-2's Conv1D
2. mm(x, W), matmul(x, W) -> linear(x, t(W))               W has two dimensions, or is one such copied along a batch
3. bmm(x, W), baddbmm(b, x, W) -> linear(x, t(W), b)       likewise
4. matmul(W, x) -> transpose(linear(transpose(x), W))      features last but one
5. einsum("..d,df->..f", x, W) -> linear(x, t(W))          any letters; features elsewhere are moved last and back
6. tensordot(x, W, [-1], [0]) -> linear(x, t(W))
7. t(t(W)) -> W                                            transpose and permute of a matrix likewise
8. linear(x, W) + b -> linear(x, W, b)                     b is [out] and nothing else reads the product

W and b are parameters or views of them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from sparsify.passes.base import Pass, PassResult
from sparsify.passes.constants import broadcast_source, is_constant
from sparsify.passes.graph_values import arguments, as_node, fake_tensor, last_size, sizes_of
from sparsify.passes.parse_einsum import Contraction, parse_einsum

aten = torch.ops.aten


@dataclass(frozen=True)
class NormalizeLinearPass(Pass):
    """Rewrite the cases above. Values are the same up to the order of the sums."""

    def call(self, graph_module: GraphModule) -> PassResult:
        """See the module."""
        count = 0
        for node in list(graph_module.graph.nodes):
            count += _rewrite_product(node) or _rewrite_bias(node)
        if count:
            graph_module.graph.eliminate_dead_code()
        return PassResult(graph_module, modified=count > 0)


@dataclass(frozen=True)
class _Product:
    """`x @ weight + bias`, weight `[in, out]` if `transposed`; features lie in `x_dim` and `out_dim`."""

    x: Node
    weight: Node
    bias: Node | None = None
    transposed: bool = True
    x_dim: int = -1
    out_dim: int = -1


def _rewrite_product(node: Node) -> bool:
    product = _read_product(node)
    if product is None:
        return False
    with node.graph.inserting_before(node):
        replacement = _write(node, product)
    replacement.meta.update(node.meta)
    node.replace_all_uses_with(replacement)
    node.graph.erase_node(node)
    return True


def _write(node: Node, product: _Product) -> Node:
    call = _Calls(node)
    x = product.x if product.x_dim == -1 else call(aten.movedim.int, product.x, product.x_dim, -1)
    weight = _transposed(call, product.weight) if product.transposed else product.weight
    bias = None if product.bias is None else _flat(call, product.bias)
    linear = node.graph.call_function(aten.linear.default, (x, weight, bias))
    linear.meta.update(node.meta)
    if product.out_dim == -1:
        return linear
    linear.meta["val"] = node.meta["val"].movedim(product.out_dim, -1)
    return call(aten.movedim.int, linear, -1, product.out_dim)


@dataclass(frozen=True)
class _Calls:
    """Adds calls in the place of `node`, in the same module, with the fake tensors that they return."""

    node: Node

    def __call__(self, target: Any, *args: Any) -> Node:
        call = self.node.graph.call_function(target, args)
        call.meta.update(self.node.meta)
        call.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, Node) else arg for arg in args))
        return call


def _read_product(node: Node) -> _Product | None:
    match node.target:
        case aten.addmm.default:
            return _read_addmm(node)
        case aten.mm.default | aten.matmul.default | aten.bmm.default:
            return _read_matmul(node)
        case aten.baddbmm.default:
            return _read_baddbmm(node)
        case aten.einsum.default:
            return _read_einsum(node)
        case aten.tensordot.default:
            return _read_tensordot(node)
        case _:
            return None


def _read_addmm(node: Node) -> _Product | None:
    """Case 1."""
    given = arguments(node)
    x, weight, bias = given["mat1"], given["mat2"], given["self"]
    if (given["alpha"], given["beta"]) != (1, 1) or not _is_weight(weight) or not _is_vector(bias, node):
        return None
    return _Product(x, weight, bias)


def _read_matmul(node: Node) -> _Product | None:
    """Cases 2, 3 and 4."""
    x, weight = as_node(node.args[0]), as_node(node.args[1])
    if _rank(x) < 2 or _rank(weight) < 2:
        return None
    copied = broadcast_source(weight)
    if _is_weight(copied) and not is_constant(x) and _rank(weight) <= _rank(x):
        return _Product(x, copied)
    copied = broadcast_source(x)
    if _is_weight(copied) and not is_constant(weight) and _rank(x) <= _rank(weight):
        return _Product(weight, copied, transposed=False, x_dim=-2, out_dim=-2)
    return None


def _read_baddbmm(node: Node) -> _Product | None:
    """Case 3 with a bias."""
    given = arguments(node)
    weight, bias = broadcast_source(given["batch2"]), broadcast_source(given["self"])
    if (given["alpha"], given["beta"]) != (1, 1) or not _is_weight(weight) or not _is_vector(bias, node):
        return None
    return None if is_constant(given["batch1"]) else _Product(given["batch1"], weight, bias)


def _read_einsum(node: Node) -> _Product | None:
    """Case 5."""
    operands = node.args[1]
    if not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    pair = [as_node(operand) for operand in operands]
    weight = next((i for i in (1, 0) if _is_weight(pair[i])), None)
    if weight is None or is_constant(pair[1 - weight]):
        return None
    parsed = parse_einsum(str(node.args[0]), weight, _rank(pair[1 - weight]))
    return None if parsed is None else _contract(pair[1 - weight], pair[weight], parsed)


def _contract(x: Node, weight: Node, parsed: Contraction) -> _Product:
    return _Product(x, weight, None, parsed.in_first, parsed.x_dim, parsed.out_dim)


def _read_tensordot(node: Node) -> _Product | None:
    """Case 6."""
    given = arguments(node)
    x, weight, over_x, over_weight = given["self"], given["other"], given["dims_self"], given["dims_other"]
    if not _is_weight(weight) or is_constant(x) or len(over_x) != 1 or over_x[0] % _rank(x) != _rank(x) - 1:
        return None
    return _Product(x, weight, transposed=over_weight[0] % 2 == 0)


def _rewrite_bias(node: Node) -> bool:
    """Case 8."""
    if node.target not in (aten.add.Tensor, operator.add) or node.kwargs:
        return False
    addends = [arg for arg in node.args if isinstance(arg, Node)]
    linear = next((addend for addend in addends if _is_bare_linear(addend)), None)
    bias = next((addend for addend in addends if linear is not None and _is_vector(addend, linear)), None)
    if linear is None or bias is None:
        return False
    with node.graph.inserting_before(node):
        flat = _flat(_Calls(node), bias)
        merged = node.graph.call_function(aten.linear.default, (linear.args[0], linear.args[1], flat))
    merged.meta.update(linear.meta)
    node.replace_all_uses_with(merged)
    node.graph.erase_node(node)
    return True


def _transposed(call: _Calls, weight: Node) -> Node:
    """Case 7."""
    return as_node(weight.args[0]) if _is_transpose(weight) else call(aten.t.default, weight)


def _is_transpose(node: Node) -> bool:
    """Of a matrix."""
    if node.target in (aten.t.default, aten.numpy_T.default, aten.mT.default):
        return True
    if node.target is aten.transpose.int:
        return sorted(dim % 2 for dim in (arguments(node)["dim0"], arguments(node)["dim1"])) == [0, 1]
    return node.target is aten.permute.default and [dim % 2 for dim in arguments(node)["dims"]] == [1, 0]


def _flat(call: _Calls, bias: Node) -> Node:
    """`[out]` from `[1, .., out]`."""
    return bias if _rank(bias) == 1 else call(aten.reshape.default, bias, [-1])


def _is_bare_linear(node: Node) -> bool:
    if node.target is not aten.linear.default or len(node.users) != 1:
        return False
    return len(node.args) < 3 or node.args[2] is None


def _is_weight(node: Node) -> bool:
    """A constant matrix."""
    return _rank(node) == 2 and is_constant(node)


def _is_vector(node: Node, product: Node) -> bool:
    """A constant `[.., 1, out]` of the width of the product."""
    if _rank(node) < 1 or _rank(node) > _rank(product) or not is_constant(node):
        return False
    return last_size(node) == last_size(product) and _ones(sizes_of(node)[:-1])


def _ones(sizes: Sequence[int | str]) -> bool:
    return all(size == 1 for size in sizes)


def _rank(node: Node) -> int:
    value = fake_tensor(node)
    return -1 if value is None else value.dim()
