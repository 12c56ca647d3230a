"""Kernels for NVIDIA GPUs; see `fusedattn.cuda.backend`."""
