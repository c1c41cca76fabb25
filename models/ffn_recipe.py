"""What a random feed-forward model is made of, as plain data: one field for each thing that fuzzing varies.

Read by `random_ffn`. The first option of a field is its default and the simplest, so that shrinking a recipe means
setting fields back. `fit` makes any combination of options one that can be built.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields, replace
from typing import Any

SPELLINGS = (
    *("linear", "addmm", "mm", "matmul", "matmul_t", "bmm", "baddbmm"),
    *("einsum_fd", "einsum_df", "einsum_dots", "conv", "left_matmul"),
)
BIASES = ("inside", "added", "none")
FUSED_CUTS = (
    *("chunk", "split", "split_sizes", "slice", "unbind"),
    *("interleaved_slice", "interleaved_unbind", "tensor_split", "narrow"),
)
ACTIVATIONS = (
    *("relu", "gelu", "gelu_tanh", "gelu_by_hand", "gelu_tanh_by_hand", "squared_relu", "silu", "quick_gelu", "mish"),
    *("softplus", "clamp", "hardtanh", "relu6", "leaky_relu", "elu", "tanh", "where", "where_zeros"),
    *("where_constant", "maximum", "bilinear", "relu_inplace", "silu_inplace"),
)
VECTORS = ("", "scale", "shift", "prelu", "scalar", "batch_norm")
NOISE = (
    *("", "dropout", "dropout_module", "double", "contiguous", "flat", "permute", "permute_tokens", "clone"),
    *("identity",),
)

# Must not be converted.
NEAR_MISSES = (
    *("softmax", "softmax_tokens", "layer_norm", "rms_norm", "rms_norm_by_hand", "subtract_mean", "cumsum"),
    *("cumsum_tokens", "depthwise", "max_pool", "spatial", "squeeze_excite", "token_gate", "token_gate_input"),
    *("mask_input", "scalar_input", "foreign_input", "global_gate", "global_scale", "positional", "arange_tokens"),
    *("token_vector", "token_vector_square", "roll_neurons", "flip_neurons", "gather_neurons", "sort_neurons"),
    *("roll_tokens", "flip_tokens", "sort_tokens", "regroup", "swap_neurons", "swap_tokens", "swap_tokens_kept"),
    *("dropout_always", "noise_always", "batch_norm_training", "residual_between", "concat", "outer_product"),
    *("mean_tokens", "flatten_tokens", "second_reader_output", "second_reader_added", "no_activation"),
    *("two_inputs", "two_inputs_shifted", "crossed_tokens", "crossed_features"),
    *("grouped_conv", "wide_conv", "strided_conv", "padded_conv"),
    *("grouped_down", "wide_down", "strided_down", "padded_down"),
    *("quantised_up", "quantised_down", "lora_up", "lora_down", "hypernetwork", "per_batch_weights"),
    *("per_token_weights", "einsum_sum", "input_weights", "dynamic_neurons", "attention_scores"),
)
# May be converted if the values stay right.
HAZARDS = (
    *("inplace_alias", "x_mutated", "input_mutated", "slice_mutated", "slice_assigned", "view_mutated"),
    *("part_mutated", "source_mutated", "mutated_after", "output_mutated", "residual_inplace"),
    *("overlapping_slices", "third_chunk", "maxout", "pair_softmax", "glu", "shuffle_neurons", "slice_tokens"),
    *("repeat_tokens", "computed_vector", "arange_vector", "sliced_weight", "scaled_weight", "same_projection"),
    *("tied_down", "shared_up", "shared_down"),
)


def _choice(*options: Any) -> Any:
    return field(default=options[0], metadata={"options": options})


@dataclass(frozen=True, repr=False)
class Recipe:
    """One model. B batch, S seq, D hidden, F neurons.

    Attributes:
        miss: what makes its first FFN a near miss or a hazard; "" in a positive.
        layout: tokens `[B, S, D]`, rows `[B, D]`, grid `[B, S, 3, D]`, channels `[B, D, S]`, image `[B, D, S, 3]`.
        flatten: the FFN runs on `[B * S, D]`.
        dtype: of weights and inputs.
        batch: B.
        seq: S.
        hidden: D.
        neurons: F.
        up: spelling of up_proj and of a fused projection.
        gate: spelling of gate_proj where it is a layer of its own.
        down: spelling of down_proj.
        up_bias: of up_proj and gate_proj.
        down_bias: of down_proj.
        cut: "plain", "two" projections, or how one fused projection becomes gate and up.
        up_first: up comes before gate, in the fused projection and in their product.
        combine: how gate and up become one.
        activation: what gate (plain: up) passes through.
        before: a per-neuron vector before the activation.
        after: a per-neuron vector after it.
        full_rank: vectors have all leading dimensions, of size 1.
        frame: the activation runs in this form of the value, which is undone after it.
        noise_before: what changes nothing, before the activation.
        noise_between: the same after it.
        noise_after: the same after the product of gate and up.
        place: where a near miss happens: after the activation, after the product of gate and up, or before both.
        norm: a normalisation before the FFN.
        residual: the FFN is added to its input.
        layer_scale: a vector multiplies its output.
        attention: before the FFN, in parallel or after it.
        reader: another linear layer reads x.
        copies: "one" FFN; "two" in sequence or "parallel"; "shared": one called twice; "tied": up's weight used again.
        experts: E.
        top_k: K.
        seed: of weights and inputs.
    """

    miss: str = _choice("", *NEAR_MISSES, *HAZARDS)
    layout: str = _choice("tokens", "rows", "grid", "channels", "image")
    flatten: bool = _choice(False, True)
    dtype: str = _choice("float32", "float64", "bfloat16")
    batch: int = _choice(2, 3, 5, 1)
    seq: int = _choice(3, 2, 4, 5, 1)
    hidden: int = _choice(8, 4, 5, 7, 11)
    neurons: int = _choice(16, 5, 7, 8, 13, 31, 64)
    up: str = _choice(*SPELLINGS)
    gate: str = _choice(*SPELLINGS)
    down: str = _choice(*SPELLINGS)
    up_bias: str = _choice(*BIASES)
    down_bias: str = _choice(*BIASES)
    cut: str = _choice("plain", "two", *FUSED_CUTS)
    up_first: bool = _choice(False, True)
    combine: str = _choice("product", "sum", "maximum")
    activation: str = _choice(*ACTIVATIONS)
    before: str = _choice(*VECTORS)
    after: str = _choice(*VECTORS)
    full_rank: bool = _choice(False, True)
    frame: str = _choice("", "double", "flat", "permute")
    noise_before: str = _choice(*NOISE)
    noise_between: str = _choice(*NOISE)
    noise_after: str = _choice(*NOISE)
    place: str = _choice("between", "after", "before")
    norm: bool = _choice(False, True)
    residual: bool = _choice(False, True)
    layer_scale: bool = _choice(False, True)
    attention: str = _choice("", "before", "parallel", "after")
    reader: bool = _choice(False, True)
    copies: str = _choice("one", "two", "parallel", "shared", "tied", "tied_transposed")
    experts: int = _choice(4, 2, 3, 8)
    top_k: int = _choice(2, 1, 3)
    seed: int = _choice(0, 1, 2, 3)

    def __repr__(self) -> str:
        """What differs from the defaults; it can be pasted."""
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value in self.changes.items())})"

    @property
    def changes(self) -> dict[str, Any]:
        """The fields that are not at their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @property
    def category(self) -> str:
        """What must become of its first FFN."""
        if not self.miss:
            return "positive"
        return "near miss" if self.miss in NEAR_MISSES else "hazard"

    @property
    def gated(self) -> bool:
        """Two projections, fused or not."""
        return self.cut != "plain"

    @property
    def channels_first(self) -> bool:
        """Features are dimension 1."""
        return self.layout in ("channels", "image")

    @property
    def rank(self) -> int:
        """Dimensions of the values inside the FFN."""
        return 2 if self.flatten or self.layout == "rows" else 4 if self.layout in ("grid", "image") else 3

    @property
    def expected(self) -> tuple[int, int]:
        """The least and the greatest number of FFNs that may be found."""
        distinct = 2 if self.copies in ("two", "parallel") else 1
        if self.miss in ("shared_up", "shared_down"):
            return 0, distinct
        return distinct - (self.category != "positive"), distinct - (self.category == "near miss")


