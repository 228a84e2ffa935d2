"""Text <-> ids, chat templates, and which ids a tokenizer never emits. On Hugging Face `tokenizers`; torch is never imported."""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.meta
import numpy as np
import tokenizers

from zip_rc_jax.errors import UsageError
from zip_rc_jax.models import chat as chats

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")

# Names that publishers give to vocabulary rows which they keep for later.
PLACEHOLDER = re.compile(
    r"<unused_?\d+>|<\|unused_?\d+\|>|\[unused_?\d+\]"  # Gemma, BERT
    r"|<reserved_\d+>|<\|reserved_(?:special_)?(?:token_)?\d+\|>"  # Llama 3, LFM2
    r"|<SPECIAL_\d+>|<extra_id_\d+>|<\|dummy_\d+\|>|<\|placeholder_?\d+\|>"  # Mistral and Nemotron, T5, Phi
    r"|\[PAD\d+\]"  # rows beyond the tokenizer in a GGUF file
)
PROBE = """The quick brown fox jumps over 12,345.67 lazy dogs & 'cats' (don't ask). Zwölf Boxkämpfer; où est l'été? ¿Qué niño?
Съешь ещё этих булок. 敏捷的棕色狐狸 跳过了懒狗。 いろはにほへと 다람쥐 헌 쳇바퀴 نص عربي עברית हिन्दी ไทย
🦊👩‍🚀 ½ ∑ x² ≤ \\frac{1}{2} <b>unused</b> [reserved] <|special|> SPECIAL_1 # 2
\tdef f(x: int) -> list[str]:\n        return [f"{i:02d}" for i in range(x)]
#include <stdio.h> { "key": [1, 2, null] } && || :: => ++\r\n
"""

# `tokenizer.ggml.pre` names how a byte-level GGUF vocabulary cuts text before merging. transformers knows some of them and takes the rest
# for GPT-2's; that is right for these only.
GPT2_SPLIT = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat", "roberta-bpe")
DIGITS_THEN_GPT2_SPLIT = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# Vocabularies that take a whole word as it is if it has an id, and those that normalise text; transformers applies neither to a GGUF file.
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken")
NORMALISED = ("qwen2", "qwen35")


