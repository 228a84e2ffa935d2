"""How an answer is read, which answers are the same, and which one is given, can each be your own.

    python examples/own_answers.py

Four samples answer one problem. Prints the answer that an extractor of your own reads in each, the
groups in which an equivalence of your own lets them vote, and the answer of three decodes: by vote,
by a vote on parity, and by a rule that prefers the shortest. Takes seconds.
"""

import re

import zip_rc_jax
from zip_rc_jax.grading import answer_groups

PROMPT = "State the final answer to the following arithmetic problem: 7 + 2 - 4 + 6 - 6 - 8 ="


def last_number(text: str) -> str | None:
    """The last whole number of a text; None if it has none, and then the text has no vote."""
    numbers = re.findall(r"-?\d+", text)
    return numbers[-1] if numbers else None


def same_parity(a: str, b: str) -> bool:
    """Symmetric, as every equivalence must be."""
    return int(a) % 2 == int(b) % 2


def shortest(prefixes):
    """The finished prefix of the fewest tokens; None withholds the answer."""
    finished = [p for p in prefixes if p.state == "finished"]
    return min(finished, key=lambda p: len(p.token_ids), default=None)


def main() -> None:
    lm = zip_rc_jax.load("embedded:chain_sum_zip")
    options = {"strategy": "fixed", "n": 4, "interval": 8, "window": 4, "max_tokens": 96}
    voted = zip_rc_jax.decode(lm, [PROMPT], answer="vote", answer_extractor=last_number, **options)[
        0
    ]
    texts = [p.text for p in voted.prefixes]
    print("answers        ", [last_number(text) for text in texts])
    print("groups         ", answer_groups(texts, last_number, "text"))
    print("parity groups  ", answer_groups(texts, last_number, same_parity))
    print("by vote        ", last_number(voted.text))
    parity = {"answer_extractor": last_number, "answer_equivalence": same_parity}
    for name, own in (
        ("by parity", {"answer": "vote", **parity}),
        ("the shortest", {"answer": shortest}),
    ):
        result = zip_rc_jax.decode(lm, [PROMPT], **options, **own)[0]
        print(f"{name:15}", last_number(result.text))


if __name__ == "__main__":
    main()
