"""A published model that reasons, from its GGUF file to the answer: Qwen2.5-Coder-0.5B-Instruct
(fetched by `make qwen`), beside what `transformers` makes of the same file."""

from __future__ import annotations

import re
import unicodedata

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import zip_rc_jax
from zip_rc_jax.grid import Grid
from zip_rc_jax.models.io.load import load
from zip_rc_jax.models.transformer import forward_packed, logits, unembedding

pytestmark = pytest.mark.slow  # each of the two readers takes half a minute

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
QUESTIONS = [
    "Anna has 12 apples and gives 5 away. How many are left?",
    "What is the greatest common divisor of 84 and 36?",
    "Write a function that reverses a list.",
    "Solve for x: 3*x + 4 = 19",
]
TOKENS = 48
STRINGS = [
    *QUESTIONS,
    "",
    " ",
    "\n",
    "  two  spaces\tand a tab \n\n new lines\r\n",
    "1234567890 3.14159 -17 1,000,000 ½ ²",
    "it's we'll I'D they've 'quoted'",
    "def f(x):\n    return x**2  # comment\n\n\nclass A:\n\tpass",
    "naïve café über straße ñandú",
    "日本語のテキスト 한국어 العربية עברית हिन्दी",
    "cafe\u0301 is normalised to café",
    "emoji 🙂👩‍👩‍👧 and surrogates 𝒳",
    "<|im_start|>user\nHi<|im_end|>\n",
    "<|endoftext|> in the middle <|fim_prefix|>",
    "\\boxed{\\frac{3}{4}} $x^2$",
    "a" * 200,
    "<tool_call>{}</tool_call>",
]
CHATS = [
    [{"role": "user", "content": "What is 17 + 25?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ],
]


@pytest.fixture(scope="module")
def qwen(qwen_gguf):
    return load(qwen_gguf)


@pytest.fixture(scope="module")
def their_tokenizer(qwen_gguf):
    return AutoTokenizer.from_pretrained(qwen_gguf.parent, gguf_file=qwen_gguf.name)


@pytest.fixture(scope="module")
def their_model(qwen_gguf):
    """The same file, with the weights and sizes that `transformers` reads there."""
    config = AutoConfig.from_pretrained(qwen_gguf.parent, gguf_file=qwen_gguf.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(qwen_gguf, return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(tensors)
    return model


def prompts(lm):
    return [
        lm.tokenizer.chat([{"role": "user", "content": f"{question}\n{INSTRUCTION}"}])
        for question in QUESTIONS
    ]


def test_the_file_says_what_it_is(qwen):
    c = qwen.config
    assert (c.vocab_size, c.d_model, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.d_ff) == (
        151_936,
        896,
        24,
        14,
        2,
        64,
        4864,
    )
    assert (c.rope_theta, c.rms_eps, c.tied, c.max_positions) == (1e6, 1e-6, False, 32_768)
    assert (c.attention_bias, c.has_output_bias, c.qk_norm) == (True, False, False)
    assert qwen.tokenizer.eos_tokens == ("<|im_end|>", "<|endoftext|>")


def test_the_head_takes_the_rows_behind_the_last_id_of_the_tokenizer(qwen, their_tokenizer):
    padding = re.compile(r"\[PAD[0-9]+\]")  # llama.cpp's names of rows without a token
    names = their_tokenizer.get_vocab()
    assert max(i for name, i in names.items() if not padding.fullmatch(name)) == 151_664
    free = qwen.tokenizer.free_ids(qwen.config.vocab_size)
    assert np.flatnonzero(free).tolist() == list(range(151_665, 151_936))
    lm = qwen.with_head(Grid.authors("value"), "value")
    assert (lm.head.first_id, lm.config.vocab_size) == (151_665, 151_936)


def test_texts_become_the_ids_that_transformers_makes_of_them(qwen, their_tokenizer):
    for text in STRINGS:
        # Qwen's own tokenizer.json composes characters first. A GGUF file does not say so, and
        # transformers leaves it out.
        composed = unicodedata.normalize("NFC", text)
        ids = their_tokenizer(composed, add_special_tokens=False)["input_ids"]
        assert qwen.tokenizer.encode(text) == ids, text
        theirs = their_tokenizer.decode(ids, skip_special_tokens=False)
        assert qwen.tokenizer.backend.decode(ids, skip_special_tokens=False) == theirs, text


@pytest.mark.parametrize("number", range(len(CHATS)))
def test_chats_become_the_prompts_of_the_own_template(qwen, their_tokenizer, number):
    theirs = their_tokenizer.apply_chat_template(
        CHATS[number], tokenize=False, add_generation_prompt=True
    )
    assert qwen.tokenizer.chat(CHATS[number]) == theirs


def test_logits_equal_those_of_transformers(qwen, their_model):
    for prompt in prompts(qwen):
        ids = np.array([qwen.tokenizer.encode(prompt)], np.int32)
        hidden = forward_packed(
            qwen.config,
            qwen.params["body"],
            jnp.asarray(ids),
            jnp.arange(ids.shape[1])[None],
            jnp.zeros(ids.shape, jnp.int32),
            layout=qwen.layout,
        )
        ours = logits(qwen.config, hidden, unembedding(qwen.config, qwen.params["body"]))
        with torch.no_grad():
            theirs = their_model(torch.from_numpy(ids).long()).logits.numpy()
        np.testing.assert_allclose(np.asarray(ours), theirs, atol=2e-3, rtol=0)
        assert theirs.std() > 1  # so that the tolerance means something


def test_greedy_continuations_equal_those_of_transformers(qwen, their_model):
    """Through our engine (rows, cache, head attached, reserved ids masked) and through
    `generate`."""
    texts = prompts(qwen)
    lm = qwen.with_head(Grid.authors("correct"), "correct")
    results = zip_rc_jax.decode(
        lm, texts, strategy="fixed", n=1, interval=16, window=1, max_tokens=TOKENS, temperature=0
    )
    for text, result in zip(texts, results, strict=True):
        ids = torch.tensor([qwen.tokenizer.encode(text)])
        row = their_model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=list(qwen.tokenizer.eos_ids),
            pad_token_id=0,
            repetition_penalty=1.0,
        )[0, ids.shape[1] :].tolist()
        mine = list(result.prefixes[0].token_ids)
        assert mine == row[: len(mine)], text
        assert len(mine) == TOKENS or mine[-1] in qwen.tokenizer.eos_ids
