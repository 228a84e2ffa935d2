"""README, docs and notebooks as tests read them: blocks, what a block prints, and links.

The rules of the documents:
- Every block of Python runs, all blocks of a page in one namespace and in order.
- A block of `text` right behind a block of Python is what that block prints.
- `<!-- not run: REASON -->` on the line before a block says why it does not run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import pathlib
import re
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
DOCUMENTS = [README, *sorted(DOCS.rglob("*.md"))]

_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+?) -->\n)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def name_of(path: pathlib.Path) -> str:
    """A document's path within the repository, for test ids; elsewhere its name alone."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
      language: as the fence names it; "" if it names none.
      code: the lines between the fences.
      line: number of the first of them.
      prints: for Python, the block of text right behind it; None if there is none.
      not_run: why it does not run; "" if it does.
    """

    language: str
    code: str
    line: int
    prints: str | None = None
    not_run: str = ""


def blocks(path: pathlib.Path) -> list[Block]:
    """All fenced blocks of a document, in order."""
    text = path.read_text()
    matches = list(_FENCE.finditer(text))
    result = []
    for match, following in itertools.zip_longest(matches, matches[1:]):
        printed = None
        if (
            match["language"] == "python"
            and following is not None
            and following["language"] == "text"
        ):
            adjacent = not text[match.end() : following.start()].strip()
            printed = following["code"] if adjacent else None
        line = text[: match.start("code")].count("\n") + 1
        result.append(Block(match["language"], match["code"], line, printed, match["reason"] or ""))
    return result


def python_blocks(path: pathlib.Path) -> list[Block]:
    """The blocks of Python that run."""
    return [b for b in blocks(path) if b.language == "python" and not b.not_run]


def run_blocks(
    path: pathlib.Path, to_run: Sequence[Block], names: dict[str, object]
) -> dict[str, object]:
    """Executes blocks one after the other in the namespace `names`, and returns it.

    Raises:
      AssertionError: a block prints something else than the document says.
    """
    for block in to_run:
        printed = io.StringIO()
        # Tracebacks name the line of the document.
        code = "\n" * (block.line - 1) + block.code
        with contextlib.redirect_stdout(printed):
            exec(compile(code, name_of(path), "exec"), names)
        if block.prints is not None:
            assert_prints(printed.getvalue(), block.prints, f"{name_of(path)}:{block.line}")
    return names


def assert_prints(printed: str, wanted: str, where: str) -> None:
    """Raises AssertionError unless both texts are equal.

    The last digit of a decimal number may differ by 1, for processors round differently. Spaces at
    the end of a line do not count.
    """
    printed, wanted = (
        re.sub(r"[ \t]+$", "", t, flags=re.MULTILINE).strip() for t in (printed, wanted)
    )
    differs = f"{where} prints\n{printed}\nand not\n{wanted}"
    assert _NUMBER.sub("0", printed) == _NUMBER.sub("0", wanted), differs
    for is_, said in zip(_NUMBER.findall(printed), _NUMBER.findall(wanted), strict=True):
        if is_ == said:
            continue
        digits = len(said.partition(".")[2])
        close = digits and abs(float(is_) - float(said)) <= 1.001 * 10**-digits
        assert close, f"{where} prints {is_} and not {said} in\n{printed}"


def commands(text: str) -> list[str]:
    """Every complete `zip-rc` command of a text, without the word `zip-rc` itself."""
    text = text.replace("\\\n", " ")
    pattern = r"(?:`|^(?:example: |\$ |\S*/)?)zip-rc ([^`#\n]+)"
    lines = [c for c in re.findall(pattern, text, re.MULTILINE) if "|" not in c]
    each = [c.strip().removeprefix("zip-rc ") for line in lines for c in line.split("&&")]
    return [c for c in each if c]


def links(text: str) -> list[str]:
    """Targets of links and images that lie in the repository, without their anchors."""
    text = _FENCE.sub("", text)
    targets = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    return [t.partition("#")[0] for t in targets if not re.match(r"https?:|mailto:|#", t)]
