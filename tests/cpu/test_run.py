"""The op on a CPU: every dtype and size has a way, the choice does not waver, and gradients agree."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify.cpu import blocks, build, kernel, run
from sparsify.cpu.blocks import in_blocks
from sparsify.cpu.experts import pick
from sparsify.cpu.run import choose_form, moe_ffn_cpu
from sparsify.ops.moe_ffn import moe_ffn

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 13, 200])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.usefixtures("poison")
def test_every_dtype_and_size(compiled, dtype, tokens, gated, make_layer, error_of, monkeypatch):
    """Protects: whatever is chosen, with the kernel or without, is right."""
    if not compiled:
        monkeypatch.setattr(kernel, "covers", lambda *_: False)
    layer = make_layer(tokens, 33, 17, 29, 4, 2, gated=gated, dtype=dtype)
    y = moe_ffn(*layer[:3], *layer[3])
    assert y.dtype == dtype
    assert error_of(y, layer) <= DTYPES[dtype]


@pytest.mark.parametrize("sizes", [(0, 8, 4, 8, 2, 1), (3, 8, 4, 0, 2, 1), (3, 8, 4, 8, 2, 0)])
def test_nothing_to_do(sizes, make_layer):
    """Protects: no tokens, no outputs, no slots."""
    x, weights, ids, experts = make_layer(*sizes)
    y = moe_ffn_cpu(x, weights, ids, *experts)
    assert y.shape == (sizes[0], sizes[3])
    assert not y.any()


@pytest.mark.parametrize("sizes", [(5, 0, 4, 8, 2, 1), (5, 8, 0, 8, 2, 1)])
def test_empty_inner_sizes_leave_the_biases(sizes, make_layer, error_of):
    """Protects: a product over nothing is 0, and the bias still counts."""
    layer = make_layer(*sizes)
    assert error_of(moe_ffn_cpu(*layer[:3], *layer[3]), layer) <= 1e-6


def test_the_kernel_works_where_it_can_be_compiled():
    """Protects: one whose check of itself fails is a fault, and no reason to skip its tests."""
    try:
        with build.library():
            pass
    except build.BuildError as failure:
        pytest.skip(str(failure))
    assert kernel.kernel_status().available, kernel.kernel_status().reason


def test_the_kernel_is_chosen_where_it_covers(make_layer):
    """Protects: with the built-in costs the compiled kernel serves fp32 and bf16."""
    if not kernel.kernel_status().available:
        pytest.skip(kernel.kernel_status().reason)
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 16, 256):
            x, _, ids, experts = make_layer(tokens, 768, 96, 768, 8, 2, dtype=dtype)
            assert choose_form(x, ids, experts).startswith("fused")
            assert choose_form(x, ids, experts, blocks=False) == "fused"
    x, _, ids, experts = make_layer(2048, 384, 8, 384, 192, 48)
    assert choose_form(x, ids, experts, blocks=False) == "fused_new_blocks"


@pytest.fixture
def blocks_made(monkeypatch):
    """Blocks are what the cost model wants; the weights they were made of, in order."""
    if not kernel.kernel_status().available:
        pytest.skip(kernel.kernel_status().reason)
    made = []
    monkeypatch.setattr(blocks, "in_blocks", lambda weight: made.append(weight) or in_blocks(weight))
    monkeypatch.setattr(run, "choose_form", lambda *_, blocks: "fused_blocks" if blocks else "fused")
    return made


@pytest.fixture
def make_stored(make_layer):
    """A layer whose weights are parameters, as those of a model."""

    def make():
        x, weights, ids, experts = make_layer(40, 33, 17, 29, 4, 2)
        up, down = (nn.Parameter(weight, requires_grad=False) for weight in (experts.up_proj, experts.down_proj))
        return x, weights, ids, experts._replace(up_proj=up, down_proj=down)

    return make


@pytest.mark.parametrize("how", ["in place", ".data"])
def test_weights_that_are_written_to_between_calls(how, blocks_made, make_stored, error_of):
    """Protects: no stale copy answers, and changing weights are not copied again and again."""
    layer = make_stored()
    x, weights, ids, experts = layer
    with torch.no_grad():
        for step in range(4):
            for _ in range(2):
                assert error_of(moe_ffn(x, weights, ids, *experts), layer) <= 1e-6
            (experts.up_proj.data if how == ".data" else experts.up_proj).mul_(1.5)
            assert len(blocks_made) == 2, step  # up_proj and down_proj, before the first change
        for _ in range(20):
            assert error_of(moe_ffn(x, weights, ids, *experts), layer) <= 1e-6
    assert len(blocks_made) > 2


def test_training_copies_no_weights(blocks_made, make_stored):
    """Protects: a step of training does not pack weights that it is about to change."""
    x, weights, ids, experts = make_stored()
    moe_ffn(x.requires_grad_(), weights, ids, *experts).sum().backward()
    moe_ffn(x.detach(), weights.requires_grad_(), ids, *experts).sum().backward()
    assert not blocks_made
    with torch.no_grad():
        moe_ffn(x.detach(), weights.detach(), ids, *experts)
    assert len(blocks_made) == 2


def test_blocks_for_one_call(blocks_made, make_stored, error_of, monkeypatch):
    """Protects: where weights are trained, blocks are made anew for each call and not kept."""
    monkeypatch.setattr(run, "choose_form", lambda *_, blocks: "fused_blocks" if blocks else "fused_new_blocks")
    layer = make_stored()
    x, weights, ids, experts = layer
    for _ in range(3):
        y = moe_ffn(x.requires_grad_(), weights, ids, *experts)
        assert error_of(y.detach(), (x.detach(), *layer[1:])) <= 1e-6
        experts.up_proj.data.mul_(1.5)  # not counted by torch
    assert len(blocks_made) == 6


def test_weights_that_are_computed_are_not_copied(blocks_made, make_stored):
    """Protects: what lives for one call is not packed for it."""
    x, weights, ids, experts = make_stored()
    moe_ffn(x, weights, ids, *experts._replace(down_proj=experts.down_proj * 2))
    assert not blocks_made


def test_compiled_models_copy_too(blocks_made, make_stored):
    """Protects: what `torch.compile` hands to the op are the parameters themselves."""
    x, weights, ids, experts = make_stored()

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.up_bias = experts.up_proj, experts.up_bias
            self.down, self.bias = experts.down_proj, experts.down_bias

        def forward(self, x):
            return moe_ffn(x, weights, ids, self.up, self.up_bias, None, None, self.down, self.bias, "gelu")

    with torch.no_grad():
        torch.compile(Layer(), fullgraph=True)(x)
    assert len(blocks_made) == 2


def test_the_choice_is_the_same_every_time(make_layer, monkeypatch):
    """Protects: no measurement hides in a forward call."""
    from sparsify.cpu import measure_costs

    monkeypatch.setattr(measure_costs, "measure_rates", None)
    monkeypatch.setattr(kernel, "covers", lambda *_: False)
    x, _, ids, experts = make_layer(16, 64, 96, 64, 8, 2)
    assert len({choose_form(x, ids, experts) for _ in range(3)}) == 1


def test_unknown_activation(make_layer):
    """Protects: a wrong name is an error, not another function."""
    x, weights, ids, experts = make_layer(3, 8, 4, 8, 2, 1)
    with pytest.raises(ValueError, match=r"activation must be one of relu, .* got 'tanh'"):
        moe_ffn(x, weights, ids, *experts._replace(activation="tanh"))


@pytest.mark.parametrize("gated", [False, True])
def test_op_is_well_formed(gated, make_layer):
    """Protects: schema, fake, autograd and dynamic shapes, on the compiled path."""
    x, weights, ids, experts = make_layer(7, 8, 4, 6, 3, 2, gated=gated)
    tensors = [tensor.requires_grad_() if tensor is not None else None for tensor in experts[:6]]
    torch.library.opcheck(moe_ffn, (x.requires_grad_(), weights.requires_grad_(), ids, *tensors, "gelu"))


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_of_the_compiled_forward(gated, make_layer):
    """Protects: forward in C and backward in plain ops belong together; held against the definition in fp64."""
    x, weights, ids, experts = make_layer(31, 12, 6, 10, 5, 2, gated=gated, activation="silu")
    ids[3] = -1
    wide = experts.double()
    exact_x, exact_weights = x.double().requires_grad_(), weights.double().requires_grad_()
    inputs = [tensor for tensor in (x, weights, *experts[:6]) if tensor is not None]
    exact_inputs = [exact_x, exact_weights, *(tensor for tensor in wide[:6] if tensor is not None)]
    for tensor in (*inputs, *exact_inputs):
        tensor.requires_grad_()
    grad = torch.randn(31, 10)
    got = torch.autograd.grad(moe_ffn(x, weights, ids, *experts), inputs, grad)

    y = torch.zeros(31, 10, dtype=torch.float64)
    for t, k in [(t, k) for t in range(31) for k in range(2) if ids[t, k] >= 0]:
        e = int(ids[t, k])
        out = wide.hidden(e, exact_x[t : t + 1]) @ wide.down_proj[e].t() + pick(wide.down_bias, e)
        y = y.index_add(0, torch.tensor([t]), exact_weights[t, k] * out)
    for a, b in zip(got, torch.autograd.grad(y, exact_inputs, grad.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_slots_that_are_not_used_cost_nothing(make_layer, monkeypatch):
    """Protects: many slots, most of them unused, get the form of as many as are used; no number overflows."""
    monkeypatch.setattr(kernel, "covers", lambda *_: False)
    x, _, ids, experts = make_layer(4096, 64, 96, 64, 8, 2)
    many = torch.cat([ids, torch.full((4096, 30), -1)], dim=1)
    assert choose_form(x, many, experts) == choose_form(x, ids, experts)
    assert choose_form(x, ids.repeat(1, 16), experts)  # more slots than experts, as several heads have
