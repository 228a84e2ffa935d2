"""Text <-> ids, chat templates, and which ids a tokenizer never emits.

On Hugging Face `tokenizers`; torch is never imported.
"""

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

from zip_rc_jax.models.io import chat as chats
from zip_rc_jax.models.io.huggingface import short
from zip_rc_jax.models.io.tokenizer_files import (
    Parts,
    added_ids,
    guarded,
    read_directory,
    write_directory,
)
from zip_rc_jax.runtime.errors import UsageError

# Names that publishers give to vocabulary rows which they keep for later.
PLACEHOLDER = re.compile(
    r"<unused_?\d+>|<\|unused_?\d+\|>|\[unused_?\d+\]"  # Gemma, BERT
    r"|<reserved_\d+>|<\|reserved_(?:special_)?(?:token_)?\d+\|>"  # Llama 3, LFM2
    # Mistral and Nemotron, T5, Phi
    r"|<SPECIAL_\d+>|<extra_id_\d+>|<\|dummy_\d+\|>|<\|placeholder_?\d+\|>"
    r"|\[PAD\d+\]"  # rows beyond the tokenizer in a GGUF file
)
PROBE = """The quick brown fox jumps over 12,345.67 lazy dogs & 'cats' (don't ask). Zwölf Boxkämpfer; où est l'été? ¿Qué niño?
Съешь ещё этих булок. 敏捷的棕色狐狸 跳过了懒狗。 いろはにほへと 다람쥐 헌 쳇바퀴 نص عربي עברית हिन्दी ไทย
🦊👩‍🚀 ½ ∑ x² ≤ \\frac{1}{2} <b>unused</b> [reserved] <|special|> SPECIAL_1 # 2
\tdef f(x: int) -> list[str]:\n        return [f"{i:02d}" for i in range(x)]
#include <stdio.h> { "key": [1, 2, null] } && || :: => ++\r\n
"""  # noqa: E501


