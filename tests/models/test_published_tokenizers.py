"""Tokenizers as publishers leave them: tokenizer.json decides, texts end where the model ends them,
prompts begin as in training."""

from __future__ import annotations

import itertools
import json

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, pre_tokenizers, processors
from transformers import AutoTokenizer

from harness.small_tokenizers import SENTENCES, chatml, gemma, llama
from zip_rc_jax.models.io.tokenizer import PROBE, Tokenizer, word_level
from zip_rc_jax.models.io.tokenizer_files import PROBES
from zip_rc_jax.runtime.errors import UsageError

TEXTS = (
    *PROBES,
    *SENTENCES,
    PROBE,
    "",
    " ",
    "<|im_start|>user\nhi<|im_end|>\n<think>",
    "x <|im_end|> y",
    "a<mask> b",
    "  <mask>  ",
)


def directory(path, backend, **config):
    """A directory as a publisher writes it by hand: tokenizer.json and tokenizer_config.json."""
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def copy_of(backend):
    return tokenizers.Tokenizer.from_str(backend.to_str())


# ---- tokenizer.json decides


def digits_in_threes():
    """Byte-level BPE that cuts digits in threes, under a name whose class cuts them otherwise."""
    backend = copy_of(chatml().backend)
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,3}|[^\p{N}]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return backend


@pytest.mark.parametrize(
    "name",
    [
        "GPT2Tokenizer",
        "LlamaTokenizer",
        "LlamaTokenizerFast",
        "Qwen2Tokenizer",
        "GemmaTokenizer",
        "NoSuchClass",
        None,
    ],
)
@pytest.mark.parametrize(
    "make", [digits_in_threes, lambda: copy_of(gemma().backend), lambda: copy_of(llama().backend)]
)
def test_whatever_class_is_named_the_ids_are_those_of_tokenizer_json(tmp_path, name, make):
    backend = make()
    end = next(
        token.content for token in backend.get_added_tokens_decoder().values() if token.special
    )
    config = {"eos_token": end} | ({"tokenizer_class": name} if name else {})
    found = Tokenizer.from_pretrained(directory(tmp_path, backend, **config))
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert found.encode(text) == reference.encode(text, add_special_tokens=False).ids, text


def test_what_is_exported_keeps_the_ids_for_transformers_and_for_tokenizers(tmp_path):
    ours = Tokenizer.from_pretrained(
        directory(
            tmp_path / "in",
            digits_in_threes(),
            tokenizer_class="GPT2Tokenizer",
            eos_token="<|im_end|>",
        )
    )
    ours.save_pretrained(tmp_path / "out")
    theirs, reference = (
        AutoTokenizer.from_pretrained(tmp_path / "out"),
        tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")),
    )
    assert len(set(ours.encode("650841823"))) == 9 or ours.encode("650") + ours.encode(
        "841"
    ) == ours.encode("650841")
    for text in TEXTS:
        assert (
            ours.encode(text)
            == theirs.encode(text, add_special_tokens=False)
            == reference.encode(text, add_special_tokens=False).ids
        )


def test_flags_of_added_tokens_survive(tmp_path):
    backend = copy_of(chatml().backend)
    backend.add_special_tokens(
        [AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False, special=True)]
    )
    backend.add_tokens([AddedToken("wholeword", single_word=True, normalized=True)])
    ours = Tokenizer.from_pretrained(
        directory(tmp_path / "in", backend, eos_token="<|im_end|>", mask_token="<mask>")
    )
    ours.save_pretrained(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    again = Tokenizer.from_dict(json.loads(json.dumps(ours.to_dict())))
    texts = ("a  <mask>  b", "awholewordb wholeword", *TEXTS)
    assert ours.encode(texts[0]) != ours.encode("a") + ours.encode("  ") + ours.encode(
        "<mask>"
    ) + ours.encode("  b"), "it takes the spaces"
    for text in texts:
        wanted = backend.encode(text, add_special_tokens=False).ids
        assert (
            ours.encode(text)
            == again.encode(text)
            == theirs.encode(text, add_special_tokens=False)
            == wanted
        )


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {
            "special_tokens_map.json": {
                "eos_token": {"content": "<|im_end|>"},
                "pad_token": "<|endoftext|>",
            }
        },
    ],
)
def test_special_tokens_come_from_either_file(tmp_path, extra):
    config = (
        {}
        if extra
        else {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "pad_token": "<|endoftext|>"}
    )
    path = directory(tmp_path, copy_of(chatml().backend), **config)
    for name, content in extra.items():
        (path / name).write_text(json.dumps(content))
    found = Tokenizer.from_pretrained(path)
    assert found.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert found.eos_tokens == ("<|im_end|>",)


