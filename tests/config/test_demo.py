"""The demo's own config."""

from __future__ import annotations

import pathlib

from zip_rc_jax.config.files import load_config

ROOT = pathlib.Path(__file__).parents[2]


def test_the_demo_goes_over_whole_sequences_in_batches_of_one_size():
    """So validation, labels, Lite's features and the report's predictions share their programs."""
    config = load_config(ROOT / "configs" / "chain_sum_demo.yaml", [])
    stages = (config.critic, config.lite, config.final)
    assert {s.batch_rows * s.row_tokens for s in stages} == {config.label.batch_tokens}
    assert {s.compute_dtype for s in stages} == {config.dtype}
    assert {s.attention for s in stages} == {"auto"}


def test_the_demo_samples_and_decodes_with_as_many_rows():
    config = load_config(ROOT / "configs" / "chain_sum_demo.yaml", [])
    assert config.rollout.rows == config.decode.max_num_seqs
    assert config.rollout.max_tokens == config.decode.max_tokens
