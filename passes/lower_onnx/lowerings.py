"""The names of the lowerings of a layer, of the runtimes that a file is written for, and of what a user may allow."""

from __future__ import annotations

from typing import Literal

Target = Literal["ort-cpu", "ort-cuda", "portable"]
Lowering = Literal["expert_chain", "sorted_split", "dense_masked", "moe_op", "fused_op", "dense", "original"]
# Layers that are one FFN in the file: with all experts on, or as before the conversion.
WHOLE: tuple[Lowering, ...] = ("dense", "original")
# What a file does where that is faster, by leave of the user alone: compute in place of the model a layer with all its
# experts, or GELU by tanh; need a library of ours.
Leave = Literal["dense", "tanh_gelu", "fused_op"]
# Lowerings that are left out where they are not allowed.
BY_LEAVE: tuple[Lowering, ...] = (*WHOLE, "fused_op")
Version = tuple[int, ...]
