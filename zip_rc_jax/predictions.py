"""Reading the head off any text: what it predicts after every token, without any decoding.

`predict` is the public function. Training, labelling and evaluation read rollouts through the same
compiled programs, see `hidden_batches` and `joints_of`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Union, overload

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import ModelConfig, TrainConfig
from zip_rc_jax.config.checks import counts, in_short, shown
from zip_rc_jax.grid import Grid
from zip_rc_jax.head import ZipHead, cell_log_probs, policy_logits
from zip_rc_jax.inference.prompts import (
    check_encodable,
    check_readable,
    encode_prompt,
    unreadable_ids,
)
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.transformer import forward_packed, logits, unembedding
from zip_rc_jax.runtime.distributed import gather
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.progress import progress as progress_bar
from zip_rc_jax.runtime.sharding import Layout

BATCH_TOKENS = 16384
READ_AHEAD = 4  # batches of items that are read from an iterator and sorted by length together
LOGITS = 2**26  # logits that a device holds at once (256 MiB)

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int] | np.ndarray
Item = Union[Prompt, tuple[Prompt, str | Sequence[int] | np.ndarray], "TokenizedItem"]


# ---- the public function


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
    reader = _Reader(lm, add_special_tokens, chat_template_kwargs)
    settings = ForwardSettings(int(batch_tokens))
    listed = _check_items(items)
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
    reader = _Reader(lm, add_special_tokens, chat_template_kwargs)
    listed = _check_items(items)
    return reader.read_list(list(items) if listed is None else listed)


def _check_items(items: Any) -> Sequence[Item] | None:
    """The items if they are a list; None for any other iterable.

    Raises:
      UsageError: one item instead of a list of them, no items, or nothing to iterate over.
    """
    wanted = "a list of items is expected"
    if isinstance(items, (str, bytes, bytearray)):
        raise UsageError("items given as one string", wanted, "pass [text]")
    if isinstance(items, Mapping) or not isinstance(items, Iterable):
        raise UsageError(f"items of type {type(items).__name__}", wanted, "pass [item, ...]")
    if isinstance(items, tuple):
        reason = "a tuple is one (prompt, response) pair"
        raise UsageError("items given as a tuple", reason, "pass a list: [(prompt, response), ...]")
    if not isinstance(items, Sequence):
        return None
    if not items:
        raise UsageError("items=[]", "there is nothing to predict", "pass at least one item")
    if all(isinstance(item, Mapping) for item in items):
        raise UsageError("items given as one chat", wanted, "pass [messages]")
    if all(map(_is_id, items)):
        raise UsageError("items given as the token ids of one item", wanted, "pass [ids]")
    return items


# ---- from items to token ids


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedItem:
    """An item that the model can read.

    Attributes:
      ids: int32 `[T]`.
      prompt_tokens: how many of them are the prompt of a pair; 0 for any other item.
    """

    ids: np.ndarray
    prompt_tokens: int


class _Reader:
    """Tokenizes items, and refuses those that the model cannot read."""

    def __init__(
        self,
        lm: LanguageModel,
        add_special_tokens: bool,
        template_kwargs: Mapping[str, Any] | None,
    ):
        variables = {} if template_kwargs is None else template_kwargs
        if not isinstance(variables, Mapping) or not all(isinstance(x, str) for x in variables):
            value = f"chat_template_kwargs={shown(template_kwargs)}"
            raise UsageError(value, "they are variables by name", 'pass {"name": value}')
        self.lm, self.unreadable = lm, unreadable_ids(lm)
        self.add_special_tokens, self.template_kwargs = add_special_tokens, dict(variables)

    def read_list(self, items: Sequence[Item]) -> list[TokenizedItem]:
        """Raises UsageError for an item that cannot be read, and for variables without a chat."""
        if self.template_kwargs and not any(_is_chat(_prompt_of(item)) for item in items):
            raise UsageError(
                f"chat_template_kwargs={shown(self.template_kwargs)}",
                "no item is a chat, so no template reads them",
                'pass chats: [{"role": "user", "content": text}]',
            )
        return [self(i, item) for i, item in enumerate(items)]

    def __call__(self, number: int, item: Any) -> TokenizedItem:
        """Raises UsageError for an item that cannot be read, by its number."""
        name = f"item {number}"
        try:
            return self._read(name, item)
        except UsageError as error:
            if name in error.value:
                raise
            raise UsageError(f"{name}: {error.value}", error.reason, error.fix) from error
        except BaseException as error:
            # A panic of the tokenizer, which is written in Rust, is about this item too.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = f"reading it fails ({in_short(error)})"
            raise UsageError(name, reason, "repair or leave it out") from error

    def _read(self, name: str, item: Any) -> TokenizedItem:
        if isinstance(item, TokenizedItem):
            ids, prompt_tokens = self._checked(name, item.ids), item.prompt_tokens
        elif not _is_pair(item):
            ids, prompt_tokens = self._prompt(name, item), 0
        else:
            prompt = self._prompt(f"{name}, its prompt", item[0])
            response = self._response(f"{name}, its response", item[1])
            ids, prompt_tokens = np.concatenate([prompt, response]), len(prompt)
        most = self.lm.config.max_positions
        if len(ids) > most:
            value = f"{name} of {len(ids)} tokens"
            raise UsageError(value, f"the model has {most} positions", f"cut it to {most} tokens")
        return TokenizedItem(ids, prompt_tokens)

    def _prompt(self, name: str, prompt: Any) -> np.ndarray:
        if isinstance(prompt, str) or _is_chat(prompt):
            added = self.add_special_tokens
            _, ids = encode_prompt(self.lm.tokenizer, name, prompt, self.template_kwargs, added)
            return self._checked(name, np.array(ids, np.int64))
        return self._ids(name, prompt)

    def _response(self, name: str, response: Any) -> np.ndarray:
        if isinstance(response, str):
            check_encodable(name, response)
            return self._checked(name, np.array(self.lm.tokenizer.encode(response), np.int64))
        return self._ids(name, response)

    def _ids(self, name: str, ids: Any) -> np.ndarray:
        try:
            array = _as_ids(ids)
        except OverflowError:
            large = next(i for i in ids if not -(2**63) <= i < 2**63)
            reason = f"the vocabulary has the ids 0 to {len(self.unreadable) - 1}"
            fix = "use ids of the model's own tokenizer"
            raise UsageError(f"{name} with id {shown(int(large))}", reason, fix) from None
        if array is None:
            value = f"{name}: {shown(ids)} of type {type(ids).__name__}"
            fix = "pass a str, [{'role': ..., 'content': ...}], [1, 2, 3] or (prompt, response)"
            reason = "it is no text, chat, list of token ids or (prompt, response) pair"
            if name.endswith("response"):
                reason, fix = "a response is a text or token ids", "pass a str or [1, 2, 3]"
            raise UsageError(value, reason, fix)
        return self._checked(name, array)

    def _checked(self, name: str, ids: np.ndarray) -> np.ndarray:
        if not len(ids):
            alone = " or pass the prompt alone" if name.endswith("response") else ""
            raise UsageError(name, "it is empty", f"leave it out{alone}")
        check_readable(name, ids, self.unreadable, self.lm.tokenizer)
        return ids.astype(np.int32)


def _is_id(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))


def _is_listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _is_chat(value: Any) -> bool:
    return _is_listed(value) and len(value) > 0 and all(isinstance(turn, Mapping) for turn in value)


def _is_pair(value: Any) -> bool:
    """Two things, not both numbers nor both turns of a chat."""
    if not _is_listed(value) or len(value) != 2 or _is_chat(value):
        return False
    return isinstance(value[0], (str, np.ndarray, jax.Array)) or _is_listed(value[0])


def _prompt_of(item: Any) -> Any:
    return item[0] if _is_pair(item) else item


def _as_ids(value: Any) -> np.ndarray | None:
    """int64 `[T]`, or None for what is no list of whole numbers. Raises OverflowError."""
    if isinstance(value, (np.ndarray, jax.Array)):
        array = np.asarray(value)
        fits = array.ndim == 1 and (array.dtype.kind in "iu" or not array.size)
        if fits and array.dtype == np.uint64 and (array >= 2**63).any():
            raise OverflowError
        return array.astype(np.int64) if fits else None
    if not _is_listed(value) or not all(map(_is_id, value)):
        return None
    return np.array([int(i) for i in value], np.int64)


# ---- predictions in batches


def _lazily(
    lm: LanguageModel,
    reader: _Reader,
    items: Iterable[Item],
    settings: ForwardSettings,
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
    settings: ForwardSettings,
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
    head, table = _head(lm), unembedding(lm.config, lm.params["body"])
    for batch in batches:
        read = joints_of(lm, batch.hidden)
        followers = np.roll(batch.tokens, -1, axis=1)  # the last of a row belongs to no token
        chunks = logit_chunks(lm, *batch.tokens.shape)
        log_probs = _log_probs(lm.config, head, chunks, table, batch.hidden, followers)
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


# ---- one forward over whole sequences, shared with training, labelling and evaluation


@dataclasses.dataclass(frozen=True)
class ForwardSettings:
    """How a model goes over whole sequences, without gradients. Hashable.

    Attributes:
      batch_tokens: most tokens of a batch, padding included. Where one sequence (or one on each
        device) has more, it is that.
      dtype: what is computed in; empty for the dtype of the parameters.
      attention: see `TrainConfig`.
    """

    batch_tokens: int
    dtype: str = ""
    attention: str = "auto"

    @classmethod
    def of(cls, train: TrainConfig) -> ForwardSettings:
        """As a training step computes, and as many tokens at once."""
        return cls(train.batch_rows * train.row_tokens, train.compute_dtype, train.attention)


class HiddenBatch(NamedTuple):
    """Final hidden states of some sequences, one in each row.

    Attributes:
      members: numbers of the sequences in the first rows; rows after them are padding.
      tokens: int32 `[rows, width]`, 0 where there is no token.
      hidden: `[rows, width, d_model]`, on the devices.
    """

    members: list[int]
    tokens: np.ndarray
    hidden: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "layout", "settings"))
def _hidden(
    model: ModelConfig,
    layout: Layout,
    settings: ForwardSettings,
    body: dict[str, Any],
    tokens: jax.Array,
    valid: jax.Array,
) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    dtype = jnp.dtype(settings.dtype) if settings.dtype else None
    segments = valid.astype(jnp.int32)
    return forward_packed(
        model,
        body,
        tokens,
        positions,
        segments,
        layout=layout,
        dtype=dtype,
        attention=settings.attention,
    )


@functools.partial(jax.jit, static_argnames=("model", "head"))
def _joints(
    model: ModelConfig,
    head: ZipHead,
    rows: jax.Array,
    hidden: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    joint = jnp.exp(cell_log_probs(logits(model, hidden, rows), head.grid))
    return head.grid.expected_reward(joint), head.grid.expected_length(joint), joint


def _head(lm: LanguageModel) -> ZipHead:
    if lm.head is None:
        raise ValueError("the model has no ZIP head")
    return lm.head


def joints_of(lm: LanguageModel, hidden: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the head reads off final hidden states `[rows, width, d_model]`.

    Returns:
      expected reward `[rows, width]`, expected remaining tokens `[rows, width]`, and the joint
      `[rows, width, B_V, B_T]`, all float32.

    Raises:
      ValueError: the model has no head.
    """
    return _joints(lm.config, _head(lm), lm.params["zip_rows"], hidden)


