"""Finding the answer in a response: what voting groups by and what graders score.

What counts as the answer
  A response states answers in four ways. The one that begins last counts:
    - a marker: "Answer: 42", "**Final Answer:** 42", "ANSWER = 42", or a heading "## Answer" with
      the answer below it;
    - a tag: "<answer>42</answer>";
    - a box: `\\boxed{42}`, `\\fbox{42}`, `\\boxed 42`; boxes with nothing but "and", "or" or commas
      between them are one answer;
    - a line "#### 42", as in GSM8K; "#### Check the sum" is a heading.
  Only without any of these counts the last sentence "the answer is 42".
  Boxes of a marker's own answer belong to the marker. Empty boxes are passed over. A marker, the
  last, with nothing behind it is no answer.

Where it is looked for
  Thoughts do not count: what stands before the last `</think>` is left out if anything follows it.
  A base model may run on into a next question. Everything from "Question:", "Q:", "Problem:",
  "Human:", "User:" and the like is left out, once an answer was stated before it.

Where it ends
  A value (a number, a formula, a choice) ends with its sentence, at a remark behind it ("42
  (forty-two)", "42, because ...") or at the next line of prose. Other answers may have several
  lines (grids, lists, moves). They end at a blank line, at a line such as "Explanation:" or
  "Confidence: 95%", or at a code fence. Emphasis and a value's trailing punctuation are no part of
  it; "!" may be a factorial and stays. Units stay, too: graders and `canonical` read them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from zip_rc_jax.grading import plain

# the answer stands at the end, so a longer response is read from there
MAX_RESPONSE_CHARS = 200_000

_MARKER = re.compile(
    r"(?<![A-Za-z])(?:answers?|ans\.?)(?![A-Za-z])(?:\*|_){0,3}(?:[ "
    r"\t]{0,3}\([^()\n]{0,40}\))?(?:[ \t]{1,3}(?:is|are))?"
    r"(?:\*|_){0,3}[ \t]{0,20}(?::(?!:)|：|=(?!=))(?:\*|_){0,3}"
    r"|^[ \t]{0,8}(?:#{1,6}[ \t]{1,3}|\*\*|__)[ \t]{0,3}(?:the[ \t])?(?:final[ \t]|correct[ "
    r"\t])?answers?[ \t]{0,3}(?:\*\*|__)?[ \t]{0,8}$",
    re.IGNORECASE | re.MULTILINE,
)
_TAG = re.compile(r"<(?:final[_ ]?)?answer>", re.IGNORECASE)
_TAG_END = re.compile(r"</(?:final[_ ]?)?answer>", re.IGNORECASE)
# a word begins a heading
_HASHES = re.compile(r"^[ \t]{0,8}####[ \t]{0,8}(?![A-Za-z]{2})(?=[^\s#])", re.MULTILINE)
_PHRASE = re.compile(
    r"\b(?:answers?|(?:correct|right|best)[ \t](?:option|choice|alternative))\b(?:[ \t]to[ "
    r"\t][^.\n]{1,80}?)?"
    r"[ \t](?:is|are|was|were|equals|would[ \t]be|will[ \t]be|must[ \t]be|should[ \t]be)\b(?![ "
    r"\t]*(?:not\b|:))"
    r"[ \t]{0,3}(?:(?:therefore|thus|then|indeed|simply|just|exactly|hence)\b[ \t]{0,3})?",
    re.IGNORECASE,
)
_HYPOTHETICAL = re.compile(
    r"\b(?:if|whether|suppose|assume|assuming|unless|that)[ "
    r"\t]+(?:(?:the|my|our|your|final|correct)[ \t]+){0,3}$",
    re.IGNORECASE,
)
_EMPTY_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{\s*\}")
_BRACES = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{|\\[{}\\]|[{}]")  # escaped braces are text
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)[ \t]{1,3}([^\s{}$\\]{1,100})")
_BETWEEN_BOXES = re.compile(
    r"(?:\s|\$|,|;|\\[()\[\],;]|\\quad|\\text\s?\{\s?(?:and|or)\s?\}|\b(?:and|or)\b)*",
    re.IGNORECASE,
)
_THOUGHTS = re.compile(
    r"</(?:think|thinking|thought|thoughts|reasoning)>|\[/THINK\]|◁/think▷", re.IGNORECASE
)
_RUN_ON = re.compile(
    r"(?:^|(?<=\s))[#*>\[ \t]{0,6}(?:(?:Next|New|Another)[ \t])?"
    r"(?:Question|QUESTION|Problem|PROBLEM|Human|HUMAN|User|USER|Exercise|Instruction|Student|Q)"
    r"(?:[ \t]{0,2}#?[0-9]{1,4})?\*{0,2}(?::|：|\.(?=\s)|\)(?=\s))"
    r"|^[#*\s]{0,6}(?i:question|problem|human|user|q|example|exercise|task|input)(?:[ "
    r"\t]{0,2}#?[0-9]{1,4})?\*{0,2}[ \t]{0,3}:"
    r"|^[ \t]{0,3}#{1,4}[ "
    r"\t](?:Question|Problem|Human|User|Instruction|Input|Example|Exercise|Task)\b"
    r"|<\|?(?:im_end|im_start|endoftext|end_of_text|eot_id|eom_id|user|end"
    r"|start_header_id|end_of_turn|start_of_turn)\|?>|</s>|<eos>|\[INST\]",
    re.MULTILINE,
)
_LABEL = re.compile(
    r"[ \t#*_>-]{0,8}(?:explanation|confidence|reason|reasoning|rationale|justification|check"
    r"|checking|verification|verify|note|proof|"
    r"solution|steps?|because|units?|source|sources|time|certainty|probability|score|comment"
    r"|remark|hint|working|calculation|method|summary|conclusion|"
    r"question|q|problem|human|user|assistant|system|instruction|input|example|exercise|task"
    r"|difficulty|topic|tags?|references?|therefore|"
    r"thought|final answer|answer)\b(?:[ \t][^:\n]{0,40})?[*_]{0,3}[ \t]{0,3}[:：]",
    re.IGNORECASE,
)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}(?:['’-][A-Za-z]+)*")
_GRID_TOKEN = re.compile(r"-?[0-9]{1,4}|[._<>^vQX∧∨˄˅❌✅#*+|-]+")
# a minus stands before it, not a dash
_FUNCTION = "(?:" + "|".join(sorted(plain.FUNCTION_WORDS)) + r")(?![A-Za-z])"
_REMARK = re.compile(
    r"(?<!\bsq)(?<!\bcu)(?<!\bRs)[.!?;][*_]{0,3}[ "
    r"\t]+(?=[*_(\"“]{0,3}[A-Z][A-Za-z']*\b[^=]|[A-Za-z]{2,}\b|[^\sA-Za-z])"
    r"|,?[ \t]+\((?=[^()\n]{0,200}?(?<![\\A-Za-z])[A-Za-z]{3})(?!\s*mod\b)"
    r"|,?[ \t]+(?:because|since|as|so|which|but|not|where|when|due|i\.e\.|by|using|after|given"
    r"|assuming|obtained|if|according|note|"
    r"therefore)\b"
    r"|,[ \t]+(?=(?:it|they|he|she|we|this|that|there)\b)|[ \t]+\([0-9.]{1,6}\s?\\?%\)"
    r"|[ \t]+(?:\|[ "
    r"\t]*)?[\[(]?(?i:explanation|confidence|certainty|reasoning|reason|justification|note|check"
    r"|proof|verification)"
    r"(?=[ \t]?[:=\d])"
    r"|[ \t]+(?:—|–|--|=>|→|⇒|//|\u2190)[ \t]+(?=[A-Za-z]{3})(?!"
    + _FUNCTION
    + r")|:[ \t]+(?=[A-Za-z]{3})"
    r"|[ \t]+-[ \t]+(?=[A-Za-z]{2,}[ \t]+[A-Za-z0-9]{2})(?!" + _FUNCTION + r")",
)


def extract_answer(text: str) -> str | None:
    """The answer that `text` states, or None.

    What counts as the answer is said at the top of this module.

    Runs in linear time. Only the last `MAX_RESPONSE_CHARS` are read.
    """
    text = _without_thoughts(text[-MAX_RESPONSE_CHARS:].replace("\r\n", "\n"))
    statements = _statements(text)
    end = _run_on(text, statements)
    if end < len(text):
        text = text[:end]
        statements = _statements(text)
    strong = [s for s in statements if s[2] != "phrase"]
    if strong:
        begin, after, kind = _that_counts(text, strong)
    elif statements:
        begin, after, kind = statements[-1]
    else:
        return None
    return _stated(text, begin, after, kind) or None


def canonical(answer: str) -> str:
    """A cheap normal form of an answer, without any process: equal forms mean equal answers.

    Numbers become exact fractions in lowest terms, with their unit. LaTeX delimiters, `\\text`,
    emphasis, spaces and the like go. Sets and lists of solutions are sorted. Two equal answers may
    still have two forms; `Grader.equivalent` decides about those.
    """
    return plain.canonical(answer)


def _without_thoughts(text: str) -> str:
    """What follows the last end of a thought, or all of it where nothing follows."""
    ends = [m.end() for m in _THOUGHTS.finditer(text)]
    return text[ends[-1] :] if ends and text[ends[-1] :].strip() else text


def _statements(text: str) -> list[tuple[int, int, str]]:
    """(where it begins, where its answer begins, kind) of each statement of an answer, in order."""
    statements = [(m.start(), m.end(), "marker") for m in _MARKER.finditer(text)]
    statements += [(m.start(), m.end(), "tag") for m in _TAG.finditer(text)]
    statements += [
        (m.start(), m.end(), "hashes")
        for m in _HASHES.finditer(text)
        if _is_value(_line(text, m.end()))
    ]
    statements += [(begin, begin, "box") for begin, _, _ in _boxes(text)]
    statements += [
        (m.start(), m.end(), "phrase")
        for m in _PHRASE.finditer(text)
        if not _HYPOTHETICAL.search(text, max(0, m.start() - 40), m.start())
    ]
    return sorted(statements)


def _that_counts(text: str, strong: list[tuple[int, int, str]]) -> tuple[int, int, str]:
    """The last statement; a box inside the answer of a marker, tag or #### line belongs to that
    one."""
    last = strong[-1]
    if last[2] == "box":
        outer = next((s for s in reversed(strong) if s[2] != "box"), None)
        if outer is not None:
            end = _block_end(text, outer)
            if last[0] < end or not text[outer[1] : last[0]].strip("*_$ \t\n#:\\[("):
                return outer
    return last


def _stated(text: str, begin: int, after: int, kind: str) -> str:
    if kind == "box":
        return _last_boxes(text)
    if kind == "tag":
        close = _TAG_END.search(text, after)
        inner = text[after : close.start() if close else len(text)].strip()
        return _refined(inner) if close else _refined(_block(inner))
    if kind == "hashes":
        return _refined(_line(text, after).strip())
    tail = text[after:]
    block = _block(tail)
    again = _PHRASE.search(block)  # "Final Answer: The final answer is 4"
    if (
        again is not None
        and block[again.end() :].strip()
        and (len(block[: again.start()].split()) <= 4 or not _is_value(_line(block, 0)))
    ):
        block = block[again.end() :].lstrip("} ")
    boxed = _last_boxes(_EMPTY_BOX.sub("", block))
    if boxed:
        return boxed
    if not _EMPTY_BOX.sub("", block).strip("*_ \n\t.$"):
        return ""
    return _refined(_EMPTY_BOX.sub("", block), sentence=kind == "phrase")


def _block_end(text: str, statement: tuple[int, int, str]) -> int:
    _, after, kind = statement
    if kind == "tag":
        close = _TAG_END.search(text, after)
        return close.start() if close else len(text)
    if kind == "hashes":
        return after + len(_line(text, after))
    tail = text[after:]
    block = _block(tail)
    return after + tail.find(block[:200]) + len(block) if block else after


def _line(text: str, begin: int) -> str:
    end = text.find("\n", begin)
    return text[begin : len(text) if end < 0 else end]


def _block(tail: str) -> str:
    """The lines right behind a marker that can be its answer."""
    lead = len(tail) - len(tail.lstrip(" \t"))
    on_the_line = bool(_line(tail, 0).strip("*_ \t"))
    lines = tail[lead:].split("\n") if on_the_line else tail.strip("*_ \t").lstrip().split("\n")
    first = lines[0].strip()
    if not first or (not on_the_line and _LABEL.match(lines[0])):
        return ""
    for opening, closing in (("$$", "$$"), ("\\[", "\\]"), ("```", "```")):
        if first.startswith(opening) and closing not in first[len(opening) :]:
            rest = "\n".join(lines)
            end = rest.find(closing, len(opening) if opening != "```" else len(first))
            if end > 0:
                return (
                    rest[len(first) : end].strip("\n")
                    if opening == "```"
                    else rest[: end + len(closing)]
                )
    taken, depth, previous = [lines[0]], _depth(lines[0]), lines[0]
    opened, boxed = depth > 0, "\\boxed{" in lines[0]
    short = _is_value(first) or len(_WORD.findall(first)) <= 3
    blank: list[str] = []
    for line in lines[1:]:
        if depth > 0 and line.strip() and (not blank or boxed) and not _LABEL.match(line):
            pass  # an open bracket or environment goes on
        elif not line.strip():
            blank.append(line)
            continue
        elif (
            _LABEL.match(line)
            or line.lstrip().startswith("```")
            or (blank and not (_is_grid_line(previous) and _is_grid_line(line)))
            or ((short or opened) and _is_prose(line, strict=opened or _is_value(first)))
        ):
            break
        taken += [*blank, line]
        blank, previous = [], line
        depth += _depth(line)
    return "\n".join(taken).rstrip()


def _depth(line: str) -> int:
    """How many brackets and environments the line leaves open; JSON and LaTeX go on to the line
    that closes them."""
    # [0, 1) closes what it opens
    opened = sum(line.count(c) for c in "([{") + line.count("\\begin")
    return opened - sum(line.count(c) for c in ")]}") - line.count("\\end")


def _is_grid_line(line: str) -> bool:
    tokens = line.split()
    return len(tokens) >= 2 and all(_GRID_TOKEN.fullmatch(t) for t in tokens[:400])


def _is_prose(line: str, strict: bool) -> bool:
    """A line that explains.

    After a value (`strict`) any word of three letters or an equation is enough.
    """
    words = _WORD.findall(line)
    if strict:
        return any(len(w) >= 3 for w in words) or bool(re.search(r"[0-9)}A-Za-z]\s?(?:=|≈)", line))
    return len(words) >= 4


def _is_value(line: str) -> bool:
    """A number, formula or choice with few words, unlike a heading or a sentence."""
    line = line.strip().strip("*_ ")
    remark = _REMARK.search(line)
    head = (line[: remark.start()] if remark else line)[:400]
    if (
        re.match(r"[0-9]{1,2}[.)]\s+[A-Z]", line)
        and len(_WORD.findall(line)) >= 1
        and not re.search(r"[.!]\s", line[3:])
    ):
        return not _heading(line)
    if re.fullmatch(r"\(?[A-Za-z]\)?[.):]?|(?i:yes|no|true|false)", head.strip()):
        return True
    lead = re.match(r"[A-Za-z][A-Za-z' ]*", head)
    if (
        lead
        and len(_WORD.findall(lead.group())) >= 2
        and head[lead.end() : lead.end() + 1] not in ("=", ":")
    ):
        return False  # a sentence that has a number
    words = [
        w
        for w in _WORD.findall(re.sub(r"\\[A-Za-z]+\s?\{[^{}]*\}", "", head))
        if w.lower() not in plain.FUNCTION_WORDS
    ]
    return bool(re.search(r"[0-9\\$π√∞½¼¾⅓⅔]", head)) and len(words) <= 3


def _heading(line: str) -> bool:
    return bool(re.match(r"[0-9]{1,2}[.)]\s+[A-Z][a-z]+(?:\s+[a-z]+)*:?$", line))


_GOES_ON = re.compile(
    r"(?:[-+*/^=,∪∩(×·]|\\(?:cup|cap|times|cdot|pm|mp|in|le|ge)|\b(?:U|and|or|is))\s*$"
)


def _refined(text: str, sentence: bool = False) -> str:
    """Without emphasis; a value also without the remarks and the punctuation behind it."""
    text = _without_emphasis(text.strip())
    if "\n" in text and not sentence:
        return text
    if sentence:
        text = _line(text, 0)
    if text[:1] in "[{" and text[-1:] in "]}":  # JSON and lists
        return text
    for remark in itertools.islice(_REMARK.finditer(text), 50):  # each looks at all before it
        head = text[: remark.start()].strip()
        if (
            (sentence or _is_value(head))
            and head
            and plain.balanced(head)
            and not _GOES_ON.search(head)
        ):
            text = _without_emphasis(head)
            break
    number = _number_of_sentence(text)
    if number is not None:
        return number
    if sentence or _is_value(text):
        bare = re.sub(r"(?:(?<=[^\s.])\.|\s[.,]|[,;:?])[*_]{0,3}$", "", text).strip()
        text = _without_emphasis(bare) if bare else text
    return re.sub(r"^(\*{1,3}|_{2,3})([^*_]+)\1(?=[\s.,!]|$)", r"\2", text)


_HEDGES = re.compile(
    r"\b(?:not|no|never|neither|nor|or|and|less|more|over|under|about|approximately|around"
    r"|roughly|between|than|before|after|ago|half|twice|"
    r"double|triple|times|dozen|hundred|thousand|million|billion|minus|plus|at|if|than|maybe"
    r"|perhaps|possibly|cannot|unless|divided|from|of|"
    r"one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|per|each|percent"
    r"|by)\b|n't\b|n’t\b",
    re.IGNORECASE,
)
_FIGURE = re.compile(r"(?<![\w.,/^])[-+]?[$€£]?[0-9][0-9,]*(?:\.[0-9]+)?(?![\w/^*=+(])%?")


def _number_of_sentence(text: str) -> str | None:
    """The number of a sentence that states one, such as "There are 42 apples in the box": the only
    one, and no word changes it."""
    if (
        len(text) > 200
        or not re.match(r"[\"“*_]{0,3}[A-Z][a-z]*\b", text)
        or re.search(r"[\\=^_{}\[\]()<>*/+\n:\"]", text)
    ):
        return None
    figures = _FIGURE.findall(text)
    if (
        len(figures) != 1
        or len(re.findall(r"[0-9]+(?:[.,][0-9]+)*", text)) != 1
        or len(_WORD.findall(text)) < 3
        or _HEDGES.search(text)
    ):
        return None
    verb = re.search(
        r"\b(?:is|are|was|were|has|have|had|gets?|costs?|equals?|sold|earns?|earned|makes?|made"
        r"|needs?|takes?|pays?|paid|spent|will|can)\b",
        text,
    )
    return figures[0] if verb and verb.start() < text.index(figures[0]) else None


def _without_emphasis(text: str) -> str:
    """Stars at the end go, and as many at the beginning; those at the end alone were opened before
    the marker."""
    inner = text.rstrip("*")
    return inner.removeprefix("*" * (len(text) - len(inner))).strip()


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """(begin, end, contents) of each complete box with contents, by beginning.

    One pass, so that no text of nothing but boxes is slow.
    """
    # where an open box and its contents begin; None for braces that are no box
    opened: list[tuple[int, int] | None] = []
    boxes: list[tuple[int, int, int]] = []
    for brace in _BRACES.finditer(text):
        if brace.group() == "}":
            box = opened.pop() if opened else None
            if box is not None:
                boxes.append((box[0], brace.end(), box[1]))
        elif brace.group() == "{" or (brace.group()[-1] == "{" and len(brace.group()) > 2):
            opened.append((brace.start(), brace.end()) if len(brace.group()) > 2 else None)
    return sorted(
        [(b, e, text[c : e - 1]) for b, e, c in _last_few(boxes, text)]
        + [(m.start(), m.end(), m[1].rstrip(".,;!")) for m in _last_bare(text)]
    )


def _last_few(boxes: list[tuple[int, int, int]], text: str) -> Iterator[tuple[int, int, int]]:
    """The boxes with contents that begin last: copying the contents of all of a deep nest would
    take quadratic time."""
    kept = 0
    for b, e, c in sorted(boxes, reverse=True):
        if (
            not text[c : min(e - 1, c + 1000)].strip()
            or not _EMPTY_BOX.sub("", text[c : min(e - 1, c + 1000)]).strip()
        ):
            continue
        yield b, e, c
        kept += 1
        if kept == 40:
            return


def _last_bare(text: str) -> list[re.Match[str]]:
    return list(_BARE_BOX.finditer(text))[-40:]


def _last_boxes(text: str) -> str:
    """The contents of the last box, and of those before it that only "and", "or" or commas
    separate; "" without any."""
    boxes = _boxes(text)
    if not boxes:
        return ""
    parts, begin = [boxes[-1][2].strip()], boxes[-1][0]
    for b, e, contents in reversed(boxes[:-1]):
        if e > begin:  # the last box is inside this one
            continue
        gap = text[e:begin]
        if len(gap) > 60 or not _BETWEEN_BOXES.fullmatch(gap) or not re.search(r"[,;]|and|or", gap):
            break
        parts.insert(0, contents.strip())
        begin = b
    return ", ".join(dict.fromkeys(parts))


def _run_on(text: str, statements: list[tuple[int, int, str]]) -> int:
    """Where a next question begins, behind the first short answer; the length of the text without
    one."""
    starts, next_start = [m.start() for m in _RUN_ON.finditer(text)], 0
    for _, after, kind in statements:
        while next_start < len(starts) and starts[next_start] <= after:
            next_start += 1
        if next_start == len(starts):
            break
        head = text[after : min(starts[next_start], after + 400)].lstrip("*_ \t\n")
        line = _line(head, 0)
        if (
            kind in ("box", "tag", "hashes")
            or (line.strip() and (_is_value(line) or len(_WORD.findall(line)) <= 6))
            or not head.strip()
        ):
            return starts[next_start]
    return len(text)
