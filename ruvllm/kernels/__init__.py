"""The public kernels."""
