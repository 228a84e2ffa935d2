"""Published models as a user meets them: one name in, a `LanguageModel` out, and back again; single
tensors are in test_families."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import zip_rc_jax
from harness.authors_definitions import LENGTH_EDGES, bin_of
from harness.forwards import full
from harness.hf_models import error, torch_logits, torch_model
from harness.small_tokenizers import chatml, gemma, llama
from harness.tiny import TINY_GRID, TINY_MODEL, tiny_lm
from zip_rc_jax.cli.main import main
from zip_rc_jax.data.problems import Problem
from zip_rc_jax.grid import Grid
from zip_rc_jax.head import joint_log_probs
from zip_rc_jax.inference.engine import Engine
from zip_rc_jax.models.io import huggingface
from zip_rc_jax.models.io.digests import json_digest
from zip_rc_jax.models.io.families import read_config
from zip_rc_jax.models.io.load import export, load
from zip_rc_jax.models.io.stored import DIGESTS
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.transformer import param_axes
from zip_rc_jax.pipeline.rollouts import as_rollouts
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.sharding import DECODE_RULES, TRAIN_RULES, Layout, make_mesh

# one model of every family
UNTIED = {
    "llama_untied": llama,
    "qwen2_sliding": chatml,
    "qwen3_sliding": chatml,
    "lfm2": chatml,
    "gemma3": gemma,
}
TIED = {
    "llama": llama,
    "qwen2": chatml,
    "qwen3": chatml,
    "lfm2_tied": chatml,
    "gemma3_tied": gemma,
}
TOKENIZERS = UNTIED | TIED
PROMPTS = ["What is 17 + 25?", "Größe, then answer"]
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Published:
    """What a publisher puts on the hub, and the torch model in it."""

    directory: pathlib.Path
    tokenizer: Tokenizer
    torch: torch.nn.Module

    @functools.cached_property
    def lm(self) -> LanguageModel:
        return load(self.directory)


def publish(name, directory, spare=0, dtype=torch.float32) -> Published:
    """Saves model `name` with its tokenizer; the vocabulary has `spare` rows more than the
    tokenizer has ids."""
    tokenizer = TOKENIZERS[name]()
    eos = list(tokenizer.eos_ids)
    model = torch_model(
        name,
        vocab_size=tokenizer.size + spare,
        eos_token_id=eos[0],
        bos_token_id=None,
        pad_token_id=None,
    ).to(dtype)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return Published(directory, tokenizer, model)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Models by name (and spare rows), each made and loaded once."""
    return functools.cache(
        lambda name, spare=0: publish(name, tmp_path_factory.mktemp(name), spare)
    )


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Tiny models spend their time on compiling."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def with_random_head(lm: LanguageModel) -> LanguageModel:
    """A head that finds some prefixes much better than others, so that the search pauses, resumes,
    branches and starts again."""
    found = lm.with_head(TINY_GRID, "value")
    rows = (
        np.random.default_rng(1).standard_normal(found.params["zip_rows"].shape)
        * 6
        / lm.config.d_model**0.5
    )
    return dataclasses.replace(
        found, params=found.params | {"zip_rows": jnp.asarray(rows, jnp.float32)}
    )


def all_logits(lm: LanguageModel, tokens) -> np.ndarray:
    """Logits `[B, T, V]` of one forward without a cache, reserved ids included."""
    return full(
        dataclasses.replace(lm.config, tied=False),
        lm.params["body"] | {"unembed": lm.folded_table()},
        tokens,
    )


def some_tokens(lm: LanguageModel) -> np.ndarray:
    return (
        np.random.default_rng(0)
        .integers(0, min(lm.tokenizer.size, lm.config.vocab_size), (3, 14))
        .astype(np.int32)
    )


