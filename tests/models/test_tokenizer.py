"""Tokenizers of published models: the same ids and prompts as transformers gives, and ids that are
really never emitted."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from harness.small_tokenizers import (
    CHATML_TEMPLATE,
    RESERVED,
    SENTENCES,
    UNUSED,
    byte_level,
    chatml,
    gemma,
    llama,
)
from zip_rc_jax.models.io.tokenizer import PROBE, Tokenizer, word_level
from zip_rc_jax.runtime.errors import UsageError

FAMILIES = [chatml, gemma, llama]
CHAT = [{"role": "user", "content": "What is 17 + 25?"}]
LONG_CHAT = [
    {"role": "user", "content": "  été <|im_end|> \n"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "数学 & <b>?"},
]
TEXTS = [
    *SENTENCES,
    PROBE,
    "",
    " ",
    "<|im_start|>user\nhi<|im_end|>\n<think>",
    "<bos><start_of_turn>user\nhi",
    "e\u0301te\u0301",
    "\x00",
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A Hugging Face directory per family, written by transformers alone."""
    found = {}
    for family in FAMILIES:
        ours, path = family(), tmp_path_factory.mktemp(family.__name__)
        theirs = PreTrainedTokenizerFast(
            tokenizer_object=ours.backend, chat_template=ours.chat_template, **ours.special_tokens
        )
        theirs.save_pretrained(str(path))
        (path / "generation_config.json").write_text(
            json.dumps({"eos_token_id": list(ours.eos_ids)})
        )
        found[family] = path
    return found


# ---- Hugging Face directories


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_gives_the_ids_and_prompts_that_transformers_gives(directories, family):
    theirs, ours = (
        AutoTokenizer.from_pretrained(str(directories[family])),
        Tokenizer.from_pretrained(directories[family]),
    )
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == theirs.decode(
            theirs.encode(text, add_special_tokens=False), skip_special_tokens=True
        )
    for chat in (CHAT, LONG_CHAT):
        rendered = ours.chat(chat)
        assert rendered == theirs.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
        tokens = theirs.apply_chat_template(
            chat, tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert ours.encode(rendered) == tokens
    assert (ours.eos_ids, ours.size) == (family().eos_ids, len(theirs))
    assert (ours.chat_template, ours.special_tokens) == (
        theirs.chat_template,
        theirs.special_tokens_map,
    )


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        (None, None, ["<|im_end|>"]),
        ([400, 402], None, ["<|im_end|>", "<|endoftext|>"]),
        (400, 401, ["<|im_end|>", "<|endoftext|>", "<|im_start|>"]),
        (None, [401], ["<|im_end|>", "<|im_start|>"]),
        ({}, {}, ["<|im_end|>"]),
    ],
)
def test_all_end_of_sequence_ids_are_found(directories, tmp_path, generation, config, wanted):
    shutil.copytree(directories[chatml], tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").unlink()
    for name, ids in (("generation_config.json", generation), ("config.json", config)):
        if ids is not None:
            (tmp_path / "m" / name).write_text(
                json.dumps({"eos_token_id": ids} if ids != {} else {})
            )
    found = Tokenizer.from_pretrained(tmp_path / "m")
    assert list(found.eos_tokens) == wanted
    assert [found.backend.id_to_token(i) for i in found.eos_ids] == wanted


def test_directories_that_hold_no_usable_tokenizer_are_refused(directories, tmp_path):
    with pytest.raises(
        UsageError,
        match=r"tokenizer .*: there is none of tokenizer\.json.*complete Hugging Face directory",
    ):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(UsageError, match="there is none of"):
        Tokenizer.from_pretrained(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="download it again"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "ByT5Tokenizer"})
    )
    with pytest.raises(UsageError, match="ByT5Tokenizer is a slow tokenizer"):
        Tokenizer.from_pretrained(tmp_path / "slow")
    shutil.copytree(directories[chatml], tmp_path / "eos")
    (tmp_path / "eos" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [402, 999]})
    )
    with pytest.raises(UsageError, match=r"end-of-sequence ids \[402, 999\] are not all tokens"):
        Tokenizer.from_pretrained(tmp_path / "eos")


