"""The names of the lowerings of a layer, of the runtimes that a file is written for, and of what it may deviate by."""

from __future__ import annotations

from typing import Literal

Target = Literal["ort-cpu", "ort-cuda", "portable"]
Lowering = Literal["expert_chain", "sorted_split", "dense_masked", "moe_op", "dense", "original"]
# Layers that are one FFN in the file: with all experts on, or as before the conversion.
WHOLE: tuple[Lowering, ...] = ("dense", "original")
# What the file may compute in place of the model, where that is faster: a layer with all its experts, GELU by tanh.
Deviation = Literal["dense", "tanh_gelu"]
Version = tuple[int, ...]