class Tokenizer:
    """A `tokenizers` tokenizer with its end-of-sequence ids and its chat templates.

    Attributes:
      backend: the Rust tokenizer. Truncation and padding are switched off.
        Its post-processor says what raw prompts get, for example a beginning-of-sequence token.
      eos_tokens: tokens that end a sequence.
      eos_ids: their ids.
      chat_template: Jinja source of the usual template, or None.
      templates: all templates by name; "default" is the usual one, "tool_use" the one for chats
        with tools.
      special_tokens: what the template may refer to, e.g. `{"bos_token": "<s>"}`.
      settings: what other engines read in an export, e.g. `{"model_max_length": 8192}`.
      rows: ids from here on have no row in the checkpoint; None if all have one.
      size: number of ids that the tokenizer knows (largest id + 1).
      used: number of ids that the model can read and emit: `size`, but at most `rows`.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_tokens: Sequence[str],
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        *,
        templates: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        rows: int | None = None,
    ):
        """Args: `templates` are those beside `chat_template`.

        Raises:
          UsageError: there is no end-of-sequence token, one that the tokenizer does not know, or
            one without a row.
        """
        backend.no_truncation()  # published files may cut every text at 512 tokens
        backend.no_padding()
        self.backend = backend
        self.eos_tokens = tuple(eos_tokens)
        self.chat_template = chat_template
        self.templates = ({} if chat_template is None else {"default": chat_template}) | {
            name: text for name, text in (templates or {}).items() if name != "default"
        }
        self.special_tokens = dict(special_tokens or {})
        self.settings = dict(settings or {})
        ids = [i for token in self.eos_tokens if (i := backend.token_to_id(token)) is not None]
        if not ids or len(ids) < len(self.eos_tokens):
            raise UsageError(
                f"eos_tokens={self.eos_tokens}",
                "the tokenizer does not know them all",
                "name tokens of tokenizer.json",
            )
        self.eos_ids: tuple[int, ...] = tuple(ids)
        self.size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.rows = rows if rows is not None and rows < self.size else None
        self.used = self.size if self.rows is None else self.rows
        if beyond := [
            token for token, i in zip(self.eos_tokens, ids, strict=True) if i >= self.used
        ]:
            raise UsageError(
                f"end-of-sequence token {', '.join(beyond[:3])}",
                f"its id is past the checkpoint's {self.used} rows, so the model can never end a "
                "text",
                "correct eos_token_id, or take the tokenizer that belongs to the checkpoint",
            )
        # a Unigram model does not tell
        self._unknown_token = getattr(backend.model, "unk_token", None) or "<unk>"

    @classmethod
    def _of(cls, parts: Parts, where: str) -> Tokenizer:
        """Raises UsageError for an end-of-sequence id that no token has, or without any."""
        ends = _tokens(parts.backend, parts.end_ids, where)
        default, special = parts.templates.get("default"), parts.special_tokens
        return cls(
            parts.backend,
            ends,
            default,
            special,
            templates=parts.templates,
            settings=parts.settings,
            rows=parts.rows,
        )

    @classmethod
    def from_pretrained(cls, directory: str | pathlib.Path) -> Tokenizer:
        """The tokenizer of a local Hugging Face directory.

        A tokenizer.json is read as it is; without one, transformers builds the tokenizer.
        End-of-sequence ids are its own, those of `generation_config.json` and `config.json`, and
        special tokens that end a turn by their name in the chat template.

        Raises:
          UsageError: no tokenizer files, files that cannot be read, a tokenizer written in Python,
            or an end-of-sequence id that no token has.
        """
        directory = pathlib.Path(directory)
        where = f"tokenizer {directory}"
        return guarded(
            lambda: cls._of(read_directory(directory), where), where, "download it again"
        )

    @classmethod
    def from_gguf(cls, path: str | pathlib.Path) -> Tokenizer:
        """The tokenizer inside a GGUF file.

        The `gguf` package reads the metadata (`AutoTokenizer(gguf_file=...)` needs torch for that),
        transformers builds the tokenizer.

        Raises:
          UsageError: no such file, not a GGUF file, no tokenizer in it, or one whose way of cutting
            text is not known here.
        """
        from zip_rc_jax.models.io.gguf_tokenizer import read_gguf_tokenizer

        where = f"model {path}"
        fix = "use the Hugging Face directory of the model"
        return guarded(lambda: cls._of(read_gguf_tokenizer(pathlib.Path(path)), where), where, fix)

    def limited(self, rows: int) -> Tokenizer:
        """The same tokenizer for a checkpoint of `rows` rows.

        Ids past them are never sampled, and no prompt may hold them.

        Raises:
          UsageError: an end-of-sequence token lies past the rows.
        """
        if rows >= self.used:
            return self
        kept = self.backend, self.eos_tokens, self.chat_template, self.special_tokens
        return Tokenizer(*kept, templates=self.templates, settings=self.settings, rows=rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; `backend` is the contents of a tokenizer.json."""
        return {
            "backend": json.loads(self.backend.to_str()),
            "eos_tokens": list(self.eos_tokens),
            "chat_template": self.chat_template,
            "special_tokens": self.special_tokens,
            "templates": {name: text for name, text in self.templates.items() if name != "default"},
            "settings": self.settings,
            "rows": self.rows,
            "prompts_get_special_tokens": True,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tokenizer:
        """Inverse of `to_dict`.

        What versions before 0.2 wrote adds nothing to raw prompts, as those versions did not.
        """
        state = dict(data["backend"])
        if not data.get("prompts_get_special_tokens", False) and _adds_tokens(
            state.get("post_processor")
        ):
            state["post_processor"] = None
        kept = {
            "templates": data.get("templates"),
            "settings": data.get("settings"),
            "rows": data.get("rows"),
        }
        backend = tokenizers.Tokenizer.from_str(json.dumps(state))
        return cls(
            backend, data["eos_tokens"], data["chat_template"], data["special_tokens"], **kept
        )

    def save_pretrained(self, directory: str | pathlib.Path) -> None:
        """Writes what `AutoTokenizer` reads: tokenizer.json, tokenizer_config.json and the chat
        templates, each a .jinja file.

        Of several end-of-sequence tokens only one can be the tokenizer's; the others belong into
        generation_config.json.

        Raises:
          UsageError: transformers would read another tokenizer from these files.
        """
        special = {"eos_token": self.eos_tokens[0], **self.special_tokens}
        parts = Parts(self.backend, special, self.templates, self.settings, [], self.rows)
        before, after = self.added_ids
        bos, eos = (
            special.get(role) and self.backend.token_to_id(special[role])
            for role in ("bos_token", "eos_token")
        )
        said = before in ((), (bos,)) and after in ((), (eos,))
        write_directory(
            pathlib.Path(directory),
            parts,
            {"add_bos_token": bool(before), "add_eos_token": bool(after)} if said else {},
        )

    # Text.

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text`. Special tokens that `text` spells out become their ids.

        Args:
          add_special_tokens: also put before and behind it what the tokenizer's own settings add;
            see `encode_prompt`.

        Raises:
          UsageError: the text has words that the vocabulary cannot express; guessing at "<unk>"
            would answer another question.
        """
        encoding = self.backend.encode(text, add_special_tokens=False)
        pieces = zip(encoding.tokens, encoding.offsets, strict=True)
        unknown = [
            text[a:b]
            for token, (a, b) in pieces
            if token == self._unknown_token and text[a:b] != token
        ]
        if unknown:
            shown = [word[:40] for word in unknown[:5]]
            raise UsageError(
                f"text with {shown}",
                "the tokenizer's vocabulary lacks these words",
                "use only words that the model was trained on",
            )
        return self._completed(encoding.ids, end=True) if add_special_tokens else encoding.ids

    def encode_prompt(
        self, text: str, *, chat: bool = False, add_special_tokens: bool = True
    ) -> list[int]:
        """Ids of a prompt, as the model saw texts in training.

        The tokenizer's own settings say what a text begins and ends with, for example a
        beginning-of-sequence token. A text that already begins with it gets no second one.

        Args:
          chat: the text comes from the chat template. It is to be continued, so nothing is put
            behind it.
          add_special_tokens: False leaves the text as it is.

        Raises:
          UsageError: as `encode`.
        """
        ids = self.encode(text)
        return self._completed(ids, end=not chat) if add_special_tokens else ids

    @functools.cached_property
    def added_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids that the tokenizer's own settings put before and behind a text."""
        return added_ids(self.backend, self.eos_tokens[0])

    def _completed(self, ids: list[int], end: bool) -> list[int]:
        before, after = map(list, self.added_ids)
        if before and ids[: len(before)] != before:
            ids = [*before, *ids]
        return [*ids, *after] if end and after and ids[-len(after) :] != after else ids

    def decode(self, ids: list[int] | tuple[int, ...]) -> str:
        """Text of `ids` without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def pieces(self, ids: list[int]) -> tuple[str, ...]:
        """What each of `ids` adds to the text, special tokens included.

        Joined, the pieces are the text of all ids. A character of several tokens belongs to the
        last of them; the others add "". Bytes that form no character read as U+FFFD.
        """
        pieces, anchor, done = [""] * len(ids), 0, 0
        for i in range(len(ids)):
            # How a token reads may depend on the one before it, so both are decoded together.
            before = self.backend.decode(ids[anchor:done], skip_special_tokens=False)
            text = self.backend.decode(ids[anchor : i + 1], skip_special_tokens=False)
            # No character has more than four bytes, so none waits for more than three tokens.
            waits = text.endswith("\ufffd") and i - done < 3 and i + 1 < len(ids)
            if not waits:
                pieces[i] = text[len(before) :]
                anchor, done = done, i + 1
        return tuple(pieces)

    # Chat.

    @property
    def template_hash(self) -> str | None:
        """First 16 hex digits of the chat template's BLAKE2b: which template rendered a prompt.

        None without a template.

        Of several templates, all are hashed together.
        """
        if self.chat_template is None:
            return None
        source = (
            self.chat_template
            if len(self.templates) == 1
            else json.dumps(self.templates, sort_keys=True)
        )
        return hashlib.blake2b(source.encode()).hexdigest()[:16]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt for `messages` up to where the assistant's answer starts, by the tokenizer's
        own template.

        Args:
          messages: `{"role": ..., "content": ...}`, oldest first; see `models.chat.turns_of`.
          continue_final_message: end where the text of the last turn ends, instead.
          kwargs: variables of the template, such as `enable_thinking=False`.

        Raises:
          UsageError: no template, no messages, a variable that the template does not read, or a
            conversation that it refuses or fails on.
        """
        return self._rendered(messages, kwargs, {}, continue_final_message)

    def finished_chat(self, messages: Sequence[Mapping[str, Any]], /, **kwargs: Any) -> str:
        """The chat up to the end of its last turn, as a reward model reads it. Raises as `chat`."""
        return self._rendered(messages, kwargs, {"add_generation_prompt": False})

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        kwargs: dict[str, Any],
        own: dict[str, Any],
        continue_final_message: bool = False,
    ) -> str:
        """See `chat`; `own` are variables that callers cannot set."""
        if self.chat_template is None:
            raise UsageError(
                "chat messages",
                "the tokenizer has no chat template",
                "pass raw prompts: strings, already templated",
            )
        for name in kwargs:
            if name not in self._template_variables:
                takes = ", ".join(sorted(self._template_variables)) or "none"
                raise UsageError(
                    f"chat template argument {name!r}",
                    "the model's template takes no such argument",
                    f"it takes {takes}",
                )
        special = {"eos_token": self.eos_tokens[0], **self.special_tokens}
        # As transformers chooses among named templates.
        template = (
            self.templates["tool_use"]
            if kwargs.get("tools") and "tool_use" in self.templates
            else self.chat_template
        )
        return chats.render(template, special, messages, kwargs | own, continue_final_message)

    @functools.cached_property
    def _template_variables(self) -> set[str]:
        """What a caller may set: names that the template reads from outside, except those that the
        rendering sets itself."""
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
        variables = set[str]()
        for text in (
            self.templates[name] for name in ("default", "tool_use") if name in self.templates
        ):
            # transformers adds the tag `generation`; Jinja alone cannot parse it.
            source = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", text)
            try:
                variables |= jinja2.meta.find_undeclared_variables(environment.parse(source))
            except jinja2.TemplateSyntaxError as error:
                raise UsageError(
                    "the model's chat template",
                    f"it is not valid Jinja ({short(error)})",
                    "pass raw prompts",
                ) from error
        defined = {*chats.OWN, *self.special_tokens}
        return variables - defined - set(environment.globals)

    @functools.cached_property
    def _hugging_face(self) -> Any:
        """A copy as a transformers tokenizer."""
        from transformers import PreTrainedTokenizerFast

        special = {"eos_token": self.eos_tokens[0], **self.special_tokens}
        template = self.chat_template if len(self.templates) < 2 else self.templates
        return PreTrainedTokenizerFast(
            tokenizer_object=self.backend, chat_template=template, **special
        )

    # Unused ids.

    def unused_ids(self, vocab_size: int) -> np.ndarray:
        """`[vocab_size]` bool: ids that the tokenizer never emits, unless a text spells a
        placeholder's name.

        These are
          - ids without a token: holes, and rows beyond the tokenizer;
          - ids without a row in the checkpoint;
          - tokens whose whole name is one of `PLACEHOLDER`, such as `<unused12>` or
            `<|reserved_special_token_12|>`, and that pass all of these checks: no end-of-sequence
            or other special token (bos, pad, unk, ...) is called so; the chat template does not
            contain the name; the token is an added token (text is searched for these before
            anything is merged), or no merge of a BPE vocabulary results in it; and encoding
            `PROBE`, a short text of many scripts and some code, does not give it.
        What the publisher's training data held is not checked: nothing in a tokenizer tells.
        """
        unused = np.ones(max(vocab_size, self.size), bool)
        unused[self._emitted_ids] = False
        unused[self.used :] = True
        return unused[:vocab_size]

    def free_ids(self, vocab_size: int) -> np.ndarray:
        """`[vocab_size]` bool: unused ids that may become a head's.

        An id past the checkpoint's rows that has a token is none.
        """
        free = self.unused_ids(vocab_size)
        taken = [
            i
            for i in self.backend.get_vocab(with_added_tokens=True).values()
            if self.used <= i < vocab_size
        ]
        free[taken] = False
        return free

    @functools.cached_property
    def _emitted_ids(self) -> list[int]:
        vocab = self.backend.get_vocab(with_added_tokens=True)
        roles = {*self.eos_tokens, *self.special_tokens.values(), self._unknown_token}
        template = "".join(self.templates.values())
        candidates = {
            token
            for token in vocab
            if PLACEHOLDER.fullmatch(token) and token not in roles and token not in template
        }
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


def _adds_tokens(processor: Mapping[str, Any] | None) -> bool:
    """Whether a post-processor of a tokenizer.json puts tokens around a text."""
    if not processor:
        return False
    if processor.get("type") == "Sequence":
        return any(map(_adds_tokens, processor["processors"]))
    return processor.get("type") != "ByteLevel"


def _tokens(backend: tokenizers.Tokenizer, ids: Sequence[int | None], where: str) -> list[str]:
    """Names of end-of-sequence ids, each once.

    Raises UsageError for an id without a token, or if all are None.
    """
    wanted = list(dict.fromkeys(i for i in ids if i is not None))
    tokens = [token for i in wanted if (token := backend.id_to_token(i)) is not None]
    if not wanted or len(tokens) < len(wanted):
        raise UsageError(
            where,
            f"its end-of-sequence ids {wanted} are not all tokens",
            "correct eos_token_id in its config files",
        )
    return tokens
