"""How prompts are decoded: the search, its prices, and how tokens are drawn."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from zip_rc_jax.config.checks import check_types, one_of, require, shown, to_plain_numbers
from zip_rc_jax.config.plugins import OF_DECODING, POLICIES, UTILITIES
from zip_rc_jax.config.renamed import takes_old_names
from zip_rc_jax.runtime.errors import UsageError

CANDIDATES = ("published", "exhaustive", "branching")
EVIDENCE = ("samples", "answers")
ANSWERS = ("value", "vote")
MOST_STOP_IDS = 1024
MOST_STOPS, LONGEST_STOP = 64, 1024


def _divides(value: float) -> bool:
    """Whether it is a positive number in float32, too: smaller ones would be 0 there, and larger
    ones infinite."""
    return 2.0**-126 <= value <= 2.0**127


def _ids(value: Any) -> tuple[int, ...]:
    """Stop ids as a tuple, each once.

    Raises UsageError for what is no list of whole numbers, or holds more than `MOST_STOP_IDS`.
    """
    problem = f"stop_token_ids={shown(value)}", "it is not a list of ids", "write it as [1, 2]"
    if isinstance(value, (str, bytes, bytearray, Mapping)):
        raise UsageError(*problem)
    try:
        listed = list(itertools.islice(value, MOST_STOP_IDS + 1))
        ids = tuple(dict.fromkeys(operator.index(i) for i in listed))
    except Exception:  # no iterable, or one of another's making that fails
        raise UsageError(*problem) from None
    if any(isinstance(i, (bool, np.bool_)) for i in listed):
        raise UsageError(*problem)
    require(
        len(listed) <= MOST_STOP_IDS,
        problem[0],
        "every token is compared with each of them",
        f"give at most {MOST_STOP_IDS}",
    )
    return ids


def _strings(value: Any) -> tuple[str, ...]:
    """Stop strings as a tuple, each once. One string will do.

    Raises:
      UsageError: no texts, an empty or too long one, one that no text can hold, or more than
        `MOST_STOPS`.
    """
    name = f"stop={shown(value)}"
    given = [value] if isinstance(value, str) else value
    fix = 'write it as ["\\n\\n", "Question:"]'
    if not isinstance(given, (list, tuple)) or not all(isinstance(x, str) for x in given):
        raise UsageError(name, "it is not a list of texts", fix)
    require(all(given), name, "an empty text stops everything at once", "leave it out")
    require(
        len(given) <= MOST_STOPS,
        name,
        "every text is compared with each of them",
        f"give at most {MOST_STOPS}",
    )
    longest = max(map(len, given), default=0)
    require(
        longest <= LONGEST_STOP,
        name,
        f"one has {longest} characters",
        f"use at most {LONGEST_STOP}",
    )
    bad = [
        x
        for x in given
        if "\N{REPLACEMENT CHARACTER}" in x or x != x.encode("utf-8", "ignore").decode()
    ]
    require(
        not bad,
        name,
        "it holds U+FFFD or half a surrogate pair, which stand for broken text",
        "leave it out",
    )
    return tuple(dict.fromkeys(map(str, given)))


def top_k_off(config: Any) -> None:
    """Makes a `top_k` of -1, which turns it off in vLLM, the 0 that does so here."""
    if config.top_k == -1:
        object.__setattr__(config, "top_k", 0)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn. Filters apply in the order temperature, top_k, top_p, min_p (as
    in Hugging Face).

    Attributes:
      temperature: 0 is greedy; logits are divided by it.
      top_k: keep the k likeliest tokens; 0 or -1 keeps all.
      top_p: keep the smallest set of likeliest tokens with at least this probability; 1 keeps all.
      min_p: keep tokens with at least this fraction of the likeliest token's probability; 0 keeps
        all.
      repetition_penalty: changes the logits of ids that occur in the prompt or in what was
        generated, before all that. Positive ones are divided by it, negative ones multiplied (as in
        Hugging Face); 1 leaves them.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        check_types(SamplingConfig, vars(self))
        to_plain_numbers(self)
        top_k_off(self)
        require(
            not self.temperature < 0,
            f"temperature={self.temperature}",
            "a temperature is not negative",
            "use 0 for greedy or a positive number",
        )
        require(
            self.temperature == 0 or _divides(self.temperature),
            f"temperature={self.temperature}",
            "logits are divided by it, in float32",
            "use 0 for greedy or a positive number",
        )
        require(
            self.top_k >= 0, f"top_k={shown(self.top_k)}", "it counts tokens", "use 0 to keep all"
        )
        require(
            0 < self.top_p <= 1,
            f"top_p={self.top_p}",
            "it is a probability",
            "use a number in (0, 1]",
        )
        require(
            0 <= self.min_p <= 1,
            f"min_p={self.min_p}",
            "it is a fraction of the largest probability",
            "use a number in [0, 1]",
        )
        require(
            _divides(self.repetition_penalty),
            f"repetition_penalty={self.repetition_penalty}",
            "logits are divided by it, in float32",
            "use 1 to leave them, or a number such as 1.1",
        )


def variant(candidates: str, evidence: str = "samples", utility: str = "sampling") -> str:
    """Name of a search: its candidates, and what else differs from the published one."""
    others = [evidence] * (evidence != "samples") + [utility] * (utility != "sampling")
    return ", ".join([candidates, *others])


@takes_old_names
@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """The adaptive search and its limits (method: sampling utility, `U = E[max] - beta (alpha
    E[compute] + (1-alpha) E[latency]) / N`).

    Attributes:
      alpha: in [0, 1]; 1 prices compute (all tokens), 0 prices latency (serial steps).
      beta: price of one mean sample's worth of cost, in reward; small buys accuracy (0.1 cheap ..
        0.01 dear).
      n: most prefixes (finished ones included) that one prompt may have.
      interval: decode steps between decisions, in tokens.
      window: the joint of a prefix is the mean over its last `window` tokens.
      candidates: "published" (the authors' keep-sets), "exhaustive" (all subsets, n <= 10), or
        "branching" (adds multiplicities and new samples from the root).
      add_back: after the best keep-set is found, keep every dropped prefix whose return does not
        lower the utility.
      evidence: what finished prefixes are worth to the search. "samples": each by itself, as
        published. "answers": those with equal answers share their evidence, and an answer is worth
        its posterior probability, see `search.evidence`. It reads answers as a vote does.
      wrong_answers: with evidence="answers", how many wrong answers are about equally likely: two
        wrong prefixes agree with probability 1 / `wrong_answers`.
      strategy: "zip_rc", or a baseline on the same engine: "fixed" (n full samples),
        "reward_threshold" (drop prefixes whose expected reward is below `reward_threshold`),
        "length_budget" (drop prefixes of `length_budget` tokens or more), "half_finished" (drop the
        rest once half have finished). They drop at decisions, so a prefix may be longer by up to an
        interval; and while none has finished, not all: the most promising goes on, or with
        "length_budget" all do. Or a policy of your own: a registered name,
        "package.module:function" or a callable, see `search.Policy`. With candidates="branching" it
        starts from the root alone, else with n samples.
      utility: what "zip_rc" maximizes: "sampling" (the paper's) or your own, given as a strategy
        is, see `search.Utility`.
      answer: "value" (the finished prefix with the highest value) or "vote" (the answer with the
        largest sum of values); or a function `(prefixes) -> prefix or None`, given as a strategy
        is.
      answer_extractor: how a vote reads the answer in a text: "stated"
        (`grading.extract_answer`), or a function `(text) -> answer or None`, given as a strategy
        is.
      answer_equivalence: which answers vote together: "grader" (`grading.equivalent`), "text"
        (equal texts), or a symmetric function `(a, b) -> bool`, given as a strategy is.
      allow_no_answer: allow a prompt to end before any prefix has finished.
      abstain_below: answers whose expected reward is below it are withheld; 0 withholds none.
      selection_exponent: exponent `s` of the value term `E[avg]^(1-s) E[max]^s`; 1 trusts the head
        to select within a prompt.
      joint_temperature, joint_top_p: sharpening of the joint before the search; 1 leaves it.
      max_tokens: most tokens generated per prefix.
      temperature, top_k, top_p, min_p: see `SamplingConfig`. With temperature 0 all samples of a
        prompt are the same, so `n` must be 1.
      repetition_penalty: see `SamplingConfig`.
      stop_token_ids: ids that end a prefix besides the tokenizer's end-of-sequence ids.
      stop: texts that end a prefix as soon as its own text holds one. The text is cut before it,
        and `Prefix.stop_reason` names it. It is looked for after every interval, but what is found
        does not depend on the interval: tokens past it are dropped.
      system: text of a system turn, which is put before every chat. Chats that have one, and
        prompts that are no chats, are refused.
      continue_final_message: chats end with a turn of the assistant, and decoding continues that
        turn (as in Hugging Face's `apply_chat_template`). The result's text is the continuation.
      generation_config: sampling options that are left at their defaults take the values of the
        checkpoint's own generation_config.json. Only `Decoder`, `decode` and `decode_stream`, which
        know the checkpoint, read it.
      token_budget: most tokens generated for one prompt by all its prefixes together (a shared
        prefix counts once); 0 sets no limit. It is never exceeded: where it runs short, the live
        prefixes share what is left.
      time_budget: seconds from a prompt's admission after which its next decision is the last; 0
        sets no limit. A running interval is not interrupted, and what the first call of a shape
        spends on compiling counts too.
      max_num_seqs: how many prefixes may be in memory at the same time, of all prompts in flight
        together (called `rows` before 0.2). It decides how much memory decoding takes, and no
        result. At least `n` on each shard of the mesh are made, whatever is given: see
        `seqs_per_shard`.
      add_special_tokens: prompts begin with what the tokenizer's own settings put before a text,
        such as a beginning-of-sequence token, once. False leaves prompts as they are.
    """

    alpha: float = 0.1
    beta: float = 0.01
    n: int = 8
    interval: int = 64
    window: int = 512
    candidates: str = "published"
    add_back: bool = True
    evidence: str = "samples"
    wrong_answers: float = 5.0
    strategy: Any = "zip_rc"
    utility: Any = "sampling"
    reward_threshold: float = 0.4
    length_budget: int = 0
    answer: Any = "value"
    answer_extractor: Any = "stated"
    answer_equivalence: Any = "grader"
    allow_no_answer: bool = False
    abstain_below: float = 0.0
    selection_exponent: float = 1.0
    joint_temperature: float = 1.0
    joint_top_p: float = 1.0
    max_tokens: int = 1024
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    system: str = ""
    continue_final_message: bool = False
    generation_config: bool = False
    token_budget: int = 0
    time_budget: float = 0.0
    max_num_seqs: int = 64
    add_special_tokens: bool = True

    def __post_init__(self) -> None:
        check_types(DecodeConfig, vars(self))
        to_plain_numbers(self)
        self.sampling  # noqa: B018  (validates the sampling options)
        top_k_off(self)
        object.__setattr__(self, "stop_token_ids", _ids(self.stop_token_ids))
        object.__setattr__(self, "stop", _strings(self.stop))
        system = self.system
        plain = isinstance(system, str) and system == system.encode("utf-8", "ignore").decode()
        require(plain, f"system={shown(system)}", "it is not a text", "write it as text")
        one_of("candidates", self.candidates, CANDIDATES)
        one_of("evidence", self.evidence, EVIDENCE)
        for plugins in OF_DECODING:
            plugins.check(getattr(self, plugins.setting))
        self._check_counts()
        self._check_search()
        self._check_budgets()

    def _check_counts(self) -> None:
        for field in ("n", "interval", "window", "max_tokens", "max_num_seqs"):
            require(
                getattr(self, field) >= 1,
                f"{field}={shown(getattr(self, field))}",
                "it counts at least one",
                "use a positive number",
            )
        for field in (
            "n",
            "interval",
            "window",
            "max_tokens",
            "max_num_seqs",
            "top_k",
            "length_budget",
            "token_budget",
        ):
            value = getattr(self, field)
            require(
                value < 2**31,
                f"{field}={shown(value)}",
                "counts are held in 32 bits",
                "use a number below 2147483648",
            )

    def _check_search(self) -> None:
        """What decides: prices, candidates, and how joints are read."""
        require(
            0 <= self.alpha <= 1,
            f"alpha={self.alpha}",
            "it weighs compute against latency",
            "use a number in [0, 1]",
        )
        require(
            0 <= self.beta <= 1e30,
            f"beta={self.beta}",
            "it is a price",
            "use a number from 0 to 1e30",
        )
        require(
            1 <= self.wrong_answers <= 1e30,
            f"wrong_answers={self.wrong_answers}",
            "it counts the wrong answers that are about equally likely",
            "use a number from 1 to 1e30, such as 5",
        )
        require(
            self.candidates != "exhaustive" or self.n <= 10,
            f"n={self.n} with candidates='exhaustive'",
            f"all 2^{self.n} subsets would be scored at every decision",
            "use n <= 10 or candidates='published'",
        )
        require(
            self.temperature > 0 or self.n == 1,
            f"temperature={self.temperature} with n={self.n}",
            "greedy samples of one prompt are all the same, and each would cost as much as the "
            "first",
            "use n=1, or a temperature above 0",
        )
        require(
            math.isfinite(self.selection_exponent) and self.selection_exponent >= 0,
            f"selection_exponent={self.selection_exponent}",
            "it is an exponent between mean (0) and maximum (1)",
            "use a finite number >= 0",
        )
        require(
            _divides(self.joint_temperature),
            f"joint_temperature={self.joint_temperature}",
            "log-probs are divided by it, in float32",
            "use 1 to leave it",
        )
        require(
            0 < self.joint_top_p <= 1,
            f"joint_top_p={self.joint_top_p}",
            "it is a probability",
            "use a number in (0, 1]",
        )

    def _check_budgets(self) -> None:
        """What limits a prompt, and when it gets no answer."""
        require(
            (self.strategy == "length_budget") == (self.length_budget >= 1)
            or not POLICIES.is_builtin(self.strategy),
            f"length_budget={self.length_budget} with strategy={self.strategy!r}",
            "strategy='length_budget' needs a budget in tokens, and the others do not read it",
            "set both, or leave length_budget at 0",
        )
        for field in ("reward_threshold", "abstain_below"):
            require(
                0 <= getattr(self, field) <= 1,
                f"{field}={getattr(self, field)}",
                "rewards lie in [0, 1]",
                "use a number in [0, 1]",
            )
        for field in ("token_budget", "time_budget"):
            value = getattr(self, field)
            require(
                math.isfinite(value) and value >= 0,
                f"{field}={shown(value)}",
                "it limits what a prompt may spend",
                "use 0 for no limit",
            )

    def seqs_per_shard(self, shards: int) -> int:
        """Prefixes that each of `shards` shards holds: an equal part of `max_num_seqs`, rounded up,
        and at least those of one prompt.

        All prefixes of a prompt lie in one shard.
        """
        return max(self.n, -(-self.max_num_seqs // shards))

    @property
    def variant(self) -> str:
        """What tables call the search."""
        return variant(self.candidates, self.evidence, UTILITIES.name_of(self.utility))

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty
        )
