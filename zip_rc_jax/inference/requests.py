"""What callers ask for, and what the engine makes of it: a `TokenizedRequest` that can be decoded,
or the reason why it cannot."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from zip_rc_jax.config import DecodeConfig, check_types
from zip_rc_jax.config.checks import in_short, shown
from zip_rc_jax.config.plugins import POLICIES
from zip_rc_jax.config.renamed import takes_old_names
from zip_rc_jax.inference.prompts import (
    check_encodable,
    check_readable,
    encode_prompt,
    unreadable_ids,
)
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.search.policies import starts_from_root

TextOrChat = str | Sequence[Mapping[str, Any]]
# A text, a chat, or token ids (a sequence of whole numbers, or a 1-D array of them).
Prompt = TextOrChat | Sequence[int] | np.ndarray
WORTH_SHARING = 32  # tokens
ON_ERROR = ("raise", "result")
SYSTEM_ROLES = ("system", "developer")


@takes_old_names
@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt with options of its own. None takes the engine's.

    Requests with different options run in the same batch and in the same compiled programs. What is
    not here belongs to the engine: how the strategy decides, interval, window and rows.

    Attributes:
      prompt: a text that is already templated, a chat for the model's own template, or token ids.
        Token ids are read as they are: nothing is put before or behind them.
      seed: of the randomness. The same prompt and seed give the same tokens, also twice in one
        batch; give them different seeds to get different samples.
      n, max_tokens: at most the engine's.
      strategy: a name of a built-in one that begins as the engine's does (with n samples, or with
        the root alone), or the engine's own.
      alpha, beta, answer, allow_no_answer, abstain_below, temperature, top_k, top_p, min_p,
        repetition_penalty, stop, stop_token_ids, token_budget, time_budget, system,
        continue_final_message: as in `DecodeConfig`.
    """

    prompt: Prompt
    seed: int | None = None
    n: int | None = None
    max_tokens: int | None = None
    alpha: float | None = None
    beta: float | None = None
    answer: Any = None
    allow_no_answer: bool | None = None
    abstain_below: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop_token_ids: tuple[int, ...] | None = None
    token_budget: int | None = None
    time_budget: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] | None = None
    system: str | None = None
    continue_final_message: bool | None = None
    strategy: Any = None

    def over(self, config: DecodeConfig) -> DecodeConfig:
        """`config` with this request's options.

        Raises:
          UsageError: an impossible value, or more than the engine has room for.
        """
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("prompt", "seed")]
        options = {name: value for name in names if (value := getattr(self, name)) is not None}
        check_types(DecodeConfig, options)
        for name in ("n", "max_tokens"):
            most = getattr(config, name)
            if options.get(name, 0) > most:
                raise UsageError(
                    f"{name}={shown(options[name])} of a request",
                    f"the engine has {name}={most}",
                    f"use at most {most}, or raise it",
                )
        if not options:
            return config
        mine = dataclasses.replace(config, **options)
        if mine.strategy != config.strategy:
            self._check_strategy(mine, config)
        return mine

    def _check_strategy(self, mine: DecodeConfig, config: DecodeConfig) -> None:
        name = f"strategy={shown(mine.strategy)} of a request"
        fix = f"leave it out, or make it the engine's instead of {shown(config.strategy)}"
        if not POLICIES.is_builtin(mine.strategy):
            raise UsageError(name, "a policy of your own reads all options of the engine", fix)
        if starts_from_root(mine) != starts_from_root(config):
            reason = f"with candidates={config.candidates!r} it begins otherwise than the engine's"
            raise UsageError(name, reason, fix)


@dataclasses.dataclass(frozen=True)
class TokenizedRequest:
    """A request that can be decoded.

    Attributes:
      number: place among the prompts, from 0.
      prompt: text, as given, as the chat template rendered it, or as the token ids decode.
      ids: its tokens.
      config: the engine's with the request's options.
      key: data of the request's random key, two uint32.
      template_hash: of the chat template that rendered the prompt; None for a text.
      streamed: its decisions are told as they are made; else its result alone.
      joints: its decisions carry the joints.
    """

    number: int
    prompt: str
    ids: list[int]
    config: DecodeConfig
    key: tuple[int, ...]
    template_hash: str | None
    streamed: bool = True
    joints: bool = False

    @property
    def slots(self) -> int:
        """Tokens that its longest prefix may have, prompt included."""
        return len(self.ids) + self.config.max_tokens


@dataclasses.dataclass(frozen=True)
class RejectedRequest:
    """A request that cannot be decoded: its number, its text as far as there is one, and why."""

    number: int
    prompt: str
    reason: str


