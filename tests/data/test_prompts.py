"""From problems to prompts: raw questions, chats, worked examples."""

from __future__ import annotations

import dataclasses
import datetime
import json

import pytest

from harness.problem_sources import gym, gym_problems
from harness.small_tokenizers import chatml, gemma
from zip_rc_jax.config import PipelineConfig, ProblemsConfig, PromptConfig
from zip_rc_jax.config.files import load_config
from zip_rc_jax.data.problems import problem_set, worked_examples
from zip_rc_jax.data.prompts import prompt_texts, variant_of
from zip_rc_jax.data.worked_solutions import parse_question
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.pipeline.provenance import prompt_record
from zip_rc_jax.runtime.errors import UsageError

SPLITS = ("train", "heldout")
LEVELS = tuple(
    {"min_terms": n, "max_terms": n, "min_digits": 2, "max_digits": 2} for n in (2, 4, 6, 8)
)
TASK = gym(name="chain_sum", levels=LEVELS, train_seed=50, heldout_seed=1_000_000)
FOUND = gym_problems(TASK, "train", 6)


def texts(prompt, tokenizer=None, found=FOUND):
    return prompt_texts(found, PipelineConfig(problems=TASK, prompt=prompt), tokenizer or chatml())


def test_a_raw_prompt_is_the_question_alone():
    assert texts(PromptConfig()) == [p.question for p in FOUND]


def test_a_chat_is_what_the_template_makes_of_it():
    prompt = PromptConfig(
        style="chat",
        system="Be brief.",
        instruction="Q: {question}\nAnswer in \\boxed{}.",
        chat_template_kwargs={"enable_thinking": False},
    )
    for text, p in zip(texts(prompt), FOUND, strict=True):
        turns = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Q: {p.question}\nAnswer in \\boxed{{}}."},
        ]
        assert text == chatml().chat(turns, enable_thinking=False)
    assert texts(PromptConfig(style="chat")) == [
        chatml().chat([{"role": "user", "content": p.question}]) for p in FOUND
    ]


def test_worked_examples_of_its_own_level_come_before_a_problem_as_earlier_turns():
    prompt = PromptConfig(
        style="chat", instruction="Q: {question}", examples=2, example_answer="Answer: {answer}"
    )
    examples = worked_examples(TASK, 2)
    wanted = []
    for p in FOUND:
        turns = []
        for e in examples(p):
            turns += [
                {"role": "user", "content": f"Q: {e.question}"},
                {"role": "assistant", "content": f"Answer: {e.answer}"},
            ]
        wanted.append(chatml().chat([*turns, {"role": "user", "content": f"Q: {p.question}"}]))
    assert texts(prompt) == wanted
    assert texts(prompt, found=FOUND[3:]) == wanted[3:], (
        "they do not depend on which problems are asked"
    )


def test_worked_steps_of_a_chain_sum():
    (text, *_) = texts(
        PromptConfig(style="chat", examples=1, example_answer="{steps}. Answer: {answer}")
    )
    (example,) = worked_examples(TASK, 1)(FOUND[0])
    terms, operators = parse_question(example.question)
    total = terms[0] + terms[1] if operators == ["+"] else terms[0] - terms[1]
    assert f"{terms[0]} {operators[0]} {terms[1]} = {total}. Answer: {total}" in text
    other = PipelineConfig(
        problems=gym("gcd"),
        prompt=PromptConfig(style="chat", examples=1, example_answer="{steps}: {answer}"),
    )
    with pytest.raises(UsageError, match="only chain sums have steps"):
        prompt_texts(gym_problems(other.problems, "train", 1), other, chatml())


def by_level(problems, count):
    """The worked examples of the first problem of every level."""
    levels = len(problems.train[0].levels) or 1
    return [worked_examples(problems, count)(p) for p in gym_problems(problems, "train", levels)]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_every_level_has_its_worked_examples(count):
    found = by_level(TASK, count)
    assert [[p.level for p in level] for level in found] == [[level] * count for level in range(4)]
    assert len({p.question for level in found for p in level}) == 4 * count
    assert found == by_level(TASK, count)


