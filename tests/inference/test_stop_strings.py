"""Stop strings: found across token borders and characters of several tokens."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.engines import CONFIG, FORKING, FORKS, MIXED
from harness.scripted import ScriptedNetwork
from harness.small_tokenizers import chatml, gemma, llama
from zip_rc_jax import DecodeConfig, Request, Result, ResultEvent, StepEvent, UsageError
from zip_rc_jax.inference.engine import Engine
from zip_rc_jax.inference.stopping import JointHistory, find_stop
from zip_rc_jax.inference.tree import ROOT, Branch

# ---- where one is found


def first_stop(tokenizer, ids, strings):
    """By the definition: (string, tokens up to the one that completes it, text before it)."""
    for length in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:length])
        while text.endswith("\ufffd"):
            text = text[:-1]
        found = sorted((text.index(s), i) for i, s in enumerate(strings) if s in text)
        if found:
            place, i = found[0]
            return strings[i], length, text[:place]
    return None


@given(
    text=st.text(alphabet="ab é数😀\n", min_size=1, max_size=20),
    strings=st.lists(
        st.text(alphabet="ab é数😀\n", min_size=1, max_size=3), min_size=1, max_size=3
    ),
    cuts=st.sets(st.integers(1, 60)),
    family=st.sampled_from([chatml, gemma, llama]),
)
def test_it_is_found_at_the_token_that_completes_it_wherever_intervals_end(
    text, strings, cuts, family
):
    tokenizer = family()
    ids = tuple(tokenizer.encode(text))
    found, known = None, 0
    for end in sorted({*(cut for cut in cuts if cut < len(ids)), len(ids)}):
        found = find_stop(tokenizer.decode, ids[:end], known, strings)
        if found:
            break
        known = end
    expected = first_stop(tokenizer, ids, strings)
    assert (found and (found.string, found.length, found.text)) == expected


@given(
    text=st.text(alphabet="ab é😀", min_size=1, max_size=16),
    strings=st.lists(st.text(alphabet="ab é😀", min_size=1, max_size=4), min_size=1, max_size=2),
    cuts=st.sets(st.integers(1, 40)),
)
def test_a_stream_never_shows_what_the_result_will_not_hold(text, strings, cuts):
    tokenizer = chatml()
    ids = tuple(tokenizer.encode(text))
    branch, told, known = Branch(0, ROOT, 0, None), "", 0
    ends = sorted({*(cut for cut in cuts if cut < len(ids)), len(ids)})
    for end in ends:
        branch.tokens = ids[:end]
        branch.stop = find_stop(tokenizer.decode, branch.tokens, known, strings)
        known = end
        if branch.stop:
            branch.tokens = ids[: branch.stop.length]
        told += branch.new_text(tokenizer, end == ends[-1], strings)
        if branch.stop:
            break
    assert told == (branch.stop.text if branch.stop else tokenizer.decode(ids))


def test_a_long_text_is_not_decoded_again_at_every_interval():
    seen = []

    def decode(ids):
        seen.append(len(ids))
        return "x" * len(ids)

    assert find_stop(decode, (0,) * 10_000, 9_990, ["yyyy"]) is None
    assert max(seen) < 100


def test_the_mean_joint_of_a_cut_prefix_is_over_the_joints_before_its_last_token():
    joints = np.random.default_rng(0).random((21, 6)).astype(np.float32)
    history = JointHistory(joints[:1])
    for start, end in ((1, 5), (5, 14), (14, 21)):
        history = history.last(4).extended(joints[start:end])
    for length in range(15, 21):
        expected = joints[max(0, length - 4) : length].mean(0)
        np.testing.assert_allclose(history.mean_of_finished(length, 4), expected, rtol=1e-6)
    short = JointHistory(joints[:1]).extended(joints[1:4])
    np.testing.assert_allclose(short.mean_of_finished(2, 4), joints[:2].mean(0), rtol=1e-6)


# ---- in the decoder (a scripted model whose fillers are w0 w1 w2 w3)

FIXED = dataclasses.replace(CONFIG, strategy="fixed")
STOP = ("w1 w3", "w2 w2")


def events(config, prompts=("x", "y y", "z"), seed=0):
    return list(Engine(MIXED.lm(), config, seed, ScriptedNetwork()).run(list(prompts)))


def results(log):
    found = {e.prompt_index: e.result for e in log if isinstance(e, ResultEvent)}
    return [found[i] for i in range(len(found))]


@pytest.fixture(scope="module")
def whole():
    return results(events(FIXED))


@pytest.fixture(scope="module")
def stopped():
    return {i: events(dataclasses.replace(FIXED, stop=STOP, interval=i)) for i in (1, 4, 24)}


def test_a_prefix_ends_at_its_first_stop_string_and_says_which(whole, stopped):
    fired = set()
    for free, cut in zip(whole, results(stopped[4]), strict=True):
        for p, q in zip(free.prefixes, cut.prefixes, strict=True):
            ends = [(p.text.index(s), s) for s in STOP if s in p.text]
            assert q.token_ids == p.token_ids[: len(q.token_ids)]
            assert len(q.logprobs) == len(q.token_ids)
            if not ends:
                assert (q.text, q.stop_reason, q.token_ids) == (p.text, None, p.token_ids)
                continue
            assert (q.text, q.stop_reason, q.finish_reason) == (
                p.text[: min(ends)[0]],
                min(ends)[1],
                "stop",
            )
            assert q.state == "finished"
            fired.add(q.stop_reason)
        assert (
            Result.from_dict(json.loads(json.dumps(cut.to_dict(logprobs=True)))).prefixes
            == cut.prefixes
        )
    assert fired == set(STOP), "the seed draws both"


@pytest.mark.parametrize("interval", [1, 24])
def test_no_prefix_depends_on_the_interval(stopped, interval):
    """Text, tokens, predictions: with an interval of 24 all of a prefix is computed before anybody
    looks.
    """
    for a, b in zip(results(stopped[4]), results(stopped[interval]), strict=True):
        for p, q in zip(a.prefixes, b.prefixes, strict=True):
            assert (p.token_ids, p.text, p.stop_reason, p.finish_reason) == (
                q.token_ids,
                q.text,
                q.stop_reason,
                q.finish_reason,
            )
            assert p.expected_reward == pytest.approx(q.expected_reward, abs=1e-6)
        assert (a.text, a.prefix_id) == (b.text, b.prefix_id)


def test_the_usage_counts_what_was_computed(whole, stopped):
    dropped = 0
    for free, one, all_at_once in zip(
        whole, results(stopped[1]), results(stopped[24]), strict=True
    ):
        held = sum(len(p.token_ids) for p in one.prefixes)
        assert one.usage.tokens == held, "nothing is computed past a stop string"
        assert all_at_once.usage.tokens == free.usage.tokens, "everything is"
        assert all_at_once.usage.serial_steps == free.usage.serial_steps
        dropped += free.usage.tokens - held
    assert dropped > 0


@pytest.mark.parametrize("interval", [1, 4, 24])
def test_streams_add_up_to_the_results(stopped, interval):
    log = stopped[interval]
    for i, result in enumerate(results(log)):
        mine = [e for e in log if isinstance(e, StepEvent) and e.prompt_index == i]
        for p in result.prefixes:
            assert "".join(e.new_text.get(p.id, "") for e in mine) == p.text
            assert sum((e.new_tokens.get(p.id, ()) for e in mine), ()) == p.token_ids


def test_requests_with_other_stop_strings_run_in_one_batch(whole, stopped):
    prompts = ["x", Request("y y", stop=STOP), Request("z", stop=("never seen",))]
    found = results(events(FIXED, prompts))
    wanted = [whole[0], results(stopped[4])[1], whole[2]]
    for a, b in zip(found, wanted, strict=True):
        assert [(p.token_ids, p.text) for p in a.prefixes] == [
            (p.token_ids, p.text) for p in b.prefixes
        ]


def test_a_token_budget_counts_dropped_tokens():
    config = dataclasses.replace(FIXED, stop=STOP, interval=24, token_budget=30)
    for result in results(events(config)):
        assert result.usage.tokens <= 30


def test_a_fork_of_a_prefix_stops_as_a_prefix_does():

    config = dataclasses.replace(FORKS, stop=("w1 w3",))
    log = list(Engine(FORKING.lm(), config, 0, ScriptedNetwork()).run(["x", "y", "z x"]))
    prefixes = [p for r in results(log) for p in r.prefixes]
    assert any(p.parent >= 0 for p in prefixes)
    for p in prefixes:
        assert "w1 w3" not in p.text
        assert (p.stop_reason == "w1 w3") == ("w1 w3" in MIXED.lm().tokenizer.decode(p.token_ids))


def test_a_stop_id_is_named_and_an_end_token_is_not():
    stop = MIXED.lm().tokenizer.encode("w1")[0]
    for result in results(events(dataclasses.replace(FIXED, stop_token_ids=(stop,)))):
        for p in result.prefixes:
            assert p.stop_reason == (stop if p.token_ids[-1] == stop else None)


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (("",), "an empty text stops everything"),
        (5, "not a list of texts"),
        ((5,), "not a list of texts"),
        (b"x", "not a list of texts"),
        (("x" * 1025,), "1025 characters"),
        (tuple(map(str, range(65))), "at most 64"),
        (("\ufffd",), "U.FFFD"),
        (("\udcff",), "half a surrogate pair"),
    ],
)
def test_impossible_stop_strings_are_refused(stop, message):
    for make in (
        lambda: DecodeConfig(stop=stop),
        lambda: Request("x", stop=stop).over(DecodeConfig()),
    ):
        with pytest.raises(UsageError, match=f"stop=.*{message}"):
            make()


def test_one_string_will_do_and_each_counts_once():
    assert DecodeConfig(stop="END").stop == ("END",)
    assert DecodeConfig(stop=["a", "b", "a"]).stop == ("a", "b")
