"""Everyday options: top_k=-1, a repetition penalty, the checkpoint's own sampling values, system
prompts, and going on with a turn.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from harness.engines import REAL, REAL_PROMPTS, exact
from harness.forwards import full
from harness.small_tokenizers import chatml, gemma, llama
from harness.tiny import TINY_GRID, TINY_MODEL, tiny_lm
from zip_rc_jax import DecodeConfig, LanguageModel, Request, UsageError, decode, load
from zip_rc_jax.config import PipelineConfig, SamplingConfig
from zip_rc_jax.inference.api import Decoder, resolve
from zip_rc_jax.inference.engine import Engine
from zip_rc_jax.inference.sampler import Filters, Sampling, penalized, seen_tokens
from zip_rc_jax.models.io.generation import sampling_values
from zip_rc_jax.models.io.load import export
from zip_rc_jax.models.io.tokenizer import Tokenizer

SMALL = dataclasses.replace(REAL, n=2, strategy="fixed", max_tokens=12)


# ---- top_k


def test_a_top_k_of_minus_one_is_off_as_in_vllm():
    assert SamplingConfig(top_k=-1) == SamplingConfig()
    assert DecodeConfig(top_k=-1) == DecodeConfig()
    assert Request("x", top_k=-1).over(DecodeConfig(top_k=5)) == DecodeConfig()
    with pytest.raises(UsageError, match="top_k=-2"):
        DecodeConfig(top_k=-2)


# ---- repetition penalty


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.4])
def test_the_penalty_is_hugging_faces(penalty):
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (5, 40)).astype(np.float32)
    tokens = rng.integers(0, 40, (5, 12)).astype(np.int32)
    lengths = np.array([1, 3, 12, 7, 5], np.int32)
    seen = seen_tokens(jnp.asarray(tokens), jnp.asarray(lengths), 40)
    found = np.asarray(penalized(jnp.asarray(logits), seen, jnp.full(5, penalty, jnp.float32)))
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    for row, (ids, length) in enumerate(zip(tokens, lengths, strict=True)):
        theirs = processor(
            torch.tensor(ids[None, :length], dtype=torch.long), torch.tensor(logits[row : row + 1])
        )
        np.testing.assert_allclose(found[row], theirs.numpy()[0], rtol=3e-7)
    if penalty == 1:
        np.testing.assert_array_equal(found, logits)


def test_greedy_decoding_with_a_penalty_takes_the_likeliest_of_the_penalized_logits(lm):
    """Step by step against full forwards: over prompt and generated tokens, before the argmax."""
    config = dataclasses.replace(SMALL, n=1, temperature=0.0, repetition_penalty=1.8)
    for result in decode(lm, REAL_PROMPTS[:3], config):
        ids, expected = list(result.prompt_token_ids), []
        for _ in result.prefixes[0].token_ids:
            padded = np.zeros((1, 48), np.int32)
            padded[0, : len(ids)] = ids
            logits = full(lm.config, lm.params["body"], padded)[0, len(ids) - 1].copy()
            seen = sorted(set(ids))
            logits[seen] = np.where(logits[seen] < 0, logits[seen] * 1.8, logits[seen] / 1.8)
            logits[~lm.head.sampleable(lm.config.vocab_size)] = -np.inf
            expected.append(int(logits.argmax()))
            ids.append(expected[-1])
        assert result.prefixes[0].token_ids == tuple(expected)
    plain = decode(lm, REAL_PROMPTS[:3], dataclasses.replace(config, repetition_penalty=1.0))
    penalty = decode(lm, REAL_PROMPTS[:3], config)
    assert [exact(r) for r in plain] != [exact(r) for r in penalty]


def test_a_penalty_concerns_its_own_request_alone(lm):
    """The others run in the same program and keep every token."""
    prompts = [REAL_PROMPTS[0], Request(REAL_PROMPTS[1], repetition_penalty=2.5), REAL_PROMPTS[2]]
    found, plain = decode(lm, prompts, SMALL), decode(lm, REAL_PROMPTS[:3], SMALL)
    (alone,) = decode(lm, [REAL_PROMPTS[1]], SMALL, repetition_penalty=2.5)
    assert [exact(found[0]), exact(found[2])] == [exact(plain[0]), exact(plain[2])]
    assert exact(found[1]) == exact(alone) != exact(plain[1])


def test_it_is_compiled_where_a_row_has_one():
    assert not Filters.of([SamplingConfig()]).repetition
    assert Filters.of([SamplingConfig(), SamplingConfig(repetition_penalty=1.1)]).repetition
    assert Filters.of([SamplingConfig(temperature=0, repetition_penalty=1.1)]).repetition, (
        "greedy too"
    )
    assert Sampling.stack([SamplingConfig(repetition_penalty=1.5)]).repetition_penalty.tolist() == [
        1.5
    ]


@pytest.mark.parametrize("penalty", [0, -1, float("nan"), float("inf"), "x", True])
def test_impossible_penalties_are_refused(penalty):
    with pytest.raises(UsageError, match="repetition_penalty="):
        DecodeConfig(repetition_penalty=penalty)


# ---- the checkpoint's own values

QWEN3 = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.51.0",
}


def test_they_are_read_under_our_names():
    assert sampling_values(QWEN3) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert sampling_values({"do_sample": False, "temperature": 0.6}) == {"temperature": 0.0}
    assert sampling_values({"num_beams": 1, "typical_p": 1.0, "top_p": None, "min_p": 0.1}) == {
        "min_p": 0.1
    }


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({}, "the checkpoint has none"),
        ({"num_beams": 4}, "num_beams=4: nothing here does that"),
        (
            {"no_repeat_ngram_size": 3, "temperature": 0.5, "penalty_alpha": 0.6},
            "no_repeat_ngram_size=3, penalty_alpha=0.6",
        ),
        ({"brand_new": 1}, "brand_new=1"),
    ],
)
def test_what_this_package_does_not_do_is_named(generation, message):
    with pytest.raises(UsageError, match=message):
        sampling_values(generation)


def test_what_the_caller_names_wins_over_the_checkpoint():
    asked = resolve(None, {"generation_config": True, "top_p": 1.0, "n": 2}, None, QWEN3)
    assert asked == DecodeConfig(n=2, temperature=0.6, top_k=20), (
        "top_p=1.0 was named, though it is the default"
    )
    config = DecodeConfig(temperature=0.9, generation_config=True)
    assert resolve(config, {}, None, QWEN3) == DecodeConfig(temperature=0.9, top_k=20, top_p=0.95)
    assert resolve(DecodeConfig(), {}, None, QWEN3) == DecodeConfig(), "only on request"
    with pytest.raises(
        UsageError, match=r"temperature=0\.0 with n=8 .*'temperature': 0\.0.* of the checkpoint"
    ):
        resolve(None, {"generation_config": True}, None, {"do_sample": False})
    with pytest.raises(UsageError, match=r"temperature=-3.* of the checkpoint"):
        resolve(None, {"generation_config": True}, None, {"temperature": -3, "do_sample": True})


def test_checkpoints_keep_them(tmp_path):
    lm = dataclasses.replace(
        tiny_lm(dataclasses.replace(TINY_MODEL, qk_norm=True, n_layers=1)), generation_config=QWEN3
    )
    export(lm, tmp_path / "hf")
    hugging_face = load(tmp_path / "hf").generation_config
    assert hugging_face == QWEN3 | {"eos_token_id": list(lm.tokenizer.eos_ids)}
    lm.save(tmp_path / "ours")
    assert load(tmp_path / "ours").generation_config == QWEN3
    assert Decoder(load(tmp_path / "ours"), n=2, generation_config=True).config == DecodeConfig(
        n=2, temperature=0.6, top_k=20, top_p=0.95
    )


def test_nothing_ignores_the_switch(lm):
    with pytest.raises(UsageError, match="the checkpoint has none"):
        Decoder(lm, generation_config=True)
    with pytest.raises(UsageError, match="generation_config=True"):
        Engine(lm, DecodeConfig(generation_config=True), 0)
    for option in (
        {"generation_config": True},
        {"system": "Be brief."},
        {"continue_final_message": True},
    ):
        with pytest.raises(UsageError, match=rf"decode\.{next(iter(option))}="):
            PipelineConfig(decode=DecodeConfig(**option))


# ---- chats

CHAT = [{"role": "user", "content": "What is 17 + 25?"}]
BEGUN = [*CHAT, {"role": "assistant", "content": "The answer is "}]


def processor(tokenizer, **options):
    config = dataclasses.replace(TINY_MODEL, vocab_size=tokenizer.size, max_positions=160)
    lm = LanguageModel.create(config, tokenizer, 5).with_head(TINY_GRID, "value")
    return Engine(lm, dataclasses.replace(SMALL, **options), 0).processor


def test_a_system_prompt_is_the_first_turn_of_every_chat():
    (found,) = processor(chatml(), system="Be brief.").tokenize([CHAT])
    assert found.prompt == chatml().chat([{"role": "system", "content": "Be brief."}, *CHAT])
    own, none = processor(chatml(), system="Be brief.").tokenize(
        [Request(CHAT, system="Be kind."), Request(CHAT, system="")]
    )
    assert own.prompt == chatml().chat([{"role": "system", "content": "Be kind."}, *CHAT])
    assert none.prompt == chatml().chat(CHAT)


@pytest.mark.parametrize(
    "template", [chatml().chat_template, gemma().chat_template, llama().chat_template]
)
@pytest.mark.parametrize("text", ["The answer is ", "The answer is", " 4\n", "x" * 50])
def test_a_turn_is_gone_on_with_where_it_is_in_transformers(template, text):
    tokenizer = Tokenizer(
        chatml().backend, ("<|im_end|>",), template, {"bos_token": "<|endoftext|>"}
    )
    chat = [*CHAT, {"role": "assistant", "content": text}]
    special = {"bos_token": "<|endoftext|>"}
    theirs = tokenizer._hugging_face.apply_chat_template(
        chat, tokenize=False, continue_final_message=True, **special
    )
    assert tokenizer.chat(chat, continue_final_message=True) == theirs
    assert chat[-1]["content"] == text, "the caller's chat is left as it is"


def test_content_in_parts_is_gone_on_with_after_its_last_part():
    parts = [
        *CHAT,
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "The "}, {"type": "text", "text": "answer"}],
        },
    ]
    text = chatml().chat(parts, continue_final_message=True)
    assert text == chatml().chat(
        [*CHAT, {"role": "assistant", "content": "The answer"}], continue_final_message=True
    )
    assert text.endswith("assistant\nThe answer")


def test_going_on_with_a_turn_decodes_what_comes_behind_it():
    (job,) = processor(chatml(), continue_final_message=True).tokenize([BEGUN])
    assert job.prompt.endswith("The answer is ")
    one, other = processor(chatml()).tokenize([Request(BEGUN, continue_final_message=True), BEGUN])
    assert one.prompt == job.prompt
    assert other.prompt == chatml().chat(BEGUN) != job.prompt


@pytest.mark.parametrize(
    ("options", "prompt", "message"),
    [
        (
            {"system": "Be brief."},
            "a text",
            r"system='Be brief\.' for prompt 0: it is a text or token ids",
        ),
        (
            {"system": "Be brief."},
            [5, 6],
            r"system='Be brief\.' for prompt 0: it is a text or token ids",
        ),
        (
            {"system": "Be brief."},
            [{"role": "system", "content": "x"}, *CHAT],
            "has the role system already",
        ),
        (
            {"continue_final_message": True},
            "a text",
            "continue_final_message=True for prompt 0: it is a text",
        ),
        ({"continue_final_message": True}, CHAT, "its last turn has the role 'user'"),
        (
            {"continue_final_message": True},
            [*CHAT, {"role": "assistant", "tool_calls": [{}]}],
            "the last turn has no text",
        ),
    ],
)
def test_options_of_chats_that_nothing_would_read_are_refused(options, prompt, message):
    with pytest.raises(UsageError, match=message):
        processor(chatml(), **options).tokenize([prompt])


def test_a_template_that_drops_the_turn_to_continue_is_refused():
    tokenizer = Tokenizer(chatml().backend, ("<|im_end|>",), "{{ messages[0].content }}")
    with pytest.raises(UsageError, match="leaves the last turn out, or changes its text"):
        tokenizer.chat(BEGUN, continue_final_message=True)


def test_the_switch_is_no_variable_of_the_template():
    with pytest.raises(UsageError, match="pass continue_final_message=True beside it"):
        decode(tiny_lm(), [CHAT], SMALL, chat_template_kwargs={"continue_final_message": True})


@pytest.mark.parametrize("system", [5, "\udcff", None])
def test_a_system_prompt_is_a_text(system):
    with pytest.raises(UsageError, match="system="):
        DecodeConfig(system=system)