def key_data(seed: int) -> tuple[int, ...]:
    """Data of the random key of `seed`.

    Raises:
      UsageError: it is no seed. Keys have 32 bits, so a larger one would give the samples of a
        smaller one.
    """
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise UsageError(
            f"seed={shown(seed)}",
            "it is not a whole number of 32 bits",
            f"use one from 0 to {2**32 - 1}",
        )
    return _key_data(int(seed))


@functools.lru_cache(maxsize=1024)
def _key_data(seed: int) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(jax.random.key(seed))).tolist())


def check_text(number: int, text: str) -> None:
    """Raises UsageError for a prompt that no tokenizer reads: half of a surrogate pair, as the
    shell gives for what is not UTF-8."""
    check_encodable(f"prompt {number}", text)


def is_array(value: Any) -> bool:
    """Whether it is an array of NumPy, JAX or another library that NumPy can read."""
    known = all(hasattr(value, name) for name in ("__array__", "dtype", "shape"))
    return known and not isinstance(value, (str, bytes))  # as np.str_ is


def is_token_ids(prompt: Any) -> bool:
    """Whether a prompt is meant as token ids: an array, or a sequence that begins with a number."""
    if is_array(prompt):
        return True
    if not isinstance(prompt, Sequence) or isinstance(prompt, (str, bytes, bytearray)):
        return False
    try:
        return len(prompt) > 0 and isinstance(prompt[0], (numbers.Number, np.generic))
    except Exception:  # a sequence of another's making, which is refused where it is read
        return False


def is_chat(prompt: Any) -> bool:
    """Whether a prompt goes through the chat template (or fails there)."""
    return not isinstance(prompt, str) and not is_token_ids(prompt)


def token_ids(number: int, prompt: Any) -> list[int]:
    """The ids of a prompt for which `is_token_ids` holds.

    Raises:
      UsageError: an array that is not 1-D or not of integers, or an item that is no whole number.
    """
    fix = "pass one flat list of ids, such as [5, 17, 3]"
    if is_array(prompt):
        try:
            array = np.asarray(prompt)
        except Exception as error:  # an array on a device that cannot be read, say
            raise UsageError(
                f"prompt {number}", f"its array cannot be read ({in_short(error)})", fix
            ) from None
        kind = f"prompt {number}, an array of {array.dtype} of shape {array.shape}"
        if array.ndim != 1:
            raise UsageError(
                kind,
                "token ids are 1-D, one array for each prompt",
                "pass list(rows), without padding",
            )
        if not np.issubdtype(array.dtype, np.integer):
            raise UsageError(kind, "token ids are whole numbers", "convert it with .astype(int)")
        return array.tolist()
    integers = (int, np.integer)
    for place, item in enumerate(prompt):
        if not isinstance(item, integers) or isinstance(item, (bool, np.bool_)):
            reason = f"item {place} is {shown(item)}, and token ids are whole numbers"
            raise UsageError(f"prompt {number} as token ids", reason, fix)
    return [int(item) for item in prompt]


def prompt_hash(ids: Sequence[int]) -> int:
    """32-bit hash of a prompt's ids: its identity in the randomness, the same in every batch."""
    return int.from_bytes(
        hashlib.blake2b(np.asarray(ids, "<i4").tobytes(), digest_size=4).digest(), "little"
    )