def test_a_token_that_two_files_number_differently_is_refused(tmp_path):
    other = {"added_tokens_decoder": {"7": {"content": "<|im_end|>", "special": True}}}
    path = directory(tmp_path, copy_of(chatml().backend), eos_token="<|im_end|>", **other)
    with pytest.raises(
        UsageError,
        match=r"tokenizer_config.json: token '<\|im_end\|>': it has id 7 there, and the tokenizer "
        r"gives 402",
    ):
        Tokenizer.from_pretrained(path)


def test_a_token_that_only_tokenizer_config_knows_is_added_with_its_id(tmp_path):
    backend = copy_of(chatml().backend)
    size = backend.get_vocab_size()
    known = {str(size): {"content": "<|tool|>", "special": True, "normalized": False}}
    found = Tokenizer.from_pretrained(
        directory(tmp_path, backend, eos_token="<|im_end|>", added_tokens_decoder=known)
    )
    assert found.encode("a<|tool|>") == [*found.encode("a"), size]


def test_without_tokenizer_json_a_vocabulary_that_contradicts_itself_is_refused(tmp_path):
    state = json.loads(chatml().backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(state["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in state["merges"]))
    special = {"eos_token": "<|im_end|>", "unk_token": None, "pad_token": None, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2Tokenizer", **special})
    )
    found = Tokenizer.from_pretrained(tmp_path)
    assert found.encode("What is 17 + 25?") == chatml().encode("What is 17 + 25?")
    assert {token: found.backend.token_to_id(token) for token in state["vocab"]} == state["vocab"]
    (tmp_path / "vocab.json").write_text("[]")
    with pytest.raises(UsageError, match="tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


# ---- chat templates


def test_all_templates_survive_an_export_and_tools_get_theirs(tmp_path):
    named = [
        {"name": "default", "template": "D{{ messages[0].content }}"},
        {"name": "tool_use", "template": "T{{ tools | length }}"},
    ]
    ours = Tokenizer.from_pretrained(
        directory(
            tmp_path / "in", copy_of(chatml().backend), eos_token="<|im_end|>", chat_template=named
        )
    )
    ours.save_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "x"}]
    theirs, again = (
        AutoTokenizer.from_pretrained(tmp_path / "out"),
        Tokenizer.from_pretrained(tmp_path / "out"),
    )
    kept = Tokenizer.from_dict(json.loads(json.dumps(ours.to_dict())))
    assert (
        theirs.chat_template
        == ours.templates
        == again.templates
        == kept.templates
        == {t["name"]: t["template"] for t in named}
    )
    for tokenizer in (ours, again, kept):
        assert (tokenizer.chat(chat), tokenizer.chat(chat, tools=[{"name": "f"}])) == ("Dx", "T1")
    one = Tokenizer(chatml().backend, ("<|im_end|>",), "D{{ messages[0].content }}")
    assert one.template_hash != ours.template_hash, (
        "another template for tools is another way to render"
    )


@pytest.mark.parametrize("name", ["../escape", "a/b", "", "x" * 300])
def test_a_template_whose_name_is_no_file_name_is_not_written(tmp_path, name):
    (tmp_path / "out").mkdir()
    odd = Tokenizer(chatml().backend, ("<|im_end|>",), "x", templates={name: "y"})
    with pytest.raises(UsageError, match="its name cannot be that of a file"):
        odd.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "escape.jinja").exists()


def test_old_places_of_a_template_are_read_and_files_stand_above(tmp_path):
    path = directory(tmp_path, copy_of(chatml().backend), eos_token="<|im_end|>")
    (path / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    assert Tokenizer.from_pretrained(path).chat_template == "old"
    (path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "chat_template": "config"})
    )
    assert Tokenizer.from_pretrained(path).chat_template == "config"
    (path / "chat_template.jinja").write_text("file")
    assert (
        Tokenizer.from_pretrained(path).chat_template
        == "file"
        == AutoTokenizer.from_pretrained(path).chat_template
    )