def test_levels_of_different_tasks_have_examples_of_their_own_task():
    problems = gym(levels=({"name": "gcd", "min_value": 1, "max_value": 12}, LEVELS[0]))
    assert [[p.task for p in level] for level in by_level(problems, 2)] == [
        ["gcd"] * 2,
        ["chain_sum"] * 2,
    ]


@pytest.mark.parametrize(
    ("train_seed", "heldout_seed"), [(50, 1_000_000), (1_000_000, 50), (0, 400)]
)
def test_worked_examples_have_seeds_of_their_own(train_seed, heldout_seed):
    problems = gym("chain_sum", LEVELS, train_seed, heldout_seed)
    count = 400 if heldout_seed == 400 else 40
    seeds = [{p.seed for p in gym_problems(problems, split, count)} for split in SPLITS]
    examples = {p.seed for level in by_level(problems, 2) for p in level}
    assert len(examples) == 8
    assert not examples & (seeds[0] | seeds[1])


def test_worked_examples_of_a_generator_without_levels():
    (found,) = by_level(gym("chain_sum"), 3)
    assert [p.level for p in found] == [0, 0, 0]
    assert len({p.question for p in found}) == 3


def test_worked_examples_of_files_come_from_a_source_of_their_own_by_the_name_of_the_level(
    tmp_path,
):
    """A level of any name: "Level 2" alone was an IndexError once."""
    solved = tmp_path / "solved.jsonl"
    names = ("Level 1", "Level 2", "Level 2", "Algebra")
    rows = [{"question": f"q{i}", "answer": i, "level": name} for i, name in enumerate(names)]
    solved.write_text("\n".join(map(json.dumps, rows)))
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"question": "q1", "answer": 1, "level": "Level 2"}')
    problems = ProblemsConfig(train=f"jsonl:{asked}", examples=f"jsonl:{solved}")
    (p,) = problem_set(problems, "train").problems
    assert [x.question for x in worked_examples(problems, 2)(p)] == ["q2", "q0"], (
        "first its own level, and never the problem itself"
    )
    with pytest.raises(UsageError, match=r"problems\.examples has 4 problems, and 5 are needed"):
        worked_examples(problems, 4)
    alone = ProblemsConfig(train=f"jsonl:{asked}")
    with pytest.raises(UsageError, match=r"only generators make .*Fix: set problems\.examples"):
        worked_examples(alone, 1)(p)


VARIANTS = (
    {"share": 3, "chat_template_kwargs": {"enable_thinking": False}, "system": "Answer at once."},
    {"instruction": "Think. {question}", "chat_template_kwargs": {"enable_thinking": True}},
)


def test_variants_of_prompts_share_the_problems_by_their_questions_alone():
    """Thinking and non-thinking prompts in one set."""
    prompt = PromptConfig(style="chat", variants=VARIANTS, seed=4)
    found = gym_problems(gym("chain_sum", LEVELS), "train", 400)
    numbers = [variant_of(prompt, p.question) for p in found]
    assert abs(numbers.count(0) / 400 - 0.75) < 0.07, "three quarters by their shares"
    assert numbers[200:] == [variant_of(prompt, p.question) for p in found[200:]]
    other = dataclasses.replace(prompt, seed=5)
    assert numbers != [variant_of(other, p.question) for p in found]
    for text, p, number in zip(texts(prompt, found=found[:20]), found, numbers, strict=False):
        turns = [{"role": "user", "content": f"{'Think. ' if number else ''}{p.question}"}]
        if not number:
            turns = [{"role": "system", "content": "Answer at once."}, *turns]
        assert text == chatml().chat(turns, enable_thinking=bool(number))
    assert variant_of(PromptConfig(style="chat"), "any") == 0


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (("thinking",), r"prompt\.variants\[0\]='thinking': it is no object"),
        (({"shares": 1},), r"a setting of prompt\.variants\[0\]='shares': it must be one of share"),
        (({}, {"share": 0}), r"prompt\.variants\[1\]\.share=0: it is no share"),
        (({"instruction": "Think."},), r"instruction='Think\.': it does not contain"),
        (({"system": 5},), r"prompt\.variants\[0\]\.system=5: it is of another type"),
    ],
)
def test_impossible_variants_are_refused(variants, message):
    with pytest.raises(UsageError, match=message):
        PromptConfig(style="chat", variants=variants)