def padded_width(tokens: int) -> int:
    """The width of a batch whose longest sequence has `tokens`.

    Multiples of 32, then at most an eighth more than needed, so that few shapes are compiled.
    """
    step = max(32, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


def hidden_batches(
    lm: LanguageModel,
    lengths: np.ndarray,
    read: Callable[[list[int]], Sequence[np.ndarray]],
    settings: ForwardSettings,
    title: str = "",
    *,
    few_shapes: bool = False,
) -> Iterator[HiddenBatch]:
    """Final hidden states of whole sequences, in batches over all devices of `lm.layout`.

    The longest sequences come first, those of like length together, so that little is padding.

    Args:
      lengths: int `[N]`, tokens of every sequence.
      read: the ids of the sequences with these numbers. It is called once for each batch.
      title: of a progress bar; empty for none.
      few_shapes: a batch that is not full has a power of two of rows on each device, so that calls
        with other numbers of sequences find compiled programs.
    """
    ways = lm.layout.ways("batch")
    order = np.argsort(-lengths, kind="stable")
    with progress_bar(title, len(order)) if title else contextlib.nullcontext() as bar:
        start = 0
        while start < len(order):
            width = padded_width(int(lengths[order[start]]))
            most = max(1, settings.batch_tokens // width // ways) * ways
            if few_shapes:
                each = -(-(len(order) - start) // ways)
                rows = min(most, (1 << (each - 1).bit_length()) * ways)
            else:
                rows = min(most, lm.layout.padded(len(order), "batch"))
            members = [int(i) for i in order[start : start + rows]]
            tokens = np.zeros((rows, width), np.int32)
            for lane, ids in enumerate(read(members)):
                tokens[lane, : len(ids)] = ids
            used = np.append(lengths[members], [0] * (rows - len(members)))
            valid = np.arange(width) < used[:, None]
            body = lm.params["body"]
            hidden = _hidden(lm.config, lm.layout, settings, body, tokens, valid)
            yield HiddenBatch(members, tokens, hidden)
            start += len(members)
            if bar is not None:
                bar(start, None)
