"""All forms and the compiled kernel compute the same layer, whatever the shapes and the routing."""

from __future__ import annotations

import pytest
import torch

from sparsify.cpu import packed
from sparsify.cpu.forms import FORMS, PACKING
from sparsify.kernels.reference import ACTIVATIONS

# tokens, hidden_size, width, out_features, num_experts, top_k: one token, primes, K = 1, K = E, one expert.
SHAPES = [
    (1, 16, 8, 16, 4, 2), (13, 7, 5, 3, 3, 3), (53, 33, 17, 29, 5, 1), (40, 64, 24, 48, 1, 1), (300, 32, 16, 32, 4, 2),
    (513, 12, 6, 10, 5, 2),
]  # fmt: skip
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def usable(form: str, dtype: torch.dtype) -> bool:
    return form not in PACKING or packed.supported(dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("gated", "biased"), [(False, True), (True, True), (False, False)])
@pytest.mark.usefixtures("poison")
def test_form_equals_the_reference(form, dtype, shape, gated, biased, make_layer, error_of):
    """Protects: every pair reaches its expert and comes back; no form reads what it did not write."""
    if not usable(form, dtype):
        pytest.skip("this build of torch does not pack")
    layer = make_layer(*shape, gated=gated, biased=biased, dtype=dtype)
    y = FORMS[form](*layer)
    assert y.dtype == dtype
    assert error_of(y, layer) <= BOUNDS[dtype]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("poison")
def test_activations_and_unused_slots(form, activation, make_layer, error_of):
    """Protects: a slot of -1 adds nothing; a token without any slot is 0; experts without rows are no error."""
    x, weights, ids, experts = make_layer(11, 12, 6, 10, 5, 2, activation=activation, gated=activation == "silu")
    ids = ids.masked_fill(ids == 3, -1)
    ids[4] = -1
    y = FORMS[form](x, weights, ids, experts)
    assert error_of(y, (x, weights, ids, experts)) <= 2e-6
    assert not y[4].any()


@pytest.mark.parametrize("form", FORMS)
def test_no_slot_is_used(form, make_layer):
    """Protects: nothing to do is no error."""
    x, weights, ids, experts = make_layer(3, 8, 4, 8, 2, 1)
    assert not FORMS[form](x, weights, torch.full_like(ids, -1), experts).any()


@pytest.mark.parametrize("form", FORMS)
def test_same_bits_every_time(form, make_layer):
    """Protects: no sum runs in an order that depends on threads."""
    layer = make_layer(64, 64, 32, 64, 8, 4)
    assert torch.equal(FORMS[form](*layer), FORMS[form](*layer))


@pytest.mark.parametrize("form", FORMS)
def test_down_proj_as_a_view_of_the_dense_weight(form, make_layer, error_of):
    """Protects: weights that are views of the dense ones, which the converter makes."""
    x, weights, ids, experts = make_layer(20, 16, 8, 12, 4, 2)
    dense = experts.down_proj.transpose(0, 1).flatten(1).contiguous()  # [D_out, E * I]
    view = dense.view(12, 4, 8).transpose(0, 1)
    assert not view.is_contiguous()
    y = FORMS[form](x, weights, ids, experts._replace(down_proj=view))
    assert error_of(y, (x, weights, ids, experts)) <= 1e-6