OPTIONS: dict[str, tuple[Any, ...]] = {f.name: f.metadata["options"] for f in fields(Recipe)}


def sample(rng: random.Random) -> Recipe:
    """A recipe that can be built; how far it is from the plainest one differs from call to call."""
    busy = rng.choice((0.1, 0.3, 0.6))
    chosen: dict[str, Any] = {}
    for name, options in OPTIONS.items():
        if rng.random() < (0.5 if name == "miss" else busy):
            chosen[name] = rng.choice(options)
    return fit(Recipe(**chosen))


# What a near miss needs in order to be one, or to be written at all.
_BY_TOKEN = {"layout": "tokens", "flatten": False}
_ALONE: dict[str, Any] = {"residual": False, "reader": False, "attention": "", "copies": "one"}
_ALONE_BY_TOKEN = {**_BY_TOKEN, **_ALONE}
_TWO_FFNS = {"copies": "two"}
_BARE = {**_BY_TOKEN, "cut": "plain", "before": "", "after": ""}
_NEEDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("regroup", "swap_tokens", "per_batch_weights", "per_token_weights", "hypernetwork"), _BY_TOKEN),
    **dict.fromkeys(("arange_tokens", "flatten_tokens"), _BY_TOKEN),
    **dict.fromkeys(("swap_tokens_kept", "einsum_sum", "mean_tokens", "slice_tokens"), _ALONE_BY_TOKEN),
    **dict.fromkeys(("strided_conv", "padded_conv", "strided_down", "padded_down"), _ALONE),
    **dict.fromkeys(("shared_up", "shared_down"), _TWO_FFNS),
    # Random numbers fall in the order of memory, which a layer that stays dense does not keep in every spelling.
    "dropout_always": {"up": "linear", "gate": "linear"},
    "noise_always": {"up": "linear", "gate": "linear"},
    **dict.fromkeys(("input_weights", "attention_scores"), _BARE),
    "dynamic_neurons": {**_BARE, "neurons": 16},
    "swap_neurons": {**_BY_TOKEN, "seq": 5, "neurons": 5, "experts": 2},
    "token_vector_square": {"layout": "channels", "seq": 5, "neurons": 5, "experts": 2},
    "outer_product": {**_BY_TOKEN, "cut": "two"},
    "two_inputs": {"cut": "two"},
    "two_inputs_shifted": {"cut": "two"},
    "same_projection": {"cut": "two"},
    "crossed_tokens": {**_BY_TOKEN, "cut": "two", "batch": 3, "seq": 3},
    "crossed_features": {**_BY_TOKEN, "cut": "two", "hidden": 5, "seq": 5},
    "repeat_tokens": _ALONE_BY_TOKEN,
    "tied_down": {**_BY_TOKEN, "cut": "plain"},
    "no_activation": {"cut": "plain", "activation": "bilinear"},
    "grouped_conv": {"hidden": 8, "neurons": 16},
    "grouped_down": {"hidden": 8, "neurons": 16},
    "shuffle_neurons": {"neurons": 16},
    "x_mutated": {"activation": "gelu"},
    "input_mutated": {"activation": "gelu", "norm": False, "attention": "", "copies": "one"},
    "inplace_alias": {"cut": "plain", "activation": "relu_inplace"},
    "part_mutated": {"cut": "slice"},
    "source_mutated": {"cut": "slice"},
    "overlapping_slices": {"cut": "overlap"},
    "third_chunk": {"cut": "third"},
    **{cut: {"cut": cut} for cut in ("maxout", "pair_softmax", "glu")},
}
_CONVOLUTIONS = tuple(f"{kind}_{w}" for kind in ("grouped", "wide", "strided", "padded") for w in ("conv", "down"))
_MUTATIONS = ("slice_mutated", "slice_assigned", "view_mutated")  # torch forbids them on one of several views
_THREE_DIMENSIONS = ("spatial", "positional", "token_vector", "depthwise", "max_pool", *_CONVOLUTIONS)


