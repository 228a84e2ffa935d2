"""Attention: all scores at once, blocks of them, and kernels for TPU and GPU.

full   rotary positions; plain and blocked attention; the TPU kernel for long rows
cached new tokens to the decoding cache: which of the ways below, on which platform
gpu    one new token per row over pages, a Pallas kernel
tpu    one new token per row over pages, a Pallas kernel
"""
