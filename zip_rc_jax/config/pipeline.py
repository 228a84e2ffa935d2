"""The other stages, and the file that holds all of them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from zip_rc_jax.config.checks import check_types, counts, one_of, require, shown
from zip_rc_jax.config.decode import CANDIDATES, DecodeConfig, SamplingConfig
from zip_rc_jax.config.grade import GradeConfig
from zip_rc_jax.config.model import ModelConfig
from zip_rc_jax.config.plugins import OF_DECODING, POLICIES, UTILITIES
from zip_rc_jax.config.problems import ProblemsConfig
from zip_rc_jax.config.replay import ReplayConfig
from zip_rc_jax.config.reward_model import RewardModelConfig
from zip_rc_jax.config.train import (
    COMPUTE_DTYPES,
    LABELS,
    LENGTH_COUNTS,
    MeshConfig,
    TrainConfig,
)
from zip_rc_jax.runtime.errors import UsageError

if TYPE_CHECKING:
    from zip_rc_jax.grid import Grid


@dataclasses.dataclass(frozen=True)
class GridConfig:
    """A grid per label kind. Empty centres or edges mean the authors'.

    Attributes:
      correct_centres, value_centres: reward centres for the labels `correct` and `value`.
      length_edges: edges of the length bins, in tokens still to generate.
      length_counts: whether these lengths count the end token: "with_end" (the default), or
        "without_end", as in the authors' published code. See `Grid.counting_the_end_token`.
    """

    correct_centres: tuple[float, ...] = ()
    value_centres: tuple[float, ...] = ()
    length_edges: tuple[int, ...] = ()
    length_counts: str = "with_end"

    def __post_init__(self) -> None:
        one_of("grid.length_counts", self.length_counts, LENGTH_COUNTS)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))

    def grid(self, label: str) -> Grid:
        """The grid for `label` in {"correct", "value"}.

        Raises `UsageError` for an impossible grid.
        """
        from zip_rc_jax.grid import Grid  # imports JAX, and `zip-rc --help` should not wait for it

        one_of("label", label, LABELS)
        authors = Grid.authors(label)
        centres: Any = self.correct_centres if label == "correct" else self.value_centres
        edges: Any = self.length_edges
        pairs = ((centres, authors.reward_centres), (edges, authors.length_edges))
        centres, edges = (
            ours if isinstance(given, tuple) and not given else given for given, ours in pairs
        )
        grid = Grid(centres, edges)
        return grid.counting_the_end_token() if self.length_counts == "without_end" else grid


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """How a problem becomes a prompt.

    Attributes:
      style: "raw" (the question alone) or "chat" (turns, rendered by the tokenizer's own chat
        template).
      system: text of the system turn; empty for none.
      instruction: user turn; `{question}` in it becomes the question. All other text stays, braces
        included.
      examples: worked examples that come before as earlier turns: problems of the task with seeds
        that no split uses.
      example_answer: assistant turn of an example; `{answer}` in it becomes the reference answer,
        and `{steps}` a chain sum worked out from left to right ("4 + 3 = 7, 7 - 2 = 5").
      chat_template_kwargs: variables of the chat template, such as `enable_thinking: false`.
      variants: several kinds of prompts in one set, each for a share of the problems, such as
        `{share: 0.5, chat_template_kwargs: {enable_thinking: false}}`. A variant may set `system`,
        `instruction` and `chat_template_kwargs` over those above. Which one a problem gets depends
        on its question and `seed` alone.
      seed: of the choice among variants.
    """

    style: str = "raw"
    system: str = ""
    instruction: str = "{question}"
    examples: int = 0
    example_answer: str = "{answer}"
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    variants: tuple[dict[str, Any], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(PromptConfig, vars(self))
        object.__setattr__(self, "variants", tuple(self.variants))
        for number, variant in enumerate(self.variants):
            self._check_variant(f"prompt.variants[{number}]", variant)
        one_of("prompt.style", self.style, ("raw", "chat"))
        for field, part in (("instruction", "{question}"), ("example_answer", "{answer}")):
            value = getattr(self, field)
            require(
                part in value,
                f"prompt.{field}={value!r}",
                f"it does not contain {part}",
                f"write {part} where it belongs",
            )
        require(
            self.examples >= 0,
            f"prompt.examples={self.examples}",
            "it counts worked examples",
            "use a number >= 0",
        )
        given = {
            "system": self.system,
            "instruction": self.instruction != "{question}",
            "examples": self.examples,
            "example_answer": self.example_answer != "{answer}",
            "chat_template_kwargs": self.chat_template_kwargs,
            "variants": self.variants,
        }
        unread = ", ".join(name for name, value in given.items() if value)
        require(
            self.style != "raw" or not unread,
            f"prompt.style='raw' with {unread}",
            "a raw prompt is the question alone, so nothing reads the rest",
            "set prompt.style=chat",
        )

    def variant(self, number: int) -> PromptConfig:
        """How the prompts of a variant are made; itself where there are none."""
        if not self.variants:
            return self
        given = {k: v for k, v in self.variants[number].items() if k != "share"}
        given["chat_template_kwargs"] = self.chat_template_kwargs | given.get(
            "chat_template_kwargs", {}
        )
        return dataclasses.replace(self, variants=(), **given)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the variants, adding up to 1."""
        given = [float(variant.get("share", 1.0)) for variant in self.variants]
        return tuple(share / sum(given) for share in given)

    def _check_variant(self, where: str, variant: Any) -> None:
        known = ("share", "system", "instruction", "chat_template_kwargs")
        require(
            isinstance(variant, dict),
            f"{where}={shown(variant)}",
            "it is no object of settings",
            "write for example {share: 0.5, chat_template_kwargs: {enable_thinking: false}}",
        )
        for name in variant:
            one_of(f"a setting of {where}", name, known)
        share = variant.get("share", 1.0)
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        require(
            number and 0 < share < float("inf"),
            f"{where}.share={shown(share)}",
            "it is no share",
            "use a number > 0, or leave the variant out",
        )
        given = {k: v for k, v in variant.items() if k != "share"}
        for name, kind in (("system", str), ("instruction", str), ("chat_template_kwargs", dict)):
            require(
                isinstance(given.get(name, kind()), kind),
                f"{where}.{name}={shown(given.get(name))}",
                "it is of another type than prompt." + name,
                "write it as there",
            )
        PromptConfig(self.style, **given)  # what is wrong with its instruction