# ---- where texts end


def test_the_token_with_which_a_template_ends_a_turn_ends_a_text(tmp_path):
    """A Llama 3 whose configuration names <|end_of_text|> alone, and whose template ends turns with
    <|eot_id|>."""
    path = directory(
        tmp_path,
        copy_of(llama().backend),
        eos_token="<|end_of_text|>",
        chat_template=llama().chat_template,
    )
    assert Tokenizer.from_pretrained(path).eos_tokens == ("<|end_of_text|>", "<|eot_id|>")
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end_of_text|>"}))
    assert Tokenizer.from_pretrained(path).eos_tokens == ("<|end_of_text|>",), (
        "nothing says that the base model ends turns"
    )


ENDS = [
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "<|end|>", "<EOT>", "<|return|>",
    "<|call|>", "<|flush|>", "<|calls|>", "<end_of_utterance>", "_<EOT>",
    "<\uff5cend▁of▁sentence\uff5c>",
]  # fmt: skip


def write_gguf(
    path,
    tokens,
    types,
    *,
    kind="gpt2",
    pre="qwen2",
    merges=("a b",),
    scores=None,
    templates=None,
    **settings,
):
    """A GGUF file without tensors."""
    writer = gguf.GGUFWriter(path, settings.pop("architecture", "qwen3"))
    writer.add_tokenizer_model(kind)
    if kind == "gpt2":
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(list(merges))
    if scores is not None:
        writer.add_token_scores(list(scores))
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(types))
    for name, value in settings.items():
        (writer.add_bool if isinstance(value, bool) else writer.add_uint32)(
            f"tokenizer.ggml.{name}", value
        )
    if templates:
        writer.add_chat_template(templates)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def gguf_of(path, special, token_type=3, **options):
    """Byte-level GGUF: the alphabet, "ab", and `special` tokens of type `kind`."""
    tokens = [*ALPHABET, "ab", *special]
    return write_gguf(
        path, tokens, [*[1] * (len(ALPHABET) + 1), *[token_type] * len(special)], **options
    )


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("kind", [1, 3, 4], ids=["normal", "control", "user-defined"])
def test_a_gguf_model_ends_where_llama_cpp_ends_it(tmp_path, name, kind):
    """Also where the file calls the token normal text: it is read as one id and never shown as
    text."""
    short = name in ("<EOT>", "_<EOT>")  # as normal text these may be anything
    found = Tokenizer.from_gguf(
        gguf_of(tmp_path / "m.gguf", ["<x>", name], kind, eos_token_id=len(ALPHABET) + 1)
    )
    number = len(ALPHABET) + 2
    assert found.eos_ids == ((number - 1,) if short and kind != 3 else (number - 1, number))
    if not (short and kind != 3):
        assert found.encode(f"a{name}b") == [*found.encode("a"), number, *found.encode("b")]
        assert found.decode(found.encode(f"a{name}b")) == "ab"


def test_explicit_end_ids_are_read_too(tmp_path):
    first = len(ALPHABET) + 1
    path = gguf_of(
        tmp_path / "m.gguf",
        ["<1>", "<2>", "<3>"],
        eos_token_id=first,
        eot_token_id=first + 1,
        eom_token_id=first + 2,
    )
    assert Tokenizer.from_gguf(path).eos_ids == (first, first + 1, first + 2)


def test_end_in_the_harmony_format_ends_a_message_only(tmp_path):
    found = Tokenizer.from_gguf(
        gguf_of(
            tmp_path / "m.gguf",
            ["<|return|>", "<|call|>", "<|end|>"],
            eos_token_id=len(ALPHABET) + 1,
        )
    )
    assert found.eos_tokens == ("<|return|>", "<|call|>")


def test_a_name_that_ordinary_text_gives_ends_nothing(tmp_path):
    tokens, merges = (
        [*ALPHABET, "<|end", "<|", "<|end|", "<|end|>", "</s>", "en", "end"],
        ["< |", "e n", "en d", "<| end", "<|end |", "<|end| >"],
    )
    types = [1] * len(tokens)
    types[tokens.index("</s>")] = 4  # Gemma's vocabulary has HTML tags
    found = Tokenizer.from_gguf(
        write_gguf(tmp_path / "m.gguf", tokens, types, merges=merges, eos_token_id=0)
    )
    assert found.eos_ids == (0,)
    assert "<|end|>" not in {
        token.content for token in found.backend.get_added_tokens_decoder().values()
    }