def test_a_text_is_never_cut_even_if_the_publisher_says_so(directories, tmp_path):
    shutil.copytree(directories[chatml], tmp_path / "m")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
    backend.enable_truncation(5)
    backend.enable_padding(length=500)
    backend.save(str(tmp_path / "m" / "tokenizer.json"))
    assert Tokenizer.from_pretrained(tmp_path / "m").encode(PROBE) == chatml().encode(PROBE)


@pytest.mark.parametrize("make", [*FAMILIES, lambda: word_level(["a", "b"])])
def test_what_we_write_is_what_transformers_and_we_read(tmp_path, make):
    ours = make()
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file() == (ours.chat_template is not None)
    assert (
        json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )
    theirs, again = (
        AutoTokenizer.from_pretrained(str(tmp_path)),
        Tokenizer.from_pretrained(tmp_path),
    )
    for text in TEXTS if ours.chat_template else ["a b", "b a a"]:
        assert (
            ours.encode(text) == theirs.encode(text, add_special_tokens=False) == again.encode(text)
        )
    assert theirs.eos_token == ours.eos_tokens[0] == again.eos_tokens[0]
    assert theirs.chat_template == ours.chat_template == again.chat_template
    if ours.chat_template:
        assert (
            theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
            == ours.chat(CHAT)
            == again.chat(CHAT)
        )


@pytest.mark.parametrize("make", [*FAMILIES, lambda: word_level(["a", "b"])])
def test_a_tokenizer_survives_json(make):
    ours = make()
    again = Tokenizer.from_dict(json.loads(json.dumps(ours.to_dict())))
    assert again.to_dict() == ours.to_dict()
    assert (again.eos_ids, again.size, again.template_hash) == (
        ours.eos_ids,
        ours.size,
        ours.template_hash,
    )
    assert again.encode("a b") == ours.encode("a b")
    np.testing.assert_array_equal(again.unused_ids(600), ours.unused_ids(600))


# ---- text


def test_words_that_the_vocabulary_lacks_are_refused_and_byte_level_lacks_none():
    words = word_level(["a", "b"])
    assert words.encode("b a <eos>") == [3, 2, 0]
    with pytest.raises(
        UsageError, match=r"text with \['c'\]: the tokenizer's vocabulary lacks these words"
    ):
        words.encode("a c")
    for family in FAMILIES:
        assert family().decode(family().encode(PROBE)) == PROBE
    assert gemma().encode("<unk>") == [3], (
        "a special token that the text spells out is no unknown word"
    )


def test_end_of_sequence_tokens_must_exist():
    for eos in ((), ("<nope>",), ("<|im_end|>", "<nope>")):
        with pytest.raises(UsageError, match="the tokenizer does not know them all"):
            Tokenizer(chatml().backend, eos)


# ---- chat


@pytest.mark.parametrize(
    "arguments",
    [{}, {"enable_thinking": True}, {"enable_thinking": False}, {"tools": [{"name": "f"}]}],
)
def test_template_arguments_reach_the_template(directories, arguments):
    theirs = AutoTokenizer.from_pretrained(str(directories[chatml]))
    wanted = theirs.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True, **arguments
    )
    assert chatml().chat(CHAT, **arguments) == wanted
    assert ("<think>\n\n</think>" in wanted) == (arguments.get("enable_thinking") is False)
    assert ('"name": "f"' in wanted) == ("tools" in arguments)


def test_a_variable_with_a_default_may_be_set():
    assert llama().chat(CHAT).endswith("26 Jul 2024")
    assert llama().chat(CHAT, date_string="today").endswith("<|reserved_special_token_3|>today")


@pytest.mark.parametrize(
    "name",
    [
        "enable_thinkin",
        "add_generation_prompt",
        "tokenize",
        "eos_token",
        "raise_exception",
        "message",
    ],
)
def test_arguments_that_the_template_does_not_take_are_refused(name):
    with pytest.raises(
        UsageError,
        match=rf"argument '{name}': the model's template takes no such.*takes enable_thinking, "
        r"tools",
    ):
        chatml().chat(CHAT, **{name: True})
    with pytest.raises(UsageError, match="takes no such argument"):
        llama().chat(CHAT, enable_thinking=False)


