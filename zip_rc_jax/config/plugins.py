"""Settings that name a function, or are one: policies, utilities, graders, and how answers are read
and compared.

Such a setting takes three kinds of values: a registered name, "package.module:function", or a
callable. Built-in names are short forms of "package.module:function", so nothing is imported
before it is used. A file holds names only, see `Plugins.name_of`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from zip_rc_jax.config.checks import in_short, shown
from zip_rc_jax.runtime.errors import UsageError

Function = TypeVar("Function", bound=Callable[..., Any])


class Plugins:
    """The functions that one setting can name.

    Attributes:
      setting: name of the setting, for messages.
      signature: what a function must take, for messages.
    """

    def __init__(
        self,
        setting: str,
        signature: str,
        builtin: Mapping[str, str],
        positional: int,
        keywords: tuple[str, ...] = (),
    ):
        """Args:
        builtin: names, and "package.module:function" of each.
        positional, keywords: how many values the function gets by position, and which by name.
        """
        self.setting, self.signature = setting, signature
        self._builtin = dict(builtin)
        self._positional, self._keywords = positional, keywords
        self._registered: dict[str, Callable[..., Any]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that the setting knows, the built-in ones first."""
        return (*self._builtin, *self._registered)

    def is_builtin(self, value: Any) -> bool:
        """Whether `value` is the name of one of this package's own functions."""
        return isinstance(value, str) and value in self._builtin

    def register(self, name: str) -> Callable[[Function], Function]:
        """A decorator that gives a function a name. The function itself is returned unchanged.

        A function that is defined once more, as in a notebook, replaces its older self.

        Raises:
          UsageError: the name is no name or belongs to another function; or the signature is wrong.
        """
        if not isinstance(name, str) or not name or ":" in name or name != name.strip():
            fix = "use a word such as 'my_policy'"
            raise UsageError(f"{self.setting} name {shown(name)}", "it is no name", fix)

        def add(function: Function) -> Function:
            self._check_callable(function)
            older = self._registered.get(name)
            if name in self._builtin or (older is not None and _place(older) != _place(function)):
                raise UsageError(
                    f"{self.setting} name {name!r}",
                    "another function has it already",
                    "choose another name",
                )
            self._registered[name] = function
            return function

        return add

    def check(self, value: Any) -> None:
        """Raises UsageError unless `resolve` finds a function. Built-in names import nothing."""
        if not self.is_builtin(value):
            self.resolve(value)

    def resolve(self, value: Any) -> Callable[..., Any]:
        """The function that `value` names or is.

        Raises:
          UsageError: an unknown name (the message lists the known ones), an import that fails,
            no callable, or a callable with another signature.
        """
        if isinstance(value, str):
            if value in self._registered:
                return self._registered[value]
            function = self._imported(value)
            if value in self._builtin:
                return function
        else:
            function = value
        self._check_callable(function)
        return function

    def name_of(self, value: Any) -> str:
        """What a file holds for `value`: its name, or "package.module:function" of a callable.

        Raises:
          UsageError: a callable that no name leads back to, such as a lambda.
        """
        if isinstance(value, str):
            return value
        for name, function in self._registered.items():
            if function is value:
                return name
        module, path = _place(value)
        try:
            at_the_name = _at(module, path)
        except Exception:
            at_the_name = None
        if at_the_name is not value or module == "__main__":
            raise UsageError(
                f"{self.setting}={shown(value)}",
                "a file records settings by name, and no name leads back to this function",
                "register it under a name, or define it at the top level of a module",
            )
        return f"{module}:{path}"

    def _imported(self, value: str) -> Callable[..., Any]:
        """The function at "package.module:function", or behind a built-in name."""
        address = self._builtin.get(value, value)
        if ":" not in address:
            close = difflib.get_close_matches(value, self.names, n=1)
            fix = f"did you mean {close[0]!r}?" if close else "choose one of them"
            raise UsageError(
                f"{self.setting}={shown(value)}",
                f"it must be one of {', '.join(self.names)}, or package.module:function",
                fix,
            )
        try:
            return _at(*address.split(":", 1))
        except Exception as error:  # a module of the user's may raise anything
            raise UsageError(
                f"{self.setting}={shown(value)}",
                f"importing it fails ({in_short(error)})",
                "write package.module:function of a module that Python finds",
            ) from None

    def _check_callable(self, function: Any) -> None:
        """Raises UsageError for what cannot be called with the setting's arguments."""
        value = f"{self.setting}={shown(function)}"
        if not callable(function):
            known = ", ".join(self.names)
            raise UsageError(
                value,
                "it is neither a name nor a function",
                f"use one of {known}, or pass a function{self.signature}",
            )
        try:
            hash(function)
        except TypeError:
            raise UsageError(
                value,
                "it is not hashable, and settings are",
                "pass a function or a frozen dataclass",
            ) from None
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # functions of C do not always tell
            return
        try:
            signature.bind(*[None] * self._positional, **dict.fromkeys(self._keywords))
        except TypeError as error:
            raise UsageError(
                value,
                f"it cannot be called with {self.signature} ({in_short(error)})",
                f"define it as def name{self.signature}",
            ) from None


def _at(module: str, path: str) -> Any:
    """What a module holds at a dotted path. Raises whatever the import raises."""
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))


def _place(function: Any) -> tuple[str, str]:
    """Module and qualified name, of an object those of its class."""
    kind = function if hasattr(function, "__qualname__") else type(function)
    return str(getattr(kind, "__module__", "")), str(kind.__qualname__)


POLICIES = Plugins(
    "strategy",
    "(inputs, *, grid, config) -> MetaAction",
    {
        name: f"zip_rc_jax.search.policies:{name}"
        for name in ("zip_rc", "fixed", "reward_threshold", "length_budget", "half_finished")
    },
    positional=1,
    keywords=("grid", "config"),
)
UTILITIES = Plugins(
    "utility",
    "(terms, multiplicity, unfinished, *, alpha, beta, normalizer, selection_exponent, grid) "
    "-> utility",
    {"sampling": "zip_rc_jax.search.utility:candidate_utility"},
    positional=3,
    keywords=("alpha", "beta", "normalizer", "selection_exponent", "grid"),
)
ANSWER_CHOICES = Plugins(
    "answer",
    "(prefixes) -> prefix or None",
    {
        "value": "zip_rc_jax.inference.tree:best_prefix",
        "vote": "zip_rc_jax.inference.tree:voted_prefix",
    },
    positional=1,
)
ANSWER_EXTRACTORS = Plugins(
    "answer_extractor",
    "(text) -> answer or None",
    {"stated": "zip_rc_jax.grading.answers:extract_answer"},
    positional=1,
)
ANSWER_EQUIVALENCES = Plugins(
    "answer_equivalence",
    "(a, b) -> bool",
    {
        "grader": "zip_rc_jax.grading.grader:equivalent",
        "text": "zip_rc_jax.grading.votes:same_text",
    },
    positional=2,
)
# Runs in the grader's worker process, so it is named and never registered.
GRADERS = Plugins(
    "grade.grader",
    "(problem, response) -> number in [0, 1]",
    {"judge": "zip_rc_jax.grading.judge:Judge"},
    positional=2,
)
OF_DECODING = (POLICIES, UTILITIES, ANSWER_CHOICES, ANSWER_EXTRACTORS, ANSWER_EQUIVALENCES)

register_policy = POLICIES.register
register_utility = UTILITIES.register
register_answer_choice = ANSWER_CHOICES.register
register_answer_extractor = ANSWER_EXTRACTORS.register
register_answer_equivalence = ANSWER_EQUIVALENCES.register
