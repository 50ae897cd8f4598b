"""Fused MoE kernels: spec → one readable Triton module, with its cost model."""