# ---- what prompts begin with


def with_bos(backend, single="<s>:0 $A:0", tokens=("<s>",)):
    backend.add_special_tokens(list(tokens))
    backend.post_processor = processors.TemplateProcessing(
        single=single,
        pair=f"{single} $B:1",
        special_tokens=[(t, backend.token_to_id(t)) for t in tokens],
    )
    return backend


@pytest.mark.parametrize(
    ("single", "flags", "begins", "ends"),
    [
        ("<s>:0 $A:0", {}, True, False),
        ("<s>:0 $A:0 </s>:0", {}, True, True),
        ("$A:0", {}, False, False),
        ("$A:0", {"add_bos_token": True}, True, False),
        ("<s>:0 $A:0", {"add_bos_token": False}, False, False),
        ("<s>:0 $A:0", {"add_bos_token": True, "add_eos_token": True}, True, True),
    ],
)
def test_raw_prompts_get_what_the_tokenizer_adds_once_and_so_do_those_of_an_export(
    tmp_path, single, flags, begins, ends
):
    backend = with_bos(copy_of(chatml().backend), single, ("<s>", "</s>"))
    settings = {"model_max_length": 321, "padding_side": "left"}
    ours = Tokenizer.from_pretrained(
        directory(tmp_path / "in", backend, bos_token="<s>", eos_token="</s>", **settings, **flags)
    )
    ours.save_pretrained(tmp_path / "out")
    kept = Tokenizer.from_dict(json.loads(json.dumps(ours.to_dict())))
    again, theirs = (
        Tokenizer.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    bos, eos = [backend.token_to_id("<s>")] * begins, [backend.token_to_id("</s>")] * ends
    for tokenizer in (ours, kept, again):
        for text in ("What is 17?", " x", "<|im_start|>"):
            plain = backend.encode(text, add_special_tokens=False).ids
            assert (
                tokenizer.encode_prompt(text)
                == bos + plain + eos
                == tokenizer.encode(text, add_special_tokens=True)
                == theirs.encode(text)
            )
            assert (
                tokenizer.encode_prompt(text, add_special_tokens=False)
                == plain
                == tokenizer.encode(text)
            )
            assert tokenizer.encode_prompt(text, chat=True) == bos + plain, (
                "an answer follows, so nothing ends the text"
            )
            if begins:
                assert tokenizer.encode_prompt(f"<s>{text}", chat=True) == bos + plain, (
                    "the template wrote it"
                )
        if begins and ends:
            assert (
                tokenizer.encode_prompt("<s>x</s>")
                == bos + backend.encode("x", add_special_tokens=False).ids + eos
            )
    assert theirs.model_max_length == 321
    assert theirs.padding_side == "left"
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (written["add_bos_token"], written["add_eos_token"]) == (begins, ends)


def test_ids_before_and_behind_are_told_apart_where_one_token_is_both():
    """GPT-2 begins and ends texts with the same token."""
    backend = with_bos(copy_of(chatml().backend), "<s>:0 $A:0")
    assert Tokenizer(backend, ("<s>",)).added_ids == ((backend.token_to_id("<s>"),), ())
    backend = with_bos(copy_of(chatml().backend), "$A:0 <s>:0")
    assert Tokenizer(backend, ("<s>",)).added_ids == ((), (backend.token_to_id("<s>"),))


def test_checkpoints_of_older_versions_add_nothing_as_they_did():
    old = Tokenizer(with_bos(copy_of(chatml().backend)), ("<|im_end|>",)).to_dict()
    for key in ("templates", "settings", "rows", "prompts_get_special_tokens"):
        del old[key]
    found = Tokenizer.from_dict(old)
    assert found.encode_prompt("x") == found.encode("x")
    assert word_level(["a"]).encode_prompt("a") == word_level(["a"]).encode("a") == [2]


@pytest.mark.parametrize(
    ("options", "begins"),
    [
        ({"add_bos_token": True}, True),
        ({"add_bos_token": False}, False),
        ({}, False),
        ({"pre": "llama-bpe"}, True),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
        ({"pre": "smollm"}, False),
    ],
)
def test_a_byte_level_gguf_begins_prompts_as_llama_cpp_does(tmp_path, options, begins):
    first = len(ALPHABET) + 1
    path = gguf_of(
        tmp_path / "m.gguf", ["<s>", "</s>"], bos_token_id=first, eos_token_id=first + 1, **options
    )
    found = Tokenizer.from_gguf(path)
    assert found.encode_prompt("ab") == [first] * begins + found.encode("ab")
    assert found.encode_prompt("<s>ab") == [first, *found.encode("ab")]
    found.save_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("ab") == found.encode_prompt("ab")


def sentencepiece_ids(text, scores, leads):
    """llama.cpp's rule: spaces become "▁", and the neighbours whose union has the highest score are
    joined, from the left."""
    pieces = list(("▁" if leads and text else "") + text.replace(" ", "▁"))
    while True:
        pairs = [
            (-scores[a + b], i)
            for i, (a, b) in enumerate(itertools.pairwise(pieces))
            if a + b in scores
        ]
        if not pairs:
            return pieces
        i = min(pairs)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


@pytest.mark.parametrize(("stated", "leads"), [(None, True), (True, True), (False, False)])
def test_a_sentencepiece_gguf_leads_with_a_space_where_the_file_says_so(tmp_path, stated, leads):
    words = ["▁a", "▁b", "ab", "▁ab", "▁▁", "ba", "▁▁a"]
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *words,
        "▁",
        "a",
        "b",
    ]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(words) + 3)]
    scores = {token: -float(i) for i, token in enumerate(tokens) if i >= 259}
    flags = {} if stated is None else {"add_space_prefix": stated}
    every = [scores.get(token, 0.0) for token in tokens]
    path = write_gguf(
        tmp_path / "m.gguf",
        tokens,
        types,
        kind="llama",
        scores=every,
        architecture="llama",
        bos_token_id=1,
        eos_token_id=2,
        **flags,
    )
    found = Tokenizer.from_gguf(path)
    for text in ("a", "ab", " a", "a b", "  ab", "a  b ", "abab ba", "b a  a"):
        wanted = [tokens.index(piece) for piece in sentencepiece_ids(text, scores, leads)]
        assert found.encode(text) == wanted, text
        assert found.encode_prompt(text) == [1, *wanted], (
            "SentencePiece files add it unless they say otherwise"
        )
        assert found.decode(found.encode(text)) == text
        assert found.encode(f"</s>{text}") == [2, *wanted], "behind a special token as at the start"