def test_what_the_template_refuses_is_told_in_its_own_words():
    with pytest.raises(UsageError, match=r"refuses them \(System role not supported\)"):
        gemma().chat([{"role": "system", "content": "x"}, *CHAT])
    with pytest.raises(UsageError, match=r"refuses them \(Unknown role tool\)"):
        chatml().chat([{"role": "tool", "content": "x"}])
    with pytest.raises(UsageError, match=r"turn 0 of role 'user': it has no content"):
        chatml().chat([{"role": "user"}])
    parts = [{"type": "text", "text": "x"}]
    assert chatml().chat([{"role": "user", "content": parts}]) == chatml().chat(
        [{"role": "user", "content": "x"}]
    )


@pytest.mark.parametrize("messages", [[], "hello", ["hello"], [{"content": "x"}], [CHAT], 3])
def test_what_is_no_chat_is_refused(messages):
    with pytest.raises(UsageError, match="a chat is a list of dicts with a role"):
        chatml().chat(messages)


def test_without_a_template_only_raw_prompts_are_possible():
    plain = Tokenizer(chatml().backend, ("<|im_end|>",))
    assert plain.template_hash is None
    with pytest.raises(
        UsageError, match="the tokenizer has no chat template. Fix: pass raw prompts"
    ):
        plain.chat(CHAT)


def test_a_template_that_is_not_jinja_is_refused():
    for template in ("{% if %}", "{% for x in y %}"):
        broken = Tokenizer(chatml().backend, ("<|im_end|>",), template)
        with pytest.raises(UsageError, match="is not valid Jinja|refuses them"):
            broken.chat(CHAT)
        with pytest.raises(UsageError, match="is not valid Jinja"):
            broken.chat(CHAT, enable_thinking=False)


def test_the_hash_names_the_template():
    assert chatml().template_hash == hashlib.blake2b(CHATML_TEMPLATE.encode()).hexdigest()[:16]
    assert (
        Tokenizer(chatml().backend, ("<|im_end|>",), CHATML_TEMPLATE + " ").template_hash
        != chatml().template_hash
    )


# ---- unused ids


def named_unused(tokenizer, vocab_size):
    return [
        tokenizer.backend.id_to_token(int(i))
        for i in np.flatnonzero(tokenizer.unused_ids(vocab_size))
    ]


def test_holes_and_rows_beyond_the_tokenizer_are_unused():
    backend = tokenizers.Tokenizer(
        models.WordLevel({"<eos>": 0, "a": 2, "b": 5}, unk_token="<eos>")
    )
    assert np.flatnonzero(Tokenizer(backend, ("<eos>",)).unused_ids(9)).tolist() == [
        1,
        3,
        4,
        6,
        7,
        8,
    ]
    assert Tokenizer(backend, ("<eos>",)).unused_ids(4).tolist() == [False, True, False, True], (
        "a model may have fewer rows"
    )


def test_placeholders_are_unused_except_those_with_a_role_or_in_the_template():
    assert named_unused(gemma(), gemma().size) == [f"<unused{i}>" for i in range(UNUSED)]
    assert named_unused(chatml(), chatml().size + 2) == [None, None]
    free = [f"<|reserved_special_token_{i}|>" for i in range(RESERVED) if i not in (1, 3)]
    assert named_unused(llama(), llama().size) == free
    ends = Tokenizer(llama().backend, ("<|eot_id|>", "<|reserved_special_token_7|>"))
    assert "<|reserved_special_token_7|>" not in named_unused(ends, ends.size)
    assert "<|reserved_special_token_3|>" in named_unused(ends, ends.size), (
        "no template mentions it"
    )


@pytest.mark.parametrize(
    ("name", "placeholder"),
    [
        ("<unused12>", True),
        ("[unused12]", True),
        ("<|reserved_special_token_247|>", True),
        ("<|reserved_12|>", True),
        ("<SPECIAL_12>", True),
        ("<reserved_12>", True),
        ("<extra_id_12>", True),
        ("<|dummy_12|>", True),
        ("<|placeholder1|>", True),
        ("[PAD151669]", True),
        ("<unused>", False),
        ("<unused12", False),
        ("a<unused12>", False),
        ("<0x0A>", False),
        ("<|image_1|>", False),
        ("[PAD]", False),
    ],
)
def test_placeholders_are_known_by_their_whole_name(name, placeholder):
    words = word_level(["a", name])
    assert named_unused(words, words.size) == ([name] if placeholder else [])


