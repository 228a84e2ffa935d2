"""A policy of your own decides which answers are continued.

    python examples/own_policy.py

Prints, for the paper's search and for a policy of ten lines, how many of six problems were solved
and how many tokens that took. Uses the small model that ships with the package; takes seconds.
"""

import numpy as np

import zip_rc_jax
from zip_rc_jax.grading import grade
from zip_rc_jax.search import MetaAction, SearchInputs, register_policy

QUESTION = "State the final answer to the following arithmetic problem: {} ="
SUMS = {
    "4 + 7": "11",
    "3 + 7 + 9 + 0": "19",
    "9 - 1 + 4 - 7": "5",
    "7 + 2 - 4 + 6 - 6 - 8": "-3",
    "1 + 7 - 9 + 0 + 2 + 0": "1",
    "6 - 1 - 5 - 7 + 2 + 6 - 5 + 6": "2",
}


@register_policy("best_two")  # a name, for YAML and the command line; decode takes the function too
def best_two(inputs: SearchInputs, *, grid, config) -> MetaAction:
    """Continues the two samples of each prompt that the head expects most of, until one
    finishes."""
    # `inputs` holds every prompt and every sample of it: arrays [prompts, samples].
    reward = np.asarray(grid.expected_reward(inputs.joint))
    rank = np.argsort(np.argsort(np.where(inputs.live, -reward, np.inf)))
    waiting = ~inputs.finished.any(axis=1, keepdims=True)
    return MetaAction.of((inputs.live & (rank < 2) & waiting) | inputs.finished)


def main() -> None:
    lm = zip_rc_jax.load("embedded:chain_sum_zip")
    prompts = [QUESTION.format(s) for s in SUMS]
    for policy in ("zip_rc", best_two):
        results = zip_rc_jax.decode(
            lm, prompts, strategy=policy, n=4, interval=8, window=4, max_tokens=96
        )
        solved = sum(grade("math", a, r.text) for a, r in zip(SUMS.values(), results, strict=True))
        tokens = sum(r.usage.tokens for r in results)
        name = policy if isinstance(policy, str) else policy.__name__
        print(f"{name:10} {solved:.0f} of {len(SUMS)} solved with {tokens} tokens")


if __name__ == "__main__":
    main()
