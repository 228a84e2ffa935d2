"""The tokenizer of a Hugging Face directory: which file says what, and what is written back."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from zip_rc_jax.models.io.huggingface import read_json, read_text, short
from zip_rc_jax.runtime.errors import UsageError

TOKENIZER, CONFIG, SPECIAL_TOKENS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
TEMPLATE, OLD_TEMPLATE, TEMPLATES = (
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)
ROWS = "zip_rc_rows"  # our own key: ids from here on have no row in the checkpoint
TOKENIZER_FILES = (TOKENIZER, CONFIG, "tokenizer.model", "vocab.json", "vocab.txt")
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Settings that other engines read and that nothing here does. They pass through.
KEPT = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces")

# Names under which published vocabularies keep the end of a turn, a call or a text. llama.cpp stops
# at each of them.
ENDS = frozenset({
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>",
    "<|calls|>", "<end_of_turn>", "<turn|>",
    "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "<|tool_response>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek's, with wide bars
})  # fmt: skip
# Short names that may as well be ordinary text, such as the HTML tag "</s>". They count only as
# control tokens.
SHORT_ENDS = frozenset({"</s>", "<eos>", "[EOS]", "<EOT>", "_<EOT>", "[EOT]"})

# Texts that tell one way of cutting text from another. Two tokenizers that agree on all of them are
# taken for the same.
PROBES = (
    "The quick brown fox jumps over 12,345.67 lazy dogs & 'cats' (don't ask).",
    "650841823 0 00 1000000 3.14159 2026-11-30 x1y22z333",
    "  two leading, three   inside, trailing  ",
    " one", "one ", "\n", "\n\n\n", "\t\ttabs\tand\r\nlines\n \n  x",
    "Zwölf Boxkämpfer; où est l'été? ¿Qué niño? Съешь ещё этих булок.",
    "敏捷的棕色狐狸 跳过了懒狗。 いろはにほへと 다람쥐 헌 쳇바퀴 نص عربي עברית हिन्दी ไทย",
    "e\u0301 \u00e9 ﬁ Å ½ ² ∑ ≤ …",
    "🦊👩‍🚀 🇫🇷 ☕️",
    "def f(x: int) -> list[str]:\n    return [f\"{i:02d}\" for i in range(x)]  # CamelCase "
    "snake_case",
    "#include <stdio.h>\n{ \"key\": [1, 2, null] } && || :: => ++ <b>x</b> \\frac{1}{2} I'LL we'Ve",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a tokenizer is made of, wherever it was found.

    Attributes:
      backend: its post-processor adds exactly what raw prompts get.
      special_tokens: by role, such as "bos_token".
      templates: chat templates by name; the usual one is "default".
      settings: see `KEPT`.
      end_ids: of its own configuration.
      rows: ids from here on have no row in the checkpoint; None if it says nothing.
    """

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    templates: dict[str, str]
    settings: dict[str, Any]
    end_ids: list[int | None]
    rows: int | None = None


def guarded(build: Any, where: str, fix: str) -> Any:
    """`build()`. The Rust library raises bare `Exception`, and for some damaged files it panics.

    Raises:
      UsageError: it failed.
    """
    try:
        return build()
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(where, f"it cannot be read ({short(error)})", fix) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UsageError(where, f"it cannot be read ({short(error)})", fix) from error


def read_backend(path: pathlib.Path) -> tokenizers.Tokenizer:
    """Reads a tokenizer.json. Raises UsageError for a damaged one."""
    text = read_text(path)  # the library would not say that a file is empty, or UTF-16
    fix = "download it again, or write it again with a current version of the tokenizers library"
    return guarded(lambda: tokenizers.Tokenizer.from_str(text), f"{path}", fix)


def post_processor(before: Sequence[tuple[str, int]], after: Sequence[tuple[str, int]]) -> Any:
    """A post-processor that puts tokens (name, id) before and behind a text; None if there are
    none."""
    if not before and not after:
        return None
    pieces = lambda tokens: [{"SpecialToken": {"id": token, "type_id": 0}} for token, _ in tokens]  # noqa: E731
    single = [*pieces(before), {"Sequence": {"id": "A", "type_id": 0}}, *pieces(after)]
    state = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"": 0}, "unk_token": ""},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                token: {"id": token, "ids": [number], "tokens": [token]}
                for token, number in [*before, *after]
            },
        },
    }
    return tokenizers.Tokenizer.from_str(json.dumps(state)).post_processor


