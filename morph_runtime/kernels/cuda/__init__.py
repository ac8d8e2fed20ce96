"""Kernels for NVIDIA GPUs, in Triton's language; nothing outside of this folder imports that language."""
