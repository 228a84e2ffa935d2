"""Where problems come from: sources for training, for each held-out set, and for worked
examples."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from zip_rc_jax.config.checks import check_names, check_types, one_of, require, shown
from zip_rc_jax.config.filters import Filter
from zip_rc_jax.runtime.errors import UsageError

KINDS = ("gym", "jsonl", "parquet", "csv", "hf", "tfds")
ANSWERS_FROM = ("auto", "text", "hash", "boxed")
UNREADABLE = ("refuse", "drop")
OVERLAPS = ("drop", "refuse", "keep")
GYM_SEEDS = 1_000_000_000  # of one generator: training has those from 0, evaluation the next ones
EXAMPLE = "write for example gym:chain_sum, jsonl:mine.jsonl or hf:openai/gsm8k/main"
_GYM_ALONE = ("levels", "seed", "span")
_GYM_NEVER = (
    *("split", "question", "answer", "level", "id"),
    *("shuffle", "filter", "data_dir", "revision"),
)


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of problems.

    Attributes:
      source: `gym:NAME` (a generator of reasoning-gym), `jsonl:PATH`, `parquet:PATH`, `csv:PATH` (a
        file, a directory of such files, or a pattern with `*`), `hf:ORG/NAME[/CONFIG]` or
        `hf:./DIRECTORY[/CONFIG]` (a data set of the Hugging Face hub, or a local copy in its
        layout), or `tfds:NAME[/CONFIG][:VERSION]`.
      split: of "hf" and "tfds", such as "test". Needed where there are several.
      levels: of "gym": one dict of the generator's options per level, easiest first. With `name`
        in it a level is another generator.
      seed: of "gym": the first seed. None: training begins at 0, held-out problems behind all
        training seeds, and worked examples behind both.
      span: of "gym": how many seeds belong to the source; its levels share them.
      question, answer, level, id: names of columns; "extra.level" is a field inside a column. Empty
        takes the first that a row has of `question|problem|prompt`, of
        `answer|solution|final_answer`, of `level|difficulty|subject`, and of `id|unique_id`.
      answer_from: how the reference answer is read. "text": the whole text. "hash": what stands
        behind the last `####`. "boxed": what the last `\\boxed{}` holds. "auto": "hash" where a
        text has `####`; else "boxed" for a column with `solution` in its name, else "text".
      unreadable: what happens to rows whose answer no grader can read: "refuse" the source, or
        "drop" them and say how many.
      count: how many problems are taken, from the start; 0 takes all.
      weight: share in a mixture of several sources.
      shuffle: seed of another order, from before `count`; None keeps the order of the source.
      filter: condition on the columns, such as `level >= 4 and subject in ["Algebra"]`.
      data_dir: of "tfds": where prepared data sets lie. Of "hf": the data set's own `data_dir`.
      revision: of "hf": branch, tag or commit; empty for the newest.
    """

    source: str = ""
    split: str = ""
    levels: tuple[dict[str, Any], ...] = ()
    seed: int | None = None
    span: int = GYM_SEEDS
    question: str = ""
    answer: str = ""
    level: str = ""
    id: str = ""
    answer_from: str = "auto"
    unreadable: str = "refuse"
    count: int = 0
    weight: float = 1.0
    shuffle: int | None = None
    filter: str = ""
    data_dir: str = ""
    revision: str = ""

    def __post_init__(self) -> None:
        check_types(SourceConfig, vars(self))
        for text in dataclasses.fields(self):
            value = getattr(self, text.name)
            require(
                str(text.type) != "str" or isinstance(value, str),
                f"{text.name}={shown(value)} of a problem source",
                "it is no text",
                "write a text, in quotes where YAML reads something else",
            )
        require(
            isinstance(self.levels, (list, tuple)),
            f"levels={shown(self.levels)} of {shown(self.source)}",
            "it is no list",
            "write a list of options, such as [{min_terms: 2, max_terms: 2}]",
        )
        object.__setattr__(self, "levels", tuple(self.levels))
        kind, colon, name = self.source.partition(":")
        require(
            bool(colon and name.strip()) and kind in KINDS,
            f"problem source {shown(self.source)}",
            f"it is not one of {', '.join(f'{kind}:...' for kind in KINDS)}",
            EXAMPLE,
        )
        one_of(f"answer_from of {shown(self.source)}", self.answer_from, ANSWERS_FROM)
        one_of(f"unreadable of {shown(self.source)}", self.unreadable, UNREADABLE)
        self._require(self.weight > 0, "weight", "it is a share", "use a number > 0")
        self._require(self.weight < float("inf"), "weight", "it is a share", "use a finite number")
        self._require(self.count >= 0, "count", "it counts problems", "use 0 (all) or more")
        for field in ("seed", "shuffle"):
            value = getattr(self, field)
            whole = value is None or (isinstance(value, int) and not isinstance(value, bool))
            self._require(whole, field, "it is no whole number", "use a number >= 0")
            self._require(
                value is None or value >= 0,
                field,
                "Python's random generator ignores the sign of a seed, so negative ranges repeat "
                "positive ones",
                "use a number >= 0",
            )
        self._require(self.span >= 1, "span", "it counts seeds", "use a positive number")
        defaults = {field.name: field.default for field in dataclasses.fields(SourceConfig)}
        for field in _GYM_NEVER if kind == "gym" else _GYM_ALONE:
            self._require(
                getattr(self, field) == defaults[field],
                field,
                "generated problems have no such choice"
                if kind == "gym"
                else "only generators (gym:...) have it",
                "leave it out",
            )
        for field in ("split", "revision"):
            others = ("hf", "tfds") if field == "split" else ("hf",)
            self._require(
                kind in others or not getattr(self, field),
                field,
                f"only {' and '.join(f'{kind}:...' for kind in others)} have it",
                "leave it out",
            )
        for number, level in enumerate(self.levels):
            require(
                isinstance(level, dict) and all(isinstance(key, str) for key in level),
                f"levels[{number}]={shown(level)} of {self.source}",
                "it is no object of options",
                "write for example {min_terms: 2, max_terms: 2}",
            )
        if self.filter:
            Filter.parse(self.filter)

    def _require(self, condition: bool, field: str, reason: str, fix: str) -> None:
        value = f"{field}={shown(getattr(self, field))} of {shown(self.source)}"
        require(condition, value, reason, fix)

    @property
    def kind(self) -> str:
        """What stands before the colon, such as "jsonl"."""
        return self.source.partition(":")[0]

    @property
    def name(self) -> str:
        """What stands behind the colon."""
        return self.source.partition(":")[2].strip()

    def to_dict(self) -> dict[str, Any]:
        """Its settings that are not the defaults, plain, for records."""
        return {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }


