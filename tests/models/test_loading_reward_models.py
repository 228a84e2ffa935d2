"""Reward models read from the files of transformers, against transformers itself."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import zip_rc_jax
from harness.reward_models import saved_reward_model
from harness.small_tokenizers import chatml, gemma, llama
from zip_rc_jax.evaluation.reward_model import score, score_ids
from zip_rc_jax.models.io.reward_models import RewardCheckpoint, load_reward_model
from zip_rc_jax.models.reward_model import RewardModel, forward_parameters, up_to_pooled
from zip_rc_jax.runtime.errors import UsageError

# Settings of every model differ from the defaults of its config class (see hf_models).
BODIES = {
    "llama": llama,
    "llama_untied": llama,
    "qwen2_sliding": chatml,
    "qwen3": chatml,
    "qwen3_sliding": chatml,
    "gemma3": gemma,
    "gemma3_tied": gemma,
}
LENGTHS = (14, 3, 9, 1, 40, 6)
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Pair:
    directory: pathlib.Path
    torch: torch.nn.Module
    ours: RewardModel


@pytest.fixture(scope="module", params=BODIES)
def pair(request, tmp_path_factory) -> Pair:
    directory = tmp_path_factory.mktemp(request.param)
    model = saved_reward_model(directory, request.param, BODIES[request.param]())
    return Pair(directory, model, load_reward_model(directory))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """One small directory, for what does not depend on the body."""
    directory = tmp_path_factory.mktemp("saved")
    saved_reward_model(directory, "qwen3", num_hidden_layers=1)
    return directory


def sequences(pair):
    """Sequences of different lengths. One ends with padding ids that are its own, one holds such an
    id in its middle, and one is nothing else."""
    rng, pad = np.random.default_rng(0), pair.ours.pad_id
    found = [rng.integers(0, pair.ours.config.vocab_size, n).tolist() for n in LENGTHS]
    found = [[i if i != pad else i - 1 for i in ids] for ids in found]
    return [*found, [5, 6, 7, pad, pad], [8, pad, 9], [pad, pad]]


def torch_scores(model, found, pad, side="right"):
    """Scores of one padded batch."""
    width = max(map(len, found))
    ids, mask = np.full((len(found), width), pad), np.zeros((len(found), width), int)
    for row, one in enumerate(found):
        place = slice(0, len(one)) if side == "right" else slice(width - len(one), width)
        ids[row, place], mask[row, place] = one, 1
    with torch.no_grad():
        out = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    return out.logits[:, 0].float().numpy()


def ours(model, found, **options):
    return score_ids(model, [up_to_pooled(ids, model.pad_id) for ids in found], **options)


# ---- the same scores


def test_scores_are_those_of_transformers_on_a_padded_batch(pair):
    found = sequences(pair)
    expected = torch_scores(pair.torch, found, pair.ours.pad_id)
    assert len(set(expected.round(3))) == len(found), "the scores tell the sequences apart"
    np.testing.assert_allclose(ours(pair.ours, found), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_every_parameter_matters_to_the_score(pair):
    found = sequences(pair)
    before = ours(pair.ours, found)
    for path, _ in jax.tree_util.tree_leaves_with_path(pair.ours.params):
        params = jax.tree_util.tree_map_with_path(
            lambda p, x, path=path: x * 0 if p == path else x, pair.ours.params
        )
        changed = ours(dataclasses.replace(pair.ours, params=params), found)
        assert np.abs(changed - before).max() > 100 * TOLERANCE, jax.tree_util.keystr(path)


@pytest.mark.parametrize("pair", ["qwen3"], indirect=True)
def test_bfloat16_parameters_give_the_scores_of_transformers_in_bfloat16(pair):
    found, model = sequences(pair), load_reward_model(pair.directory, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    half = AutoModelForSequenceClassification.from_pretrained(
        pair.directory, dtype=torch.bfloat16, attn_implementation="eager"
    )
    expected = torch_scores(half, found, pair.ours.pad_id)
    spread = np.ptp(expected)
    assert np.abs(ours(model, found) - expected).max() < 0.05 * spread


@pytest.mark.parametrize("pair", ["qwen3"], indirect=True)
def test_the_score_is_read_at_the_last_token_that_is_no_padding_wherever_padding_lies(pair):
    left = torch_scores(pair.torch, sequences(pair), pair.ours.pad_id, side="left")
    found = ours(pair.ours, sequences(pair))
    # what is padding alone is scored where the row begins
    np.testing.assert_allclose(found[:-1], left[:-1], atol=TOLERANCE, rtol=TOLERANCE)


def test_without_a_padding_id_the_last_token_is_scored(tmp_path):
    model = saved_reward_model(tmp_path, pad_token_id=None)
    loaded = load_reward_model(tmp_path)
    assert loaded.pad_id is None
    for ids in ([1, 2, 3], [4], [400, 400]):
        expected = model(torch.tensor([ids])).logits.item()  # one at a time: it refuses batches
        assert ours(loaded, [ids])[0] == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("pair", ["llama_untied"], indirect=True)
def test_scores_do_not_depend_on_the_size_of_a_batch(pair):
    found = sequences(pair)
    expected = torch_scores(pair.torch, found, pair.ours.pad_id)
    np.testing.assert_allclose(
        ours(pair.ours, found, batch_tokens=100), expected, atol=TOLERANCE, rtol=TOLERANCE
    )


TURNS = [
    {"role": "user", "content": "What is 17 + 25?"},
    {"role": "assistant", "content": "The answer is 42."},
]


@pytest.mark.parametrize("pair", ["llama", "qwen3", "gemma3"], indirect=True)
def test_a_conversation_is_rendered_and_scored_as_transformers_does(pair):
    """Template, special tokens and pooled position together."""
    theirs = AutoTokenizer.from_pretrained(pair.directory)
    conversations = [TURNS, [*TURNS, TURNS[0], {"role": "assistant", "content": "43, no, 41"}]]
    expected = []
    for turns in conversations:
        ids = theirs.apply_chat_template(turns, return_dict=False)
        expected.append(pair.torch(torch.tensor([ids])).logits.item())
    found = score(pair.ours, conversations)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_forward_parameters_are_those_of_the_model_without_its_embedding(pair):
    counted = sum(
        parameter.numel()
        for name, parameter in pair.torch.named_parameters()
        if "embed_tokens" not in name and name != "score.weight"
    )
    assert forward_parameters(pair.ours.config) == counted


# ---- kinds of checkpoints


def changed(saved, directory, settings=None, change=None):
    """A copy with other settings (None deletes one) or tensors."""
    shutil.copytree(saved, directory)
    path = directory / "config.json"
    written = json.loads(path.read_text()) | (settings or {})
    path.write_text(json.dumps({k: v for k, v in written.items() if v is not None}))
    if change:
        tensors = load_file(directory / "model.safetensors")
        save_file(change(tensors), directory / "model.safetensors")
    return directory


def without(tensors, name="score.weight"):
    return {key: array for key, array in tensors.items() if key != name}


D = 48  # hidden size of the models
CASES = {
    "a causal LM": (
        {"architectures": ["Qwen3ForCausalLM"]}, None,
        "Qwen3ForCausalLM, which gives no score. Fix: .*zip_rc_jax.load",
    ),
    "no weights": ({}, without, "it has no score.weight.*Fix: use a checkpoint that transformers"),
    "weights of another name": (
        {}, lambda t: without(t) | {"score.0.weight": t["score.weight"]},
        "it has no score.weight .*score.0.weight",
    ),
    "two labels": (
        {"id2label": {"0": "bad", "1": "good"}}, None,
        "num_labels=2: a reward is one number. Fix: use a model with one label",
    ),
    "two rows": (
        {"id2label": None, "label2id": None},
        lambda t: t | {"score.weight": np.ones((2, D), np.float32)}, "num_labels=2",
    ),
    "another width": (
        {}, lambda t: t | {"score.weight": np.ones((1, 5), np.float32)},
        r"score.weight of .*\(1, 5\) instead of \(1, 48\)",
    ),
    "a bias": (
        {}, lambda t: t | {"score.bias": np.ones(1, np.float32)},
        "1 not in this architecture .score.bias.",
    ),
    "NaN": ({}, lambda t: t | {"score.weight": t["score.weight"] * np.nan}, "score.weight.*NaN"),
    "a damaged body": (
        {}, lambda t: without(t, "model.norm.weight"), "1 missing .model.norm.weight.",
    ),
    "an unknown body": ({"model_type": "mistral"}, None, "model_type 'mistral'.*llama, qwen2"),
    "LFM2": (
        {"model_type": "lfm2", "architectures": ["Lfm2ForSequenceClassification"],
        "layer_types": ["full_attention"]}, None, "its body is lfm2, and bodies of llama",
    ),
    "a padding id": ({"pad_token_id": "x"}, None, "pad_token_id"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_reward_model_is_refused(case, saved, tmp_path):
    settings, change, words = CASES[case]
    directory = changed(saved, tmp_path / "model", settings, change)
    with pytest.raises(UsageError, match=words) as found:
        load_reward_model(directory)
    assert len(str(found.value)) < 900


def test_paths_without_a_hugging_face_directory_are_refused(tmp_path):
    for path, words in (
        ("embedded", "there is no such directory"),
        (tmp_path, "there is no config.json there"),
        (tmp_path / "model.gguf", "not read from GGUF"),
        (pathlib.Path(zip_rc_jax.__file__).parent / "assets" / "chain_sum_zip", "gives no score"),
    ):
        with pytest.raises(UsageError, match=words):
            load_reward_model(path)


def test_a_name_that_is_no_path_is_fetched_from_the_hub(saved, monkeypatch):
    asked = []

    def fetch(name, allow_patterns):
        asked.append(name)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    model = zip_rc_jax.load_reward_model("org/name")
    assert (asked, model.info) == (["org/name"], {"source": str(saved)})


def test_a_reward_model_is_no_policy(saved, tmp_path):
    words = "it is a reward model.*Fix: load it with `zip_rc_jax.load_reward_model`"
    with pytest.raises(UsageError, match=words):
        zip_rc_jax.load(saved)
    with pytest.raises(UsageError, match=words):  # known by its tensors alone
        zip_rc_jax.load(changed(saved, tmp_path / "model", {"architectures": None}))


def test_a_checkpoint_that_does_not_name_its_class_is_known_by_its_tensors(saved, tmp_path):
    directory = changed(saved, tmp_path / "model", {"architectures": None})
    assert score(load_reward_model(directory), [TURNS]) == score(load_reward_model(saved), [TURNS])


def test_the_unembedding_of_the_model_that_it_was_trained_from_is_not_read(saved, tmp_path):
    directory = changed(
        saved, tmp_path / "model", {},
        lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1},
    )  # fmt: skip
    assert score(load_reward_model(directory), [TURNS]) == score(load_reward_model(saved), [TURNS])


def test_a_multimodal_gemma_is_read_as_its_text_model(tmp_path):
    """Gemma3ForSequenceClassification: nested settings and longer names."""
    saved_reward_model(tmp_path / "text", "gemma3", gemma())

    def rename(tensors):
        return {
            name.replace("model.", "model.language_model.", 1): array
            for name, array in tensors.items()
        } | {"model.vision_tower.x.weight": np.ones(3, np.float32)}

    text = json.loads((tmp_path / "text" / "config.json").read_text())
    settings = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForSequenceClassification"],
        "text_config": text,
        "vision_config": {},
    }
    directory = changed(tmp_path / "text", tmp_path / "whole", settings, rename)
    alone, nested = load_reward_model(tmp_path / "text"), load_reward_model(directory)
    assert (alone.config, alone.pad_id) == (nested.config, nested.pad_id)
    jax.tree.map(np.testing.assert_array_equal, alone.params, nested.params)


def test_opening_a_checkpoint_reads_no_weight(saved, monkeypatch):
    checkpoint = RewardCheckpoint.open(saved)
    read = []
    monkeypatch.setattr(
        type(checkpoint.source), "read", lambda self, name: read.append(name) or np.zeros((1, D))
    )
    RewardCheckpoint.open(saved)
    assert read == []


def test_a_conversation_that_does_not_fit_is_refused_and_not_cut(saved):
    long = [TURNS[0], {"role": "assistant", "content": "42 " * 300}]
    with pytest.raises(UsageError, match=r"1 of 2 conversations.*has \d+ tokens.*200 positions"):
        score(load_reward_model(saved), [TURNS, long])
