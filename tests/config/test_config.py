"""Configs: every shipped file loads, and every mistake is found before anything is computed."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from zip_rc_jax.config import (
    DecodeConfig,
    EvaluateConfig,
    GridConfig,
    LabelConfig,
    ModelConfig,
    PipelineConfig,
    PolicyConfig,
    RolloutConfig,
    SamplingConfig,
    SelfEvaluationConfig,
    TrainConfig,
    to_dict,
)
from zip_rc_jax.config.files import load_config
from zip_rc_jax.models.transformer import param_shapes
from zip_rc_jax.runtime.errors import UsageError

FILES = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture
def written(tmp_path):
    def write(text: str) -> pathlib.Path:
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return path

    return write


def test_there_are_shipped_configs():
    assert len(FILES) >= 2


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_its_parts_fit(path):
    config = load_config(path)
    assert config.run_dir
    shapes = param_shapes(config.model)  # abstract: no memory
    assert shapes["embed"].shape == (config.model.vocab_size, config.model.d_model)
    for label in ("correct", "value"):
        assert config.grid.grid(label).n_cells < config.model.vocab_size
    # Without a section `model` the sizes are those of the checkpoint.
    if "\ndecode:" in path.read_text() and "\nmodel:" in path.read_text():
        assert config.decode.max_tokens < config.model.max_positions, "no prompt would fit"
    assert hash(config.decode) == hash(DecodeConfig(**to_dict(config.decode)))
    assert json.loads(json.dumps(to_dict(config)))["model"]["d_model"] == config.model.d_model


def test_values_come_from_the_file_then_from_overrides(written):
    path = written(
        "run_dir: here\ndecode: {beta: 0.5, n: 3, stop_token_ids: [4, 5]}\ngrid: {length_edges: "
        "[0, 7]}\n"
    )
    config = load_config(
        path,
        [
            "decode.beta=0.25",
            "model.qk_norm=false",
            "evaluate.alphas=[0.5]",
            "evaluate.headline_beta=[0.1]",
        ],
    )
    assert (config.run_dir, config.decode.beta, config.decode.n) == ("here", 0.25, 3)
    assert config.decode.stop_token_ids == (4, 5)
    assert config.model.qk_norm is False
    assert config.evaluate.alphas == (0.5,)
    assert config.grid.grid("value").length_edges == (0, 7)
    assert config.decode.alpha == DecodeConfig().alpha, "what nobody mentions keeps its default"


def test_an_empty_file_is_the_defaults(written):
    assert load_config(written("{}")) == PipelineConfig()


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("decode: {bta: 0.1}", [], r"'decode\.bta'.*no stage reads this key.*did you mean 'beta'"),
        ("decoed: {beta: 0.1}", [], r"'decoed'.*did you mean 'decode'"),
        ("{}", ["train.steps=3"], r"'train'.*no stage reads this key"),
        ("{}", ["critic.learning_rat=3"], r"did you mean 'learning_rate'"),
        ("{}", ["decode.zzzzzz=3"], r"known keys here are alpha, beta"),
        ("{}", ["decode.beta"], r"override 'decode\.beta'.*section\.key=value"),
        ("decode: {beta: much}", [], r"c\.yaml.*much"),
        ("decode: {n: 1.5}", [], r"c\.yaml.*1\.5"),
        ("decode: {beta: -1}", [], r"beta=-1.*price"),
        ("{}", ["decode.alpha=2"], r"alpha=2"),
        ("{}", ["grid.length_edges=[0,5,5]"], r"length_edges=\[0, 5, 5\]"),
        ("{}", ["grid.value_centres=[0,2]"], r"reward_centres"),
        ("decode: [1, 2]", [], r"c\.yaml"),
        ("- 1\n- 2\n", [], r"c\.yaml"),
        ("decode: {beta: 0.1", [], r"c\.yaml"),
    ],
)
def test_mistakes_in_a_file_or_an_override_are_named(written, text, overrides, message):
    with pytest.raises(UsageError, match=message):
        load_config(written(text), overrides)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.yaml: there is no such file\. Fix: "):
        load_config(tmp_path / "nowhere.yaml")


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, r"alpha=-0\.1"),
        ({"alpha": 1.1}, r"alpha=1\.1"),
        ({"alpha": NAN}, r"alpha=nan"),
        ({"beta": -1.0}, r"beta=-1\.0"),
        ({"beta": INF}, r"beta=inf"),
        ({"beta": NAN}, r"beta=nan"),
        ({"n": 0}, r"n=0"),
        ({"interval": 0}, r"interval=0"),
        ({"window": 0}, r"window=0"),
        ({"max_tokens": 0}, r"max_tokens=0"),
        ({"max_num_seqs": 0}, r"max_num_seqs=0"),
        ({"candidates": "all"}, r"candidates='all'.*published, exhaustive, branching"),
        ({"strategy": "best"}, r"strategy='best'.*zip_rc, fixed"),
        ({"answer": "first"}, r"answer='first'.*value, vote"),
        ({"n": 11, "candidates": "exhaustive"}, r"n=11 with candidates='exhaustive'.*2\^11"),
        ({"strategy": "length_budget"}, r"length_budget=0"),
        ({"length_budget": 100}, r"length_budget=100 with strategy='zip_rc'"),
        ({"temperature": 0.0}, r"temperature=0.0 with n=8: greedy"),
        ({"beta": 1e39}, r"beta=1e\+39"),
        ({"top_k": 2**31}, r"top_k=2147483648"),
        ({"interval": 2**31}, r"interval=2147483648"),
        ({"selection_exponent": -1.0}, r"selection_exponent=-1"),
        ({"selection_exponent": NAN}, r"selection_exponent=nan"),
        ({"selection_exponent": INF}, r"selection_exponent=inf"),
        ({"joint_temperature": 0.0}, r"joint_temperature=0"),
        ({"joint_temperature": INF}, r"joint_temperature=inf"),
        ({"n": 2.5}, r"n=2\.5: it is not a whole number"),
        ({"beta": "0.1"}, r"beta='0\.1': it is not a number"),
        ({"add_back": 1}, r"add_back=1: it is not true or false"),
        ({"joint_top_p": 0.0}, r"joint_top_p=0"),
        ({"joint_top_p": 1.5}, r"joint_top_p=1\.5"),
        ({"temperature": -1.0}, r"temperature=-1"),
        ({"temperature": NAN}, r"temperature=nan"),
        ({"temperature": INF}, r"temperature=inf"),
        ({"temperature": 1e-46}, r"temperature=1e-46: logits are divided by it, in float32"),
        ({"temperature": 1e39}, r"temperature=1e\+39"),
        ({"joint_temperature": 1e-46}, r"joint_temperature=1e-46"),
        ({"top_k": -2}, r"top_k=-2"),
        ({"top_p": 0.0}, r"top_p=0"),
        ({"top_p": 1.1}, r"top_p=1\.1"),
        ({"min_p": -0.1}, r"min_p=-0\.1"),
        ({"min_p": 1.1}, r"min_p=1\.1"),
    ],
)
def test_impossible_decode_settings(options, message):
    with pytest.raises(UsageError, match=message + r".*Fix: "):
        DecodeConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.0, "beta": 0.0},
        {"alpha": 1.0, "n": 8, "max_num_seqs": 3},
        {"n": 100},
        {"n": 9, "max_num_seqs": 8, "candidates": "branching"},
        {"n": 10, "candidates": "exhaustive"},
        {"n": 8, "max_num_seqs": 3, "candidates": "branching"},
        {"strategy": "length_budget", "length_budget": 1},
        {"temperature": 0.0, "n": 1, "top_p": 1.0, "min_p": 1.0, "selection_exponent": 0.0},
        {"n": np.int64(3), "alpha": np.float32(0.5), "beta": 1, "stop_token_ids": (np.int32(7),)},
    ],
)
def test_the_limits_themselves_are_allowed(options):
    assert dataclasses.asdict(DecodeConfig(**options)).items() >= options.items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "length"}, r"label='length'.*correct, value"),
        ({"trainable": "head"}, r"trainable='head'.*all, zip_rows"),
        ({"kl_kind": "both"}, r"kl_kind='both'.*forward_topk, forward, reverse"),
        ({"kl_mask": "none"}, r"kl_mask='none'.*unused, cells"),
        ({"kl_mask": "cells"}, r"kl_mask='cells' with kl_weight=0\.0.*belongs to the KL"),
        ({"kl_mask": "cells", "kl_weight": 1.0, "lm_weight": 1.0}, r"kl_mask='cells' with.*"
                                                                  r"lm_weight=1\.0"),
        ({"mean_over": "tokens"}, r"mean_over='tokens'.*positions, rollouts"),
        ({"unfinished_length": "cut"}, r"unfinished_length='cut'.*censored, ended"),
        *[({name: 0}, rf"{name}=0") for name in ("steps", "batch_rows", "row_tokens", "kl_top_k",
        "loss_chunk", "log_every")],
        *[({name: 0.0}, rf"{name}=0") for name in ("learning_rate", "clip", "zip_lr_multiplier",
        "save_seconds")],
        *[({name: NAN}, rf"{name}=nan") for name in ("learning_rate", "clip", "zip_lr_multiplier",
        "save_seconds")],
        *[({name: -1.0}, rf"{name}=-1") for name in ("kl_weight", "lm_weight", "joint_weight",
        "weight_decay")],
        ({"warmup": 1.0}, r"warmup=1"),
        ({"warmup": -0.1}, r"warmup=-0\.1"),
        ({"trainable": "zip_rows", "kl_weight": 1.0}, r"trainable='zip_rows' with "
                                                      r"kl_weight=1\.0.*no gradient"),
        ({"trainable": "zip_rows", "lm_weight": 1.0}, r"trainable='zip_rows' with.*lm_weight=1\.0"),
    ],
)  # fmt: skip
def test_impossible_training_settings(options, message):
    with pytest.raises(UsageError, match=message + r".*Fix: "):
        TrainConfig(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *[(lambda name=name: ModelConfig(**{name: 0}), rf"model\.{name}=0") for name in
          ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff",
          "max_positions")],
        (lambda: ModelConfig(n_heads=4, n_kv_heads=3), r"n_heads=4, n_kv_heads=3.*multiple"),
        (lambda: ModelConfig(head_dim=5), r"head_dim=5.*even"),
        (lambda: SamplingConfig(top_p=NAN), r"top_p=nan"),
        (lambda: SamplingConfig(min_p=NAN), r"min_p=nan"),
        (lambda: RolloutConfig(samples=0), r"rollout\.samples=0"),
        (lambda: RolloutConfig(temperature=-1.0), r"temperature=-1"),
        (lambda: LabelConfig(last=0), r"label\.last=0"),
        (lambda: LabelConfig(batch_tokens=0), r"label\.batch_tokens=0"),
        (lambda: EvaluateConfig(betas=(0.02,)), r"headline_beta=\[0\.05, 0\.05\] with "
                                                r"evaluate\.betas=\[0\.02\]"),
        (lambda: EvaluateConfig(samples=0), r"evaluate\.samples=0"),
        (lambda: SelfEvaluationConfig(question="?", yes=""), r"yes='', no='No'"),
        (lambda: SelfEvaluationConfig(chat_template_kwargs={"enable_thinking": False}),
        "without a question"),
        (
            lambda: PipelineConfig(evaluate=EvaluateConfig(self_evaluation=SelfEvaluationConfig(question="Right?"))),  # noqa: E501
            r"self_evaluation\.question with prompt\.style='raw'",
        ),
        (lambda: EvaluateConfig(bootstrap=0), r"evaluate\.bootstrap=0"),
        (lambda: PolicyConfig(unsure=7.0), r"policy\.unsure=7\.0"),
        (lambda: PolicyConfig(train=TrainConfig(eval_rollouts=5)),
        r"policy\.train\.eval_rollouts=5"),
        (lambda: PipelineConfig(dtype="float16"), r"dtype='float16'"),
        (lambda: EvaluateConfig(candidates=("none",)), r"evaluate\.candidates='none'"),
        (lambda: EvaluateConfig(alphas=(0.1,)), r"headline_beta=.*one per alpha"),
        (lambda: EvaluateConfig(prompts=-1), r"evaluate\.prompts=-1"),
        (lambda: EvaluateConfig(alphas=(), headline_beta=()), r"evaluate\.alphas=\[\].*Fix: give "
                                                              r"at least one"),
        (lambda: EvaluateConfig(betas=()), r"evaluate\.betas=\[\]"),
        (lambda: EvaluateConfig(candidates=()), r"evaluate\.candidates=\[\]"),
        (lambda: EvaluateConfig(seed=-1), r"evaluate\.seed=-1.*Fix: use one from 0"),
        (lambda: EvaluateConfig(seed=2**32), r"evaluate\.seed=4294967296"),
        (
            lambda: PipelineConfig(evaluate=EvaluateConfig(alphas=(0.1, 1.5))),
            r"evaluate\.alphas, betas, candidates: alpha=1\.5: it weighs .*Fix: use a number in "
            r"\[0, 1\]\.$",
        ),
        (lambda: PipelineConfig(evaluate=EvaluateConfig(betas=(0.05, -1.0))), r"evaluate\.alphas, "
                                                                              r"betas, candidates: beta=-1\.0"),  # noqa: E501
        (
            lambda: PipelineConfig(decode=DecodeConfig(n=12),
            evaluate=EvaluateConfig(candidates=("published", "exhaustive"))),
            r"evaluate\.alphas, betas, candidates: n=12 with candidates='exhaustive'",
        ),
        (
            lambda: PipelineConfig(evaluate=EvaluateConfig(betas=(0.05, 0.05))),
            r"evaluate\.alphas, betas, candidates: \['published alpha=0\.1 beta=0\.05', .* occur "
            r"twice",
        ),
        (lambda: PipelineConfig(decode=DecodeConfig(n=1, temperature=0.0)), r"evaluate\.samples=8 "
                                                                            r"with decode: "
                                                                            r"temperature=0\.0 "
                                                                            r"with n=8"),
        (lambda: GridConfig().grid("length"), r"label='length'"),
        (lambda: GridConfig(value_centres=(1.0, 0.0)).grid("value"), r"reward_centres"),
    ],
)  # fmt: skip
def test_impossible_settings_of_the_other_stages(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_an_evaluation_may_have_any_number_of_samples():
    """Also where the search scores every subset of its few prefixes."""
    for candidates in ("published", "exhaustive", "branching"):
        config = PipelineConfig(
            decode=DecodeConfig(n=4, candidates=candidates), evaluate=EvaluateConfig(samples=64)
        )
        assert config.fixed_decode.n == 64
        assert config.decode.n == 4


def test_a_budget_of_the_search_does_not_cut_the_samples_that_it_is_compared_with():
    config = PipelineConfig(
        decode=DecodeConfig(n=4, token_budget=100, time_budget=2.0, beta=0.5),
        evaluate=EvaluateConfig(samples=6),
    )
    fixed = config.fixed_decode
    assert (fixed.strategy, fixed.n, fixed.token_budget, fixed.time_budget) == ("fixed", 6, 0, 0.0)
    assert fixed.beta == 0.5


def test_empty_grids_are_the_authors_and_each_label_has_its_own_centres():
    grid = GridConfig(correct_centres=(0.0, 0.5, 1.0), length_edges=(0, 9))
    assert grid.grid("correct").reward_centres == (0.0, 0.5, 1.0)
    assert grid.grid("value").n_reward == 7
    assert GridConfig().grid("correct").length_edges[-1] == 32768