def test_a_gguf_that_adds_a_token_it_does_not_name_is_refused(tmp_path):
    path = gguf_of(
        tmp_path / "m.gguf", ["</s>"], eos_token_id=len(ALPHABET) + 1, add_bos_token=True
    )
    with pytest.raises(UsageError, match="it says add_bos_token and names no bos token"):
        Tokenizer.from_gguf(path)


# ---- ids without a row


def test_ids_past_the_rows_are_unused_and_no_head_takes_them():
    ours = chatml()
    short = ours.limited(ours.size - 2)  # the model lacks <think> and </think>
    assert (short.size, short.used) == (ours.size, ours.size - 2)
    assert np.flatnonzero(short.unused_ids(ours.size + 3)).tolist() == list(
        range(ours.size - 2, ours.size + 3)
    )
    assert np.flatnonzero(short.free_ids(ours.size + 3)).tolist() == list(
        range(ours.size, ours.size + 3)
    )
    assert Tokenizer.from_dict(json.loads(json.dumps(short.to_dict()))).used == short.used
    assert ours.limited(ours.size + 5) is ours


def test_an_end_of_sequence_token_without_a_row_is_refused():
    with pytest.raises(
        UsageError,
        match=r"end-of-sequence token <\|im_end\|>: its id is past the checkpoint's 402 rows",
    ):
        chatml().limited(402)


# ---- damaged files