@pytest.mark.parametrize("added", [False, True])
def test_a_placeholder_that_merging_can_give_is_used(added):
    """As an added token it is cut out of the text before anything is merged."""
    pieces = ["<unused1", "<unused", "<un", "us", "ed", *"<unsed1>2"]
    vocab = {
        piece: i
        for i, piece in enumerate(["<eos>", "<unused1>", "<unused2>", *dict.fromkeys(pieces)])
    }
    merges = [("u", "s"), ("e", "d"), ("<unused1", ">")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    if added:
        backend.add_tokens(["<unused1>"])
    found = Tokenizer(backend, ("<eos>",))
    assert named_unused(found, found.size) == (["<unused1>"] if added else []) + ["<unused2>"]


def test_a_placeholder_that_ordinary_text_gives_is_used():
    words = [*PROBE.split(), "<unused1>", "<unused2>"]
    backend = tokenizers.Tokenizer(
        models.WordLevel(
            {word: i for i, word in enumerate(dict.fromkeys(["<eos>", *words]))}, unk_token="<eos>"
        )
    )
    backend.normalizer = normalizers.Replace("quick", "<unused1>")
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = Tokenizer(backend, ("<eos>",))
    assert named_unused(found, found.size) == ["<unused2>"]


# ---- GGUF files


def write_gguf(path, source, pre, *, tokens=None, merges=True, **ids):
    """A GGUF file with the tokenizer of `source` and no tensors, as llama.cpp's converter writes
    it."""
    state = json.loads(source.backend.to_str())
    special = {t["content"]: 3 if t["special"] else 4 for t in state["added_tokens"]}
    vocab = source.backend.get_vocab(with_added_tokens=True)
    tokens = tokens or sorted(vocab, key=vocab.get)
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([special.get(token, 1) for token in tokens])
    if merges:
        writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    for name, value in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", value)
    if source.chat_template:
        writer.add_chat_template(source.chat_template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_gguf_file_gives_the_tokenizer_that_it_was_made_from(tmp_path):
    ours = chatml()
    found = Tokenizer.from_gguf(
        write_gguf(tmp_path / "m.gguf", ours, "qwen2", eos=402, eot=400, padding=400)
    )
    for text in TEXTS:
        assert found.encode(text) == ours.encode(text)
        assert found.decode(found.encode(text)) == ours.decode(ours.encode(text))
    assert (found.eos_tokens, found.size, found.chat_template) == (
        ours.eos_tokens,
        ours.size,
        ours.chat_template,
    )
    assert found.special_tokens == ours.special_tokens
    assert found.chat(CHAT, enable_thinking=False) == ours.chat(CHAT, enable_thinking=False)


def test_rows_that_a_gguf_file_pads_are_unused(tmp_path):
    ours = chatml()
    vocab = ours.backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.get) + [f"[PAD{i}]" for i in range(ours.size, ours.size + 20)]
    found = Tokenizer.from_gguf(
        write_gguf(tmp_path / "m.gguf", ours, "qwen2", tokens=tokens, eos=402)
    )
    assert found.size == ours.size + 20
    assert np.flatnonzero(found.unused_ids(found.size)).tolist() == list(
        range(ours.size, ours.size + 20)
    )
    assert found.encode(PROBE) == ours.encode(PROBE)


def test_a_gguf_vocabulary_gets_no_ids_that_the_model_lacks(tmp_path):
    """transformers would add <|endoftext|>."""
    found = Tokenizer.from_gguf(
        write_gguf(tmp_path / "m.gguf", llama(), "llama-bpe", bos=350, eos=354, eot=351)
    )
    assert found.size == llama().size
    assert found.special_tokens == {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    assert found.encode("hi<|eot_id|>")[-1] == 354


def test_a_word_with_an_id_is_taken_whole_where_llama_3_does_so(tmp_path):
    source = Tokenizer(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), 300), ("a",))
    vocab = source.backend.get_vocab()
    tokens = [*sorted(vocab, key=vocab.get), "xyz"]  # no merge gives it
    llama3 = Tokenizer.from_gguf(
        write_gguf(tmp_path / "1.gguf", source, "llama-bpe", tokens=tokens, eos=0)
    )
    gpt2 = Tokenizer.from_gguf(
        write_gguf(tmp_path / "2.gguf", source, "gpt-2", tokens=tokens, eos=0)
    )
    assert (llama3.encode("xyz"), len(gpt2.encode("xyz"))) == ([len(tokens) - 1], 3)


