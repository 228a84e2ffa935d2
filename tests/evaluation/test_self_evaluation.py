"""The policy's opinion of its own samples, against forwards of one conversation at a time."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from harness.problem_sources import gym, gym_problems
from harness.small_tokenizers import chatml
from zip_rc_jax.config import (
    EvaluateConfig,
    ModelConfig,
    PipelineConfig,
    PromptConfig,
    SelfEvaluationConfig,
)
from zip_rc_jax.data.rollouts import Rollout
from zip_rc_jax.evaluation.self_evaluation import SelfEvaluation
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.transformer import forward_packed, logits, unembedding
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.sharding import single_device

TOKENIZER = chatml()
QUESTION = "Is this right? Reply with Yes or No."
TASK = gym(
    name="chain_sum", levels=({"min_terms": 2, "max_terms": 2}, {"min_terms": 4, "max_terms": 4})
)
CONFIG = PipelineConfig(
    problems=TASK,
    prompt=PromptConfig(style="chat", system="Be brief."),
    evaluate=EvaluateConfig(
        self_evaluation=SelfEvaluationConfig(
            QUESTION, chat_template_kwargs={"enable_thinking": False}
        )
    ),
)
FOUND = gym_problems(TASK, "heldout", 3)


def model(max_positions=2048, **sizes):
    config = ModelConfig(
        vocab_size=TOKENIZER.size,
        d_model=32,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        head_dim=16,
        d_ff=48,
        **sizes,
    )
    return LanguageModel.create(
        dataclasses.replace(config, max_positions=max_positions), TOKENIZER, seed=1
    )


def sample(index, response):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": FOUND[index].question},
    ]
    prompt = TOKENIZER.chat(turns)
    ids = [*TOKENIZER.encode(response), *TOKENIZER.encode("<|im_end|>")]
    empty = {"question": "", "answer": "", "entry_json": ""}
    return Rollout(
        task="chain_sum",
        prompt_index=index,
        sample_index=0,
        level=0,
        seed=0,
        prompt=prompt,
        response=response,
        prompt_token_ids=np.array(TOKENIZER.encode(prompt)),
        output_token_ids=np.array(ids),
        finished=True,
        **empty,
    )


SAMPLES = [
    [
        sample(i, text)
        for text in (
            "The answer is 42.",
            "1 + 2 = 3, and 3 - 7 = -4. The answer to the problem is -4.",
        )
    ]
    for i in range(3)
]


@pytest.mark.parametrize("softcap", [0.0, 1.0])
@pytest.mark.parametrize("tied", [True, False])
def test_the_opinion_is_the_models_next_token_after_the_question(softcap, tied):
    lm = model(tied=tied, logit_softcap=softcap)
    values, extra = SelfEvaluation(lm, FOUND, CONFIG)(SAMPLES)
    yes, no = (TOKENIZER.encode(reply)[0] for reply in ("Yes", "No"))
    for p, row in enumerate(SAMPLES):
        for k, one in enumerate(row):
            asked = (
                f"{one.prompt}{one.response}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n"
                "<|im_start|>assistant\n<think>\n\n</think>\n\n"
            )
            ids = jnp.array([TOKENIZER.encode(asked)])
            at, ones = jnp.arange(ids.shape[1])[None], jnp.ones_like(ids)
            hidden = forward_packed(
                lm.config, lm.params["body"], ids, at, ones, layout=single_device()
            )
            found = jax.nn.softmax(
                logits(lm.config, hidden[0, -1], unembedding(lm.config, lm.params["body"]))[
                    jnp.array([yes, no])
                ]
            )
            assert values[p, k] == pytest.approx(float(found[0]), abs=1e-5)
            # Prompt and response lie in the sample's cache, its end token, which was drawn last,
            # does not; the reply is one token.
            assert (
                extra[p, k]
                == ids.shape[1] - len(one.prompt_token_ids) - (len(one.output_token_ids) - 1) + 1
            )
    assert values.shape == extra.shape == (3, 2)
    assert np.ptp(values) > 1e-4


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"yes": "Yes", "no": "Yes, but"}, "both begin with the same token"),
        ({"chat_template_kwargs": {"no_such": 1}}, "no_such"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_decoded(settings, named):
    asked = dataclasses.replace(CONFIG.evaluate.self_evaluation, **settings)
    config = dataclasses.replace(
        CONFIG, evaluate=dataclasses.replace(CONFIG.evaluate, self_evaluation=asked)
    )
    with pytest.raises(UsageError, match=named):
        SelfEvaluation(model(), FOUND, config)


def test_a_question_that_would_not_fit_behind_the_longest_sample_is_refused():
    decode = dataclasses.replace(CONFIG.decode, max_tokens=64)
    config = dataclasses.replace(CONFIG, decode=decode)
    with pytest.raises(
        UsageError,
        match=r"decode\.max_tokens=64: prompt, sample and question may have \d+ tokens, and the "
        r"model has 100",
    ):
        SelfEvaluation(model(max_positions=100), FOUND, config)