def equal_tokens(ids: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens are the same in both."""
    return next(
        (i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b),
        min(len(ids), len(other)),
    )


def shared_prefix(ids: Sequence[int], other: Sequence[int]) -> int:
    """First tokens that a prompt may take over from another one: all that are equal, but its last;
    0 if fewer than `WORTH_SHARING`."""
    if ids[:WORTH_SHARING] != other[:WORTH_SHARING]:
        return 0
    equal = min(equal_tokens(ids, other), len(ids) - 1)
    return equal if equal >= WORTH_SHARING else 0


def _concerns_one(error: BaseException) -> bool:
    """Whether it is about one request.

    A panic of the tokenizer, which is written in Rust, is; what ends the process is not.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _refusal(number: int, error: BaseException) -> UsageError:
    """What a request is refused with, by its number, whatever was raised for it."""
    if not isinstance(error, UsageError):
        return UsageError(
            f"prompt {number}", f"reading it fails ({in_short(error)})", "repair or leave it out"
        )
    named = error.value if f"prompt {number}" in error.value else f"prompt {number}: {error.value}"
    return UsageError(named, error.reason, error.fix)


def _ids_as_list(ids: Any) -> UsageError:
    """The refusal of token ids in the place of a list of prompts."""
    if is_array(ids) and len(ids.shape) != 1:
        value = f"prompts given as one array of shape {tuple(ids.shape)}"
        return UsageError(
            value, "a list of prompts is expected", "pass list(rows), without padding"
        )
    reason = "a list of prompts is expected, and a flat list of ids could be one prompt or many"
    return UsageError("prompts given as one list of token ids", reason, "pass [ids] for one prompt")


class RequestProcessor:
    """Turns requests into jobs for one model and one configuration."""

    def __init__(
        self,
        lm: LanguageModel,
        config: DecodeConfig,
        seed: int,
        template_kwargs: Mapping[str, Any],
        check_memory: Callable[[int, int, bool], None],
    ):
        """Checks the configuration; prompts are checked as they come.

        Args:
          check_memory: raises a UsageError for what the device cannot hold. It gets the tokens of
            the longest prefix and of the longest prompt so far (they may be of two prompts), and
            whether the prompts are a list.

        Raises:
          UsageError: the configuration itself has a stop id that the policy cannot emit, the seed
            is none, or the variables have no names.
        """
        key_data(seed)
        assert lm.head is not None
        self.lm, self.config, self.seed = lm, config, seed
        if not isinstance(template_kwargs, Mapping) or not all(
            isinstance(name, str) for name in template_kwargs
        ):
            raise UsageError(
                f"chat_template_kwargs={shown(template_kwargs)}",
                "they are variables by name",
                'pass {"name": value}',
            )
        if "continue_final_message" in template_kwargs:
            reason = "it is no variable of the template"
            fix = "pass continue_final_message=True beside it"
            raise UsageError("chat_template_kwargs with continue_final_message", reason, fix)
        self.template_kwargs, self.check_memory = dict(template_kwargs), check_memory
        self.head = lm.head
        self.sampleable = lm.head.sampleable(lm.config.vocab_size)
        self.unreadable = unreadable_ids(lm)
        self._check_stop_ids(config)

    def tokenize(
        self, prompts: Iterable[Prompt | Request], on_error: str | None = None
    ) -> Iterable[TokenizedRequest | RejectedRequest]:
        """A list for a sequence, checked as a whole; a lazy iterator for any other iterable,
        checked as it is read.

        Args:
          on_error: "raise" raises for a request that cannot be decoded, "result" makes it a
            `RejectedRequest`. Whatever goes wrong with one request is told of that one, by its
            number. Default: raise for a sequence, where nothing is lost yet; a refusal for an
            iterator, whose other requests would be lost.

        Raises:
          UsageError: no prompts, one text, chat or list of ids instead of a list of them, template
            variables without any chat, an unknown `on_error`, or (with "raise") an unencodable,
            empty or too long prompt, an id that is reserved or never used, impossible options, or
            more rows and tokens than the device can hold.
        """
        if isinstance(prompts, (str, bytes, bytearray)):
            raise UsageError(
                "prompts given as one string", "a list of prompts is expected", "pass [prompt]"
            )
        if is_token_ids(prompts):
            raise _ids_as_list(prompts)
        if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
            raise UsageError(
                f"prompts of type {type(prompts).__name__}",
                "a list of prompts is expected",
                "pass [prompt, ...]",
            )
        if on_error is not None and not (isinstance(on_error, str) and on_error in ON_ERROR):
            raise UsageError(
                f"on_error={shown(on_error)}",
                f"it is one of {', '.join(ON_ERROR)}",
                "choose one of them, or leave it out",
            )
        if not isinstance(prompts, Sequence):
            return self._read(prompts, on_error == "raise", listed=False)
        if not prompts:
            raise UsageError("prompts=[]", "there is nothing to decode", "pass at least one prompt")
        if all(isinstance(prompt, Mapping) for prompt in prompts):
            raise UsageError(
                "prompts given as one chat", "a list of prompts is expected", "pass [messages]"
            )
        chats = [is_chat(p.prompt if isinstance(p, Request) else p) for p in prompts]
        if self.template_kwargs and not any(chats):
            raise UsageError(
                f"chat_template_kwargs={shown(self.template_kwargs)}",
                "every prompt is a string or token ids, which no template renders",
                'pass chats: [{"role": "user", "content": prompt}]',
            )
        return list(self._read(prompts, on_error != "result", listed=True))

    def _read(
        self, prompts: Iterable[Prompt | Request], strict: bool, listed: bool
    ) -> Iterator[TokenizedRequest | RejectedRequest]:
        slots = prompt_tokens = 0
        for number, prompt in enumerate(prompts):
            request = prompt if isinstance(prompt, Request) else Request(prompt)
            try:
                job = self._job(number, request)
                longest = max(slots, job.slots), max(prompt_tokens, len(job.ids))
                self.check_memory(*longest, listed)
                slots, prompt_tokens = longest
            except BaseException as error:
                if not _concerns_one(error):
                    raise
                if strict:
                    # No name for it here: the frame that it is raised in would hold it, and it the
                    # frame with the model.
                    raise _refusal(number, error) from error
                reason = str(_refusal(number, error))
                yield RejectedRequest(
                    number, request.prompt if isinstance(request.prompt, str) else "", reason
                )
            else:
                yield job

    def _job(self, number: int, request: Request) -> TokenizedRequest:
        config = request.over(self.config)
        self._check_stop_ids(config)
        tokenizer, prompt = self.lm.tokenizer, request.prompt
        chat = is_chat(prompt)
        if chat and (
            isinstance(prompt, (bytes, bytearray, Mapping)) or not isinstance(prompt, Sequence)
        ):
            raise UsageError(
                f"prompt {number} of type {type(prompt).__name__}",
                "a prompt is a text, a chat (a list of dicts) or a list of token ids",
                "convert it",
            )
        if chat and not prompt:
            raise UsageError(f"prompt {number}", "it is empty", "leave it out")
        self._check_chat_options(number, prompt, chat, config)
        if is_token_ids(prompt):
            ids = token_ids(number, prompt)
            self._check_ids(number, ids, config)
            text = tokenizer.backend.decode(ids, skip_special_tokens=False)
        else:
            text, ids = encode_prompt(
                tokenizer,
                f"prompt {number}",
                self._turns(prompt, config) if chat else str(prompt),
                self._variables(chat, config),
                config.add_special_tokens,
            )
            self._check_ids(number, ids, config)
        seed = self.seed if request.seed is None else request.seed
        return TokenizedRequest(
            number, text, ids, config, key_data(seed), tokenizer.template_hash if chat else None
        )

    def _check_chat_options(
        self, number: int, prompt: Any, chat: bool, config: DecodeConfig
    ) -> None:
        """Raises UsageError for options of chats that no template reads or the chat contradicts."""
        given = [name for name in ("system", "continue_final_message") if getattr(config, name)]
        if given and not chat:
            value = f"{given[0]}={shown(getattr(config, given[0]))} for prompt {number}"
            reason = "it is a text or token ids, which no template renders"
            raise UsageError(value, reason, 'pass a chat: [{"role": "user", "content": prompt}]')
        turns = [turn for turn in prompt if isinstance(turn, Mapping)] if chat else []
        if config.system and turns and turns[0].get("role") in SYSTEM_ROLES:
            value = f"system={shown(config.system)} for prompt {number}"
            reason = f"its first turn has the role {turns[0].get('role')} already"
            raise UsageError(value, reason, "leave one of them out")
        if config.continue_final_message and turns and turns[-1].get("role") != "assistant":
            value = f"continue_final_message=True for prompt {number}"
            reason = f"its last turn has the role {shown(turns[-1].get('role'))}"
            raise UsageError(
                value,
                reason,
                "end it with the assistant's turn to continue, or leave the option out",
            )

    def _turns(self, chat: Any, config: DecodeConfig) -> Any:
        """The turns of a chat, the `system` one first if there is one."""
        return [{"role": "system", "content": config.system}, *chat] if config.system else chat

    def _variables(self, chat: bool, config: DecodeConfig) -> dict[str, Any]:
        """What the template gets besides the turns."""
        going_on = (
            {"continue_final_message": True} if chat and config.continue_final_message else {}
        )
        return self.template_kwargs | going_on

    def _check_stop_ids(self, config: DecodeConfig) -> None:
        bad = [
            i
            for i in config.stop_token_ids
            if not (0 <= i < len(self.sampleable) and self.sampleable[i])
        ]
        if bad:
            head = self.head
            reason = (
                f"the policy can only emit ids 0..{head.used_ids - 1}, without the reserved "
                f"{head.first_id}..{head.last_id - 1}"
            )
            raise UsageError(f"stop_token_ids {shown(bad)}", reason, "remove them")

    def _check_ids(self, number: int, ids: list[int], config: DecodeConfig) -> None:
        if not ids:
            raise UsageError(f"prompt {number}", "it is empty", "leave it out")
        check_readable(f"prompt {number}", ids, self.unreadable, self.lm.tokenizer)
        positions = self.lm.config.max_positions
        room = positions - config.max_tokens
        if len(ids) > room:
            fixes = [f"shorten it to {room} tokens"] if room >= 1 else []
            fixes += [f"lower max_tokens to {positions - len(ids)}"] if len(ids) < positions else []
            raise UsageError(
                f"prompt {number} of {len(ids)} tokens with max_tokens={config.max_tokens}",
                f"the model has {positions} positions",
                " or ".join(fixes)
                or f"shorten it, and lower max_tokens, to less than {positions} together",
            )
