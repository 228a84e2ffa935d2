"""Attention: all scores at once, blocks of them, and kernels for TPU and GPU.

full   rotary positions; plain and blocked attention; the TPU kernel for long rows
gpu    one new token per row over the decoding cache, a Pallas kernel
"""