def test_variants_are_part_of_the_record_and_of_no_earlier_one(tmp_path):
    plain = PipelineConfig(run_dir=str(tmp_path), prompt=PromptConfig(style="chat"))
    assert "variants" not in prompt_record(plain, chatml())["prompt"]
    some = dataclasses.replace(plain, prompt=PromptConfig(style="chat", variants=VARIANTS))
    assert prompt_record(some, chatml())["prompt"]["variants"] == [dict(v) for v in VARIANTS]


def test_what_cannot_be_rendered_is_refused():
    with pytest.raises(UsageError, match="the tokenizer has no chat template"):
        texts(PromptConfig(style="chat"), Tokenizer(chatml().backend, ("<|im_end|>",)))
    with pytest.raises(UsageError, match="System role not supported"):
        texts(PromptConfig(style="chat", system="Be brief."), gemma())
    with pytest.raises(
        UsageError, match="'enable_thinking': the model's template takes no such argument"
    ):
        texts(PromptConfig(style="chat", chat_template_kwargs={"enable_thinking": False}), gemma())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"style": "chats"}, r"prompt\.style='chats': it must be one of raw, chat"),
        (
            {"style": "chat", "instruction": "Solve it."},
            r"prompt\.instruction='Solve it\.': it does not contain \{question\}",
        ),
        (
            {"style": "chat", "example_answer": "42"},
            r"prompt\.example_answer='42': it does not contain \{answer\}",
        ),
        ({"style": "chat", "examples": -1}, r"prompt\.examples=-1"),
        (
            {"system": "x", "examples": 2},
            r"prompt\.style='raw' with system, examples: .*Fix: set prompt\.style=chat",
        ),
        ({"instruction": "Q: {question}"}, r"with instruction"),
        ({"example_answer": "A: {answer}"}, r"with example_answer"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, r"with chat_template_kwargs"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting, message):
    with pytest.raises(UsageError, match=message):
        PromptConfig(**setting)


def test_the_section_is_read_from_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "run_dir: x\nprompt:\n  style: chat\n  instruction: '{question} Think.'\n  "
        "chat_template_kwargs: {enable_thinking: false}\n"
    )
    found = load_config(tmp_path / "c.yaml", ["prompt.examples=3"]).prompt
    assert found == PromptConfig(
        "chat",
        instruction="{question} Think.",
        examples=3,
        chat_template_kwargs={"enable_thinking": False},
    )
    assert isinstance(found.chat_template_kwargs, dict)
    with pytest.raises(UsageError, match="did you mean 'instruction'"):
        load_config(tmp_path / "c.yaml", ["prompt.instructio=x"])


def test_prompts_of_a_run_have_the_date_on_which_it_was_begun(tmp_path, monkeypatch):
    """Rollouts that go on after midnight, and an evaluation a week later, ask the same
    questions."""
    dated = Tokenizer(
        chatml().backend, ("<|im_end|>",), "{{ strftime_now('%d %b') }}: {{ messages[0].content }}"
    )
    config = PipelineConfig(
        run_dir=str(tmp_path / "run"), problems=TASK, prompt=PromptConfig(style="chat")
    )

    class Clock(datetime.datetime):
        day = 26

        @classmethod
        def now(cls, tz=None):
            return cls(2024, 7, cls.day)

    monkeypatch.setattr(datetime, "datetime", Clock)
    first, record = prompt_texts(FOUND, config, dated), prompt_record(config, dated)
    assert first == [f"26 Jul: {p.question}" for p in FOUND]
    Clock.day = 29
    assert prompt_texts(FOUND, config, dated) == first
    assert prompt_record(config, dated) == record
    other = dataclasses.replace(config, run_dir=str(tmp_path / "other"))
    assert prompt_texts(FOUND, other, dated) == [f"29 Jul: {p.question}" for p in FOUND]
    assert prompt_record(other, dated) != record, "made on another day, they are other prompts"
    assert "prompt_time" not in prompt_record(config, chatml()), (
        "a template that writes no date has no need of it"
    )
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["prompt_time.json"]
    (tmp_path / "run" / "prompt_time.json").write_text("{")
    with pytest.raises(UsageError, match=r"prompt_time\.json: it holds no time"):
        prompt_texts(FOUND, config, dated)
