"""Scores of samples by a reward model, what they cost, and the best-of-n that they give."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from harness.reward_models import saved_reward_model
from harness.small_tokenizers import GEMMA_TEMPLATE
from harness.tiny import tiny_lm
from zip_rc_jax.config.reward_model import RewardModelConfig
from zip_rc_jax.data.rollouts import Rollout
from zip_rc_jax.evaluation.baselines import SamplePool
from zip_rc_jax.evaluation.reward_model import (
    BEST,
    WEIGHTED,
    RewardModelScorer,
    reward_model_curves,
    sigmoid,
)
from zip_rc_jax.models.io.huggingface import SafetensorsSource
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.sharding import DECODE_RULES, Layout, make_mesh

POLICY = tiny_lm()
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    [SYSTEM, {"role": "user", "content": "What is 17 + 25?"}],
    [SYSTEM, {"role": "user", "content": "4 + 3 - 2 + 9 ="}],
]
RESPONSES = [
    ["The answer is 42.", "43", "Think step by step: 17 + 25 is 42. The answer is 42."],
    ["14", "The answer to the question is 13.", "9"],
]


@dataclasses.dataclass(frozen=True)
class Judge:
    directory: str
    torch: torch.nn.Module


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Judge:
    directory = tmp_path_factory.mktemp("judge")
    return Judge(str(directory), saved_reward_model(directory, "qwen3", num_hidden_layers=1))


def sample(prompt, number, response):
    """A sample. Only its text matters here: the reward model has a tokenizer of its
    own."""
    empty = {"question": "", "answer": "", "entry_json": "", "task": "", "prompt": ""}
    ids = np.array([1, 2, 3])
    return Rollout(
        prompt_index=prompt, sample_index=number, level=0, seed=0, response=response,
        prompt_token_ids=ids, output_token_ids=ids, finished=True, **empty,
    )  # fmt: skip


SAMPLES = [[sample(p, k, text) for k, text in enumerate(row)] for p, row in enumerate(RESPONSES)]


def scorer(judge, max_tokens=40, turns=TURNS, policy=POLICY, **settings):
    config = RewardModelConfig(judge.directory, **settings)
    return RewardModelScorer(policy, turns, config, max_tokens=max_tokens)


def theirs(judge, turns, response):
    """Score and number of tokens that transformers gives one sample alone."""
    asked = [*turns, {"role": "assistant", "content": response}]
    ids = AutoTokenizer.from_pretrained(judge.directory).apply_chat_template(
        asked, return_dict=False
    )
    with torch.no_grad():
        return judge.torch(torch.tensor([ids])).logits.item(), len(ids)


def parameters(tree):
    """Numbers in all arrays but the embedding tables."""
    return sum(
        x.size
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if not {"embed", "unembed", "zip_rows"} & {getattr(key, "key", None) for key in path}
    )


# ---- scores and cost


def test_scores_are_those_of_transformers_and_cost_by_parameters_and_tokens(judge):
    values, extra = scorer(judge)(SAMPLES)
    assert values.shape == extra.shape == (2, 3)
    assert values.dtype == extra.dtype == np.float64
    own = sum(p.numel() for n, p in judge.torch.named_parameters() if "embed_tokens" not in n)
    ratio = own / parameters(POLICY.params)
    assert not 0.8 < ratio < 1.2, "the sizes differ"
    for p, row in enumerate(RESPONSES):
        for k, response in enumerate(row):
            score, tokens = theirs(judge, TURNS[p], response)
            assert values[p, k] == pytest.approx(score, abs=1e-5)
            assert extra[p, k] == pytest.approx(ratio * tokens)
    assert scorer(judge).parameter_ratio == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("system", "turns"),
    [("", []), ("Judge.", [{"role": "system", "content": "Judge."}])],
    ids=["no system turn", "another system turn"],
)
def test_the_system_turn_of_the_reward_model_may_be_its_own(judge, system, turns):
    found = scorer(judge, system=system)
    for p, conversation in enumerate(TURNS):
        assert found.conversations[p] == [*turns, conversation[1]]
    score, _ = theirs(judge, [*turns, TURNS[0][1]], RESPONSES[0][0])
    assert found([SAMPLES[0][:1], SAMPLES[1][:1]])[0][0, 0] == pytest.approx(score, abs=1e-5)


def test_small_batches_over_eight_devices_give_the_same(judge):
    values, extra = scorer(judge)(SAMPLES)
    layout = Layout(make_mesh(data=8), DECODE_RULES)
    spread = dataclasses.replace(POLICY, layout=layout)
    again, cost = scorer(judge, policy=spread, batch_tokens=1)(SAMPLES)
    np.testing.assert_allclose(again, values, atol=1e-5)
    np.testing.assert_array_equal(cost, extra)


# ---- refused before anything is decoded


@pytest.fixture
def no_weights(monkeypatch):
    """Reading a weight fails."""

    def read(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(SafetensorsSource, "read", read)


def edited(judge, tmp_path, template=None, positions=None):
    """A copy with another template (empty: none) or context."""
    directory = tmp_path / "judge"
    shutil.copytree(judge.directory, directory)
    if template is not None:
        path = directory / "chat_template.jinja"
        path.write_text(template) if template else path.unlink()
    if positions:
        path = directory / "config.json"
        settings = json.loads(path.read_text()) | {"max_position_embeddings": positions}
        path.write_text(json.dumps(settings))
    return dataclasses.replace(judge, directory=str(directory))


def test_a_reward_model_without_a_template_is_refused(judge, tmp_path, no_weights):
    with pytest.raises(UsageError, match=r"no chat template.*Fix: .*chat_template\.jinja"):
        scorer(edited(judge, tmp_path, template=""))


def test_a_template_that_refuses_the_system_turn_is_refused_with_the_way_out(
    judge, tmp_path, no_weights
):
    other = edited(judge, tmp_path, template=GEMMA_TEMPLATE)
    with pytest.raises(
        UsageError, match='System role not supported.*Fix: .*evaluate.reward_model.system: ""'
    ):
        scorer(other)
    scorer(other, system="")


def test_a_template_that_leaves_the_answer_out_is_refused(judge, tmp_path, no_weights):
    with pytest.raises(UsageError, match="leaves the assistant's answer out"):
        scorer(edited(judge, tmp_path, template="{{ messages[0].content }}"))


def test_an_argument_that_the_template_does_not_take_is_refused(judge, no_weights):
    with pytest.raises(UsageError, match="no_such"):
        scorer(judge, chat_template_kwargs={"no_such": 1})


def test_a_context_that_is_too_short_for_the_longest_sample_is_refused(judge, tmp_path, no_weights):
    longest = max(theirs(judge, turns, "")[1] for turns in TURNS)
    short = edited(judge, tmp_path, positions=longest + 40)
    scorer(short, max_tokens=40)
    with pytest.raises(
        UsageError,
        match=rf"decode.max_tokens=41: prompt and sample may have {longest + 41} tokens, and the "
        rf"reward model has {longest + 40} positions. Fix: lower decode.max_tokens",
    ):
        scorer(short, max_tokens=41)


def test_a_sample_of_more_tokens_than_fit_is_refused_before_a_weight_is_read(judge, no_weights):
    long = [[sample(0, 0, "42 " * 300)], SAMPLES[1][:1]]
    with pytest.raises(UsageError, match="1 of 2 conversations.*200 positions"):
        scorer(judge)(long)


def test_a_policy_is_no_reward_model(tmp_path, no_weights):
    with pytest.raises(UsageError, match="there is no such directory"):
        scorer(Judge(str(tmp_path / "absent"), None))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"path": "x", "batch_tokens": 0}, "evaluate.reward_model.batch_tokens=0"),
        ({"path": "x", "dtype": "float16"}, "evaluate.reward_model.dtype='float16'"),
        ({"system": "Judge."}, "evaluate.reward_model.system='Judge.' without a path"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs=.* without a path"),
    ],
)
def test_settings_that_cannot_work_or_that_nothing_reads_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        RewardModelConfig(**settings)


def test_the_settings_are_read_from_yaml():
    text = "{path: org/name, system: '', dtype: bfloat16, chat_template_kwargs: {a: [1, x]}}"
    merged = OmegaConf.merge(OmegaConf.structured(RewardModelConfig), OmegaConf.create(text))
    assert OmegaConf.to_object(merged) == RewardModelConfig(
        "org/name", {"a": [1, "x"]}, system="", dtype="bfloat16"
    )
    assert RewardModelConfig().system is None


# ---- best of n


def random_pool(prompts=5, n=5, seed=0):
    rng = np.random.default_rng(seed)
    answers = rng.integers(-1, 3, (prompts, n))
    truth = rng.integers(0, 3, prompts)
    pool = SamplePool(
        correct=(answers == truth[:, None]).astype(float),
        answer_id=answers,
        value=rng.random((prompts, n)),
        self_length=rng.integers(3, 30, (prompts, n)),
        level=np.zeros(prompts),
    )
    return pool, rng.normal(0, 3, (prompts, n)), rng.uniform(5, 20, (prompts, n))


def slow_reward(correct, answers, scores, weighted):
    """Expected reward of the chosen answer of a few samples, by the definition."""
    answered = [k for k, a in enumerate(answers) if a >= 0] or range(len(answers))
    if not weighted:
        return correct[max(answered, key=lambda k: scores[k])]
    votes = dict[int, float]()
    for k in answered:
        votes[answers[k]] = votes.get(answers[k], 0.0) + 1 / (1 + np.exp(-scores[k]))
    winner = max(votes, key=votes.__getitem__)
    return np.mean([correct[k] for k in answered if answers[k] == winner])


@pytest.mark.parametrize("method", [WEIGHTED, BEST])
def test_the_curves_are_means_over_all_subsets(method):
    pool, scores, extra = random_pool()
    points = reward_model_curves(pool, scores, extra, serial_steps=2.5)[method]
    assert [(p.method, p.n) for p in points] == [(method, n) for n in range(1, 6)]
    for point in points:
        sets = list(itertools.combinations(range(5), point.n))
        for p in range(pool.n_prompts):
            part = [
                slow_reward(
                    pool.correct[p, list(s)], pool.answer_id[p, list(s)], scores[p, list(s)],
                    method == WEIGHTED,
                )
                for s in sets
            ]  # fmt: skip
            assert point.accuracy[p] == pytest.approx(np.mean(part))
            asked, unit = point.n > 1, pool.self_length[p].mean()
            compute = point.n + asked * np.mean([extra[p, list(s)].sum() for s in sets]) / unit
            latency = np.mean([pool.self_length[p, list(s)].max() for s in sets]) + asked * 2.5
            assert point.compute[p] == pytest.approx(compute)
            assert point.latency[p] == pytest.approx(latency / unit)


def test_negative_scores_do_not_make_rare_answers_win():
    """Three samples say A and one says B; all scores are -1: their plain sums would prefer B."""
    pool = SamplePool(
        correct=np.array([[1.0, 1, 1, 0]]), answer_id=np.array([[0, 0, 0, 1]]),
        value=np.zeros((1, 4)), self_length=np.ones((1, 4)), level=np.zeros(1),
    )  # fmt: skip
    point = reward_model_curves(pool, np.full((1, 4), -1.0), np.ones((1, 4)))[WEIGHTED][-1]
    assert point.accuracy == 1


def test_large_scores_are_told_apart():
    """sigmoid(50) and sigmoid(60) are the same float."""
    pool = SamplePool(
        correct=np.array([[0.0, 1.0]]), answer_id=np.array([[0, 1]]),
        value=np.zeros((1, 2)), self_length=np.ones((1, 2)), level=np.zeros(1),
    )  # fmt: skip
    point = reward_model_curves(pool, np.array([[50.0, 60.0]]), np.ones((1, 2)))[BEST][-1]
    assert point.accuracy == 1


@pytest.mark.filterwarnings("error")
def test_the_sigmoid_of_any_score_is_a_probability():
    x = np.array([-1e4, -3.0, 0.0, 3.0, 1e4])
    np.testing.assert_allclose(sigmoid(x)[1:4], 1 / (1 + np.exp(-x[1:4])))
    assert sigmoid(x)[[0, 4]].tolist() == [0.0, 1.0]
