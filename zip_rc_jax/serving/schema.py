"""Bodies of requests. A field that is not here is refused by its name, and null is as good as
absent.

Fields of OpenAI's API that this server cannot serve are here with the one value that asks for
nothing; any other value is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from zip_rc_jax.config.plugins import POLICIES

MOST_CHOICES = 128


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _only(*allowed: Any) -> Any:
    """A field that takes these values alone, which change nothing."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(x) and value == x for x in allowed):
            words = " or ".join(map(repr, allowed))
            raise ValueError(f"this server does nothing else than {words} here")
        return value

    return AfterValidator(check)


def _strategy(value: str) -> str:
    names = [name for name in POLICIES.names if POLICIES.is_builtin(name)]
    if value not in ("zip", *names):
        raise ValueError(f"it is one of zip, {', '.join(names)}")
    return value


class ZipFields(Strict):
    """What the search may spend, and what the client wants to see of it.

    Attributes:
      n: most prefixes of one answer; the field `n` outside counts answers.
      alpha, beta, abstain_below: see `DecodeConfig`.
      strategy: a built-in one; "zip" is short for "zip_rc".
      token_budget, time_budget: tokens and seconds that one answer may take.
      return_tree: the account holds the whole search tree.
      introspect: every event of a stream, and the tree of the account, hold the utility of every
        action that was weighed.
      stream: "certain" streams only what the answer will surely begin with; "best" streams the
        best prefix at the time, and corrects it by `revise` events.
    """

    n: int | None = None
    alpha: float | None = None
    beta: float | None = None
    strategy: Annotated[str, AfterValidator(_strategy)] | None = None
    token_budget: int | None = Field(default=None, ge=1)
    time_budget: float | None = Field(default=None, gt=0)
    abstain_below: float | None = None
    return_tree: bool | None = None
    introspect: bool | None = None
    stream: Literal["certain", "best"] | None = None


class StreamOptions(Strict):
    """`include_usage`: a last chunk with the usage. `include_obfuscation`: only false, for nothing
    is padded here."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[bool, _only(False)] | None = None


class Body(Strict):
    """What both kinds of completions have.

    Attributes:
      n: answers to return, each by a search of its own; answer i has the seed `seed + i`.
      user, metadata: accepted, and not used.
    """

    model: str
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    zip_rc: ZipFields | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    frequency_penalty: Annotated[float, _only(0.0, 0)] | None = None
    presence_penalty: Annotated[float, _only(0.0, 0)] | None = None
    logit_bias: Annotated[dict[str, Any], _only({})] | None = None


class ChatBody(Body):
    """Body of `/v1/chat/completions`.

    Attributes:
      messages: turns for the model's own chat template, tool calls and tool results included.
      tools: go to the template; what the model writes to call one comes back as text.
      chat_template_kwargs: further variables of the template.
    """

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, _only(0)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Annotated[str, _only("auto", "none")] | None = None
    parallel_tool_calls: Annotated[bool, _only(True)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    response_format: Annotated[dict[str, Any], _only({"type": "text"})] | None = None
    store: Annotated[bool, _only(False)] | None = None
    service_tier: Annotated[str, _only("auto", "default")] | None = None


class CompletionBody(Body):
    """Body of `/v1/completions`.

    Attributes:
      prompt: one text, one list of token ids, or a list of either.
      logprobs: 0 gives the log-probability of every token of the answer.
    """

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, _only(0)] | None = None
    echo: Annotated[bool, _only(False)] | None = None
    suffix: Annotated[str, _only("")] | None = None
    best_of: Annotated[int, _only(1)] | None = None