def _problems(name: str, value: int) -> None:
    """Raises UsageError unless it counts problems, or is 0 for all of them."""
    require(value >= 0, f"{name}={value}", "it counts problems", "use a number, or 0 for all")
    if value:
        counts(name, value)


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """On-policy samples for training.

    Attributes:
      prompts: number of problems; 0 takes all of `problems.train` (generators have no end, and need
        a number).
      samples: rollouts per prompt.
      rows: rows decoded together.
      max_tokens: longest response in tokens; longer ones are stored as truncated (right-censored
        length).
      seed: seed of the sampling.
      temperature, top_k, top_p, min_p: see `SamplingConfig`. Defaults are the authors'.
    """

    prompts: int = 0
    samples: int = 2
    rows: int = 256
    max_tokens: int = 1024
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.1

    def __post_init__(self) -> None:
        check_types(RolloutConfig, vars(self))
        _problems("rollout.prompts", self.prompts)
        for field in ("samples", "rows", "max_tokens"):
            counts(f"rollout.{field}", getattr(self, field))
        self.sampling  # noqa: B018

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(self.temperature, self.top_k, self.top_p, self.min_p)


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """Where the starting policy lies, and how one that works out chain sums is made.

    Attributes:
      path: checkpoint of the starting policy (see `load`); empty for the one that `train --stage
        policy` left in run_dir.
      start: model that `train --stage policy` begins with (see `load`); empty for a new one of the
        sizes in `model`.
      unsure: probability that a total is carried unsurely to the next step.
      slip_unsure, slip_sure: probability that an unsure carry is wrong, and that a sure one is.
      redo: probability that an unsure carry is redone, surely.
      check_unsure, check_sure: probability of another pass when an unsure carry stands in the last
        one, and when none does.
      examples: training solutions, each written anew.
      train: optimizer settings of the pretraining (next-token loss only).
    """

    path: str = ""
    start: str = ""
    unsure: float = 0.27
    slip_unsure: float = 0.7
    slip_sure: float = 0.005
    redo: float = 0.5
    check_unsure: float = 0.5
    check_sure: float = 0.2
    examples: int = 2_000_000
    train: TrainConfig = TrainConfig(lm_weight=1.0, joint_weight=0.0, eval_rollouts=0)

    def __post_init__(self) -> None:
        check_types(PolicyConfig, vars(self))
        for field in ("unsure", "slip_unsure", "slip_sure", "redo", "check_unsure", "check_sure"):
            value = getattr(self, field)
            require(
                0 <= value <= 1,
                f"policy.{field}={value}",
                "it is a probability",
                "use a number in [0, 1]",
            )
        counts("policy.examples", self.examples)
        for field, only in (("label", "correct"), ("rows_from", ""), ("eval_rollouts", 0)):
            value = getattr(self.train, field)
            require(
                value == only,
                f"policy.train.{field}={value!r}",
                "a policy learns from written solutions, without a head",
                "leave it out",
            )
        require(
            not (self.path and self.start),
            f"policy.path={self.path!r} with policy.start={self.start!r}",
            "no stage would read the policy that is trained from the second",
            "leave one of them out",
        )