def fit(recipe: Recipe) -> Recipe:
    """The nearest recipe that can be built and is what its `category` says."""
    recipe = replace(recipe, **_NEEDS.get(recipe.miss, {}))
    changes: dict[str, Any] = {"flatten": recipe.flatten and recipe.layout in ("tokens", "grid")}
    if not recipe.miss and recipe.cut not in OPTIONS["cut"]:
        changes |= {"cut": "chunk"}
    if recipe.miss in _THREE_DIMENSIONS:
        changes |= {"flatten": False, "layout": "channels" if recipe.channels_first else "tokens"}
    if recipe.miss.endswith("_conv"):
        changes |= {"cut": "plain" if recipe.cut == "two" else recipe.cut}
    if recipe.miss in _MUTATIONS and recipe.cut not in ("plain", "two"):
        changes |= {"cut": "slice"}
    if recipe.miss:
        changes |= {"batch": max(recipe.batch, 2), "seq": max(recipe.seq, 2)}
        changes |= {"copies": recipe.copies.replace("tied_transposed", "one").replace("tied", "one")}
    if recipe.miss in ("residual_between", "token_vector_square"):
        changes |= {"neurons": recipe.hidden if recipe.miss == "residual_between" else 5}
    recipe = replace(recipe, **changes)
    return replace(recipe, **_legal_vectors(recipe), **_legal_activation(recipe), **_legal_experts(recipe))


def _legal_vectors(recipe: Recipe) -> dict[str, Any]:
    """Batch norm is one vector for each neuron only where neurons are dimension 1; PReLU is an activation."""
    wrong = () if recipe.channels_first or recipe.rank == 2 else ("batch_norm",)
    wrong += ("prelu",) if recipe.miss == "no_activation" else ()
    return {name: "scale" for name in ("before", "after") if getattr(recipe, name) in wrong}


def _legal_activation(recipe: Recipe) -> dict[str, Any]:
    """No activation at all is a near miss of its own; in place on a slice is a hazard of its own."""
    activation = recipe.activation
    if activation == "bilinear" and not recipe.gated and recipe.miss != "no_activation":
        return {"activation": "relu"}
    if activation == "bilinear":
        return {"combine": "product"}
    if activation.endswith("_inplace") and (recipe.cut not in ("plain", "two") or recipe.miss == "same_projection"):
        return {"activation": activation.removesuffix("_inplace")}
    return {}


def _legal_experts(recipe: Recipe) -> dict[str, Any]:
    """Every routed expert gets a neuron."""
    experts = min(recipe.experts, 4) if recipe.neurons < 16 else recipe.experts
    return {"experts": experts, "top_k": min(recipe.top_k, experts)}
