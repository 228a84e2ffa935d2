"""The process in which scorers run that may hang, exhaust memory or evaluate text: `grader.Grader` starts, times and kills it.

Run as a script, never imported, so that it loads neither JAX nor the caller's main module. Protocol: one JSON object a line each way.
A request names the kind of scoring; the reply is `{"score": float}`, -1 if the problem cannot be generated again. The first line out
says that the imports are done.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import sys
from typing import Any

# Some reasoning-gym scorers call `eval` or sympy's `parse_expr` on the answer. No correct answer of those tasks has any of these.
UNSAFE = re.compile(
    r"__|\b(?:import|exec|eval|open|compile|getattr|setattr|delattr|globals|locals|vars|input|breakpoint|exit|quit|help|lambda)\b"
    r"|[^\W\d]\w*\s*\.\s*[^\W\d]|[)\]}'\"]\s*\.\s*[^\W\d]"
)
# "18 dollars" is 18; LaTeX would read a product of variables.
WITH_UNIT = re.compile(r"(\$?-?[\d,]*\.?\d+(?:/\d+)?)\s+[A-Za-z]{3,}[A-Za-z ]*\.?")
MEMORY_BYTES = 4 << 30


def score_math(gold: str, answer: str) -> float:
    """1.0 if math-verify finds the two equal. Its own time limit is off: it needs the main thread, and the parent has a harder one."""
    import math_verify

    def parse(text: str) -> Any:
        delimited = any(mark in text for mark in ("$", "\\boxed", "\\(", "\\["))
        return math_verify.parse(text if delimited else f"\\boxed{{{text}}}", parsing_timeout=None)

    with_unit = WITH_UNIT.fullmatch(answer)
    return float(math_verify.verify(parse(gold), parse(with_unit.group(1) if with_unit else answer), timeout_seconds=None))


class ForeignEntry(Exception):
    """The generated entry is not the one that was asked."""


def score_task(task: str, options: dict[str, Any], seed: int, index: int, question: str, gold: str, answer: str) -> float:
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
    except Exception:  # options of another version, say: the problem is not known, which says nothing about the answer
        raise ForeignEntry from None
    if (entry["question"], str(entry["answer"])) != (question, gold):
        raise ForeignEntry
    source = inspect.getsource(inspect.getmodule(type(dataset)))  # type: ignore[arg-type]
    by_sympy = "parse_expr(" in source or "sympify(" in source
    if ("eval(" in source or by_sympy) and (UNSAFE.search(answer) or (by_sympy and re.search(r"['\"]", answer))):
        return 0.0
    return float(dataset.score_answer(answer, entry))


DATASETS: dict[tuple, Any] = {}


def main() -> None:
    seconds = int(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever a library prints must not look like a reply
    # The slow imports happen before the clock of the first request starts.
    import math_verify  # noqa: F401
    import reasoning_gym  # noqa: F401

    for limit, value in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # a stricter limit is already set, or the system has no such limit
            resource.setrlimit(limit, (value, value))
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        # Should the parent die first, the kernel ends this process even inside a long C call.
        signal.alarm(2 * seconds)
        try:
            reply = {"score": score_math(**request["math"]) if "math" in request else score_task(**request["task"])}
        except ForeignEntry:
            reply = {"score": -1.0}
        except Exception:  # a scorer that cannot read the answer has not found it right
            reply = {"score": 0.0}
        signal.alarm(0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
