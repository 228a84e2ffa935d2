"""Decodes of the same prompts in other company."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from harness.engines import FORKING, MIXED, exact
from harness.scripted import ScriptedNetwork
from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.inference import engine as engine_module
from zip_rc_jax.inference import running_batch as running_module
from zip_rc_jax.inference import scheduler as schedule_module
from zip_rc_jax.inference.engine import Engine, ResultEvent
from zip_rc_jax.models.transformer import param_axes
from zip_rc_jax.runtime.sharding import DECODE_RULES, Layout, make_mesh

PROMPTS = ("x", "y y", "z", "x y z", "y", "z z z z")


SEARCH = DecodeConfig(n=3, interval=4, window=3, max_tokens=24, alpha=0.5, beta=0.1)


CONFIGS = {
    "published": (SEARCH, MIXED),
    "branching": (dataclasses.replace(SEARCH, candidates="branching", alpha=1.0), FORKING),
    "fixed": (dataclasses.replace(SEARCH, strategy="fixed"), MIXED),
}


def rounded_to(step):
    """Another ladder of shapes: multiples of `step`."""

    def bucket(size, most=None, least=8):
        wanted = -(-max(size, 1) // step) * step
        return wanted if most is None else min(wanted, most)

    return bucket


def decoded(name, prompts, rows=16, devices=1, lazy=False, buckets=False, seed=7):
    config, script = CONFIGS[name]
    network = ScriptedNetwork(layout=Layout(make_mesh(data=devices), DECODE_RULES))
    lm = dataclasses.replace(script.lm(), layout=network.layout)
    with pytest.MonkeyPatch.context() as patch:
        if buckets:
            for module in (engine_module, running_module):
                patch.setattr(module, "bucket", rounded_to(6))
            for module in (engine_module, running_module, schedule_module):
                patch.setattr(
                    module,
                    "fine_bucket",
                    lambda tokens, most, least=64: min(-(-tokens // 20) * 20, most),
                )
        engine = Engine(lm, dataclasses.replace(config, max_num_seqs=rows), seed, network)
        events = list(engine.run(iter(prompts) if lazy else prompts))
    found = {e.prompt_index: e.result for e in events if isinstance(e, ResultEvent)}
    return [found[i] for i in range(len(prompts))], events


@functools.cache
def alone(name, prompt):
    return decoded(name, [prompt], rows=4)[0][0]


def same(a, b, longest=32):
    """Tokens and decisions are equal, and what is predicted up to rounding; `longest` is the
    largest length that can be, in tokens."""
    assert exact(a) == exact(b)
    assert (a.usage.tokens, a.usage.serial_steps) == (b.usage.tokens, b.usage.serial_steps)
    for x, y in zip((*a.trace, *a.prefixes), (*b.trace, *b.prefixes), strict=True):
        np.testing.assert_allclose(x.expected_reward, y.expected_reward, atol=1e-5)
        np.testing.assert_allclose(x.expected_remaining, y.expected_remaining, atol=1e-5 * longest)
    np.testing.assert_allclose(
        [d.utility for d in a.trace], [d.utility for d in b.trace], atol=1e-5
    )


def on_mesh(lm, data, tensor):
    layout = Layout(make_mesh(data=data, tensor=tensor), DECODE_RULES)
    axes = {"body": param_axes(lm.config), "zip_rows": ("cells", "embed")}
    return dataclasses.replace(lm, layout=layout, params=layout.shard(lm.params, axes))