@pytest.mark.parametrize(
    ("pre", "digits_apart"), [("smollm", True), ("command-r", True), ("gpt-2", False)]
)
def test_digits_are_cut_apart_where_the_publisher_does_so(tmp_path, pre, digits_apart):
    source = Tokenizer(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)), ("a",))
    found = Tokenizer.from_gguf(write_gguf(tmp_path / "m.gguf", source, pre, eos=0))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference = tokenizers.Tokenizer(models.BPE(**bpe(source.backend)))
    reference.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), split])
        if digits_apart
        else split
    )
    for text in (PROBE, "x\n\n12  345", *SENTENCES):
        assert found.encode(text) == reference.encode(text).ids
    assert (source.encode("x\n\n12  345") == found.encode("x\n\n12  345")) != digits_apart


def bpe(backend):
    state = json.loads(backend.to_str())["model"]
    return {"vocab": state["vocab"], "merges": [tuple(pair) for pair in state["merges"]]}


def test_gguf_files_that_hold_no_usable_tokenizer_are_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no such file"):
        Tokenizer.from_gguf(tmp_path / "absent.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(UsageError, match="it is no complete GGUF file"):
        Tokenizer.from_gguf(tmp_path / "text.gguf")
    whole = write_gguf(tmp_path / "whole.gguf", chatml(), "qwen2", eos=402).read_bytes()
    (tmp_path / "half.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="it is no complete GGUF file"):
        Tokenizer.from_gguf(tmp_path / "half.gguf")
    with pytest.raises(
        UsageError,
        match="it cuts text in the way 'martian', which is not known here.*Hugging Face directory",
    ):
        Tokenizer.from_gguf(write_gguf(tmp_path / "pre.gguf", chatml(), "martian", eos=402))
    with pytest.raises(UsageError, match="tokenizer 'gpt2' cannot be built"):
        Tokenizer.from_gguf(
            write_gguf(tmp_path / "merges.gguf", chatml(), "qwen2", merges=False, eos=402)
        )
    # no name in it ends a text
    plain = Tokenizer(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)), ("a",))
    with pytest.raises(UsageError, match=r"end-of-sequence ids \[\] are not all tokens"):
        Tokenizer.from_gguf(write_gguf(tmp_path / "eos.gguf", plain, "qwen2"))
    writer = gguf.GGUFWriter(tmp_path / "none.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UsageError, match="it holds no tokenizer"):
        Tokenizer.from_gguf(tmp_path / "none.gguf")


def test_a_published_gguf_file(smollm2_gguf, tmp_path):
    found = Tokenizer.from_gguf(smollm2_gguf)
    assert (found.size, found.eos_tokens, found.eos_ids) == (
        49152,
        ("<|im_end|>", "<|endoftext|>"),
        (2, 0),
    )
    # As its tokenizer.json says: single digits, then GPT-2's way of cutting text.
    reference = tokenizers.Tokenizer(models.BPE(**bpe(found.backend)))
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    for text in (PROBE, *SENTENCES, "1. x\n\n2. 345"):
        assert found.encode(text) == reference.encode(text).ids
        assert found.decode(found.encode(text)) == text
    system = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n"
    )
    prompt = found.chat(CHAT)
    assert (
        prompt == f"{system}<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert found.encode(prompt).count(1) == 3
    assert not found.unused_ids(49152).any()
    assert found.unused_ids(49280).sum() == 128
    found.save_pretrained(tmp_path)
    # as `export` does
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": list(found.eos_ids)})
    )
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.to_dict() == found.to_dict()


# ---- torch


def test_nothing_here_needs_torch_and_importing_the_package_leaves_transformers_alone(
    directories, tmp_path
):
    write_gguf(tmp_path / "m.gguf", chatml(), "qwen2", eos=402)
    code = f"""
import sys
sys.modules["torch"] = None  # importing it raises
import zip_rc_jax
from zip_rc_jax.models.io.tokenizer import Tokenizer
assert "transformers" not in sys.modules
for found in (Tokenizer.from_pretrained({str(directories[chatml])!r}), Tokenizer.from_gguf({str(tmp_path / "m.gguf")!r})):
    assert found.chat([{{"role": "user", "content": "hi"}}], enable_thinking=False).endswith("</think>\\n\\n")
    found.save_pretrained({str(tmp_path / "out")!r})
assert sys.modules["torch"] is None
"""  # noqa: E501
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
