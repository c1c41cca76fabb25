"""Packed copies follow their weights: written to, freed, forbidden."""

from __future__ import annotations

import gc

import pytest
import torch

from sparsify.cpu import packed
from sparsify.cpu.cost_model import available_forms
from sparsify.cpu.forms import FORMS, PACKING
from sparsify.cpu.kernel import kernel_status

pytestmark = pytest.mark.skipif(not packed.supported(torch.float32), reason="this build of torch does not pack")


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch):
    monkeypatch.setattr(packed, "_cache", {})


@pytest.mark.parametrize("form", sorted(PACKING.keys() & FORMS))
def test_a_weight_changed_in_place_is_packed_anew(form, make_layer, error_of):
    """Protects: no stale copy answers after a training step."""
    layer = make_layer(20, 16, 8, 16, 4, 2)
    FORMS[form](*layer)
    with torch.no_grad():
        layer[3].down_proj.mul_(2)
        layer[3].up_proj.add_(0.1)
    assert error_of(FORMS[form](*layer), layer) <= 1e-6


@pytest.mark.parametrize("form", sorted(PACKING.keys() & FORMS))
def test_packs_once(form, monkeypatch, make_layer):
    """Protects: packing costs more than the layer itself."""
    layer = make_layer(20, 16, 8, 16, 4, 2)
    FORMS[form](*layer)
    monkeypatch.setattr(packed, "pack", None)
    views = layer[3]._replace(up_proj=layer[3].up_proj.view(4, 8, 16), down_proj=layer[3].down_proj[:])
    FORMS[form](*layer)
    FORMS[form](layer[0], layer[1], layer[2], views)


def test_freed_with_the_weight(make_layer):
    """Protects: a model that is gone takes its packed copies with it."""
    layer = make_layer(20, 16, 8, 16, 4, 2)
    FORMS["sorted_packed"](*layer)
    assert len(packed._cache) == 8
    del layer
    gc.collect()
    other = torch.randn(4, 4)
    packed.cached(other, "linear", lambda: packed.pack(other, other.shape))
    assert len(packed._cache) == 1


def test_memory_that_is_used_again(error_of, make_layer):
    """Protects: a new weight at the address of one that is gone is not taken for it."""
    seen = set()
    for _ in range(20):
        layer = make_layer(20, 16, 8, 16, 4, 2)
        seen.add(layer[3].up_proj.data_ptr())
        assert error_of(FORMS["sorted_packed"](*layer), layer) <= 1e-6
        del layer
    assert len(seen) < 20, "the allocator never gave the same address: the test tests nothing"


def test_weights_made_in_inference_mode(make_layer, error_of):
    """Protects: such weights have no version, which must not be asked."""
    with torch.inference_mode():
        layer = make_layer(20, 16, 8, 16, 4, 2)
        y = FORMS["sorted_packed"](*layer)
        assert error_of(y, layer) <= 1e-6


def test_can_be_forbidden(monkeypatch):
    """Protects: SPARSIFY_NO_PREPACK keeps memory as it is."""
    packing = PACKING.keys() if kernel_status().available else PACKING.keys() & FORMS
    assert set(available_forms(torch.float32)) >= packing
    monkeypatch.setenv("SPARSIFY_NO_PREPACK", "1")
    assert not PACKING.keys() & set(available_forms(torch.float32))


def test_many_tokens_need_no_packed_copy(make_layer, error_of):
    """Protects: memory, where packing saves no time and oneDNN keeps something for every number of rows."""
    layer = make_layer(512, 16, 8, 12, 4, 2)
    assert error_of(FORMS["dense_masked"](*layer), layer) <= 1e-6
    assert not packed._cache
    FORMS["dense_masked"](layer[0][:511], layer[1][:511], layer[2][:511], layer[3])
    assert len(packed._cache) == 2


def test_settled():
    """Protects: a weight counts as one that changes once it was seen to, until it stays as it is for some calls."""
    weight, other = torch.randn(4, 4), torch.randn(4, 4)
    assert packed.settled(weight)
    assert packed.settled(weight)
    for _ in range(2):
        weight.mul_(2)
        assert [packed.settled(weight) for _ in range(20)].index(True) == 7
    assert packed.settled(other)
    packed.cached(other, "linear", lambda: other.clone())
    packed.forget(other)
    assert not packed._cache[packed._key(other)].forms
    assert not packed.settled(other)
