"""What every method of an evaluation needs, and where it comes from: the table of
`docs/baselines.md`."""

from __future__ import annotations

import dataclasses

NOTHING = ""


@dataclasses.dataclass(frozen=True)
class Method:
    """One method, as it is called in curves and reports.

    Attributes:
      name: the `method` of its points.
      does: one sentence.
      source: paper, by arXiv number; "" for the plain ones.
      training: what has to be trained; "" for nothing.
      probabilities: what it reads of the policy's probabilities; "" for nothing, so a policy behind
        an API that returns texts will do.
      second_model: another model that it calls; "" for none.
      rounds: when samples are drawn: "one" (all in parallel), "one, cut" (in parallel, some end
        early), "several" (one wave after the other).
      knob: what its curve goes over.
      where: function that computes it, "module.function" in `zip_rc_jax.evaluation`.
    """

    name: str
    does: str
    source: str
    training: str
    probabilities: str
    second_model: str
    rounds: str
    knob: str
    where: str


HEAD = "a ZIP head"
REWARD_MODEL = "a reward model"
ANSWER_TOKENS = "of two replies"
ALL_TOKENS = "at every token"
ALL = f"of all ids, {ALL_TOKENS}"
LIKELIEST = f"of the likeliest ids, {ALL_TOKENS}"

METHOD_TABLE: tuple[Method, ...] = (
    Method(
        "pass",
        "Whether any of n samples is right: the bound for every selection.",
        "2107.03374",
        NOTHING,
        NOTHING,
        NOTHING,
        "one",
        "n",
        "baselines.baseline_point",
    ),
    Method(
        "majority",
        "The most frequent answer of n samples.",
        "2203.11171",
        NOTHING,
        NOTHING,
        NOTHING,
        "one",
        "n",
        "baselines.baseline_point",
    ),
    Method(
        "best_of_n",
        "The sample of the highest final value.",
        "2512.01457",
        HEAD,
        NOTHING,
        NOTHING,
        "one",
        "n",
        "baselines.baseline_point",
    ),
    Method(
        "weighted_best_of_n",
        "The answer with the largest sum of final values.",
        "2512.01457",
        HEAD,
        NOTHING,
        NOTHING,
        "one",
        "n",
        "baselines.baseline_point",
    ),
    Method(
        "self_evaluation",
        "As weighted_best_of_n, by what the policy says when it is asked about its samples.",
        "2512.01457",
        NOTHING,
        ANSWER_TOKENS,
        NOTHING,
        "several",
        "n",
        "baselines.self_evaluation_curve",
    ),
    Method(
        "reward_model_weighted",
        "The answer with the largest sum of another model's scores, each through a sigmoid.",
        "2512.01457",
        NOTHING,
        NOTHING,
        REWARD_MODEL,
        "several",
        "n",
        "reward_model.reward_model_curves",
    ),
    Method(
        "reward_model_best_of_n",
        "The sample that another model scores highest.",
        "2512.01457",
        NOTHING,
        NOTHING,
        REWARD_MODEL,
        "several",
        "n",
        "reward_model.reward_model_curves",
    ),
    Method(
        "self_certainty",
        "The sample whose next-token distributions lie farthest from uniform.",
        "2502.18581",
        NOTHING,
        ALL,
        NOTHING,
        "one",
        "n",
        "confidence.self_certainty_curve",
    ),
    Method(
        "self_certainty_borda",
        "A vote whose weights are ranks by self-certainty, to a power.",
        "2502.18581",
        NOTHING,
        ALL,
        NOTHING,
        "one",
        "power",
        "confidence.borda_curve",
    ),
    Method(
        "deepconf_offline",
        "The most confident samples vote with their confidence.",
        "2508.15260",
        NOTHING,
        LIKELIEST,
        NOTHING,
        "one",
        "keep",
        "confidence.deepconf_offline",
    ),
    Method(
        "deepconf_online",
        "Full samples set a threshold; the others end where their confidence falls below it.",
        "2508.15260",
        NOTHING,
        LIKELIEST,
        NOTHING,
        "several",
        "keep",
        "confidence.deepconf_online",
    ),
    Method(
        "adaptive_consistency",
        "Samples until the two leading answers are far apart (Beta); then the majority.",
        "2305.11860",
        NOTHING,
        NOTHING,
        NOTHING,
        "several",
        "threshold",
        "sequential.adaptive_consistency",
    ),
    Method(
        "adaptive_consistency_dirichlet",
        "Samples until the leading answer is far from all others (Dirichlet).",
        "2305.11860",
        NOTHING,
        NOTHING,
        NOTHING,
        "several",
        "threshold",
        "sequential.adaptive_consistency",
    ),
    Method(
        "early_stopping",
        "Samples windows until all samples of one agree; then the majority.",
        "2401.10480",
        NOTHING,
        NOTHING,
        NOTHING,
        "several",
        "window",
        "sequential.early_stopping",
    ),
    Method(
        "cges",
        "Samples until one answer has enough posterior probability, given the final values.",
        "2511.02603",
        HEAD,
        NOTHING,
        NOTHING,
        "several",
        "threshold",
        "sequential.confidence_posterior",
    ),
    Method(
        "pandora",
        "Samples while one more is worth its price; then the highest final value.",
        "2510.01394",
        HEAD,
        NOTHING,
        NOTHING,
        "several",
        "cost",
        "sequential.pandora",
    ),
    Method(
        "pandora_known",
        "As pandora, with the index of the prompt's own pool: what no real decode can know.",
        "2510.01394",
        HEAD,
        NOTHING,
        NOTHING,
        "several",
        "cost",
        "sequential.pandora",
    ),
    Method(
        "shortest",
        "The first of n samples to finish ends the others.",
        "2505.17813",
        NOTHING,
        NOTHING,
        NOTHING,
        "one, cut",
        "n",
        "pruning.shortest_curve",
    ),
    Method(
        "first_finished",
        "The first m of n samples to finish vote, and the others end with them.",
        "2505.17813",
        NOTHING,
        NOTHING,
        NOTHING,
        "one, cut",
        "finished",
        "pruning.first_finished",
    ),
    Method(
        "reward_pruning",
        "Samples end where their expected reward lies below a threshold.",
        "2512.01457",
        HEAD,
        NOTHING,
        NOTHING,
        "one, cut",
        "threshold",
        "pruning.reward_pruning",
    ),
    Method(
        "length_pruning",
        "Samples end at a budget of tokens; the finished ones vote.",
        "2512.01457",
        NOTHING,
        NOTHING,
        NOTHING,
        "one, cut",
        "budget",
        "pruning.length_pruning",
    ),
)


def markdown_table(methods: tuple[Method, ...] = METHOD_TABLE) -> str:
    """The table as Markdown, one row a method."""
    columns = (
        "method",
        "what it does",
        "training",
        "probabilities",
        "second model",
        "rounds",
        "curve over",
        "source",
    )
    lines = [_row(columns), _row(["---"] * len(columns))]
    for method in methods:
        paper = f"[{method.source}](https://arxiv.org/abs/{method.source})"
        lines.append(
            _row(
                [
                    f"`{method.name}`",
                    method.does,
                    method.training or "no",
                    method.probabilities or "no",
                    method.second_model or "no",
                    method.rounds,
                    method.knob,
                    paper if method.source else "",
                ]
            )
        )
    return "".join(lines)


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |\n"
