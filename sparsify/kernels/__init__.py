"""Kernels of `sparsify::moe_ffn`: the plain reference, Triton for GPUs."""
