"""Chats: what callers pass as one, and what a chat template makes of it.

Templates are code of a model's publisher. They run in Jinja's sandbox with the settings, filters
and functions that transformers gives them, so that they write what they write there; but what one
of them does with one chat is limited in time and size. The limits hold in any thread: every turn of
a loop, every call and every product asks whether they are reached.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import datetime
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor
import numpy as np

from zip_rc_jax.config.checks import in_short, shown
from zip_rc_jax.runtime.errors import UsageError

SECONDS = 10.0  # of one thread's computing for one chat; a published template takes milliseconds
CHARACTERS = 2**26  # of a text; more than any model reads
ITEMS = 2**20  # of a list
WORK = 2**30  # characters that all texts made on the way may have together
DEPTH = 64  # of lists and dicts in a chat
DIGITS = 4096  # bits of a whole number
WITHOUT_CONTENT = ("tool_calls", "function_call")  # a turn with one of these needs no content
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing, see transformers
OWN = ("messages", "add_generation_prompt", "raise_exception", "strftime_now")
PROBE = "zip-rc probe of content"
MARK = "zip-rc end of the last turn "  # its last space shows whether a template trims texts

_clock: contextvars.ContextVar[datetime.datetime | None] = contextvars.ContextVar(
    "clock of templates", default=None
)
_budget = threading.local()


class TemplateLimit(Exception):
    """A template that computes too long or writes too much."""


@contextlib.contextmanager
def template_time(now: datetime.datetime | None) -> Iterator[None]:
    """Inside, templates that write the date see `now` (None: the clock)."""
    token = _clock.set(now)
    try:
        yield
    finally:
        _clock.reset(token)


def reads_clock(source: str | None) -> bool:
    """Whether what a template writes may depend on the day."""
    return source is not None and "strftime_now" in source


def check_variable(name: str) -> None:
    """Raises UsageError for a variable of the rendering's own, which callers cannot set in any
    template."""
    if name in OWN:
        raise UsageError(
            f"chat template argument {name!r}", "the rendering itself sets it", "leave it out"
        )


def render(
    source: str,
    special_tokens: Mapping[str, str],
    messages: Any,
    variables: Mapping[str, Any],
    continue_final_message: bool = False,
) -> str:
    """The prompt for a chat, up to where the assistant's answer starts.

    Args:
      source: of the template.
      special_tokens: what it may refer to, e.g. `{"bos_token": "<s>"}`.
      messages: see `turns_of`.
      variables: further ones that the template reads. `tools` may hold functions, as in
        transformers.
      continue_final_message: the prompt ends where the text of the last turn ends, so that it is
        gone on with.

    Raises:
      UsageError: no chat, or the template fails on it in any way, a limit included.
    """
    turns = turns_of(messages)
    final = _marked(turns) if continue_final_message else ""
    strings, parts = reads(source, tuple(sorted(special_tokens.items())))
    turns = [
        turn | {"content": _content(turn["content"], strings, parts)} if "content" in turn else turn
        for turn in turns
    ]
    try:
        given = {
            name: _tools(value) if name == "tools" else plain(value, name)
            for name, value in variables.items()
        }
        if not continue_final_message:
            return _render(source, special_tokens, turns, given)
        text = _render(source, special_tokens, turns, {"add_generation_prompt": False, **given})
        return _up_to_mark(text, final)
    except UsageError:
        raise
    except RecursionError as error:
        raise UsageError(
            "chat messages",
            "the model's template calls itself without end",
            "change the template or the messages",
        ) from error
    # a template may do anything, such as dividing by zero or looking past the end of a list
    except Exception as error:
        what = in_short(error) if not isinstance(error, jinja2.TemplateError) else _message(error)
        raise UsageError(
            "chat messages", f"the model's template refuses them ({what})", "change the messages"
        ) from error


def _marked(turns: list[dict[str, Any]]) -> str:
    """Puts `MARK` behind the last text of the last turn. Returns that text.

    Raises:
      UsageError: there is none.
    """
    content = turns[-1].get("content")
    if isinstance(content, str):
        turns[-1]["content"] = content + MARK
        return content
    if not content:
        value = "continue_final_message=True"
        raise UsageError(value, "the last turn has no text to continue", "give it content")
    part = content[-1]
    text = part["text"]
    part["text"] = text + MARK
    return text


def _up_to_mark(text: str, final: str) -> str:
    """`text` up to the mark behind `final`. A template that trims texts has the space of the mark
    trimmed, and then that of `final`.

    Raises:
      UsageError: the template leaves the last turn out, or changes it.
    """
    mark = MARK.strip()
    if mark not in text or final.strip() not in text:
        value = "continue_final_message=True"
        reason = "the model's template leaves the last turn out, or changes its text"
        raise UsageError(value, reason, "pass the prompt as one text")
    place = text.rindex(mark)
    kept = text[:place]
    return kept if text.startswith(MARK, place) else kept.rstrip()


def turns_of(messages: Any) -> list[dict[str, Any]]:
    """A chat as new dicts of plain values, checked.

    Keys whose value is None are left out, as in transformers.

    Args:
      messages: `{"role": ..., "content": ...}`, oldest first. Content is a text or a list of parts
        such as `{"type": "text", "text": ...}`.

    Raises:
      UsageError: no messages; a turn that is no dict or has no role; content that is neither; a
        part that is no text; a turn without content that calls no tool; or values that are not
        plain (see `plain`).
    """
    wanted = 'write [{"role": "user", "content": "..."}]'
    listed = isinstance(messages, Sequence) and not isinstance(messages, (str, bytes, bytearray))
    if not listed or not len(messages) or not all(isinstance(turn, Mapping) for turn in messages):
        raise UsageError(
            f"messages {shown(messages)}", "a chat is a list of dicts with a role", wanted
        )
    turns = []
    for number, message in enumerate(messages):
        turn = {
            key: value
            for key, value in plain(message, f"turn {number}").items()
            if value is not None
        }
        role = turn.get("role")
        if not isinstance(role, str) or not role:
            raise UsageError(
                f"turn {number} with role {shown(role)}",
                "a chat is a list of dicts with a role, which is a text",
                wanted,
            )
        content = turn.get("content")
        if content is None:
            if not any(turn.get(name) for name in WITHOUT_CONTENT):
                raise UsageError(
                    f"turn {number} of role {shown(role)}",
                    "it has no content, and it calls no tool",
                    "give it content, or leave it out",
                )
        elif not isinstance(content, str):
            turn["content"] = _parts(number, content)
        turns.append(turn)
    return turns


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of `value` made of dicts, lists, texts, numbers, truth values and None only; scalars
    of NumPy become numbers.

    Raises:
      UsageError: another type, more than `DEPTH` levels (it may contain itself), or a number of
        more than `DIGITS` bits; `where` names it.
    """
    if depth > DEPTH:
        raise UsageError(
            f"{where} of a chat",
            f"it is nested more than {DEPTH} levels deep, or contains itself",
            "pass plain text",
        )
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        if value.bit_length() > DIGITS:
            raise UsageError(f"{where} of a chat", f"it holds {shown(value)}", "pass it as text")
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {
            str(plain(key, where, depth + 1)): plain(item, where, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [plain(item, where, depth + 1) for item in value]
    raise UsageError(
        f"{where} of a chat",
        f"it holds a {type(value).__name__}",
        "use texts, numbers, lists and dicts, as in JSON",
    )


def _parts(number: int, content: Any) -> list[dict[str, Any]]:
    """The parts of a turn's content, all of them text."""
    if not isinstance(content, list) or not content:
        raise UsageError(
            f"turn {number} with content {shown(content)}",
            "content is a text, or a list of parts",
            'write "content": "..."',
        )
    parts = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise UsageError(
                f"turn {number} with a part of type {shown(kind)}",
                "the models here read text only",
                "leave it out",
            )
        if not isinstance(part.get("text"), str):
            raise UsageError(
                f"turn {number} with part {shown(part)}",
                "it holds no text",
                'write {"type": "text", "text": "..."}',
            )
        parts.append({"type": "text", **part})
    return parts


def _content(
    content: str | list[dict[str, Any]], strings: bool, parts: bool
) -> str | list[dict[str, Any]]:
    """Content in the form that the template reads; texts are joined as they are, nothing in
    between."""
    if isinstance(content, list) and not parts:
        return "".join(part["text"] for part in content)
    if isinstance(content, str) and parts and not strings:
        return [{"type": "text", "text": content}]
    return content


@functools.lru_cache(maxsize=64)
def reads(source: str, special_tokens: tuple[tuple[str, str], ...]) -> tuple[bool, bool]:
    """Whether a template writes content that is a text, and content that is a list of parts.

    One that fails on a trial reads texts.
    """

    def shows(content: Any, marks: tuple[str, ...]) -> bool:
        turns = [{"role": "user", "content": content}]
        try:
            text = _render(source, dict(special_tokens), turns, {})
        except Exception:
            return False
        return PROBE in text and not any(mark in text for mark in marks)

    strings = shows(PROBE, ())
    # the list itself, written out
    parts = shows([{"type": "text", "text": PROBE}], ("'text'", '"text"'))
    return strings or not parts, parts


def _tools(value: Any) -> Any:
    """`tools` as JSON schemas; functions are described by their signature and docstring."""
    if value is None or not isinstance(value, (list, tuple)):
        return plain(value, "tools")
    if any(callable(tool) for tool in value):
        from transformers.utils import get_json_schema  # a second to import

        value = [get_json_schema(tool) if callable(tool) else tool for tool in value]
    return plain(value, "tools")


def _render(
    source: str,
    special_tokens: Mapping[str, str],
    turns: list[dict[str, Any]],
    variables: Mapping[str, Any],
) -> str:
    template = compiled(source)
    context = {
        **special_tokens,
        "tools": None,
        "documents": None,
        "messages": [_with_reasoning(turn) for turn in turns],
    }
    limits = _Limits(time.thread_time() + SECONDS)
    before, _budget.limits = getattr(_budget, "limits", None), limits
    try:
        written, size = [], 0
        for piece in template.generate(
            **context | {"add_generation_prompt": True} | dict(variables)
        ):
            size += len(piece)
            if size > CHARACTERS:
                raise TemplateLimit(f"it writes more than {CHARACTERS:,} characters")
            limits.tick()
            written.append(piece)
        return "".join(written)
    finally:
        _budget.limits = before


def _with_reasoning(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn whose reasoning has all the names that templates read it under, as transformers passes
    it."""
    reasoning = next((turn[name] for name in REASONING if turn.get(name) is not None), None)
    return (
        turn
        if reasoning is None
        else {"thinking": reasoning, **turn, "reasoning_content": reasoning}
    )


def _message(error: jinja2.TemplateError) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# The sandbox.


@dataclasses.dataclass
class _Limits:
    """What is left of one rendering. `deadline`: of the thread's own clock, in seconds."""

    deadline: float
    work: int = 0

    def tick(self) -> None:
        if time.thread_time() > self.deadline:
            raise TemplateLimit(f"it takes longer than {SECONDS:g} s")

    def made(self, value: Any) -> Any:
        """Counts a result."""
        if isinstance(value, (str, bytes)):
            self.allow(len(value))
            self.work += len(value)
            if self.work > WORK:
                raise TemplateLimit(f"it makes texts of more than {WORK:,} characters on the way")
        return value

    def allow(self, size: int, like: Any = "") -> None:
        """Asked before something of that size is made, a text or a list like the one given."""
        if size > (ITEMS if isinstance(like, (list, tuple)) else CHARACTERS):
            raise TemplateLimit(f"it makes a value of {shown(size)} characters or items")


def _limits() -> _Limits:
    """Those of the rendering in this thread; while a template is compiled there are none, and time
    is short."""
    limits: _Limits | None = getattr(_budget, "limits", None)
    return limits or _Limits(time.thread_time() + SECONDS)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 0


def _foresee(name: str, subject: Any, arguments: Sequence[Any]) -> None:
    """Refuses a call whose result would be too large, before it is made: a single call cannot be
    stopped."""
    limits = _limits()
    limits.tick()
    numbers = [abs(x) for x in arguments if isinstance(x, int) and not isinstance(x, bool)]
    # As many characters for each line, word, item: `indent`, `expandtabs` and the like.
    if numbers and max(numbers) > 2**16:
        limits.allow(
            max(numbers) * max(1, _size(subject))
            if name in ("indent", "expandtabs")
            else max(numbers)
        )
    if name in ("replace", "join", "expandtabs", "indent", "translate"):
        factor = max(
            [
                1,
                *map(_size, arguments[1:] if name == "replace" else arguments),
                *(numbers if name != "replace" else []),
            ]
        )
        places = _size(subject) + 1
        if (
            name == "replace"
            and arguments
            and isinstance(subject, str)
            and isinstance(arguments[0], str)
        ):
            places = subject.count(arguments[0]) if arguments[0] else len(subject) + 1
        # of the method the subject is what lies between
        if name == "join" and isinstance(subject, str):
            places, factor = max([1, *map(_size, arguments)]), max(1, len(subject))
        elif name in ("indent", "expandtabs") and isinstance(subject, str):
            places = subject.count("\n") + subject.count("\t") + 1
        limits.allow(places * factor)
    for text in (subject, *arguments) if name in ("format", "format_map", "%") else ():
        if isinstance(text, str) and re.search(r"[0-9]{6}", text):
            raise TemplateLimit("it formats with a width of six digits or more")


class _Rewrite(jinja2.visitor.NodeTransformer):
    """Every turn of a loop and every call of a macro asks the limits, and so does every `~`."""

    def _ticking(self, node: Any) -> Any:
        self.generic_visit(node)
        tick = jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, jinja2.nodes.ExprStmt(tick).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_FilterBlock = _ticking

    def visit_Concat(self, node: Any) -> Any:
        self.generic_visit(node)
        return jinja2.nodes.Call(
            jinja2.nodes.EnvironmentAttribute("concatenated"), node.nodes, [], None, None
        ).set_lineno(node.lineno)


class _Generation(jinja2.ext.Extension):
    """The tag `generation` of transformers, which marks what the assistant wrote: here it leaves
    the text as it is."""

    tags = {"generation"}  # noqa: RUF012  (as the base class declares it)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Callable[[], str]) -> str:
        return caller()


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def _parse(self, source: str, name: Any, filename: Any) -> Any:
        return _Rewrite().visit(super()._parse(source, name, filename))

    def tick(self) -> str:
        _limits().tick()
        return ""

    def concatenated(self, *values: Any) -> str:
        return _limits().made("".join([str(value) for value in values]))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        limits = _limits()
        limits.tick()
        if operator == "+":
            limits.allow(_size(left) + _size(right), left)
        elif operator == "%" and isinstance(left, str):
            _foresee("%", left, right if isinstance(right, tuple) else (right,))
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int):
                    limits.allow(_size(value) * times, value)
        if isinstance(left, int) and isinstance(right, int):
            bits = {
                "*": left.bit_length() + right.bit_length(),
                "**": left.bit_length() * max(1, right),
            }.get(operator, 0)
            if bits > DIGITS:
                raise TemplateLimit("it makes a number of thousands of digits")
        return limits.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # Jinja wraps `str.format`
        subject = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(subject, (str, bytes, int, list, tuple, dict)):
            _foresee(getattr(__obj, "__name__", ""), subject, (*args, *kwargs.values()))
        return _limits().made(super().call(__context, __obj, *args, **kwargs))


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that asks the limits.

    What Jinja passes it first (a context, say) is marked on the function, and stays so.
    """
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _foresee(
            name, args[first] if len(args) > first else None, (*args[first + 1 :], *kwargs.values())
        )
        return _limits().made(function(*args, **kwargs))

    return guarded


class _Dict:
    """`dict` for templates: what it makes, and nothing of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return (_clock.get() or datetime.datetime.now()).strftime(pattern)


@functools.cache
def environment() -> _Environment:
    """With what transformers gives templates: its settings, `tojson`, `raise_exception`,
    `strftime_now`."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.filters = {
        name: _guarded(name, function) for name, function in environment.filters.items()
    }
    del environment.globals["lipsum"]  # text by chance, which no prompt should hold
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
    }
    return environment


@functools.lru_cache(maxsize=64)
def compiled(source: str) -> jinja2.Template:
    """Raises UsageError for a source that is not valid Jinja."""
    try:
        return environment().from_string(source)
    except Exception as error:  # a syntax error, or anything that compiling a hostile one may raise
        what = _message(error) if isinstance(error, jinja2.TemplateError) else in_short(error)
        raise UsageError(
            "the model's chat template", f"it is not valid Jinja ({what})", "pass raw prompts"
        ) from error
