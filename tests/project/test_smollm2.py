"""A real published model, from its GGUF file to the answer: SmolLM2-135M-Instruct (fetched by `make
smollm2`)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zip_rc_jax
from zip_rc_jax.config.files import load_config
from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.collect import run_all
from zip_rc_jax.inference.engine import Engine
from zip_rc_jax.models.io.load import export, load
from zip_rc_jax.pipeline.policy import solution_rollouts

pytestmark = pytest.mark.slow  # reading the file takes ten seconds

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis in one sentence.",
    "List three prime numbers.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Hamlet?",
    "def fibonacci(n):",
    "What is 7 plus 5?",
    "Name a mammal that lays eggs.",
    "Why is the sky blue?",
]
TOKENS = 64


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    return load(smollm2_gguf)


@pytest.fixture(scope="module")
def exported(smollm2, tmp_path_factory):
    """The same weights as a Hugging Face directory; float32, so that both engines compute with the
    same numbers."""
    directory = tmp_path_factory.mktemp("export") / "smollm2"
    export(smollm2, directory, dtype=np.float32)
    return directory


def test_the_file_says_what_it_is(smollm2):
    c = smollm2.config
    assert (c.vocab_size, c.d_model, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.d_ff) == (
        49152,
        576,
        30,
        9,
        3,
        64,
        1536,
    )
    assert (c.rope_theta, c.rms_eps, c.tied, c.max_positions) == (100000.0, 1e-5, True, 8192)
    assert smollm2.tokenizer.eos_tokens == ("<|im_end|>", "<|endoftext|>")
    assert "SmolLM" in smollm2.tokenizer.chat([{"role": "user", "content": "Hi"}])


def test_all_its_ids_are_in_use_so_the_head_gets_new_rows(smollm2):
    lm = smollm2.with_head(Grid.authors("value"), "value")
    assert (lm.head.first_id, lm.config.vocab_size) == (49152, 49280)


def test_worked_solutions_stand_behind_its_own_chat_template_and_end_as_it_ends_a_turn(smollm2):
    config = load_config("configs/smollm2_sums.yaml", ["policy.examples=6"])
    theirs = smollm2.tokenizer
    for rollout in solution_rollouts(config, theirs):
        turns = [
            {"role": "system", "content": config.prompt.system},
            {"role": "user", "content": rollout.question},
        ]
        assert rollout.prompt == theirs.chat(turns)
        assert (
            theirs.backend.decode(list(rollout.prompt_token_ids), skip_special_tokens=False)
            == rollout.prompt
        )
        written = theirs.backend.decode(list(rollout.output_token_ids), skip_special_tokens=False)
        assert written == f"{rollout.response}<|im_end|>"


def test_greedy_continuations_equal_those_of_transformers(smollm2, exported):
    """64 tokens of 10 prompts, through our engine (paged rows, cache, head attached) and through
    `generate`."""
    prompts = [smollm2.tokenizer.chat([{"role": "user", "content": q}]) for q in QUESTIONS]
    config = zip_rc_jax.DecodeConfig(
        strategy="fixed",
        n=1,
        max_num_seqs=10,
        interval=16,
        window=1,
        max_tokens=TOKENS,
        temperature=0,
    )
    results = run_all(
        Engine(smollm2.with_head(Grid.authors("correct"), "correct"), config, 0), prompts
    )
    ours = [list(r.prefixes[0].token_ids) for r in results]

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32),
        AutoTokenizer.from_pretrained(exported),
    )
    batch = tokenizer(
        prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )
    found = model.generate(
        **batch,
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=list(smollm2.tokenizer.eos_ids),
        pad_token_id=0,
        repetition_penalty=1.0,
    )
    for prompt, mine, row in zip(
        QUESTIONS, ours, found[:, batch["input_ids"].shape[1] :].tolist(), strict=True
    ):
        assert mine == row[: len(mine)], prompt
        assert len(mine) == TOKENS or mine[-1] in smollm2.tokenizer.eos_ids