DAMAGE = {
    "empty": b"", "blank": b"  \n", "zeros": bytes(200), "list": b"[1, 2]", "text": b'"x"',
    "number": b"3", "null": b"null",
    "cut": b'{"a": [1, ', "UTF-16": '{"a": 1}'.encode("utf-16"), "bytes": b"\xff\xfe\x00\x80" * 9,
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "config.json",
        "special_tokens_map.json",
        "chat_template.json",
    ],
)
def test_a_damaged_file_is_named_in_one_short_sentence(tmp_path, name, damage):
    path = directory(tmp_path, copy_of(chatml().backend), eos_token="<|im_end|>")
    (path / name).write_bytes(DAMAGE[damage])
    with pytest.raises(UsageError) as found:
        Tokenizer.from_pretrained(path)
    assert str(path / name) in str(found.value)
    assert len(str(found.value)) < 600
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_a_byte_order_mark_does_no_harm(tmp_path, name):
    path = directory(tmp_path, copy_of(chatml().backend), eos_token="<|im_end|>")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [400]}))
    before = Tokenizer.from_pretrained(path).to_dict()
    (path / name).write_bytes(b"\xef\xbb\xbf" + (path / name).read_bytes())
    assert Tokenizer.from_pretrained(path).to_dict() == before


@pytest.mark.parametrize(
    "value",
    ["x", -1, 1.5, True, [1, "x"], [[1]], {"a": 1}, 2**40, "x" * 1_000_000],
    ids=lambda v: str(v)[:20],
)
def test_an_end_of_sequence_id_that_is_none_is_named_with_its_file(tmp_path, value):
    path = directory(tmp_path, copy_of(chatml().backend), eos_token="<|im_end|>")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(
        UsageError, match=r"generation_config.json: eos_token_id=.*it is no token id"
    ) as found:
        Tokenizer.from_pretrained(path)
    assert len(str(found.value)) < 600


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": 3},
        {"eos_token": ["x"]},
        {"eos_token": {"text": "x"}},
        {"chat_template": 3},
        {"chat_template": [1]},
        {"chat_template": [{"name": 1, "template": 2}]},
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"x": {"content": "y"}}},
        {"added_tokens_decoder": {"1": 3}},
        {"zip_rc_rows": "x"},
    ],
    ids=str,
)
def test_a_tokenizer_config_of_wrong_types_is_named(tmp_path, config):
    path = directory(tmp_path, copy_of(chatml().backend), **({"eos_token": "<|im_end|>"} | config))
    with pytest.raises(UsageError, match=r"tokenizer_config.json") as found:
        Tokenizer.from_pretrained(path)
    assert len(str(found.value)) < 600


def test_every_cut_of_a_tokenizer_json_is_refused(tmp_path):
    path = directory(tmp_path, copy_of(gemma().backend), eos_token="<eos>")
    whole = (path / "tokenizer.json").read_bytes()
    for kept in [*range(0, len(whole) - 2, len(whole) // 40), len(whole) - 3]:
        (path / "tokenizer.json").write_bytes(whole[:kept])
        with pytest.raises(UsageError, match=r"tokenizer.json: it cannot be read"):
            Tokenizer.from_pretrained(path)


@pytest.mark.parametrize(
    "options",
    [
        {"eos_token_id": 10**6},
        {"bos_token_id": 10**6, "eos_token_id": 0},
        {"merges": ["abc"], "eos_token_id": 0},
        {"merges": ["x yz"], "eos_token_id": 0},
        {"kind": "martian", "eos_token_id": 0},
    ],
    ids=str,
)
def test_a_gguf_tokenizer_that_contradicts_itself_is_named(tmp_path, options):
    with pytest.raises(UsageError, match=f"model {tmp_path / 'm.gguf'}") as found:
        Tokenizer.from_gguf(gguf_of(tmp_path / "m.gguf", ["</s>"], **options))
    assert len(str(found.value)) < 600


def test_a_special_token_with_letters_outside_the_byte_alphabet_is_one_id(tmp_path):
    """DeepSeek's: transformers respells it in bytes, and then no text gives it."""
    names = [
        "<\uff5cbegin▁of▁sentence\uff5c>",
        "<\uff5cend▁of▁sentence\uff5c>",
        "<\uff5cUser\uff5c>",
    ]
    first = len(ALPHABET) + 1
    path = gguf_of(
        tmp_path / "m.gguf",
        names,
        bos_token_id=first,
        eos_token_id=first + 1,
        pre="deepseek-r1-qwen",
        add_bos_token=True,
    )
    found = Tokenizer.from_gguf(path)
    assert found.encode("".join(names)) == [first, first + 1, first + 2]
    assert found.special_tokens == {"bos_token": names[0], "eos_token": names[1]}
    assert found.encode_prompt("ab") == [first, *found.encode("ab")]
    assert found.size == first + 3
    found.save_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode(
        "".join(names), add_special_tokens=False
    ) == [first, first + 1, first + 2]