def read_by_torch(directory):
    """The model in `directory`, which transformers must find complete."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def reserved_softmax(logits, head) -> np.ndarray:
    """The joint `[..., B_V, B_T]` as someone without this package would compute it."""
    cells = torch.softmax(
        torch.from_numpy(logits[..., head.first_id : head.last_id]), dim=-1
    ).numpy()
    return cells.reshape(*logits.shape[:-1], head.grid.n_reward, head.grid.n_length)


def assert_same_params(one: LanguageModel, other: LanguageModel):
    assert jax.tree.structure(one.params) == jax.tree.structure(other.params)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


@pytest.mark.parametrize("output_bias", [True, False])
def test_the_digest_says_nothing_of_output_biases_where_all_projections_have_them(output_bias):
    """Records made before the setting was there hold digests without it."""
    sizes = {"n_layers": 1, "attention_bias": True, "attention_output_bias": output_bias}
    lm = tiny_lm(dataclasses.replace(TINY_MODEL, **sizes))
    config = zip_rc_jax.config.to_dict(lm.config)
    del config["attention_output_bias"]
    hasher = hashlib.blake2b(json.dumps([config, lm.head.identity()]).encode(), digest_size=16)
    for leaf in jax.tree.leaves(lm.params):
        hasher.update(np.asarray(leaf).tobytes())
    assert (lm.digest() == hasher.hexdigest()) == output_bias


# ---- a Hugging Face directory


@pytest.mark.parametrize("name", UNTIED)
def test_a_directory_is_a_language_model(shelf, name):
    published = shelf(name)
    lm, ours = published.lm, published.tokenizer
    assert lm.config == read_config(published.torch.config.to_dict(), "x")[1]
    assert (lm.head, lm.info) == (None, {"source": str(published.directory)})
    assert {leaf.dtype for leaf in jax.tree.leaves(lm.params)} == {jnp.dtype("float32")}
    assert len(lm.tokenizer.eos_ids) == 2, (
        "one is the tokenizer's, the other is in the list of generation_config.json"
    )
    assert (lm.tokenizer.eos_ids, lm.tokenizer.size) == (ours.eos_ids, ours.size)
    assert lm.tokenizer.encode(PROMPTS[0]) == ours.encode(PROMPTS[0])
    chat = [{"role": "user", "content": "Hi"}]
    theirs = AutoTokenizer.from_pretrained(published.directory).apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert lm.tokenizer.chat(chat) == theirs


def greedy(published, prompt, banned, count):
    """The continuation by `generate` of transformers, which never emits the ids `banned`."""
    ids = torch.tensor([published.tokenizer.encode(prompt)])
    found = published.torch.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
        suppress_tokens=banned.tolist() or None,
        eos_token_id=list(published.tokenizer.eos_ids), pad_token_id=0,
    )  # fmt: skip
    return tuple(found[0, ids.shape[1] :].tolist())


SEARCH = zip_rc_jax.DecodeConfig(
    candidates="branching",
    n=4,
    max_num_seqs=10,
    interval=2,
    window=2,
    max_tokens=12,
    alpha=0.5,
    beta=0.1,
    top_k=1,
)


def happened(result):
    """Which moves the search made: "pause", "resume", "fork" of a prefix, "late" start of another
    sample."""
    moves, paused = set(), set()
    for number, decision in enumerate(result.trace):
        for prefix, copies, finished in zip(
            decision.prefix_ids, decision.multiplicity, decision.finished, strict=True
        ):
            if prefix < 0:
                moves |= {"late"} if copies and number else set()
            elif not finished:
                moves |= {"pause"} if not copies else {"fork"} if copies > 1 else set()
                moves |= {"resume"} if copies and prefix in paused else set()
                (paused.discard if copies else paused.add)(prefix)
    return moves


@pytest.mark.parametrize(
    "name",
    [name if name == "lfm2" else pytest.param(name, marks=pytest.mark.slow) for name in UNTIED],
)
def test_the_search_without_temperature_writes_what_transformers_writes(shelf, name):
    """Every prefix, paused ones too.

    The rows of LFM2 hold convolution states, which move with them.
    """
    published = shelf(name)
    lm = with_random_head(published.lm)
    results = zip_rc_jax.decode(lm, PROMPTS, SEARCH)
    banned = np.flatnonzero(~lm.head.sampleable(published.lm.config.vocab_size))
    expected = [greedy(published, prompt, banned, SEARCH.max_tokens) for prompt in PROMPTS]
    assert all(len(set(tokens)) > 3 for tokens in expected), (
        "a model that repeats itself would hide a stale state"
    )
    assert expected[0] != expected[1]
    for result, tokens in zip(results, expected, strict=True):
        assert any(prefix.token_ids == tokens for prefix in result.prefixes)
        assert all(
            prefix.token_ids == tokens[: len(prefix.token_ids)] for prefix in result.prefixes
        )
    if name == "lfm2":
        assert set.union(*map(happened, results)) == {"pause", "resume", "fork", "late"}


def test_what_the_search_reads_while_it_samples_is_what_a_fresh_forward_says(shelf):
    """LFM2 at temperature 1, where every prefix is another text: their values from one forward of
    each, without cache and rows."""
    lm = with_random_head(shelf("lfm2").lm)
    results = zip_rc_jax.decode(lm, PROMPTS, dataclasses.replace(SEARCH, top_k=0))
    assert set.union(*map(happened, results)) >= {"pause", "resume"}
    assert len({prefix.token_ids for result in results for prefix in result.prefixes}) == 8
    for result in results:
        prompt = lm.tokenizer.encode(result.prompt)
        for prefix in result.prefixes:
            text = np.zeros(32, np.int32)  # of one length, so that the forward is compiled once
            text[: len(prompt) + len(prefix.token_ids)] = [*prompt, *prefix.token_ids]
            joints = np.exp(joint_log_probs(jnp.asarray(all_logits(lm, text[None])[0]), lm.head))
            # nobody reads the joint after the last token
            end = len(prompt) + len(prefix.token_ids) - (prefix.state == "finished")
            mean = joints[max(end - SEARCH.window, len(prompt) - 1) : end].mean(0)
            np.testing.assert_allclose(
                prefix.expected_reward, lm.head.grid.expected_reward(mean), atol=1e-5
            )
            if prefix.state == "paused":
                np.testing.assert_allclose(
                    prefix.expected_remaining, lm.head.grid.expected_length(mean), rtol=1e-4
                )


def test_parameters_may_be_bfloat16(shelf):
    lm = load(
        shelf("qwen3", 64).directory,
        dtype=jnp.bfloat16,
        zip_label="value",
        zip_first_id=chatml().size,
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(lm.params)} == {jnp.dtype("bfloat16")}
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)),
        lm.params["body"],
        shelf("qwen3", 64).lm.params["body"],
    )


@pytest.mark.parametrize("rules", [DECODE_RULES, TRAIN_RULES], ids=["decode", "train"])
@pytest.mark.parametrize("name", ["qwen3", "lfm2"])
def test_a_mesh_gets_its_shards_and_the_same_numbers(shelf, name, rules):
    # 67: an even number of rows
    published, layout = shelf(name, 67), Layout(make_mesh(data=2, fsdp=2, tensor=2), rules)
    lm = load(
        published.directory,
        layout=layout,
        zip_label="correct",
        zip_first_id=published.tokenizer.size,
    )
    one = load(published.directory, zip_label="correct", zip_first_id=published.tokenizer.size)
    assert_same_params(lm, one)
    assert len(lm.params["body"]["embed"].sharding.device_set) == 8
    axes = {"body": param_axes(lm.config), "zip_rows": ("cells", "embed")}
    jax.tree.map(
        lambda x, names: np.testing.assert_equal(
            x.sharding.is_equivalent_to(layout.sharding(names), x.ndim), True
        ),
        lm.params,
        axes,
    )


# ---- export


@pytest.mark.parametrize("name", TOKENIZERS)
def test_other_engines_read_the_joint_from_an_export(shelf, name, tmp_path):
    published = shelf(name)
    lm = with_random_head(published.lm)
    note = export(lm, tmp_path / "out", dtype=jnp.float32)
    assert ("no longer tied" in note) == (name in TIED)
    assert "folded" in note

    model, tokens = read_by_torch(tmp_path / "out"), some_tokens(lm)
    theirs, ours = torch_logits(model, tokens), all_logits(lm, tokens)
    joint = np.exp(joint_log_probs(jnp.asarray(ours), lm.head))
    np.testing.assert_allclose(reserved_softmax(theirs, lm.head), joint, atol=TOLERANCE)
    assert np.ptp(joint, axis=(0, 1)).max() > 0.5, "a joint that never changes would prove little"
    assert error(ours, theirs) < TOLERANCE
    before = torch_logits(published.torch, tokens)
    others = np.setdiff1d(np.arange(before.shape[-1]), np.arange(lm.head.first_id, lm.head.last_id))
    np.testing.assert_allclose(theirs[..., others], before[..., others], rtol=1e-5, atol=1e-5)

    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["zip_rc"] == lm.head.to_dict()
    assert (settings["tie_word_embeddings"], settings["dtype"], settings["eos_token_id"]) == (
        False,
        "float32",
        list(lm.tokenizer.eos_ids),
    )
    for role in ("bos", "pad"):
        token = lm.tokenizer.special_tokens.get(f"{role}_token")
        assert settings[f"{role}_token_id"] == (token and lm.tokenizer.backend.token_to_id(token))

    again = load(tmp_path / "out")
    assert (again.head, again.config) == (lm.head, dataclasses.replace(lm.config, tied=False))
    assert again.tokenizer.to_dict() == lm.tokenizer.to_dict()
    body = lm.params["body"] | {"unembed": lm.folded_table()}
    assert_same_params(again, dataclasses.replace(lm, params=lm.params | {"body": body}))


def test_a_model_stays_tied_where_its_reserved_rows_are_those_of_the_embedding(shelf, tmp_path):
    lm = load(shelf("qwen3", 64).directory, zip_label="value", zip_first_id=chatml().size)
    note = export(lm, tmp_path / "out", dtype=jnp.float32)
    assert note == "The reserved rows were folded into the unembedding."
    again = load(tmp_path / "out")
    assert (again.config, again.head) == (lm.config, lm.head)
    assert_same_params(again, lm)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_there_and_back_every_bit_is_the_same(name, tmp_path):
    published = publish(name, tmp_path / "in", dtype=torch.bfloat16)
    assert (
        export(load(tmp_path / "in"), tmp_path / "out") == "The unembedding was written as it is."
    )
    stored, written = (load_file(tmp_path / side / "model.safetensors") for side in ("in", "out"))
    assert written.keys() == stored.keys()
    for tensor, array in stored.items():
        assert (written[tensor].dtype, written[tensor].shape) == (array.dtype, array.shape)
        assert written[tensor].tobytes() == array.tobytes(), tensor
    old, new = (AutoConfig.from_pretrained(tmp_path / side).to_dict() for side in ("in", "out"))
    assert read_config(new, "out") == read_config(old, "in")
    assert [new[key] for key in ("model_type", "architectures", "dtype")] == [
        old[key] for key in ("model_type", "architectures", "dtype")
    ]
    assert "zip_rc" not in new
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "eos_token_id": list(published.tokenizer.eos_ids)
    }


def test_an_export_may_have_several_shards(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 40_000)
    lm = with_random_head(shelf("qwen3").lm)
    export(lm, tmp_path / "out", dtype=jnp.float32)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert shards == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    assert len(shards) > 3
    index = json.loads((tmp_path / "out" / huggingface.INDEX).read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(
        x.nbytes for shard in shards for x in load_file(tmp_path / "out" / shard).values()
    )
    tokens = some_tokens(lm)
    assert (
        error(
            all_logits(load(tmp_path / "out"), tokens),
            torch_logits(read_by_torch(tmp_path / "out"), tokens),
        )
        < TOLERANCE
    )


def test_an_existing_directory_is_refused_before_anything_is_loaded(shelf, tmp_path, capsys):
    assert main(["export", "there/is/no/such/model", str(tmp_path)]) == 2
    assert f"directory {tmp_path}: it exists and is not overwritten" in capsys.readouterr().err
    with pytest.raises(UsageError, match="it exists"):
        export(shelf("qwen3").lm, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failure_in_the_middle_leaves_nothing(shelf, tmp_path, monkeypatch):
    saved = []

    def fails_later(held, path, **options):
        saved.append(path)
        if len(saved) == 3:
            raise OSError("No space left on device")
        path.write_bytes(b"x")

    monkeypatch.setattr(huggingface, "SHARD_BYTES", 40_000)
    monkeypatch.setattr(huggingface, "save_file", fails_later)
    with pytest.raises(UsageError, match="No space left.*nothing of it was kept"):
        export(shelf("qwen3").lm, tmp_path / "out")
    assert len(saved) == 3
    assert not list(tmp_path.iterdir())


def test_the_embedded_model_can_be_exported(tmp_path, capsys):
    assert (
        main(["export", "embedded:chain_sum_zip", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    )
    assert "out. The reserved rows were folded into the unembedding." in " ".join(
        capsys.readouterr().out.split()
    )
    lm, model = load("embedded:chain_sum_zip"), read_by_torch(tmp_path / "out")
    question = "State the final answer to the following arithmetic problem: 4 + 3 - 2 + 9 ="
    tokens = np.asarray([lm.tokenizer.encode(question)], np.int32)
    np.testing.assert_array_equal(
        AutoTokenizer.from_pretrained(tmp_path / "out").encode(question), tokens[0]
    )
    joint = np.exp(joint_log_probs(jnp.asarray(all_logits(lm, tokens)), lm.head))
    np.testing.assert_allclose(
        reserved_softmax(torch_logits(model, tokens), lm.head), joint, atol=TOLERANCE
    )
    assert load(tmp_path / "out").head == lm.head


# ---- checkpoints of the paper's authors: reserved rows that config.json does not mention


@pytest.mark.parametrize(("label", "shape"), [("correct", (2, 8)), ("value", (7, 8))])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_sliding"], ids=["tied", "untied"])
def test_the_joint_of_the_authors_lies_where_the_caller_says(shelf, name, label, shape):
    published = shelf(name, 64)
    first = published.tokenizer.size + 3
    lm = load(published.directory, zip_label=label, zip_first_id=first)
    grid = Grid.authors(label).counting_the_end_token()
    assert (lm.head.grid, lm.head.label, lm.head.first_id) == (grid, label, first)
    assert (lm.head.grid.n_reward, lm.head.grid.n_length) == shape
    table = published.torch.get_output_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(
        lm.params["zip_rows"], table[first : first + lm.head.grid.n_cells]
    )
    np.testing.assert_array_equal(lm.folded_table(), table)
    tokens = some_tokens(lm)
    joint = np.exp(joint_log_probs(jnp.asarray(all_logits(lm, tokens)), lm.head))
    np.testing.assert_allclose(
        joint, reserved_softmax(torch_logits(published.torch, tokens), lm.head), atol=TOLERANCE
    )


def mean_length_of_each_of_their_bins():
    """Of all lengths that count the end token, by the bin that the authors' code labels them with.

    It labels a length without the end token. A bin `[a, b)` of whole numbers stands for its middle
    `(a + b) / 2`, which is half a token above the mean of its members.
    """
    lengths = np.arange(32769 + 1)
    bins = [bin_of(max(length - 1, 0), LENGTH_EDGES) for length in lengths]
    return np.array([lengths[np.equal(bins, b)].mean() + 0.5 for b in range(8)])


def test_what_their_checkpoints_say_about_length_counts_the_end_token(shelf):
    published = shelf("qwen3", 64)
    first = published.tokenizer.size
    lm = load(published.directory, zip_label="value", zip_first_id=first)
    assert lm.head.grid.length_edges == (0, 257, 513, 1025, 2049, 4097, 8193, 16385, 32769)
    lengths = np.arange(1, 33_000)
    theirs = [bin_of(length - 1, LENGTH_EDGES) for length in lengths]
    np.testing.assert_array_equal(lm.head.grid.length_bin(lengths), theirs)
    means = mean_length_of_each_of_their_bins()

    (one,) = zip_rc_jax.predict(lm, [PROMPTS[0]], progress=False)
    joint = reserved_softmax(torch_logits(published.torch, one.token_ids[None])[0], lm.head)
    np.testing.assert_allclose(one.remaining, joint.sum(-2) @ means, rtol=3e-5)

    options = {"n": 2, "max_num_seqs": 4, "interval": 3, "window": 2, "max_tokens": 6}
    (result,) = zip_rc_jax.decode(lm, PROMPTS[:1], return_joints=True, **options)
    for decision in result.trace:
        expected = np.where(decision.finished, 0, decision.joints.sum(-2) @ means)
        np.testing.assert_allclose(decision.expected_remaining, expected, rtol=3e-5)
    assert not all(result.trace[0].finished)


def test_the_edges_of_the_authors_are_taken_as_they_are_where_lengths_count_the_end_token(
    shelf, tmp_path
):
    published = shelf("qwen3", 64)
    given = {"zip_label": "value", "zip_first_id": published.tokenizer.size}
    lm = load(published.directory, **given, zip_length_counts="with_end")
    assert lm.head.grid == Grid.authors("value")
    with pytest.raises(UsageError, match=r"zip_length_counts='neither'.*with_end, without_end"):
        load(published.directory, **given, zip_length_counts="neither")
    with pytest.raises(UsageError, match=r"without zip_label.*give zip_label and zip_first_id"):
        load(published.directory, zip_length_counts="with_end")
    flags = ["--zip-label", "value", "--zip-first-id", str(published.tokenizer.size)]
    flags += ["--zip-length-counts", "with_end"]
    assert main(["export", str(published.directory), str(tmp_path / "ours"), *flags]) == 0
    assert load(tmp_path / "ours", **given).head.grid == Grid.authors("value")
    with pytest.raises(UsageError, match=r"says where its length bins end: \[0, 256.*leave it out"):
        load(tmp_path / "ours", **given, zip_length_counts="without_end")


def test_impossible_reserved_ranges_are_refused(shelf, tmp_path):
    published = shelf("qwen3", 64)
    size = published.tokenizer.size
    for flags, words in [
        (
            {"zip_label": "value"},
            "zip_label=value, zip_first_id=None: one without the other says nothing",
        ),
        ({"zip_first_id": size}, f"zip_label=None, zip_first_id={size}: one without the other"),
        ({"zip_label": "values", "zip_first_id": size}, "label='values'"),
        (
            {"zip_label": "value", "zip_first_id": size - 2},
            f"tokenizer really uses ids {size - 2}, {size - 1} of it.*start it at {size}",
        ),
        (
            {"zip_label": "value", "zip_first_id": size + 9},
            f"the vocabulary ends at {size + 63}, so 56 cells do not fit",
        ),
        ({"zip_label": "value", "zip_first_id": -1}, "reserved range -1"),
    ]:
        with pytest.raises(UsageError, match=words):
            load(published.directory, **flags)
    export(load(published.directory, zip_label="value", zip_first_id=size), tmp_path / "ours")
    assert (
        load(tmp_path / "ours", zip_label="value", zip_first_id=size).head
        == load(tmp_path / "ours").head
    )
    for flags in (
        {"zip_label": "correct", "zip_first_id": size},
        {"zip_label": "value", "zip_first_id": size + 1},
    ):
        with pytest.raises(UsageError, match=rf"says \('value', {size}\)"):
            load(tmp_path / "ours", **flags)
    with pytest.raises(UsageError, match="only foreign checkpoints need it"):
        load("embedded:chain_sum_zip", zip_label="value", zip_first_id=size)


def test_a_damaged_zip_block_is_named(shelf, tmp_path):
    published = shelf("qwen3", 64)
    size = published.tokenizer.size
    directory = shutil.copytree(published.directory, tmp_path / "m")
    settings = json.loads((directory / "config.json").read_text())
    good = {
        "grid": Grid.authors("value").to_dict(),
        "label": "value",
        "first_id": size,
        "used_ids": size,
    }
    for block, words in [
        (
            {key: value for key, value in good.items() if key != "grid"},
            "zip_rc block of .*damaged .*grid",
        ),
        (
            good | {"grid": {"reward_centres": [1, 0], "length_edges": [0, 8]}},
            "zip_rc block of .*damaged .*ascend",
        ),
        (good | {"first_id": "x"}, "zip_rc block of .*damaged"),
        ("x", "zip_rc block of .*damaged"),
        (good | {"first_id": size - 1}, f"tokenizer really uses ids {size - 1} of it"),
        (good | {"used_ids": size - 1}, f"it says {size - 1} used ids, its tokenizer uses {size}"),
    ]:
        (directory / "config.json").write_text(json.dumps(settings | {"zip_rc": block}))
        with pytest.raises(UsageError, match=words):
            load(directory)
    (directory / "config.json").write_text(json.dumps(settings | {"zip_rc": good}))
    assert load(directory).head.to_dict() == good


def test_the_command_line_decodes_and_exports_the_authors_checkpoints(shelf, tmp_path, capsys):
    published = shelf("qwen3_sliding", 64)
    flags = [
        str(published.directory),
        "--zip-label",
        "value",
        "--zip-first-id",
        str(published.tokenizer.size),
    ]
    options = {"n": 2, "max_num_seqs": 4, "interval": 3, "window": 2, "max_tokens": 6}
    arguments = [f"{key}={value}" for key, value in options.items()]
    assert (
        main(
            [
                "decode",
                *flags,
                "--prompt",
                PROMPTS[0],
                "--output",
                str(tmp_path / "results"),
                *arguments,
            ]
        )
        == 0
    )
    (row,) = map(json.loads, (tmp_path / "results" / "results.jsonl").read_text().splitlines())
    assert main(["export", *flags, str(tmp_path / "ours"), "--dtype", "float32"]) == 0
    assert "were folded into the unembedding" in " ".join(capsys.readouterr().out.split())
    (result,) = zip_rc_jax.decode(load(tmp_path / "ours"), PROMPTS[:1], **options)
    assert [prefix["token_ids"] for prefix in row["prefixes"]] == [
        list(prefix.token_ids) for prefix in result.prefixes
    ]
    assert row["expected_reward"] == pytest.approx(result.expected_reward)
    assert main(["decode", *flags[:3], "--prompt", PROMPTS[0]]) == 2
    assert "give both or neither" in capsys.readouterr().err


# ---- names on the hub


def test_a_name_that_is_no_path_is_fetched_from_the_hub(shelf, monkeypatch):
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(shelf("qwen3").directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    lm = load("org/name")
    assert_same_params(lm, shelf("qwen3").lm)
    ((name, patterns),) = asked
    assert name == "org/name"
    assert {"*.json", "*.safetensors", "*.jinja"} <= set(patterns)
    assert not any(pathlib.PurePath("pytorch_model.bin").match(pattern) for pattern in patterns)


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (LocalEntryNotFoundError("Cannot find it.\nSecond line"), "Cannot find it."),
        (OfflineModeIsEnabled("Cannot reach https://huggingface.co: offline mode"), "offline mode"),
        (RepositoryNotFoundError.__new__(RepositoryNotFoundError), "RepositoryNotFoundError"),
        (HFValidationError("Repo id must be so and so"), "Repo id must be"),
        (HTTPError("the proxy hung up"), "the proxy hung up"),
        (ConnectionResetError(), "ConnectionResetError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_hub_does_not_give_is_named(problem, words, monkeypatch, capsys):
    def fetch(*_, **__):
        raise problem

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(
        UsageError,
        match=f"model 'org/name': it is no local path, and the hub did not give it .*{words}",
    ) as found:
        load("org/name")
    assert "\n" not in str(found.value)
    assert main(["export", "org/name", "nowhere"]) == 2
    assert "model 'org/name'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "org/name/more",
        "name",
        "./org/name",
        "/org/name",
        "~/name",
        "org/name.gguf",
        "embedded:name",
    ],
)
def test_other_names_are_never_looked_up(name, monkeypatch):
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("it asked the hub")
    )
    with pytest.raises(UsageError):
        load(name)


def test_the_cache_of_the_hub_is_enough_when_offline(shelf, tmp_path, monkeypatch):
    """As `huggingface-cli download` leaves it: links in snapshots/ to content in blobs/, and the
    name of the newest in refs/."""
    repository, commit = tmp_path / "models--org--name", "0123456789abcdef0123456789abcdef01234567"
    snapshot = repository / "snapshots" / commit
    for directory in (repository / "blobs", repository / "refs", snapshot):
        directory.mkdir(parents=True)
    for number, path in enumerate(shelf("qwen3").directory.iterdir()):
        shutil.copy(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(pathlib.Path("..", "..", "blobs", str(number)))
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    lm = load("org/name")
    assert lm.info == {"source": str(snapshot)}
    assert_same_params(lm, shelf("qwen3").lm)
    with pytest.raises(UsageError, match="model 'org/other'"):
        load("org/other")


# ---- incomplete directories


def test_an_incomplete_directory_is_named(shelf, tmp_path):
    directory = shutil.copytree(shelf("qwen3").directory, tmp_path / "m")
    weights = directory / "model.safetensors"

    (directory / "pytorch_model.bin").write_bytes(b"")
    weights.rename(tmp_path / "weights")
    with pytest.raises(
        UsageError, match="model.safetensors is not there.*convert pytorch_model.bin to safetensors"
    ):
        load(directory)
    (tmp_path / "weights").rename(weights)

    for path in directory.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UsageError, match=f"tokenizer {directory}: there is none of tokenizer.json"):
        load(directory)

    for content in ("{", "[]"):
        (directory / "config.json").write_text(content)
        with pytest.raises(UsageError, match=f"{directory / 'config.json'}: it "):
            load(directory)
    (directory / "config.json").unlink()
    with pytest.raises(UsageError, match=f"model {directory}: "):
        load(directory)
    with pytest.raises(UsageError, match=f"model {tmp_path / 'none'}: there is no such directory"):
        load(tmp_path / "none")


def test_a_wrong_path_of_a_checkpoint_of_the_authors_is_said_to_be_wrong(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("none", "no such directory"),
        ("none.gguf", "no such directory"),
        ("empty", "no config.json there"),
    ):
        with pytest.raises(UsageError, match=f"model {tmp_path / name}: there is {words}"):
            load(tmp_path / name, zip_label="value", zip_first_id=151669)


def test_a_tokenizer_may_have_more_ids_than_the_model_has_rows(shelf):
    """Gemma's knows an image token that its text models lack.

    The model loads, takes a head, and refuses such a prompt.
    """
    published = shelf("gemma3", -1)
    lm = published.lm
    last = lm.tokenizer.backend.id_to_token(lm.tokenizer.size - 1)
    assert lm.tokenizer.size == lm.config.vocab_size + 1
    found = with_random_head(lm)
    assert found.config == lm.config
    assert found.without_head().config == lm.config
    engine = Engine(found, SEARCH, 0)
    assert [job.ids for job in engine.processor.tokenize(PROMPTS)] == [
        lm.tokenizer.encode(prompt) for prompt in PROMPTS
    ]
    with pytest.raises(UsageError, match=f"{lm.tokenizer.size - 1} .*reserved or unused"):
        engine.processor.tokenize([f"{PROMPTS[0]} {last}"])


def test_a_checkpoint_of_ours_with_unknown_settings_is_from_another_version(lm, tmp_path):
    lm.save(tmp_path / "m")
    path = tmp_path / "m" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    for changed in (
        {**meta, "model": meta["model"] | {"rope_thetas": 3}},
        {key: meta[key] for key in ("format", "model")},
    ):
        if DIGESTS in changed:  # every version writes the digest of what it wrote
            body = {**changed, DIGESTS: {"params": changed[DIGESTS]["params"]}}
            changed[DIGESTS] = {**body[DIGESTS], "meta": json_digest(body)}
        path.write_text(json.dumps(changed))
        with pytest.raises(
            UsageError,
            match=f"model {tmp_path / 'm'}: another version of this package wrote "
            "it.*(rope_thetas|tokenizer)",
        ):
            load(tmp_path / "m")


# ---- torch


def test_torch_is_not_needed_to_load_chat_decode_and_export(shelf, tmp_path):
    published = shelf("qwen3", 64)
    code = f"""
