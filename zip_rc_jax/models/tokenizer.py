"""Text <-> ids, on Hugging Face `tokenizers` files."""

from __future__ import annotations

import pathlib

import tokenizers

from zip_rc_jax.errors import UsageError

FILE_NAME = "tokenizer.json"


class Tokenizer:
    """A `tokenizer.json` with its end-of-sequence ids.

    Attributes:
      size: number of ids that the tokenizer uses (largest id + 1).
      eos_ids: ids that end a sequence.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_tokens: tuple[str, ...]):
        self.backend = backend
        self.eos_tokens = eos_tokens
        ids = [i for token in eos_tokens if (i := backend.token_to_id(token)) is not None]
        if not ids or len(ids) < len(eos_tokens):
            raise UsageError(f"eos_tokens={eos_tokens}", "the tokenizer does not know them all", "name tokens of tokenizer.json")
        self.eos_ids: tuple[int, ...] = tuple(ids)
        self.size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._unknown = backend.token_to_id("<unk>")

    @classmethod
    def load(cls, directory: str | pathlib.Path, eos_tokens: tuple[str, ...]) -> Tokenizer:
        """Raises UsageError if the directory holds no tokenizer.json."""
        path = pathlib.Path(directory) / FILE_NAME
        if not path.is_file():
            raise UsageError(f"tokenizer {path}", "there is no such file", "point at a directory with a tokenizer.json")
        return cls(tokenizers.Tokenizer.from_file(str(path)), eos_tokens)

    def save(self, directory: str | pathlib.Path) -> None:
        self.backend.save(str(pathlib.Path(directory) / FILE_NAME))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added.

        Raises:
          UsageError: the text has words that a word-level tokenizer does not know; guessing at "<unk>" would answer another question.
        """
        encoding = self.backend.encode(text, add_special_tokens=False)
        if self._unknown is not None and self._unknown in encoding.ids:
            unknown = [text[a:b] for (a, b), i in zip(encoding.offsets, encoding.ids, strict=True) if i == self._unknown]
            raise UsageError(
                f"text with {unknown[:5]}", "the tokenizer's vocabulary lacks these words", "use only words that the model was trained on"
            )
        return encoding.ids

    def decode(self, ids: list[int] | tuple[int, ...]) -> str:
        """Text of `ids` without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)


def word_level(words: list[str]) -> Tokenizer:
    """A tokenizer with one id per whitespace-separated word, "<eos>" first and "<unk>" second."""
    vocab = {word: i for i, word in enumerate(["<eos>", "<unk>", *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<eos>"])
    return Tokenizer(backend, ("<eos>",))
