"""Items to predict for: texts, chats, token ids and pairs, as checked token ids."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union

import jax
import numpy as np

from zip_rc_jax.config.checks import in_short, shown
from zip_rc_jax.inference.prompts import (
    check_encodable,
    check_readable,
    encode_prompt,
    unreadable_ids,
)
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.runtime.errors import UsageError

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int] | np.ndarray
Item = Union[Prompt, tuple[Prompt, str | Sequence[int] | np.ndarray], "TokenizedItem"]


def check_items(items: Any) -> Sequence[Item] | None:
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


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedItem:
    """An item that the model can read.

    Attributes:
      ids: int32 `[T]`.
      prompt_tokens: how many of them are the prompt of a pair; 0 for any other item.
    """

    ids: np.ndarray
    prompt_tokens: int


class ItemReader:
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
