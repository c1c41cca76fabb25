"""The names of the lowerings of a layer, and of the runtimes that a file is written for."""

from __future__ import annotations

from typing import Literal

Target = Literal["ort-cpu", "ort-cuda", "portable"]
Lowering = Literal["expert_chain", "sorted_split", "dense_masked", "moe_op"]
Version = tuple[int, ...]
