"""Loading a checkpoint of several gigabytes needs memory for its parameters and about one tensor,
measured in a process of its own."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from harness.small_tokenizers import chatml
from zip_rc_jax.config import ModelConfig
from zip_rc_jax.models.io import huggingface
from zip_rc_jax.models.io.families import tensors, write_config
from zip_rc_jax.models.io.huggingface import write_checkpoint

MB = 10**6
# The layers of Qwen3-1.7B, fewer of them and a smaller vocabulary: 2.4 GB in bfloat16 with an
# embedding of 410 MB.
MODEL = ModelConfig(
    vocab_size=100_096, d_model=2048, n_layers=20, n_heads=16, n_kv_heads=8, head_dim=128,
    d_ff=6144, tied=True, max_positions=4096
)  # fmt: skip
CHILD = """
import json, re, resource, sys, time
import jax, jax.numpy as jnp
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast  # `load` needs them; they are not what it loads
from zip_rc_jax import load

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

jnp.zeros(1).block_until_ready()
before, started = resident(), time.monotonic()
lm = load(sys.argv[1], dtype=jnp.dtype(sys.argv[2]))
jax.block_until_ready(lm.params)
seconds, after = time.monotonic() - started, resident()
# Not ru_maxrss: it also holds what the process that started this one had.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
params = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
print(json.dumps({"peak": peak - before, "after": after - before, "params": params, "seconds": seconds}))
"""  # noqa: E501


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The directory, and the bytes of its files and of its largest tensor."""
    directory = tmp_path_factory.mktemp("large") / "model"
    family, settings = write_config(MODEL)
    wanted = list(tensors(family, MODEL))
    largest = max(math.prod(tensor.shape) for tensor in wanted)
    numbers = np.random.default_rng(0).standard_normal(2**20, np.float32) * np.float32(0.02)
    numbers = np.resize(numbers.astype(ml_dtypes.bfloat16), largest)  # the same for every tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface, "SHARD_BYTES", 500 * MB)
        found = (
            (tensor.name, numbers[: math.prod(tensor.shape)].reshape(tensor.shape))
            for tensor in wanted
        )
        write_checkpoint(directory, settings, found, chatml(), "bfloat16")
    shards = list(directory.glob("model-*.safetensors"))
    assert len(shards) > 3
    yield directory, sum(path.stat().st_size for path in shards), numbers.nbytes
    shutil.rmtree(directory)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_holds_the_parameters_and_at_most_one_tensor_more(checkpoint, dtype):
    directory, size, largest = checkpoint
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu"
    }
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(directory), dtype],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = json.loads(child.stdout.splitlines()[-1])
    print(
        f"\n{size / 1e9:.2f} GB of bfloat16 (largest tensor {largest / MB:.0f} MB) as {dtype}: "
        f"{found['seconds']:.1f} s, "
        f"{size / 1e9 / found['seconds']:.2f} GB/s; parameters {found['params'] / MB:.0f} MB, "
        f"resident afterwards {found['after'] / MB:.0f} MB, peak {found['peak'] / MB:.0f} MB"
    )
    assert found["params"] == pytest.approx(size * (2 if dtype == "float32" else 1), rel=1e-3)
    assert found["peak"] <= found["params"] + largest
