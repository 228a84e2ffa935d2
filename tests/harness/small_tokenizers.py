"""Small real tokenizers, built like those of published model families."""

from __future__ import annotations

import functools
import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from zip_rc_jax.models.io.tokenizer import Tokenizer

SENTENCES = [
    "What is 17 + 25? The answer is 42, and the answer to the next question is 43.",
    "State the final answer to the following arithmetic problem: 4 + 3 - 2 + 9 =",
    "You are a helpful assistant. Think step by step, then answer the user's question.",
    "def f(x):\n    return x + 1\n\n\nprint(f(41))",
    "Größe, été, niño, ещё, 数学, العدد.",
]
# Qwen3's template, shortened: system turn, tools, and an empty thought when thinking is switched
# off.
CHATML_TEMPLATE = """{%- if tools %}
    {{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('Unknown role ' + message.role) }}
    {%- endif %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- message.content + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
GEMMA_TEMPLATE = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""  # noqa: E501
LLAMA_TEMPLATE = """{{- bos_token }}
{%- if date_string is not defined %}{% set date_string = '26 Jul 2024' %}{% endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}
{%- endfor %}
{{- '<|reserved_special_token_3|>' + date_string }}"""  # noqa: E501
QWEN_SPLIT = (
    # as published
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(split: pre_tokenizers.PreTokenizer, size: int = 400) -> tokenizers.Tokenizer:
    """Byte-level BPE trained on `SENTENCES`: `size` ids at most, no special tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


def qwen_split() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@functools.cache
def chatml() -> Tokenizer:
    """Qwen-like: special tokens behind the vocabulary, NFC, thinking that can be switched off."""
    backend = byte_level(qwen_split())
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens(["<think>", "</think>"])
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return Tokenizer(backend, ("<|im_end|>", "<|endoftext|>"), CHATML_TEMPLATE, special)


UNUSED = 30


@functools.cache
def gemma() -> Tokenizer:
    """Gemma-like: "▁" for spaces, byte fallback, and `<unusedN>` among the first ids."""
    named = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        *(f"<unused{i}>" for i in range(UNUSED)),
        "<start_of_turn>",
        "<end_of_turn>",
    ]
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    backend.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=len(named) + 256 + 150,
            special_tokens=[*named, *fallback],
            show_progress=False,
        ),
    )
    state = json.loads(backend.to_str())
    # Only <unusedN> and bytes are ordinary tokens; bytes are not searched for in the text.
    state["added_tokens"] = [
        t | {"special": "unused" not in t["content"]}
        for t in state["added_tokens"]
        if t["content"] in named
    ]
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    special = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    return Tokenizer(backend, ("<eos>", "<end_of_turn>"), GEMMA_TEMPLATE, special)


RESERVED = 40


@functools.cache
def llama() -> Tokenizer:
    """Llama-3-like: `<|reserved_special_token_N|>` behind the vocabulary; number 1 pads, and the
    template writes number 3."""
    backend = byte_level(qwen_split(), size=350)
    named = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    backend.add_special_tokens(
        [*named, *(f"<|reserved_special_token_{i}|>" for i in range(RESERVED))]
    )
    special = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|reserved_special_token_1|>",
    }
    return Tokenizer(backend, ("<|eot_id|>", "<|end_of_text|>"), LLAMA_TEMPLATE, special)
