"""From a prompt to token ids: the one way that decoding and `predict` share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zip_rc_jax.config.checks import in_short, shown
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.runtime.errors import UsageError


def check_encodable(name: str, text: str) -> None:
    """Raises UsageError for a text that no tokenizer reads.

    It holds half of a surrogate pair, as the shell gives for what is not UTF-8.

    Args:
      name: of the text, for the message, e.g. "prompt 3".
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        reason = f"it is not text that can be encoded ({in_short(error)})"
        raise UsageError(name, reason, "repair or leave it out") from None


def encode_prompt(
    tokenizer: Tokenizer,
    name: str,
    prompt: str | Sequence[Mapping[str, Any]],
    template_kwargs: Mapping[str, Any],
    add_special_tokens: bool,
) -> tuple[str, list[int]]:
    """Text and ids of a prompt: a text, or a chat for the tokenizer's own template.

    Args:
      name: of the prompt, for messages, e.g. "prompt 3".
      template_kwargs: variables of the chat template.
      add_special_tokens: see `Tokenizer.encode_prompt`.

    Raises:
      UsageError: it cannot be encoded, or the template refuses it.
    """
    chat = not isinstance(prompt, str)
    text = str(prompt) if isinstance(prompt, str) else tokenizer.chat(prompt, **template_kwargs)
    check_encodable(name, text)
    ids = tokenizer.encode_prompt(text, chat=chat, add_special_tokens=add_special_tokens)
    return text, ids


def unreadable_ids(lm: LanguageModel) -> np.ndarray:
    """`[V]` bool: ids that no prompt may hold, because the tokenizer never emits them.

    Reserved ids are among them.
    """
    unreadable = lm.tokenizer.unused_ids(lm.config.vocab_size)
    if lm.head is not None:
        unreadable[lm.head.first_id : lm.head.last_id] = True
    return unreadable


def check_readable(
    name: str,
    ids: Sequence[int] | np.ndarray,
    unreadable: np.ndarray,
    tokenizer: Tokenizer,
) -> None:
    """Checks that a model can read all of some ids.

    Args:
      name: of the ids, for the message, e.g. "prompt 3".
      unreadable: see `unreadable_ids`.

    Raises:
      UsageError: an id is reserved, unused, or past the vocabulary.
    """
    # Python's numbers, for an id that somebody gave may be of any size.
    given = {int(i) for i in ids}
    strange = sorted(i for i in given if not 0 <= i < len(unreadable) or unreadable[i])
    if not strange:
        return
    names = {i: tokenizer.backend.id_to_token(i) if 0 <= i < 2**32 else None for i in strange[:5]}
    value = f"{name} with ids {', '.join(f'{shown(i)} ({token})' for i, token in names.items())}"
    if any(names[i] is None and not 0 <= i < len(unreadable) for i in names):
        reason = f"the vocabulary has the ids 0 to {len(unreadable) - 1}"
        raise UsageError(value, reason, "use ids of the model's own tokenizer")
    reason = "they are reserved or unused: the model cannot read them"
    raise UsageError(value, reason, "take them out of the text")