@dataclasses.dataclass(frozen=True)
class ProblemsConfig:
    """Where the problems of a run come from.

    Attributes:
      train: sources of the training problems.
      heldout: sources of the evaluation. Empty: the generators of `train` with seeds that no
        training problem has. With any other source in `train` it must be given.
      examples: sources of the worked examples in prompts. Empty: generators make their own.
      overlap: what happens to training problems whose question is in the held-out set too: "drop"
        them, "refuse" to go on, or "keep" them with a warning. They are counted in each case.
      ngram: words in a row of the comparison that also finds a held-out question inside a longer
        text; 0 compares whole questions alone.
    """

    train: tuple[SourceConfig, ...] = ()
    heldout: tuple[SourceConfig, ...] = ()
    examples: tuple[SourceConfig, ...] = ()
    overlap: str = "drop"
    ngram: int = 13

    def __post_init__(self) -> None:
        check_types(ProblemsConfig, vars(self))
        for field in ("train", "heldout", "examples"):
            given: Any = getattr(self, field)
            several = tuple(given) if isinstance(given, (list, tuple)) else (given,)
            object.__setattr__(
                self,
                field,
                tuple(
                    made_source(item, f"problems.{field}[{i}]") for i, item in enumerate(several)
                ),
            )
        one_of("problems.overlap", self.overlap, OVERLAPS)
        require(
            self.ngram == 0 or self.ngram >= 4,
            f"problems.ngram={self.ngram}",
            "so few words in a row are in many texts",
            "use 4 or more (13 is usual), or 0 to compare whole questions alone",
        )


def made_source(given: Any, where: str) -> SourceConfig:
    """A source from a text, an object of settings, or itself."""
    if isinstance(given, SourceConfig):
        return given
    values = {"source": given} if isinstance(given, str) else given
    require(
        isinstance(values, Mapping),
        f"{where}={shown(given)}",
        "it is no source of problems",
        f"give a text or an object with `source`: {EXAMPLE}",
    )
    check_names(values, SourceConfig, where, "no source has this setting")
    return SourceConfig(**values)


SECTIONS = ("train", "heldout", "examples")
_SAME_AS = re.compile(r"\$\{problems\.(train|heldout|examples)\}")


def in_full(values: Mapping[Any, Any], current: Mapping[str, Any]) -> dict[Any, Any]:
    """The section `problems` with its short forms written out.

    A source may be a text, a list may be one source, and a command line may change one that is
    there: `problems.train[1].count=5`, or `problems.train.count=5` for the first. A list may be
    that of another part: `problems.heldout=${problems.train}`.

    Args:
      values: the section, as a file or an override gives it.
      current: the section as it is before.

    Raises:
      UsageError: a number of a source that is not there.
    """
    found = dict(values)
    for name in SECTIONS:
        given = found.get(name)
        if isinstance(given, str) and (other := _SAME_AS.fullmatch(given)):
            given = found[name] = values.get(other[1]) or current.get(other[1]) or []
        if isinstance(given, Mapping) and given and all(str(key).isdigit() for key in given):
            found[name] = _changed(name, given, list(current.get(name) or []))
        elif isinstance(given, Mapping) and "source" not in given and current.get(name):
            found[name] = _changed(name, {0: given}, list(current[name]))
        elif isinstance(given, Mapping) or (isinstance(given, str) and "${" not in given):
            found[name] = [_source(given)]
        elif isinstance(given, (list, tuple)):
            found[name] = [_source(item) for item in given]
    return found


def _source(given: Any) -> Any:
    return {"source": given} if isinstance(given, str) else given


def _changed(name: str, given: Mapping[Any, Any], current: list[Any]) -> list[Any]:
    """`current` with some sources changed by their number."""
    for key, value in given.items():
        number = int(key) if len(str(key)) < 6 else len(current)
        if number >= len(current):
            raise UsageError(
                f"problems.{name}[{shown(key)}]",
                f"problems.{name} has {len(current)} sources, counted from 0",
                f"give the whole list: problems.{name}=[...]",
            )
        changed = isinstance(value, Mapping)
        current[number] = {**current[number], **value} if changed else _source(value)
    return current
