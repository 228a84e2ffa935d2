"""Ahead-of-time compilation for TPU topologies on a machine without a TPU: what the programs need,
compute, read and send.

topology, model_sizes   chips and meshes that are not here; sizes of a model without its parameters
programs                training and decoding, compiled from shapes and shardings
hlo, costs              the compiled module as instructions, and what they cost
analytic                what a step must cost, counted by hand
report                  the two side by side, as a table
"""

STAGES = ("policy", "critic", "final", "lite")
DTYPES = ("bfloat16", "float32")
