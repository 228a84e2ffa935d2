"""The process in which scorers run that may hang, exhaust memory or evaluate text: `grader.Grader`
starts, times and kills it.

Run as a script, never imported, so that it loads neither JAX nor the caller's main module.
Protocol: one JSON object a line each way. A request names the kind of scoring; the reply is
`{"score": float}`, -1 if the problem cannot be generated again. The first line out says that the
imports are done.
A worker for a grader of the user's imports that one function, and nothing of the package. Its
reply to what the function does wrong is `{"error": text}`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import re
import resource
import signal
import sys
from typing import Any

# Some reasoning-gym scorers call `eval` or sympy's `parse_expr` on the answer. No correct answer of
# those tasks has any of these.
UNSAFE = re.compile(
    r"__|\b(?:import|exec|eval|open|compile|getattr|setattr|delattr|globals|locals|vars|input"
    r"|breakpoint|exit|quit|help|lambda)\b"
    r"|[^\W\d]\w*\s*\.\s*[^\W\d]|[)\]}'\"]\s*\.\s*[^\W\d]"
)
MEMORY_BYTES = 4 << 30


def load(name: str) -> Any:
    """A neighboring file or folder as a module of its own, without the package around it."""
    folder = pathlib.Path(__file__).with_name(name)
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    # A spec with search locations is a package: the files in it import each other relatively.
    spec = importlib.util.spec_from_file_location(
        f"zip_rc_{name}",
        path,
        submodule_search_locations=[str(folder)] if folder.is_dir() else None,
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def score_math(gold: str, answer: str) -> float:
    """1.0 if the two are equal: plain forms by `plain`, formulas by math-verify."""
    return float(load_once("plain").equal(gold, answer, load_once("mathematics").equal))


@functools.cache
def load_once(name: str) -> Any:
    module = load(name)
    if name == "mathematics":
        module.close_lenient_spots()
    return module


class ForeignEntry(Exception):
    """The generated entry is not the one that was asked."""


def score_task(
    task: str, options: dict[str, Any], seed: int, index: int, question: str, gold: str, answer: str
) -> float:
    """The reasoning-gym dataset's own score of `answer` for its entry `index`.

    Raises:
      ForeignEntry: that entry has another question or reference answer than `question`, `gold`.
    """
    import inspect

    import reasoning_gym

    key = (task, json.dumps(options), seed, 1 << index.bit_length())
    try:
        if key not in DATASETS:
            DATASETS.clear()
            DATASETS[key] = reasoning_gym.create_dataset(task, seed=seed, size=key[3], **options)
        dataset = DATASETS[key]
        entry = dataset[index]
    # options of another version, say: the problem is not known, which says nothing about the answer
    except Exception:
        raise ForeignEntry from None
    if (entry["question"], str(entry["answer"])) != (question, gold):
        raise ForeignEntry
    source = inspect.getsource(inspect.getmodule(type(dataset)))  # type: ignore[arg-type]
    by_sympy = "parse_expr(" in source or "sympify(" in source
    if ("eval(" in source or by_sympy) and (
        UNSAFE.search(answer) or (by_sympy and re.search(r"['\"]", answer))
    ):
        return 0.0
    return float(dataset.score_answer(answer, entry))


DATASETS: dict[tuple, Any] = {}


def in_short(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def imported(name: str, path: list[str]) -> Any:
    """The user's function "module:function", found on the path of the process that starts this
    one."""
    sys.path[:] = path
    module, _, attributes = name.partition(":")
    return functools.reduce(getattr, attributes.split("."), importlib.import_module(module))


def score_custom(function: Any, problem: dict[str, str], response: str) -> dict[str, Any]:
    """The reply for a grader of the user's."""
    try:
        found = function(problem, response)
    except Exception as error:
        return {"error": f"it fails ({in_short(error)})"}
    try:
        score = float(found)
    except (TypeError, ValueError):
        score = float("nan")
    if not isinstance(found, str) and 0 <= score <= 1:
        return {"score": score}
    try:
        text = f"{found!r:.100}"
    except Exception:
        text = f"a {type(found).__name__}"
    return {"error": f"it returned {text}, which is no number in [0, 1]"}


def main() -> None:
    seconds = int(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever a library prints must not look like a reply
    # The slow imports happen before the clock of the first request starts. Mathematics needs no
    # reasoning-gym.
    function = None
    if sys.argv[2:3] == ["custom"]:
        try:
            function = imported(sys.argv[3], json.loads(sys.argv[4]))
        except BaseException as error:  # a module of the user's may raise anything
            print(json.dumps({"error": in_short(error)}), file=replies, flush=True)
            return
    else:
        if sys.argv[2:] == ["tasks"]:
            import reasoning_gym  # noqa: F401

        load_once("plain")
        load_once("mathematics")
        # The first formula loads what parses formulas; that must not count as the time of an
        # answer.
        with contextlib.suppress(Exception):
            score_math("(x-1)(x+1)", "x^2 - 1")

    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        # a stricter limit is already set, or the system has no such limit
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, value))
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        # Should the parent die first, the kernel ends this process even inside a long C call.
        signal.alarm(2 * seconds)
        try:
            if "custom" in request:
                reply = score_custom(function, **request["custom"])
            elif "math" in request:
                reply = {"score": score_math(**request["math"])}
            else:
                reply = {"score": score_task(**request["task"])}
        except ForeignEntry:
            reply = {"score": -1.0}
        except Exception:  # a scorer that cannot read the answer has not found it right
            reply = {"score": 0.0}
        signal.alarm(0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
