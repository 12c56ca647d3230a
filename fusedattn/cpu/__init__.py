"""The CPU backend: fused kernels compiled by Numba from vector IR."""
