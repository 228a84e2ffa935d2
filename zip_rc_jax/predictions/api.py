"""`predict`: what the head says after every token of any text, without any decoding."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import ModelConfig
from zip_rc_jax.config.checks import counts, shown
from zip_rc_jax.grid import Grid
from zip_rc_jax.head import ZipHead, policy_logits
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.transformer import logits, unembedding
from zip_rc_jax.predictions.forward import (
    ScoringConfig,
    hidden_batches,
    joints_of,
    padded_width,
    require_head,
)
from zip_rc_jax.predictions.items import Item, ItemReader, TokenizedItem, check_items
from zip_rc_jax.runtime.distributed import gather
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.progress import progress as progress_bar

BATCH_TOKENS = 16384
READ_AHEAD = 4  # batches of items that are read from an iterator and sorted by length together
LOGITS = 2**26  # logits that a device holds at once (256 MiB)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenPredictions:
    """What the head says along one item of `T` tokens.

    Entry `t` of `p_correct`, `remaining` and `joint` is read after token `t`. It is what the
    decoder would see if the sequence ended there. `remaining[t]` counts the tokens after token `t`,
    the end-of-sequence token included.

    Attributes:
      token_ids: int32 `[T]`, prompt and response.
      pieces: `T` texts. Joined, they are the whole text with its special tokens. A character of
        several tokens belongs to the last of them.
      prompt_tokens: tokens of the prompt of a (prompt, response) pair; 0 for any other item.
      p_correct: float32 `[T]`, expected reward. It is P(correct) for a head trained on `correct`.
      remaining: float32 `[T]`, expected tokens still to come.
      joint: float32 `[T, B_V, B_T]`, probability of every (reward, remaining length) cell.
      logprob: float32 `[T]`, natural logarithm of each token's probability, given the tokens before
        it. The policy is taken at temperature 1, without reserved and unused ids. NaN for token 0,
        which has nothing before it.
      grid: what the cells of `joint` mean.
    """

    token_ids: np.ndarray
    pieces: tuple[str, ...]
    prompt_tokens: int
    p_correct: np.ndarray
    remaining: np.ndarray
    joint: np.ndarray
    logprob: np.ndarray
    grid: Grid

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def start(self) -> int:
        """First position that predicts a response: the last prompt token of a pair, else 0."""
        return max(self.prompt_tokens - 1, 0)

    @property
    def text(self) -> str:
        """All pieces, joined."""
        return "".join(self.pieces)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, ready for JSON.

        Numbers have as many digits as float32 has. What is not finite is None.
        """
        arrays = {name: _plain(getattr(self, name)) for name in _ARRAYS}
        return {
            "token_ids": self.token_ids.tolist(),
            "pieces": list(self.pieces),
            "prompt_tokens": self.prompt_tokens,
            **arrays,
            "grid": self.grid.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TokenPredictions:
        """Inverse of `to_dict`, also after JSON."""
        arrays = {name: np.array(data[name], np.float32) for name in _ARRAYS}  # None becomes NaN
        return cls(
            token_ids=np.array(data["token_ids"], np.int32),
            pieces=tuple(data["pieces"]),
            prompt_tokens=data["prompt_tokens"],
            grid=Grid.from_dict(data["grid"]),
            **arrays,
        )


_ARRAYS = ("p_correct", "remaining", "joint", "logprob")


def _plain(array: np.ndarray) -> Any:
    """Nested lists of a float32 array: the shortest numbers that are read back as the same ones."""
    if array.ndim > 1:
        return [_plain(part) for part in array]
    values = [float(digits) for digits in array.astype(str)]
    return [value if math.isfinite(value) else None for value in values]


@overload
def predict(  # type: ignore[overload-overlap]
    lm: LanguageModel,
    items: Sequence[Item],
    *,
    batch_tokens: int = ...,
    progress: bool | None = ...,
    add_special_tokens: bool = ...,
    chat_template_kwargs: Mapping[str, Any] | None = ...,
) -> list[TokenPredictions]: ...


@overload
def predict(
    lm: LanguageModel,
    items: Iterable[Item],
    *,
    batch_tokens: int = ...,
    progress: bool | None = ...,
    add_special_tokens: bool = ...,
    chat_template_kwargs: Mapping[str, Any] | None = ...,
) -> Iterator[TokenPredictions]: ...


def predict(
    lm: LanguageModel,
    items: Iterable[Item],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool | None = None,
    add_special_tokens: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[TokenPredictions] | Iterator[TokenPredictions]:
    """What the head predicts after every token of every item (paper, section 3).

    Each item is one of
      a text, which gets the special tokens that `decode` gives to a prompt;
      a chat (`[{"role": "user", "content": ...}]`), rendered by the model's own template up to
        where the answer starts, as in `decode`;
      token ids (a list of whole numbers, or a one-dimensional array), taken as they are;
      a pair `(prompt, response)`: the prompt is any of these, the response a text or token ids.
    A response that is a text is tokenized on its own, and gets no special tokens. The ids that a
    model sampled are exact: `(prompt, result.prefixes[0].token_ids)`.

    Predictions begin at the first token, and there is one after every token, the last one included.
    The head was trained from the last prompt token on. In a pair these are the positions from
    `TokenPredictions.start` on; what it says inside a prompt is an extrapolation.

    Items of like length run together, one in a row, on all devices of `lm.layout`. What is
    predicted for one does not depend on the others (up to rounding). Memory: a device holds the
    final hidden states and the joints of `batch_tokens` tokens (or of one item, if that is longer)
    and at most 256 MiB of logits at once. The host holds `4 * (B_V * B_T + 5)` bytes and a text for
    each token of its results. A list keeps all of them. From an iterator, items of about
    `4 * batch_tokens` tokens (or one item) are read ahead, and only their results are held.

    Args:
      lm: a model with a ZIP head, from `load`.
      items: a list, or any other iterable.
      batch_tokens: most tokens that go through the model at once, on all devices together and with
        padding.
      progress: whether to show a progress bar. Default: for more than one batch.
      add_special_tokens: False leaves texts as they are, as `DecodeConfig.add_special_tokens`.
      chat_template_kwargs: variables of the chat template, as in `decode`.

    Returns:
      For a list, a list. For any other iterable, an iterator, which reads items as they are needed.
      Both have one entry for each item, in order.

    Raises:
      UsageError: the model has no head, an option is impossible, or an item cannot be read. It is
        empty, longer than the model's positions, of a wrong type, or has an id that is out of range
        or reserved. The message names the item's number. In a list this is found before the model
        runs. In an iterator it is raised after the predictions for the items before it.
    """
    if lm.head is None:
        reason = "the joint is read from its reserved logits"
        raise UsageError("model without a ZIP head", reason, "train one with `zip-rc train`")
    if isinstance(batch_tokens, bool) or not isinstance(batch_tokens, numbers.Integral):
        reason = "it counts tokens"
        raise UsageError(f"batch_tokens={shown(batch_tokens)}", reason, "give a whole number")
    counts("batch_tokens", int(batch_tokens))
    reader = ItemReader(lm, add_special_tokens, chat_template_kwargs)
    settings = ScoringConfig(int(batch_tokens))
    listed = check_items(items)
    if listed is None:
        return _lazily(lm, reader, items, settings, progress)
    return _predictions(lm, reader.read_list(listed), settings, progress)


def tokenize_items(
    lm: LanguageModel,
    items: Sequence[Item],
    *,
    add_special_tokens: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[TokenizedItem]:
    """The items of a list as token ids, all of them checked.

    `predict` takes the result for items. `predict(lm, iter(tokenize_items(lm, items)))` checks all
    items before the model runs, and holds the predictions for a few at a time.

    Args:
      items, add_special_tokens, chat_template_kwargs: as in `predict`.

    Raises:
      UsageError: as `predict` for a list.
    """
    reader = ItemReader(lm, add_special_tokens, chat_template_kwargs)
    listed = check_items(items)
    return reader.read_list(list(items) if listed is None else listed)


# ---- predictions in batches


def _lazily(
    lm: LanguageModel,
    reader: ItemReader,
    items: Iterable[Item],
    settings: ScoringConfig,
    progress: bool | None,
) -> Iterator[TokenPredictions]:
    """Predictions for the items of an iterator. What fails is raised when the rest is done."""
    source, failure, given = enumerate(items), list[BaseException](), 0

    def read() -> Iterator[TokenizedItem]:
        try:
            for number, item in source:
                yield reader(number, item)
        except Exception as error:
            failure.append(error)

    items_read = read()
    bars = contextlib.ExitStack()
    bar = bars.enter_context(progress_bar("predict", None)) if progress else None
    with bars:
        while window := _window(items_read, READ_AHEAD * settings.batch_tokens):
            for predictions in _predictions(lm, window, settings, False):
                given += 1
                yield predictions
            if progress is None and bar is None:  # there is more than one window
                bar = bars.enter_context(progress_bar("predict", None, given))
            if bar is not None:
                bar(given, None)
        if failure:
            raise failure.pop()


def _window(items: Iterator[TokenizedItem], most: int) -> list[TokenizedItem]:
    """The next items, until they have `most` tokens with their padding; at least one."""
    window, tokens = list[TokenizedItem](), 0
    for item in items:
        window.append(item)
        tokens += padded_width(len(item.ids))
        if tokens >= most:
            break
    return window


def _predictions(
    lm: LanguageModel,
    items: Sequence[TokenizedItem],
    settings: ScoringConfig,
    progress: bool | None,
) -> list[TokenPredictions]:
    lengths = np.array([len(item.ids) for item in items])
    if progress is None:
        progress = sum(padded_width(int(n)) for n in lengths) > settings.batch_tokens
    result: list[TokenPredictions | None] = [None] * len(items)
    batches = hidden_batches(
        lm,
        lengths,
        lambda numbers: [items[i].ids for i in numbers],
        settings,
        "predict" if progress else "",
        few_shapes=True,
    )
    head, table = require_head(lm), unembedding(lm.config, lm.params["body"])
    for batch in batches:
        # On the devices: the joint after every token, and how likely the next token was.
        read = joints_of(lm, batch.hidden)
        followers = np.roll(batch.tokens, -1, axis=1)  # the last of a row belongs to no token
        chunks = logit_chunks(lm, *batch.tokens.shape)
        log_probs = _log_probs(lm.config, head, chunks, table, batch.hidden, followers)
        # On the host: one record for each item, without the padding.
        reward, remaining, joint, logprob = gather((*read, log_probs))
        for lane, number in enumerate(batch.members):
            item, size = items[number], int(lengths[number])
            result[number] = TokenPredictions(
                token_ids=item.ids,
                pieces=lm.tokenizer.pieces(item.ids.tolist()),
                prompt_tokens=item.prompt_tokens,
                p_correct=reward[lane, :size].copy(),
                remaining=remaining[lane, :size].copy(),
                joint=joint[lane, :size].copy(),
                logprob=np.append(np.float32(np.nan), logprob[lane, : size - 1]),
                grid=head.grid,
            )
    return [p for p in result if p is not None]


def logit_chunks(lm: LanguageModel, rows: int, width: int) -> int:
    """How many parts of a row take their logits one after the other. It divides `width`."""
    held = rows // lm.layout.ways("batch") * -(-lm.config.vocab_size // lm.layout.ways("vocab"))
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    return next((n for n in divisors if width // n * held <= LOGITS), width)


@functools.partial(jax.jit, static_argnames=("model", "head", "chunks"))
def _log_probs(
    model: ModelConfig,
    head: ZipHead,
    chunks: int,
    table: jax.Array,
    hidden: jax.Array,
    followers: jax.Array,
) -> jax.Array:
    """Log-probability of the token after every position, float32 `[rows, width]`.

    Args:
      table: `[V, d]`, the unembedding.
      hidden: `[rows, width, d]`.
      followers: `[rows, width]` int32, the token after each position.
    """

    def part(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, followers = inputs
        policy = policy_logits(logits(model, hidden, table), head)
        chosen = jnp.take_along_axis(policy, followers[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(policy, axis=-1)

    rows, width, size = hidden.shape
    # Rows stay on their devices: each is cut along its length.
    cut = hidden.reshape(rows, chunks, -1, size), followers.reshape(rows, chunks, -1)
    parts = jax.lax.map(part, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), cut))
    return jnp.moveaxis(parts, 0, 1).reshape(rows, width)