def added_ids(backend: tokenizers.Tokenizer, probe: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that the post-processor puts before and behind a text. `probe` is a text that has ids."""
    for text in (probe, "a", "the"):
        encoding = backend.encode(text, add_special_tokens=True)
        inner = [i for i, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
        if inner:
            return tuple(encoding.ids[: inner[0]]), tuple(encoding.ids[inner[-1] + 1 :])
    return (), ()


def end_names(vocabulary: Mapping[str, int] | set[str], special: set[str]) -> set[str]:
    """Names in a vocabulary at which generation ends.

    Args:
      special: tokens of it that are control tokens.
    """
    named = {token for token in ENDS if token in vocabulary} | {
        token for token in SHORT_ENDS if token in special
    }
    called = "<|call|>" in vocabulary or "<|calls|>" in vocabulary
    if called and ("<|return|>" in vocabulary or "<|flush|>" in vocabulary):
        named.discard("<|end|>")  # as gpt-oss uses it: it ends a message, and another one follows
    if "<|tool_response>" in vocabulary:
        named.discard("</s>")  # an HTML tag there
    return named


# Reading.


def read_directory(directory: pathlib.Path) -> Parts:
    """The tokenizer of a Hugging Face directory.

    Where there is a tokenizer.json, it alone decides how text becomes ids. Classes of transformers
    would rebuild the tokenizer from its vocabulary, and some cut text in another way than the file
    says.

    Raises:
      UsageError: no tokenizer files, damaged or contradictory ones, or a tokenizer written in
        Python.
    """
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise UsageError(
            f"tokenizer {directory}",
            f"there is none of {', '.join(TOKENIZER_FILES)}",
            "point at a complete Hugging Face directory, for example one with a tokenizer.json",
        )
    config = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    if (directory / TOKENIZER).is_file():
        backend = read_backend(directory / TOKENIZER)
        special = _special_tokens(directory, config, backend)
        _add_missing(backend, config, special, directory)
        templates = _templates(directory, config)
    else:
        backend, special, templates = _built_by_transformers(directory)
    _check_decoder(backend, config, directory / CONFIG)
    # as transformers: they replace what tokenizer.json says
    if "add_bos_token" in config or "add_eos_token" in config:
        bos = _role(backend, special, "bos_token") if config.get("add_bos_token") else []
        eos = _role(backend, special, "eos_token") if config.get("add_eos_token") else []
        backend.post_processor = post_processor(bos, eos)
    stated_end = special.get("eos_token")
    ends: list[int | None] = [None if stated_end is None else backend.token_to_id(stated_end)]
    for name in ("generation_config.json", "config.json"):
        ends += end_ids(directory / name)
    ends += _ends_of_templates(backend, templates)
    settings = {
        key: config[key] for key in KEPT if isinstance(config.get(key), (str, int, float, bool))
    }
    rows = config.get(ROWS)
    if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
        raise UsageError(
            f"{directory / CONFIG}: {ROWS}={str(rows)[:50]}",
            "it is no number of rows",
            "export the model again",
        )
    return Parts(backend, special, templates, settings, ends, rows)


def end_ids(path: pathlib.Path) -> list[int | None]:
    """`eos_token_id` of a Hugging Face JSON file: a number, a list, or absent, as the file itself
    may be.

    Raises:
      UsageError: the file is damaged, or what it says is no id.
    """
    if not path.is_file():
        return []
    given = read_json(path)
    if "eos_token_id" not in given and isinstance(given.get("text_config"), dict):
        given = given["text_config"]
    value = given.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    for i in ids:
        if i is not None and (not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < 2**31):
            raise UsageError(
                f"{path}: eos_token_id={str(value)[:80]}",
                "it is no token id",
                "write a whole number or a list of them",
            )
    return ids


def _token(value: Any) -> str | None:
    """The text of a special token: a string, or an object with its content."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _special_tokens(
    directory: pathlib.Path, config: dict[str, Any], backend: tokenizers.Tokenizer
) -> dict[str, str]:
    """By role. special_tokens_map.json is read where tokenizer_config.json is of the old kind, as
    transformers does."""
    given = dict(config)
    if "added_tokens_decoder" not in config and (directory / SPECIAL_TOKENS).is_file():
        given |= read_json(directory / SPECIAL_TOKENS)
    for role in ROLES:
        if given.get(role) not in (None, "") and _token(given[role]) is None:
            raise UsageError(
                f"{directory / CONFIG}: {role}={str(given[role])[:80]}",
                "it is no token",
                "write the token as a string",
            )
    if "eos_token" not in given:
        given = _usual_tokens(config.get("tokenizer_class"), backend) | given
    own_names = [
        key
        for key in given
        if key.endswith("_token") and key not in ROLES and isinstance(given[key], (str, Mapping))
    ]
    tokens = {role: _token(given.get(role)) for role in (*ROLES, *own_names)}
    return {role: token for role, token in tokens.items() if token is not None}


