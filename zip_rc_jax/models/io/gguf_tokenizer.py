"""The tokenizer inside a GGUF file, with llama.cpp's rules: which tokens end a text, what raw
prompts get, how text is cut."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import tokenizers

from zip_rc_jax.models.io.gguf import contents, open_gguf
from zip_rc_jax.models.io.huggingface import short
from zip_rc_jax.models.io.tokenizer_files import Parts, end_names, post_processor
from zip_rc_jax.runtime.errors import UsageError

# `tokenizer.ggml.pre` names how a byte-level GGUF vocabulary cuts text before merging. transformers
# knows some of them and takes the rest for GPT-2's; that is right for these only.
GPT2_SPLIT = (
    "gpt-2",
    "phi-2",
    "mpt",
    "olmo",
    "jais",
    "trillion",
    "granite-docling",
    "exaone4",
    "gigachat",
    "roberta-bpe",
)
DIGITS_THEN_GPT2_SPLIT = (
    "smollm",
    "starcoder",
    "refact",
    "command-r",
    "codeshell",
    "exaone",
    "minerva-7b",
)
# Vocabularies that take a whole word as it is if it has an id, and those that normalise text.
# transformers applies neither to a GGUF file. llama.cpp lets prompts of the first kind begin with
# the beginning-of-sequence token.
WHOLE_WORDS = (
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "tekken",
)
NORMALISED = ("qwen2", "qwen35")

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types that matter here
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# of a SentencePiece vocabulary whose file does not say
USUAL_IDS = {"bos": (1, "<s>"), "eos": (2, "</s>")}
FIX = "use the Hugging Face directory of the model"


def read_gguf_tokenizer(path: pathlib.Path) -> Parts:
    """The tokenizer that a GGUF file describes.

    Raises:
      UsageError: no such file, a damaged one, no tokenizer in it, or one whose way of cutting text
        is not known here.
    """
    where = f"model {path}"
    if not path.is_file():
        raise UsageError(where, "there is no such file", "pass a .gguf file")
    fields = open_gguf(path, where, "it is no complete GGUF file").fields
    prefix, named = "tokenizer.ggml.", "tokenizer.chat_template."
    metadata = {
        name.removeprefix(prefix): contents(fields[name], where)
        for name in fields
        if name.startswith(prefix)
    }
    tokens = metadata.get("tokens")
    if not tokens:
        raise UsageError(where, "it holds no tokenizer", FIX)
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise UsageError(where, "its tokens are no list of texts", FIX)
    _check_ids(metadata, where)
    ends = _correct_types(metadata)
    architecture = fields.get("general.architecture")
    backend = _backend(where, architecture and contents(architecture, where), metadata)
    special = {
        name: tokens[i] for name, role in ROLES.items() if (i := _id(metadata, role)) is not None
    }
    backend.post_processor = _post_processor(metadata, special, where)
    templates = {
        name.removeprefix(named): contents(fields[name], where)
        for name in fields
        if name.startswith(named)
    }
    if "tokenizer.chat_template" in fields:
        templates["default"] = contents(fields["tokenizer.chat_template"], where)
    if not all(isinstance(text, str) for text in templates.values()):
        raise UsageError(where, "its chat template is no text", FIX)
    stated = [_id(metadata, "eos"), metadata.get("eot_token_id"), metadata.get("eom_token_id")]
    return Parts(backend, special, templates, {}, [*stated, *ends])


def _check_ids(metadata: dict[str, Any], where: str) -> None:
    """Raises UsageError for a special id that is no token of the file, and for flags and lists that
    are none."""
    size = len(metadata["tokens"])
    for key, value in metadata.items():
        if key.endswith("_token_id") and (
            not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < size
        ):
            raise UsageError(
                f"{where}: tokenizer.ggml.{key}={str(value)[:60]}",
                f"it is none of the {size} token ids",
                FIX,
            )
        if key.startswith("add_") and not isinstance(value, bool):
            raise UsageError(
                f"{where}: tokenizer.ggml.{key}={str(value)[:60]}",
                "it is neither true nor false",
                FIX,
            )
    for key in ("token_type", "scores"):
        if key in metadata and (not isinstance(metadata[key], list) or len(metadata[key]) < size):
            raise UsageError(
                f"{where}: tokenizer.ggml.{key}", f"it has no entry for each of {size} tokens", FIX
            )


def _id(metadata: dict[str, Any], role: str) -> int | None:
    """Id of a special token; where a SentencePiece file does not say, the usual one if it has its
    usual name."""
    if f"{role}_token_id" in metadata:
        return int(metadata[f"{role}_token_id"])
    usual, name = USUAL_IDS.get(role, (-1, ""))
    tokens = metadata["tokens"]
    return (
        usual
        if metadata.get("model") == "llama" and 0 <= usual < len(tokens) and tokens[usual] == name
        else None
    )


def _correct_types(metadata: dict[str, Any]) -> list[int]:
    """Makes tokens whose name ends a text control tokens, as llama.cpp does, and returns their ids.

    Converters write some of them as normal text. A name that merging ordinary text gives is text.
    """
    tokens = metadata["tokens"]
    types = list(metadata.get("token_type") or [NORMAL] * len(tokens))
    number = {token: i for i, token in enumerate(tokens)}
    ends = end_names(number, {token for token, i in number.items() if types[i] == CONTROL})
    merged = {
        merge.replace(" ", "", 1)
        for merge in metadata.get("merges") or ()
        if isinstance(merge, str)
    }
    type_ids = []
    for token in sorted(ends, key=number.__getitem__):
        split = ((token[:i], token[i:]) for i in range(1, len(token)))
        pieces = metadata.get("model") == "llama" and any(
            left in number and right in number for left, right in split
        )
        if types[number[token]] != CONTROL and (token in merged or pieces):
            continue
        types[number[token]] = CONTROL
        type_ids.append(number[token])
    if "<|end|>" in number and "<|end|>" not in ends:
        types[number["<|end|>"]] = USER_DEFINED
    metadata["token_type"] = types
    return type_ids


def _post_processor(metadata: dict[str, Any], special: dict[str, str], where: str) -> Any:
    """What raw prompts get: as the file says, else as llama.cpp takes it for this kind of
    vocabulary."""
    usual = metadata.get("model") == "llama" or (
        metadata.get("model") == "gpt2" and metadata.get("pre") in WHOLE_WORDS
    )
    wanted = {
        "bos": metadata.get("add_bos_token", usual),
        "eos": metadata.get("add_eos_token", False),
    }
    added: dict[str, list[tuple[str, int]]] = {}
    for role, add in wanted.items():
        token, number = special.get(f"{role}_token"), _id(metadata, role)
        if add and token is None and f"add_{role}_token" in metadata:
            raise UsageError(where, f"it says add_{role}_token and names no {role} token", FIX)
        added[role] = [(token, number)] if add and token is not None and number is not None else []
    return post_processor(added["bos"], added["eos"])


def _backend(where: str, architecture: Any, metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """The Rust tokenizer that `metadata` (keys without "tokenizer.ggml.") describes.

    transformers builds it; what it leaves out is corrected here, so that text becomes the ids that
    the model was trained on.

    Raises:
      UsageError: transformers cannot build it, or the way of cutting text is not known.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_PRE_TOKENIZER_SPLITS,
        GGUF_SENTENCEPIECE_BUILDERS,
    )

    kind, split, tokens = metadata.get("model"), metadata.get("pre"), metadata["tokens"]
    if kind == "gpt2" and split not in {
        *GGUF_PRE_TOKENIZER_SPLITS,
        *GPT2_SPLIT,
        *DIGITS_THEN_GPT2_SPLIT,
    }:
        raise UsageError(where, f"it cuts text in the way {split!r}, which is not known here", FIX)
    names = {
        key.removeprefix("ggml."): name for key, name in GGUF_TOKENIZER_MAPPING["tokenizer"].items()
    }
    try:
        backend, _ = convert_gguf_tokenizer(
            architecture, {name: metadata[key] for key, name in names.items() if key in metadata}
        )
    except Exception as error:  # a list of numbers instead of merges, for example
        raise UsageError(
            where, f"its tokenizer {str(kind)[:40]!r} cannot be built ({short(error)})", FIX
        ) from error
    state = json.loads(backend.to_str())
    alphabet = set(bytes_to_unicode().values()) if kind == "gpt2" else None
    _own_added_tokens(state, tokens, metadata["token_type"], alphabet)
    if kind == "gpt2" and split in DIGITS_THEN_GPT2_SPLIT:
        digits = {"type": "Digits", "individual_digits": True}
        state["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [digits, state["pre_tokenizer"]],
        }
    if kind == "gpt2" and split in WHOLE_WORDS:
        state["model"]["ignore_merges"] = True
    if kind == "gpt2" and split in NORMALISED:
        state["normalizer"] = {"type": "NFC"}
    if kind == "llama":
        _lead_with_space(
            state, metadata.get("add_space_prefix", architecture not in GGUF_SENTENCEPIECE_BUILDERS)
        )
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _own_added_tokens(
    state: dict[str, Any], tokens: list[str], types: list[int], alphabet: set[str] | None
) -> None:
    """Added tokens are the file's control and user-defined ones, spelled as in the file.

    transformers adds GPT-2's <|endoftext|> to every byte-level vocabulary, also where the model has
    no row for it. It respells special tokens such as DeepSeek's, which have letters outside the
    byte alphabet, and then no text gives them.
    """
    vocab = state["model"]["vocab"]
    if not isinstance(vocab, dict):  # Unigram
        state["added_tokens"] = [
            token for token in state["added_tokens"] if token["id"] < len(tokens)
        ]
        return
    added = {
        token["id"]: token
        for token in state["added_tokens"]
        if token["id"] < len(tokens) and token["content"] in vocab
    }
    respelled = {}
    for number, (token, kind) in enumerate(zip(tokens, types, strict=False)):
        if kind not in (CONTROL, USER_DEFINED) or not token:
            continue
        if alphabet is not None and not set(token) <= alphabet and token not in vocab:
            respelled[number] = token
        elif vocab.get(token) != number:
            continue
        flags = {
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == CONTROL,
        }
        added[number] = {"id": number, "content": token} | flags
    if respelled:
        state["model"]["vocab"] = {
            respelled.get(number, token): number for token, number in vocab.items()
        }
    state["added_tokens"] = [added[number] for number in sorted(added)]


def _lead_with_space(state: dict[str, Any], leads: bool) -> None:
    """SentencePiece text: "▁" for spaces, and with `leads` one more before the text and after each
    special token."""
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    if leads:
        steps.insert(0, {"type": "Prepend", "prepend": "▁"})
    state["normalizer"] = {"type": "Sequence", "normalizers": steps}
    state["pre_tokenizer"] = None
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if leads:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    state["decoder"] = {"type": "Sequence", "decoders": decoders}