class Tokenizer:
    """A `tokenizers` tokenizer with its end-of-sequence ids and its chat template.

    Attributes:
      backend: the Rust tokenizer. Truncation and padding are switched off.
      eos_tokens: tokens that end a sequence.
      eos_ids: their ids.
      chat_template: Jinja source, or None.
      special_tokens: what the template may refer to, e.g. `{"bos_token": "<s>"}`.
      size: number of ids that the tokenizer uses (largest id + 1).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_tokens: Sequence[str],
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        """Raises UsageError if there is no end-of-sequence token, or one that the tokenizer does not know."""
        backend.no_truncation()  # published files may cut every text at 512 tokens
        backend.no_padding()
        self.backend = backend
        self.eos_tokens = tuple(eos_tokens)
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        ids = [i for token in self.eos_tokens if (i := backend.token_to_id(token)) is not None]
        if not ids or len(ids) < len(self.eos_tokens):
            raise UsageError(f"eos_tokens={self.eos_tokens}", "the tokenizer does not know them all", "name tokens of tokenizer.json")
        self.eos_ids: tuple[int, ...] = tuple(ids)
        self.size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._unknown_token = getattr(backend.model, "unk_token", None) or "<unk>"  # a Unigram model does not tell

    @classmethod
    def from_pretrained(cls, directory: str | pathlib.Path) -> Tokenizer:
        """The tokenizer of a local Hugging Face directory, read by transformers.

        Its end-of-sequence ids are its own and those of `generation_config.json` and `config.json`.

        Raises:
          UsageError: no tokenizer files, files that transformers cannot read, a tokenizer written in Python, or an end-of-sequence id
            that no token has.
        """
        directory = pathlib.Path(directory)
        if not any((directory / name).is_file() for name in TOKENIZER_FILES):
            raise UsageError(
                f"tokenizer {directory}",
                f"there is none of {', '.join(TOKENIZER_FILES)}",
                "point at a complete Hugging Face directory, for example one with a tokenizer.json",
            )
        from transformers import AutoTokenizer  # a second to import, and only published models need it

        try:
            found = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # `tokenizers` raises bare Exception for a file that it cannot read
            raise UsageError(f"tokenizer {directory}", _first_line(error), "download it again, or add its tokenizer.json") from error
        backend = getattr(found, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise UsageError(
                f"tokenizer {directory}",
                f"{type(found).__name__} is a slow tokenizer, written in Python",
                "convert it to a tokenizer.json (transformers.convert_slow_tokenizer)",
            )
        template = found.chat_template
        ids = [found.eos_token_id, *_eos_ids(directory / "generation_config.json"), *_eos_ids(directory / "config.json")]
        return cls(
            backend,
            _tokens(backend, ids, f"tokenizer {directory}"),
            template.get("default") if isinstance(template, dict) else template,
            {name: str(token) for name, token in found.special_tokens_map.items()},
        )

    @classmethod
    def from_gguf(cls, path: str | pathlib.Path) -> Tokenizer:
        """The tokenizer inside a GGUF file.

        The `gguf` package reads the metadata (`AutoTokenizer(gguf_file=...)` needs torch for that), transformers builds the tokenizer.

        Raises:
          UsageError: no such file, not a GGUF file, no tokenizer in it, or one whose way of cutting text is not known here.
        """
        import gguf

        path = pathlib.Path(path)
        if not path.is_file():
            raise UsageError(f"model {path}", "there is no such file", "pass a .gguf file")
        try:
            fields = gguf.GGUFReader(path).fields
        except (ValueError, IndexError, KeyError) as error:
            raise UsageError(f"model {path}", f"it is no complete GGUF file ({_first_line(error)})", "download it again") from error
        prefix = "tokenizer.ggml."
        metadata = {name.removeprefix(prefix): field.contents() for name, field in fields.items() if name.startswith(prefix)}
        if not metadata.get("tokens"):
            raise UsageError(f"model {path}", "it holds no tokenizer", "use the Hugging Face directory of the model")
        backend = _gguf_backend(path, fields["general.architecture"].contents(), metadata)
        roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        found = {name: backend.id_to_token(metadata.get(f"{role}_token_id", len(metadata["tokens"]))) for name, role in roles.items()}
        special = {name: token for name, token in found.items() if token is not None}
        template = fields.get("tokenizer.chat_template")
        ids = [metadata.get("eos_token_id"), metadata.get("eot_token_id")]
        return cls(backend, _tokens(backend, ids, f"model {path}"), template.contents() if template else None, special)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON: the backend's tokenizer.json, `eos_tokens`, `chat_template`, `special_tokens`."""
        return {
            "backend": json.loads(self.backend.to_str()),
            "eos_tokens": list(self.eos_tokens),
            "chat_template": self.chat_template,
            "special_tokens": self.special_tokens,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tokenizer:
        """Inverse of `to_dict`."""
        backend = tokenizers.Tokenizer.from_str(json.dumps(data["backend"]))
        return cls(backend, data["eos_tokens"], data["chat_template"], data["special_tokens"])

    def save_pretrained(self, directory: str | pathlib.Path) -> None:
        """Writes what `AutoTokenizer` reads: tokenizer.json, tokenizer_config.json and, with a template, chat_template.jinja.

        Of several end-of-sequence tokens only one can be the tokenizer's; the others belong into generation_config.json.
        """
        directory = pathlib.Path(directory)
        self._hugging_face.save_pretrained(str(directory))
        config = directory / "tokenizer_config.json"
        # transformers 4 and 5 both load this class; the name that 5 writes is unknown to 4.
        settings = json.loads(config.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    # Text.

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added. Special tokens that `text` spells out become their ids.

        Raises:
          UsageError: the text has words that the vocabulary cannot express; guessing at "<unk>" would answer another question.
        """
        encoding = self.backend.encode(text, add_special_tokens=False)
        pieces = zip(encoding.tokens, encoding.offsets, strict=True)
        unknown = [text[a:b] for token, (a, b) in pieces if token == self._unknown_token and text[a:b] != token]
        if unknown:
            raise UsageError(
                f"text with {unknown[:5]}", "the tokenizer's vocabulary lacks these words", "use only words that the model was trained on"
            )
        return encoding.ids

    def decode(self, ids: list[int] | tuple[int, ...]) -> str:
        """Text of `ids` without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    # Chat.

    @property
    def template_hash(self) -> str | None:
        """First 16 hex digits of the chat template's BLAKE2b: which template rendered a prompt. None without a template."""
        return None if self.chat_template is None else hashlib.blake2b(self.chat_template.encode()).hexdigest()[:16]

    def chat(self, messages: Sequence[Mapping[str, Any]], /, **kwargs: Any) -> str:
        """The prompt for `messages` up to where the assistant's answer starts, by the tokenizer's own template.

        Args:
          messages: `{"role": ..., "content": ...}`, oldest first; see `models.chat.turns_of`.
          kwargs: variables of the template, such as `enable_thinking=False`.

        Raises:
          UsageError: no template, no messages, a variable that the template does not read, or a conversation that it refuses or fails on.
        """
        if self.chat_template is None:
            raise UsageError("chat messages", "the tokenizer has no chat template", "pass raw prompts: strings, already templated")
        for name in kwargs:
            if name not in self._template_variables:
                takes = ", ".join(sorted(self._template_variables)) or "none"
                raise UsageError(f"chat template argument {name!r}", "the model's template takes no such argument", f"it takes {takes}")
        special = {"eos_token": self.eos_tokens[0], **self.special_tokens}
        return chats.render(self.chat_template, special, messages, kwargs)

    @functools.cached_property
    def _template_variables(self) -> set[str]:
        """What a caller may set: names that the template reads from outside, except those that the rendering sets itself."""
        # transformers adds the tag `generation`; Jinja alone cannot parse it.
        source = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", self.chat_template or "")
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
        try:
            found = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise UsageError("the model's chat template", f"it is not valid Jinja ({_first_line(error)})", "pass raw prompts") from error
        own = {*chats.OWN, *self.special_tokens}
        return found - own - set(environment.globals)

    @functools.cached_property
    def _hugging_face(self) -> Any:
        """A copy as a transformers tokenizer."""
        from transformers import PreTrainedTokenizerFast

        special = {"eos_token": self.eos_tokens[0], **self.special_tokens}
        return PreTrainedTokenizerFast(tokenizer_object=self.backend, chat_template=self.chat_template, **special)

    # Unused ids.

    def unused_ids(self, vocab_size: int) -> np.ndarray:
        """`[vocab_size]` bool: ids that the tokenizer never emits, unless a text spells a placeholder's name.

        These are
          - ids without a token: holes, and rows beyond the tokenizer;
          - tokens whose whole name is one of `PLACEHOLDER`, such as `<unused12>` or `<|reserved_special_token_12|>`, and that pass all
            of these checks: no end-of-sequence or other special token (bos, pad, unk, ...) is called so; the chat template does not
            contain the name; the token is an added token (text is searched for these before anything is merged), or no merge of a BPE
            vocabulary results in it; and encoding `PROBE`, a short text of many scripts and some code, does not give it.
        What the publisher's training data held is not checked: nothing in a tokenizer tells.
        """
        unused = np.ones(max(vocab_size, self.size), bool)
        unused[self._emitted_ids] = False
        return unused[:vocab_size]

    @functools.cached_property
    def _emitted_ids(self) -> list[int]:
        vocab = self.backend.get_vocab(with_added_tokens=True)
        roles = {*self.eos_tokens, *self.special_tokens.values(), self._unknown_token}
        template = self.chat_template or ""
        candidates = {token for token in vocab if PLACEHOLDER.fullmatch(token) and token not in roles and token not in template}
        if candidates:
            candidates -= set(self.backend.encode(PROBE, add_special_tokens=False).tokens)
        added = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        if candidates - added:  # only then, because a large vocabulary takes a second to write out
            merges = json.loads(self.backend.to_str())["model"].get("merges", [])
            candidates -= {left + right for left, right in merges} - added
        return [i for token, i in vocab.items() if token not in candidates]


def word_level(words: list[str]) -> Tokenizer:
    """A tokenizer with one id per whitespace-separated word, "<eos>" first and "<unk>" second."""
    vocab = {word: i for i, word in enumerate(["<eos>", "<unk>", *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<eos>"])
    return Tokenizer(backend, ("<eos>",))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _eos_ids(path: pathlib.Path) -> list[int | None]:
    """`eos_token_id` of a Hugging Face JSON file: a number, a list, or absent (as the file may be)."""
    found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return found if isinstance(found, list) else [found]


def _tokens(backend: tokenizers.Tokenizer, ids: Sequence[int | None], where: str) -> list[str]:
    """Names of end-of-sequence ids, each once. Raises UsageError for an id without a token, or if all are None."""
    wanted = list(dict.fromkeys(i for i in ids if i is not None))
    tokens = [token for i in wanted if (token := backend.id_to_token(i)) is not None]
    if not wanted or len(tokens) < len(wanted):
        raise UsageError(where, f"its end-of-sequence ids {wanted} are not all tokens", "correct eos_token_id in its config files")
    return tokens


def _gguf_backend(path: pathlib.Path, architecture: str, metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer that `metadata` (keys without "tokenizer.ggml.") describes.

    transformers builds it; what it leaves out is corrected here, so that text becomes the ids that the model was trained on.

    Raises:
      UsageError: transformers cannot build it, or the way of cutting text is not known.
    """
    from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    kind, split = metadata.get("model"), metadata.get("pre")
    fix = "use the Hugging Face directory of the model"
    if kind == "gpt2" and split not in {*GGUF_PRE_TOKENIZER_SPLITS, *GPT2_SPLIT, *DIGITS_THEN_GPT2_SPLIT}:
        raise UsageError(f"model {path}", f"it cuts text in the way {split!r}, which is not known here", fix)
    names = {key.removeprefix("ggml."): name for key, name in GGUF_TOKENIZER_MAPPING["tokenizer"].items()}
    try:
        backend, _ = convert_gguf_tokenizer(architecture, {name: metadata[key] for key, name in names.items() if key in metadata})
    except (ValueError, KeyError) as error:
        raise UsageError(f"model {path}", f"its tokenizer {kind!r} cannot be built ({_first_line(error)})", fix) from error
    state = json.loads(backend.to_str())
    # transformers adds GPT-2's <|endoftext|> to every byte-level vocabulary, also where the model has no row for it.
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < len(metadata["tokens"])]
    if kind == "gpt2" and split in DIGITS_THEN_GPT2_SPLIT:
        digits = {"type": "Digits", "individual_digits": True}
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, state["pre_tokenizer"]]}
    if kind == "gpt2" and split in WHOLE_WORDS:
        state["model"]["ignore_merges"] = True
    if kind == "gpt2" and split in NORMALISED:
        state["normalizer"] = {"type": "NFC"}
    return tokenizers.Tokenizer.from_str(json.dumps(state))