def _usual_tokens(name: Any, backend: tokenizers.Tokenizer) -> dict[str, str]:
    """Special tokens that a class of transformers has where the files do not say, as far as the
    vocabulary has them."""
    if not isinstance(name, str):
        return {}
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    kind = tokenizer_class_from_name(name)
    parameters = inspect.signature(kind.__init__).parameters if kind else {}
    usual = {role: parameters[role].default for role in ROLES if role in parameters}
    return {
        role: token
        for role, token in usual.items()
        if isinstance(token, str) and backend.token_to_id(token) is not None
    }


def _add_missing(
    backend: tokenizers.Tokenizer,
    config: dict[str, Any],
    special: dict[str, str],
    directory: pathlib.Path,
) -> None:
    """Adds tokens that only tokenizer_config.json knows, and makes special tokens whole where text
    would cut them."""
    known = backend.get_vocab(with_added_tokens=True)
    for _, token in sorted(_decoder(config, directory / CONFIG).items()):
        if token.content not in known:
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    for name in dict.fromkeys(special.values()):
        number = backend.token_to_id(name)
        if number is None or backend.encode(name, add_special_tokens=False).ids != [number]:
            backend.add_special_tokens(
                [tokenizers.AddedToken(name, special=True, normalized=False)]
            )


def _decoder(config: dict[str, Any], path: pathlib.Path) -> dict[int, tokenizers.AddedToken]:
    """`added_tokens_decoder` of tokenizer_config.json: id -> token."""
    given = config.get("added_tokens_decoder") or {}

    def build() -> dict[int, tokenizers.AddedToken]:
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        added = {}
        for number, token in given.items():
            token = {"content": token} if isinstance(token, str) else dict(token)
            kept = {flag: bool(token[flag]) for flag in flags if flag in token}
            added[int(number)] = tokenizers.AddedToken(token["content"], **kept)
        return added

    return guarded(build, f"{path}: added_tokens_decoder", "download it again")


def _check_decoder(
    backend: tokenizers.Tokenizer, config: dict[str, Any], path: pathlib.Path
) -> None:
    """Raises UsageError where tokenizer_config.json and the tokenizer give a token two ids."""
    for number, token in _decoder(config, path).items():
        other = backend.token_to_id(token.content)
        if other != number:
            raise UsageError(
                f"{path}: token {token.content[:60]!r}",
                f"it has id {number} there, and the tokenizer gives {other}",
                "correct one of them",
            )


def _role(
    backend: tokenizers.Tokenizer, special: dict[str, str], role: str
) -> list[tuple[str, int]]:
    """Name and id of a special token; empty without one, as transformers takes it."""
    token = special.get(role)
    number = None if token is None else backend.token_to_id(token)
    return [] if token is None or number is None else [(token, number)]


def _templates(directory: pathlib.Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name: files of their own stand above what tokenizer_config.json says."""
    given = config.get("chat_template")
    if isinstance(given, list):
        given = guarded(
            lambda: {t["name"]: t["template"] for t in given},
            f"{directory / CONFIG}: chat_template",
            "download it again",
        )
    templates = (
        dict(given) if isinstance(given, Mapping) else {} if given is None else {"default": given}
    )
    if "default" not in templates and (directory / OLD_TEMPLATE).is_file():
        stated = read_json(directory / OLD_TEMPLATE).get("chat_template")
        templates |= {} if stated is None else {"default": stated}
    files = {"default": directory / TEMPLATE} | {
        path.stem: path for path in sorted((directory / TEMPLATES).glob("*.jinja"))
    }
    texts = {name: _lines(read_text(path)) for name, path in files.items() if path.is_file()}
    templates = texts or templates  # transformers takes the files alone, if there are any
    for name, text in templates.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise UsageError(
                f"{directory / CONFIG}: chat_template", "it is no text", "download it again"
            )
    return templates


def _lines(text: str) -> str:
    """With the line ends that Python reads from a text file, and that Jinja renders."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _ends_of_templates(
    backend: tokenizers.Tokenizer, templates: Mapping[str, str]
) -> list[int | None]:
    """Ids of special tokens that end a turn by their name and that a chat template writes."""
    added = {
        token.content: number
        for number, token in backend.get_added_tokens_decoder().items()
        if token.special
    }
    names = end_names(backend.get_vocab(with_added_tokens=True) if templates else {}, set(added))
    return [
        number
        for token, number in added.items()
        if token in names and any(token in text for text in templates.values())
    ]