DATA_ENDS = ("model", "table")


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """Value labelling.

    Attributes:
      last: `value` is the critic's mean expected reward over that many last labelled positions.
      batch_tokens: tokens of a batch of whatever predicts without gradients (labelling, and the
        evaluation's predictions), on all its devices together; a longer rollout is a batch of its
        own. It decides how much memory that takes, and no label.
    """

    last: int = 512
    batch_tokens: int = 16384

    def __post_init__(self) -> None:
        check_types(LabelConfig, vars(self))
        for field in ("last", "batch_tokens"):
            counts(f"label.{field}", getattr(self, field))


@dataclasses.dataclass(frozen=True)
class SelfEvaluationConfig:
    """The baseline that asks the policy itself, in one more turn of the chat, whether its sample is
    right.

    Attributes:
      question: that user turn; empty leaves the baseline out.
      yes, no: replies. Their first tokens are compared.
      chat_template_kwargs: variables of the chat template for this turn, over those of `prompt`:
        `enable_thinking: false` where the reply must come at once.
    """

    question: str = ""
    yes: str = "Yes"
    no: str = "No"
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        where = "evaluate.self_evaluation"
        require(
            bool(self.yes and self.no),
            f"{where} with yes={self.yes!r}, no={self.no!r}",
            "one is empty",
            "name both replies",
        )
        require(
            bool(self.question) or not self.chat_template_kwargs,
            f"{where}.chat_template_kwargs={self.chat_template_kwargs} without a question",
            "nothing would read them",
            "write the question, or leave them out",
        )


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Held-out comparison of the adaptive search with its baselines under one cost meter.

    Attributes:
      benchmarks: what is evaluated: names of the table, or objects with a name and settings that
        replace those of the table, such as `{name: gsm8k, tries: 1}`. Empty: `problems.heldout`, as
        one benchmark that is called "heldout", in one try.
      benchmark_table: a YAML file with benchmarks of your own, in the form of the shipped table.
      prompts: number of held-out problems; 0 takes all (generators have no end, and need a number).
        Of a benchmark at most so many are taken, and the output says so.
      samples: samples per problem of the fixed run (the baselines' pool, and the mean length that
        normalises cost). How many prefixes the search may have is `decode.n`.
      alphas, betas: the sweep. For each pair every candidate set in `candidates` is decoded online.
      headline_beta: one beta per alpha, fixed beforehand, whose row is the headline.
      bootstrap: resamples of the paired bootstrap over prompts.
      drift_rollouts: samples of the starting policy on which the drift of the trained models is
        measured (two forwards of each per trained model).
      seed: seed of the decoding.
      self_evaluation: whether and how the policy is asked about its own samples, for one more
        baseline.
      reward_model: a second model whose scores weigh votes, for two more baselines.
      baselines: "all" methods, or the "plain" ones, which need no further forward of the policy and
        no draws of orders.
      joint_prompts: ids of problems whose predicted and empirical joints are drawn. Empty: of
        every benchmark the hardest and the easiest problem, and two in between.
      introspect: how many searches of a headline's run the report explains decision by decision,
        wrong ones first, and 65,536 tokens in all. They are decoded once more, with their joints.
    """

    benchmarks: tuple[Any, ...] = ()
    benchmark_table: str = ""
    prompts: int = 0
    samples: int = 8
    alphas: tuple[float, ...] = (0.1, 1.0)
    betas: tuple[float, ...] = (0.1, 0.05, 0.02, 0.01)
    candidates: tuple[str, ...] = ("published",)
    headline_beta: tuple[float, ...] = (0.05, 0.05)
    bootstrap: int = 2000
    drift_rollouts: int = 1024
    seed: int = 0
    self_evaluation: SelfEvaluationConfig = SelfEvaluationConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    baselines: str = "all"
    joint_prompts: tuple[str, ...] = ()
    introspect: int = 8

    def __post_init__(self) -> None:
        check_types(EvaluateConfig, vars(self))
        object.__setattr__(self, "benchmarks", tuple(self.benchmarks))
        object.__setattr__(self, "joint_prompts", tuple(self.joint_prompts))
        one_of("evaluate.baselines", self.baselines, ("all", "plain"))
        require(
            bool(self.benchmarks) or not self.benchmark_table,
            f"evaluate.benchmark_table={shown(self.benchmark_table)} without benchmarks",
            "nothing would read it",
            "name benchmarks of it in evaluate.benchmarks, or with --benchmarks",
        )
        for field in ("alphas", "betas", "candidates", "headline_beta"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
            require(
                bool(getattr(self, field)),
                f"evaluate.{field}=[]",
                "nothing would be decoded",
                "give at least one",
            )
        for name in self.candidates:
            one_of("evaluate.candidates", name, CANDIDATES)
        _problems("evaluate.prompts", self.prompts)
        for field in ("samples", "bootstrap", "drift_rollouts"):
            counts(f"evaluate.{field}", getattr(self, field))
        require(
            self.introspect >= 0,
            f"evaluate.introspect={self.introspect}",
            "it counts searches",
            "use 0 for none",
        )
        absent = [beta for beta in self.headline_beta if beta not in self.betas]
        require(
            not absent,
            f"evaluate.headline_beta={list(self.headline_beta)} with "
            f"evaluate.betas={list(self.betas)}",
            f"{absent} would not be decoded",
            "add it to betas, or choose one of these",
        )
        require(
            len(self.headline_beta) == len(self.alphas),
            f"headline_beta={self.headline_beta}, alphas={self.alphas}",
            "every alpha has its own headline beta",
            "give one per alpha",
        )
        require(
            0 <= self.seed < 2**32,
            f"evaluate.seed={self.seed}",
            "it is not a whole number of 32 bits",
            f"use one from 0 to {2**32 - 1}",
        )


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """The whole pipeline: one section per stage, one run directory.

    Attributes:
      run_dir: where every stage writes, and reads what the stages before it wrote: a directory, or
        an address in a bucket such as gs://BUCKET/run (extra `buckets`).
      data: rollouts to use instead of those of run_dir: a directory written by `zip-rc`, a Parquet
        file, or a directory of Parquet files in the authors' schema. What grade, label and train
        read.
      data_ends: which responses of a Parquet file in `data` ended. "model" (the default): those
        that its column `finished` names, and those whose last token is any end token of the policy.
        "table": the column alone, as in the authors' published code, which knows one end token.
      dtype: "float32" or "bfloat16": of the parameters, and so of the cache, where models only
        read: sampling, labelling, evaluation. Training has float32 parameters and a `compute_dtype`
          of its own.
    """

    run_dir: str = ""
    data: str = ""
    data_ends: str = "model"
    dtype: str = "float32"
    problems: ProblemsConfig = ProblemsConfig()
    prompt: PromptConfig = PromptConfig()
    model: ModelConfig = ModelConfig()
    grid: GridConfig = GridConfig()
    mesh: MeshConfig = MeshConfig()
    policy: PolicyConfig = PolicyConfig()
    rollout: RolloutConfig = RolloutConfig()
    critic: TrainConfig = TrainConfig(learning_rate=1e-4)
    grade: GradeConfig = GradeConfig()
    label: LabelConfig = LabelConfig()
    final: TrainConfig = TrainConfig(label="value", kl_weight=10.0)
    lite: TrainConfig = TrainConfig(label="value", trainable="zip_rows", learning_rate=1e-3)
    decode: DecodeConfig = DecodeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    replay: ReplayConfig = ReplayConfig()

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, COMPUTE_DTYPES)
        one_of("data_ends", self.data_ends, DATA_ENDS)
        require(
            not self.evaluate.self_evaluation.question or self.prompt.style == "chat",
            f"evaluate.self_evaluation.question with prompt.style={self.prompt.style!r}",
            "only in a chat is there another turn to ask in",
            "set prompt.style=chat, or leave the question out",
        )
        unread = {
            "system": "set prompt.system",
            "continue_final_message": "leave it out",
            "generation_config": "write the values, such as decode.temperature",
        }
        for name, fix in unread.items():
            value = getattr(self.decode, name)
            reason = "the pipeline renders its prompts itself, and samples as its config says"
            require(not value, f"decode.{name}={value!r}", reason, fix)
        # What an evaluation is going to decode, so that what is impossible is found now and not
        # after hours.
        try:
            self.fixed_decode  # noqa: B018
        except UsageError as error:
            raise UsageError(
                f"evaluate.samples={self.evaluate.samples} with decode: {error.value}",
                error.reason,
                error.fix,
            ) from None
        try:
            names = [name for name, _ in self.sweep(length_budget=1)]
        except UsageError as error:
            raise UsageError(
                f"evaluate.alphas, betas, candidates: {error.value}", error.reason, error.fix
            ) from None
        repeated = [name for i, name in enumerate(names) if name in names[:i]]
        require(
            not repeated,
            f"evaluate.alphas, betas, candidates: {repeated}",
            "they occur twice in the sweep",
            "leave one out",
        )

    @property
    def fixed_decode(self) -> DecodeConfig:
        """How an evaluation makes its pool: `evaluate.samples` full samples of every problem,
        whatever the search may spend."""
        # Full samples score no subsets, so they may be more than 10.
        exhaustive = self.decode.candidates == "exhaustive"
        return dataclasses.replace(
            self.decode,
            candidates="published" if exhaustive else self.decode.candidates,
            strategy="fixed",
            length_budget=0,
            token_budget=0,
            time_budget=0.0,
            n=self.evaluate.samples,
        )

    def sweep(self, length_budget: int) -> list[tuple[str, DecodeConfig]]:
        """Every online setting of an evaluation by name: the search over candidate sets, alpha and
        beta, and the pruning baselines.

        Args:
          length_budget: of the baseline that has one, in tokens.
        """
        e = self.evaluate
        own = UTILITIES.name_of(self.decode.utility)
        utilities = {"sampling": "sampling", own: self.decode.utility}
        base = dataclasses.replace(self.decode, strategy="zip_rc", length_budget=0)
        searches = [
            (candidates, alpha, beta)
            for candidates in e.candidates
            for alpha in e.alphas
            for beta in e.betas
        ]
        # A utility of the user's stands beside the paper's: its runs bear its name.
        runs = [
            (
                f"{utility + ' ' if utility != 'sampling' else ''}{candidates} "
                f"alpha={alpha:g} beta={beta:g}",
                dataclasses.replace(
                    base, candidates=candidates, alpha=alpha, beta=beta, utility=chosen
                ),
            )
            for utility, chosen in utilities.items()
            for candidates, alpha, beta in searches
        ]
        policy = POLICIES.name_of(self.decode.strategy)
        if not POLICIES.is_builtin(policy):
            # It may read both prices, or none.
            runs += [
                (
                    f"{policy} alpha={alpha:g} beta={beta:g}",
                    dataclasses.replace(self.decode, alpha=alpha, beta=beta),
                )
                for alpha, beta in zip(e.alphas, e.headline_beta, strict=True)
            ]
        budgets = [length_budget]
        if policy == "length_budget" and self.decode.length_budget != length_budget:
            budgets.append(self.decode.length_budget)
        return [
            *runs,
            ("reward threshold", dataclasses.replace(base, strategy="reward_threshold")),
            ("half finished", dataclasses.replace(base, strategy="half_finished")),
            *(
                (
                    f"length budget {budget}",
                    dataclasses.replace(base, strategy="length_budget", length_budget=budget),
                )
                for budget in budgets
            ),
        ]


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dicts and lists (for JSON next to outputs and inside checkpoints).

    A function is recorded by its name, see `Plugins.name_of`.

    Raises:
      UsageError: a function that no name leads back to.
    """
    plugins = {p.setting: p for p in OF_DECODING}

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                k: plugins[k].name_of(v) if callable(v) and k in plugins else plain(v)
                for k, v in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value

    return plain(dataclasses.asdict(config))
