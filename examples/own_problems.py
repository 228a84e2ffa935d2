"""Problems in files as yours may be: one JSON object a line, with a question and an answer.

    python examples/own_problems.py runs/own_problems --kind sums
    python examples/own_problems.py runs/stories --kind apples

Writes `train.jsonl` and `heldout.jsonl`: chain sums of reasoning-gym, or the same told as stories.
Nothing afterwards knows where they come from. Takes seconds.
"""

import argparse
import itertools
import json
import pathlib
import re

import reasoning_gym

LEVELS = {"sums": (4, 6, 8), "apples": (2, 3, 4)}  # terms of the sums of each level
NAMES = ("Ann", "Ben", "Eva", "Max", "Mia", "Tom")
THINGS = ("apples", "books", "coins", "marbles", "shells", "stamps")


def problems(kind: str, count: int, seed: int) -> list[dict[str, str]]:
    """`count` different problems, of the levels in turn."""
    each = count // len(LEVELS[kind]) + 1
    found = []
    for number, terms in enumerate(LEVELS[kind]):
        # More than needed: some have the text of an earlier one, or take away what is not there.
        entries = reasoning_gym.create_dataset(
            "chain_sum",
            size=8 * each,
            seed=seed + number,
            min_terms=terms,
            max_terms=terms,
            min_digits=1,
            max_digits=1,
        )
        answers: dict[str, str] = {}
        for i, entry in enumerate(entries):
            question = in_words(entry["question"], i) if kind == "apples" else entry["question"]
            if question:
                answers.setdefault(question, entry["answer"])
        found.append([(f"{terms} terms", *item) for item in answers.items()][:each])
    in_turn = [item for together in zip(*found, strict=True) for item in together][:count]
    return [
        {"id": f"{kind}-{seed + i}", "question": question, "answer": answer, "level": level}
        for i, (level, question, answer) in enumerate(in_turn)
    ]


def in_words(chain_sum: str, number: int) -> str:
    """A story of the sum; "" where it takes away more than is there, or gets or gives nothing."""
    parts = re.findall(r"([+-]?) ?(\d+)", chain_sum)
    amounts = [int(amount) * (-1 if sign == "-" else 1) for sign, amount in parts]
    if 0 in amounts or min(itertools.accumulate(amounts)) < 0:
        return ""
    name, thing = NAMES[number % len(NAMES)], THINGS[number // len(NAMES) % len(THINGS)]
    story = [f"{name} has {amounts[0]} {thing}."]
    for amount in amounts[1:]:
        act = "gets" if amount > 0 else "gives away"
        story.append(f"Then {name} {act} {abs(amount)}{' more' if amount > 0 else ''}.")
    return " ".join([*story, f"How many {thing} does {name} have now?"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--kind", choices=LEVELS, default="sums", help="default sums")
    parser.add_argument("--train", type=int, default=1000, help="training problems (default 1000)")
    parser.add_argument("--heldout", type=int, default=120, help="held-out ones (default 120)")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (
        ("train", arguments.train, 0),
        ("heldout", arguments.heldout, 1_000_000),
    ):
        path = arguments.directory / f"{name}.jsonl"
        rows = problems(arguments.kind, count, seed)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{len(rows)} problems in {path}")


if __name__ == "__main__":
    main()