import sys
sys.modules["torch"] = None  # importing it raises
import zip_rc_jax
from zip_rc_jax.models.io.load import export
lm = zip_rc_jax.load({str(published.directory)!r}, zip_label="value", zip_first_id={published.tokenizer.size})
chat = [{{"role": "user", "content": "Hi"}}]
assert lm.tokenizer.chat(chat, enable_thinking=False).endswith("</think>\\n\\n")
(result,) = zip_rc_jax.decode(lm, [chat], strategy="fixed", n=1, max_num_seqs=1, interval=4, window=1, max_tokens=4)
assert 0 < len(result.prefixes[0].token_ids) <= 4
export(lm, {str(tmp_path / "out")!r})
assert zip_rc_jax.load({str(tmp_path / "out")!r}).head == lm.head
assert sys.modules["torch"] is None
"""  # noqa: E501
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


# ---- ids without a row, end to end


@pytest.mark.parametrize("lacking", [1, 7])
def test_ids_without_a_row_are_never_sampled_and_never_reserved(tmp_path, lacking):
    """The head's padding gives the vocabulary more rows again; the tokenizer's ids in them stay
    unused."""
    tokenizer = llama()
    directory = tmp_path / "in"
    model = torch_model(
        "llama_untied",
        vocab_size=tokenizer.size - lacking,
        eos_token_id=354,
        bos_token_id=None,
        pad_token_id=None,
    )
    model.save_pretrained(directory)
    used = {"pad_token": "<|reserved_special_token_1|>"}
    # roles: none is a free placeholder
    everything = {f"extra{i}_token": f"<|reserved_special_token_{i}|>" for i in range(40)}
    Tokenizer(
        tokenizer.backend, ("<|eot_id|>",), tokenizer.chat_template, used | everything
    ).save_pretrained(directory)
    lm = load(directory)
    rows = tokenizer.size - lacking
    assert (lm.config.vocab_size, lm.tokenizer.size, lm.tokenizer.used) == (
        rows,
        tokenizer.size,
        rows,
    )
    headed = lm.with_head(TINY_GRID, "value")
    assert headed.head.first_id >= tokenizer.size, (
        "ids that the tokenizer really has are no reserved ids"
    )
    allowed = headed.head.sampleable(headed.config.vocab_size)
    assert not allowed[rows:].any()
    assert allowed[:rows].all()
    engine = Engine(headed, dataclasses.replace(SEARCH, top_k=0), 0)
    with pytest.raises(UsageError, match="reserved or unused"):
        engine.processor.tokenize([f"x <|reserved_special_token_{40 - lacking}|>"])
    with pytest.raises(UsageError, match="stop_token_ids"):
        Engine(headed, dataclasses.replace(SEARCH, stop_token_ids=(rows,)), 0)
    results = zip_rc_jax.decode(
        headed, PROMPTS, dataclasses.replace(SEARCH, top_k=0, temperature=50.0, max_tokens=24)
    )
    assert (
        max(i for result in results for prefix in result.prefixes for i in prefix.token_ids) < rows
    )
    headed.save(tmp_path / "ours")
    export(headed, tmp_path / "out", dtype=jnp.float32)
    for again in (load(tmp_path / "ours"), load(tmp_path / "out")):
        assert again.head == headed.head
        assert again.tokenizer.used == rows
        assert not again.head.sampleable(again.config.vocab_size)[rows:].any()
        assert again.without_head().config.vocab_size == rows


def test_an_end_of_sequence_id_past_the_rows_is_refused(tmp_path):
    published = publish("qwen3", tmp_path, spare=-3)
    assert published.tokenizer.eos_ids == (402, 400)
    with pytest.raises(UsageError, match="its id is past the checkpoint's 402 rows"):
        load(tmp_path)


# ---- what prompts begin with, end to end


def with_bos(directory, **config):
    """The tokenizer of a directory begins texts with <bos>."""
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": True, **config}))
    return load(directory)


def test_prompts_begin_as_the_tokenizer_says_in_decoding_and_in_the_rollouts_made_of_it(tmp_path):
    publish("gemma3", tmp_path)
    lm = with_random_head(with_bos(tmp_path))
    bos = lm.tokenizer.backend.token_to_id("<bos>")
    chat = [{"role": "user", "content": "Hi"}]
    prompts = ["What is 17?", "<bos>What is 17?", chat]
    jobs = Engine(lm, SEARCH, 0).processor.tokenize(prompts)
    assert [job.ids[0] for job in jobs] == [bos] * 3
    assert [job.ids.count(bos) for job in jobs] == [1] * 3
    assert jobs[0].ids == jobs[1].ids
    assert jobs[2].ids == AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    bare = Engine(lm, dataclasses.replace(SEARCH, add_special_tokens=False), 0).processor.tokenize(
        prompts
    )
    assert [job.ids.count(bos) for job in bare] == [0, 1, 1]
    problem = Problem(0, "chain_sum", 0, 0, "What is 17?", "17", {})
    for added, ids in ((True, jobs), (False, bare)):
        config = dataclasses.replace(SEARCH, add_special_tokens=added)
        for number, result in enumerate(zip_rc_jax.decode(lm, prompts, config)):
            for rollout in as_rollouts(problem, result, lm, added):
                assert list(rollout.prompt_token_ids) == ids[number].ids


def test_a_template_that_writes_no_beginning_still_gets_one(tmp_path):
    publish("gemma3", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    lm = with_random_head(with_bos(tmp_path))
    (job,) = Engine(lm, SEARCH, 0).processor.tokenize([[{"role": "user", "content": "Hi"}]])
    assert job.ids.count(lm.tokenizer.backend.token_to_id("<bos>")) == 1


# ---- damage


DAMAGE = {
    "empty": lambda content: b"",
    "cut to a half": lambda content: content[: len(content) // 2],
    "cut by one": lambda content: content.rstrip()[:-1],
    "list": lambda content: b"[1]",
    "text": lambda content: b'"x"',
    "UTF-16": lambda content: content.decode("latin1").encode("utf-16"),
    "zeros": lambda content: bytes(len(content)),
    "deep": lambda content: b"[" * 50_000,
    "a page": lambda content: b"<!DOCTYPE html><html>" + b"x" * 3_000_000,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", UNTIED)
def test_every_damaged_file_of_a_directory_is_named(shelf, name, damage, tmp_path):
    """Half-copied, emptied, of another kind: in all families, each file in turn."""
    directory = shutil.copytree(shelf(name).directory, tmp_path / "m")
    for path in sorted(directory.iterdir()):
        if path.suffix == ".jinja" and damage not in ("empty", "UTF-16", "zeros"):
            continue  # any text is a template
        content = path.read_bytes()
        path.write_bytes(DAMAGE[damage](content))
        with pytest.raises(UsageError) as found:
            load(directory)
        assert str(path) in str(found.value), path.name
        assert len(str(found.value)) < 1000
        path.write_bytes(content)
    load(directory)


def test_an_adapter_is_told_from_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "org/base"})
    )
    with pytest.raises(
        UsageError, match=r"adapter \(LoRA\) for org/base.*merge it into that model"
    ):
        load(tmp_path)
