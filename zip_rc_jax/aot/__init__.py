"""Ahead-of-time compilation for TPU topologies on a machine without a TPU: what the programs need,
compute, read and send."""

STAGES = ("policy", "critic", "final", "lite")
DTYPES = ("bfloat16", "float32")
