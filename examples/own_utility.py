"""A utility of your own is what the search maximizes, on arrays alone and in a decode.

    python examples/own_utility.py

First, for one prompt with three unfinished answers, prints which of them the search continues under
the paper's utility and under a flat price per token. No model takes part: joints may come from
anywhere. Then prints the tokens that both utilities spend on two problems. Takes seconds.
"""

import numpy as np

import zip_rc_jax
from zip_rc_jax.search import choose_meta_action
from zip_rc_jax.search.utility import expected_compute, expected_max

PRICE = 0.002  # reward that one token must be worth


def price_per_token(
    terms, multiplicity, unfinished, *, alpha, beta, normalizer, selection_exponent, grid
):
    """Expected reward of the best answer, less a flat price for every token.

    Shapes: `search.Utility`.
    """
    copies = multiplicity.astype(terms.value.dtype)
    extended = copies * unfinished[:, None]
    value = expected_max(terms.log_reward_cdf, copies, grid)
    return value - PRICE * expected_compute(terms.length, extended)


def on_arrays() -> None:
    grid = zip_rc_jax.Grid(reward_centres=(0.0, 1.0), length_edges=(0, 32, 128, 512))
    # Of each answer: P(wrong), P(right) in the rows; ends within 32, 128, 512 tokens in the
    # columns.
    joint = np.array(
        [
            [[0.30, 0.10, 0.00], [0.50, 0.10, 0.00]],  # fair, nearly done
            [[0.05, 0.10, 0.05], [0.10, 0.60, 0.10]],  # good, longer
            [[0.00, 0.10, 0.30], [0.00, 0.10, 0.50]],  # fair, far from done
        ]
    )
    for utility in ("sampling", price_per_token):
        config = zip_rc_jax.DecodeConfig(n=3, utility=utility)
        action = choose_meta_action(
            joint[None], np.ones((1, 3), bool), np.full((1, 3), 40), grid=grid, config=config
        )
        continued = np.flatnonzero(action.multiplicity[0]).tolist()
        name = utility if isinstance(utility, str) else utility.__name__
        print(f"{name:16} continues answers {continued} for a utility of {action.utility[0]:.2f}")


def in_a_decode() -> None:
    lm = zip_rc_jax.load("embedded:chain_sum_zip")
    question = "State the final answer to the following arithmetic problem: {} ="
    prompts = [question.format("4 + 3 - 2"), question.format("7 + 2 - 4 + 6 - 6 - 8")]
    for utility in ("sampling", price_per_token):
        results = zip_rc_jax.decode(
            lm, prompts, utility=utility, n=4, interval=8, window=4, max_tokens=96
        )
        name = utility if isinstance(utility, str) else utility.__name__
        print(f"{name:16} spends {[r.usage.tokens for r in results]} tokens")


if __name__ == "__main__":
    on_arrays()
    in_a_decode()
