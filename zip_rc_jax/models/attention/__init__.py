"""Attention: all scores at once, blocks of them, and kernels for TPU and GPU."""
