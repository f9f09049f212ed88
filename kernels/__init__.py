"""Triton kernels, one file per step of the spec."""
