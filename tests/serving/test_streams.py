"""What a stream may say, against every event of scripted searches: it is never taken back."""

from __future__ import annotations

import dataclasses

import pytest

from harness.engines import BRANCHING, CONFIG, FORKING, MIXED
from harness.scripted import ScriptedNetwork
from zip_rc_jax.inference.engine import Engine, StepEvent
from zip_rc_jax.inference.outputs import Decision
from zip_rc_jax.serving.answers import progress
from zip_rc_jax.serving.streams import BestStream, CertainStream, PrefixTexts, candidates, common

PROMPTS = ["x", "y y", "z", "x y z", "y", "z z"]
PRICED = dataclasses.replace(CONFIG, alpha=0.5, beta=0.1)
CASES = {
    "published": (PRICED, MIXED),
    "branching": (dataclasses.replace(BRANCHING, alpha=1.0, beta=0.1), FORKING),
    "fixed": (dataclasses.replace(CONFIG, strategy="fixed"), MIXED),
    "one": (dataclasses.replace(CONFIG, n=1), MIXED),
    "budget": (dataclasses.replace(CONFIG, token_budget=9), MIXED),
    "vote": (dataclasses.replace(PRICED, answer="vote"), MIXED),
    "abstaining": (dataclasses.replace(PRICED, abstain_below=0.7), MIXED),
    "no answer allowed": (dataclasses.replace(PRICED, allow_no_answer=True, beta=3.0), MIXED),
}


@pytest.fixture(params=CASES, scope="module")
def search(request):
    """The configuration of a case, and the events of every prompt."""
    config, script = CASES[request.param]
    events = list(Engine(script.lm(), config, 0, ScriptedNetwork()).run(PROMPTS))
    return config, [[e for e in events if e.prompt_index == i] for i in range(len(PROMPTS))]


def test_the_text_that_is_certain_is_the_beginning_of_the_answer(search):
    config, prompts = search
    for *steps, last in prompts:
        stream, texts, sent = CertainStream(config), PrefixTexts(), ""
        for event in steps:
            texts.take(event)
            delta = stream.step(texts, event.decision)
            assert delta.keep is None
            sent += delta.text
            assert last.result.text.startswith(sent)
        assert sent + stream.end(last.result).text == last.result.text


def test_the_best_prefix_is_followed_by_its_corrections(search):
    config, prompts = search
    for *steps, last in prompts:
        stream, texts, shown = BestStream(config), PrefixTexts(), ""
        for event in steps:
            texts.take(event)
            delta = stream.step(texts, event.decision)
            shown = shown[: delta.keep] + delta.text
            # an independent look at the events so far
            grown = {}
            for step in steps[: steps.index(event) + 1]:
                for number, new in step.new_text.items():
                    grown[number] = grown.get(number, "") + new
            reward = dict(
                zip(event.decision.prefix_ids, event.decision.expected_reward, strict=True)
            )
            if grown:
                best = max(reward[number] for number in grown)
                assert shown in [grown[number] for number in grown if reward[number] == best]
        delta = stream.end(last.result)
        assert shown[: delta.keep] + delta.text == last.result.text


def test_events_carry_the_log_probabilities_of_their_tokens(search):
    _, prompts = search
    for *steps, last in prompts:
        texts = PrefixTexts()
        for event in steps:
            texts.take(event)
        for prefix in last.result.prefixes:
            assert texts.tokens.get(prefix.id, ()) == prefix.token_ids
            assert texts.logprobs.get(prefix.id, ()) == prefix.logprobs


def test_text_comes_before_the_end_where_all_prefixes_begin_alike():
    """One prefix alone is certain as soon as it is there."""
    config, script = CASES["one"]
    events = list(Engine(script.lm(), config, 0, ScriptedNetwork()).run(["x"]))
    steps = [event for event in events if isinstance(event, StepEvent)]
    stream, texts = CertainStream(config), PrefixTexts()
    early = []
    for event in steps[:-1]:
        texts.take(event)
        early.append(stream.step(texts, event.decision).text)
    assert len([text for text in early if text]) >= 1


def decision(ids, multiplicity, finished, reward=None):
    many = len(ids)
    return Decision(
        step=4,
        prefix_ids=tuple(ids),
        multiplicity=tuple(multiplicity),
        planned_pause_bin=-1,
        utility=0.0,
        expected_reward=tuple(reward or [0.5] * many),
        expected_remaining=tuple(range(many)),
        tokens=(1,) * many,
        finished=tuple(finished),
    )


def test_nothing_is_certain_while_a_new_sample_may_begin_at_the_root():
    some = decision([0, 1, -1], [1, 1, 0], [False, True, False])
    assert candidates(some, n=3) == []
    assert candidates(some, n=2) == [0, 1]


def test_progress_is_of_the_most_promising_prefix_and_counts_the_others():
    some = decision(
        [0, 1, 2, 3, -1], [2, 0, 0, 1, 1], [False, False, True, True, False], [0.1, 0.9, 0.2, 0, 0]
    )
    assert progress(some) == {"p_correct": 0.9, "remaining_tokens": 1, "live": 3, "paused": 1}


def test_the_common_beginning_of_texts_and_of_tokens():
    assert common(["abc", "abd", "ab"]) == 2
    assert common([(1, 2, 3), (1, 2), (1, 9)]) == 1
    assert common(["abc"]) == 3
    assert common([]) == 0
