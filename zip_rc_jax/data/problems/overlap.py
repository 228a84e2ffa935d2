"""Which training problems are held-out ones: equal questions, and questions inside longer texts.

A question is compared by its tokens: words, numbers and signs, after NFKC, without case, spaces,
quotes, punctuation and LaTeX's dollar signs. Digits, operators and brackets stay, so
`(2 + 3) * 4` and `2 + 3 * 4` are two questions.

A training question repeats a held-out one if

1. their tokens are equal; or
2. at least `CONTAINED` of the held-out question's n-grams of tokens (13 by default) are in the
   training question, and its numbers and signs stand there in the same order without others
   between.

The second finds a held-out question with text around it or a few changed words. Its last condition
keeps templates: `gsm_symbolic` writes the same sentences with other numbers, and that is another
problem with another answer. Questions of fewer than n tokens are compared by the first alone.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

CONTAINED = 0.8  # of the n-grams of a held-out question
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_SPACING = re.compile(r"\\(?:left|right|displaystyle|quad|qquad|[()\[\]!,;: ])")
_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[+\-*/=<>^_()\[\]{}|%\\&!#~@]|[^\w\s.,;:?!\"'`$]")
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"))


def question_tokens(text: str) -> tuple[str, ...]:
    """Words, numbers and signs of a question, as they are compared."""
    text = unicodedata.normalize("NFKC", text).casefold().translate(_DASHES)
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), _SPACING.sub(" ", text))
    tokens = _TOKEN.findall(text)
    # "Wow!" ends a sentence; "5!" and ")!" are factorials.
    return tuple(
        token
        for i, token in enumerate(tokens)
        if token != "!" or (i and (tokens[i - 1][0].isdigit() or tokens[i - 1] == ")"))
    )


@dataclasses.dataclass(frozen=True)
class Repeats:
    """Which questions repeat others.

    Attributes:
      of: `[n]` number of the other question that question i repeats; -1 for none.
      equal, contained: how many do by the first and by the second rule.
    """

    of: np.ndarray
    equal: int
    contained: int

    @property
    def any(self) -> np.ndarray:
        """`[n]` bool."""
        return self.of >= 0


class HeldOut:
    """Held-out questions, prepared for comparisons with many others.

    Args:
      questions: their texts.
      ngram: tokens in a row; 0 compares whole questions alone.
    """

    def __init__(self, questions: Sequence[str], ngram: int = 13):
        self.ngram = ngram
        self._tokens = [question_tokens(text) for text in questions]
        self._whole = dict[tuple[str, ...], int]()
        for number, tokens in enumerate(self._tokens):
            self._whole.setdefault(tokens, number)
        self._grams = [
            _grams(tokens, ngram) if number == self._whole[tokens] else set()
            for number, tokens in enumerate(self._tokens)
        ]
        self._rare = self._rarest()
        self._hashes = np.array(sorted({_hash(gram) for gram in self._rare}), np.uint64)

    def _rarest(self) -> dict[tuple[str, ...], list[int]]:
        """The rarest n-grams of every question, and the questions that they lead to.

        A question with at least `CONTAINED` of its n-grams in another text has at least one there
        of any `1 - CONTAINED` of them and one more. The rarest ones lead to few questions, also
        where templates share most of their text.
        """
        frequency = Counter(gram for grams in self._grams for gram in grams)
        found: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for number, grams in enumerate(self._grams):
            needed = int((1 - CONTAINED) * len(grams) + 1e-9) + 1 if grams else 0
            for gram in sorted(grams, key=lambda gram: (frequency[gram], gram))[:needed]:
                found[gram].append(number)
        return dict(found)

    def repeated_by(self, questions: Sequence[str]) -> Repeats:
        """Which of `questions` repeat a held-out one. See the module."""
        tokens = [question_tokens(text) for text in questions]
        of = np.array([self._whole.get(t, -1) for t in tokens], np.int64).reshape(len(tokens))
        equal = int((of >= 0).sum())
        for number in self._candidates(tokens):
            if of[number] < 0:
                of[number] = self._contained(tokens[number])
        return Repeats(of, equal, int((of >= 0).sum()) - equal)

    def seen_in(self, questions: Sequence[str]) -> np.ndarray:
        """`[n]` bool: which held-out questions are repeated by one of `questions`."""
        of = self.repeated_by(questions).of
        seen = {self._tokens[number] for number in set(of[of >= 0].tolist())}
        return np.array([tokens in seen for tokens in self._tokens], bool)

    def _candidates(self, tokens: Sequence[tuple[str, ...]]) -> np.ndarray:
        """Numbers of the texts that have one of the rare n-grams, by hashes of all n-grams at
        once."""
        n, lengths = self.ngram, np.array([len(t) for t in tokens])
        if not len(self._hashes) or not n or not lengths.size or lengths.max() < n:
            return np.zeros(0, np.int64)
        ids = {word: _word_hash(word) for t in tokens for word in t}
        stream = np.array([ids[word] for t in tokens for word in t], np.uint64)
        owner = np.repeat(np.arange(len(tokens)), lengths)
        hashes = np.zeros(len(stream) - n + 1, np.uint64)
        for k in range(n):  # a polynomial in uint64, which wraps around
            hashes = hashes * _BASE + stream[k : len(stream) - n + 1 + k]
        whole = owner[: len(hashes)] == owner[n - 1 :]
        return np.unique(owner[: len(hashes)][whole & np.isin(hashes, self._hashes)])

    def _contained(self, tokens: tuple[str, ...]) -> int:
        """A held-out question that these tokens contain; -1 for none."""
        grams = _grams(tokens, self.ngram)
        signs = _signs(tokens)
        others = sorted({number for gram in grams for number in self._rare.get(gram, ())})
        for number in others:
            shared = len(self._grams[number] & grams) / len(self._grams[number])
            if shared >= CONTAINED and _run_in(_signs(self._tokens[number]), signs):
                return number
        return -1


_BASE = np.uint64(0x9E3779B97F4A7C15)


def _word_hash(word: str) -> int:
    """64 bits that are the same in every process."""
    value = 0xCBF29CE484222325
    for byte in word.encode("utf-8", "surrogatepass"):
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


def _hash(gram: tuple[str, ...]) -> int:
    value = 0
    for word in gram:
        value = (value * int(_BASE) + _word_hash(word)) & 0xFFFFFFFFFFFFFFFF
    return value


def _grams(tokens: tuple[str, ...], n: int) -> set[tuple[str, ...]]:
    return {tokens[i : i + n] for i in range(len(tokens) - n + 1)} if n else set()


def _signs(tokens: tuple[str, ...]) -> tuple[str, ...]:
    """The tokens that are no words."""
    return tuple(token for token in tokens if not token[0].isalpha())


def _run_in(short: tuple[str, ...], long: tuple[str, ...]) -> bool:
    """Whether `short` stands in `long` without anything between."""
    n = len(short)
    return any(long[i : i + n] == short for i in range(len(long) - n + 1))