def _built_by_transformers(
    directory: pathlib.Path,
) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[str, str]]:
    """The tokenizer of a directory without tokenizer.json: backend, special tokens, templates.

    Raises:
      UsageError: transformers cannot build it, it is written in Python, or what it built
        contradicts the vocabulary.
    """
    from transformers import AutoTokenizer  # a second to import, and only published models need it

    where = f"tokenizer {directory}"
    tokenizer = guarded(
        lambda: AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        ),
        where,
        "download it again, or add its tokenizer.json",
    )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise UsageError(
            where,
            f"{type(tokenizer).__name__} is a slow tokenizer, written in Python",
            "convert it to a tokenizer.json (transformers.convert_slow_tokenizer)",
        )
    if (directory / "vocab.json").is_file():
        stated, built = (
            read_json(directory / "vocab.json"),
            backend.get_vocab(with_added_tokens=True),
        )
        other = next(
            (token for token, number in stated.items() if built.get(token) != number), None
        )
        if other is not None:
            raise UsageError(
                where,
                f"transformers gives {other[:60]!r} another id than vocab.json",
                "add its tokenizer.json",
            )
    text = "two words, three  spaces"
    spaces = guarded(
        lambda: backend.decode(backend.encode(text, add_special_tokens=False).ids),
        where,
        "add its tokenizer.json",
    )
    if " " in text and " " not in spaces and spaces:
        raise UsageError(
            where,
            "as transformers builds it, it loses the spaces of a text",
            "add its tokenizer.json",
        )
    template = tokenizer.chat_template
    templates = (
        dict(template)
        if isinstance(template, Mapping)
        else {}
        if template is None
        else {"default": template}
    )
    return (
        backend,
        {
            name: str(token)
            for name, token in tokenizer.special_tokens_map.items()
            if isinstance(token, str)
        },
        templates,
    )


# Writing.


def write_directory(directory: pathlib.Path, parts: Parts, flags: dict[str, bool]) -> None:
    """Writes what transformers and other engines read: tokenizer.json, tokenizer_config.json and
    the chat templates.

    Args:
      flags: "add_bos_token" and "add_eos_token", where these two say all that the post-processor
        adds.

    Raises:
      UsageError: a template has a name that is no file name, or transformers would read another
        tokenizer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    parts.backend.save(str(directory / TOKENIZER))
    # transformers 4 and 5 both load this class; the name that 5 writes is unknown to 4.
    config = (
        {"tokenizer_class": "PreTrainedTokenizerFast"}
        | parts.settings
        | parts.special_tokens
        | flags
    )
    if parts.rows is not None:
        config[ROWS] = parts.rows
    (directory / CONFIG).write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    for name, text in parts.templates.items():
        if not re.fullmatch(r"[\w-][\w.-]{0,99}", name):
            raise UsageError(
                f"chat template {name[:60]!r}", "its name cannot be that of a file", "rename it"
            )
        path = (
            directory / TEMPLATE if name == "default" else directory / TEMPLATES / f"{name}.jinja"
        )
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())  # not as text: a line may end in \r\n
    _check_written(directory, parts.backend)


def _check_written(directory: pathlib.Path, backend: tokenizers.Tokenizer) -> None:
    """Raises UsageError if transformers reads other ids from `directory` than `backend` gives."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(
        str(directory), local_files_only=True, trust_remote_code=False
    )
    spelled = [token.content for token in backend.get_added_tokens_decoder().values()][:200]
    for text in (*PROBES, " x ".join(spelled), "".join(spelled)):
        for added in (False, True):
            ours = backend.encode(text, add_special_tokens=added).ids
            if theirs.encode(text, add_special_tokens=added) != ours:
                raise UsageError(
                    f"tokenizer {directory}",
                    f"transformers reads it otherwise, for example {text[:40]!r}",
                    "report this model",
                )
