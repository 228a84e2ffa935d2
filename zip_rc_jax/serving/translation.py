"""From a body to jobs of the engine. It may take seconds, for a template is rendered here."""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from zip_rc_jax.config.checks import shown
from zip_rc_jax.config.plugins import POLICIES
from zip_rc_jax.inference.engine import Engine
from zip_rc_jax.inference.requests import Request, RequestProcessor, TokenizedRequest, key_data
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.serving.errors import ApiError, of_usage
from zip_rc_jax.serving.schema import Body, ChatBody, CompletionBody, ZipFields

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
OF_ZIP = ("n", "alpha", "beta", "token_budget", "time_budget", "abstain_below")
SUFFIX = re.compile(r"(zip|[a-z_]*[a-z])([1-9][0-9]{0,8})?")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A request that is ready for the engine.

    Attributes:
      model: as the client named it.
      chat: whether it is answered as a chat.
      jobs: one for each choice, in order.
      seeds: of the choices.
      prompts: how many prompts the choices are of.
      stream: whether it is answered by events; "best" or "certain" in `mode`.
      include_usage: whether the last event tells the usage.
      logprobs: whether log-probabilities of tokens are told.
      return_tree: whether the account holds the tree.
      introspect: whether decisions are told with what they were weighed against.
      slots: the engine's `n`.
    """

    model: str
    chat: bool
    jobs: tuple[TokenizedRequest, ...]
    seeds: tuple[int, ...]
    prompts: int
    stream: bool
    mode: str
    include_usage: bool
    logprobs: bool
    return_tree: bool
    introspect: bool
    slots: int


class Translator:
    """Reads bodies for one engine."""

    def __init__(self, engine: Engine, name: str, context: int, max_seconds: float):
        """Args:
        name: of the model.
        context: most tokens of a prompt and its longest prefix together.
        max_seconds: time budget of requests that have none, and the most that one may ask for.
        """
        self.engine, self.name = engine, name
        self.context, self.max_seconds = context, max_seconds

    def model_names(self) -> list[str]:
        """The names that `/v1/models` lists: every strategy, and `fixed` with powers of two."""
        most = self.engine.config.n
        sizes = sorted({1 << i for i in range(most.bit_length())} | {most})
        return [
            self.name,
            f"{self.name}:zip",
            *(f"{self.name}:fixed{size}" for size in sizes if size <= most),
        ]

    def check_model(self, model: str) -> dict[str, Any]:
        """The options that the name of a model stands for, such as `NAME:fixed8`.

        Raises:
          ApiError: there is no such model.
        """
        name, colon, suffix = model.partition(":")
        if name == self.name and not colon:
            return {}
        found = SUFFIX.fullmatch(suffix)
        strategy = found and ("zip_rc" if found[1] == "zip" else found[1])
        if name != self.name or not strategy or not POLICIES.is_builtin(strategy):
            fix = f"use one of {', '.join(self.model_names())}"
            wrong = UsageError(f"model {shown(model)}", "it is not served here", fix)
            raise ApiError(404, str(wrong), param="model", code="model_not_found")
        assert found is not None
        return {"strategy": strategy} | ({"n": int(found[2])} if found[2] else {})

    def chat(self, body: ChatBody) -> Plan:
        """Raises ApiError for a body that cannot be answered, as `completion`."""
        limits = {body.max_tokens, body.max_completion_tokens} - {None}
        if len(limits) > 1:
            value = f"max_tokens={body.max_tokens} with max_completion_tokens"
            wrong = UsageError(value, "they are one limit, and differ", "leave one of them out")
            raise ApiError(400, str(wrong), param="max_completion_tokens")
        variables = dict(body.chat_template_kwargs or {})
        if body.tools and body.tool_choice != "none":
            variables["tools"] = body.tools
        most = limits.pop() if limits else None
        own = {"continue_final_message": body.continue_final_message}
        logprobs = bool(body.logprobs)
        return self._plan(body, True, [body.messages], most, own, variables, logprobs)

    def completion(self, body: CompletionBody) -> Plan:
        prompt: Any = body.prompt
        many = isinstance(prompt, list) and not all(isinstance(item, int) for item in prompt)
        prompts = prompt if many else [prompt]
        logprobs = body.logprobs is not None
        return self._plan(body, False, prompts, body.max_tokens, {}, {}, logprobs)

    def _plan(
        self,
        body: Body,
        chat: bool,
        prompts: Sequence[Any],
        max_tokens: int | None,
        own: Mapping[str, Any],
        variables: Mapping[str, Any],
        logprobs: bool,
    ) -> Plan:
        fields = body.zip_rc or ZipFields()
        if body.stream_options and not body.stream:
            wrong = UsageError("stream_options", "nothing is streamed", "add stream: true")
            raise ApiError(400, str(wrong), param="stream_options")
        try:
            options = self._options(body, fields, max_tokens) | dict(own)
            seed = secrets.randbits(32) if body.seed is None else body.seed
            key_data(seed)
            processor = RequestProcessor(
                self.engine.lm, self.engine.config, 0, variables, self._check_context
            )
            jobs = [self._job(processor, prompt, options) for prompt in prompts]
        except UsageError as error:
            inside = fields.model_dump(exclude_none=True)
            raise of_usage(error, "messages" if chat else "prompt", tuple(inside)) from None
        choices, introspect = body.n or 1, bool(fields.introspect)
        seeds = [(seed + i) % 2**32 for i in range(choices)]
        return Plan(
            model=body.model,
            chat=chat,
            jobs=tuple(
                dataclasses.replace(
                    job, key=key_data(s), streamed=bool(body.stream), joints=introspect
                )
                for job in jobs
                for s in seeds
            ),
            seeds=tuple(seeds * len(jobs)),
            prompts=len(jobs),
            stream=bool(body.stream),
            mode=fields.stream or "certain",
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
            logprobs=logprobs,
            return_tree=bool(fields.return_tree),
            introspect=introspect,
            slots=self.engine.config.n,
        )

    def _options(self, body: Body, fields: ZipFields, max_tokens: int | None) -> dict[str, Any]:
        """Options of the request, those of the model's name included."""
        named = self.check_model(body.model)
        given = {name: getattr(fields, name) for name in OF_ZIP}
        if fields.strategy is not None:
            given["strategy"] = "zip_rc" if fields.strategy == "zip" else fields.strategy
        given = {name: value for name, value in given.items() if value is not None}
        for name in named.keys() & given.keys():
            if named[name] != given[name]:
                raise UsageError(
                    f"{name}={shown(given[name])} with model {shown(body.model)}",
                    f"the model's name says {shown(named[name])}",
                    "say it in one place",
                )
        options = named | given
        for name in SAMPLING:
            if (value := getattr(body, name)) is not None:
                options[name] = value
        if body.temperature == 0 and "n" not in options:
            options["n"] = 1  # greedy samples are all the same
        if max_tokens is not None:
            options["max_tokens"] = max_tokens
        if body.stop is not None:
            options["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
        if body.stop_token_ids is not None:
            options["stop_token_ids"] = tuple(body.stop_token_ids)
        if options.get("time_budget", 0) > self.max_seconds:
            raise UsageError(
                f"time_budget={shown(options['time_budget'])}",
                f"the server allows {self.max_seconds:g} seconds",
                "lower it",
            )
        configured = self.engine.config.time_budget or self.max_seconds
        return {"time_budget": min(configured, self.max_seconds)} | options

    def _job(
        self, processor: RequestProcessor, prompt: Any, options: Mapping[str, Any]
    ) -> TokenizedRequest:
        (job,) = processor.tokenize([Request(prompt, **options)], "raise")
        assert isinstance(job, TokenizedRequest)
        return job

    def _check_context(self, tokens: int, prompt_tokens: int, listed: bool) -> None:
        if tokens > self.context:
            most = tokens - prompt_tokens
            raise UsageError(
                f"the prompt of {prompt_tokens} tokens with max_tokens={most}",
                f"the server holds {self.context} tokens of a request",
                f"shorten it, or lower max_tokens, to {self.context} together",
            )
