"""Reading the head off any text: the same numbers as the decoder, and as Hugging Face."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM

from harness.company import on_mesh
from harness.hf_models import torch_logits
from harness.small_tokenizers import chatml, gemma, llama
from harness.tiny import TINY_GRID, tiny_chat_lm
from zip_rc_jax import DecodeConfig, TokenPredictions, UsageError, decode, predict
from zip_rc_jax.inference.engine import Engine
from zip_rc_jax.inference.state import PoolSizes, PrefillInputs, empty_pool, prefill
from zip_rc_jax.models.io.load import export
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.predictions import ScoringConfig, api, forward, hidden_batches

pytestmark = pytest.mark.optimized  # bits are compared between programs of several shapes

TEXTS = ["1 + 2 =", "wait so check", "a b c d 7 + 8 =", "3", "11 + 10 + 9 = 3 0 a a b"]
CHAT = [{"role": "user", "content": "What is 17 + 25?"}]
EVERY_STEP = DecodeConfig(
    n=3, max_num_seqs=8, interval=1, window=1, max_tokens=8, beta=0.02, alpha=0.2
)


def assert_close(one: TokenPredictions, other: TokenPredictions, tolerance: float = 1e-5):
    np.testing.assert_array_equal(one.token_ids, other.token_ids)
    assert (one.pieces, one.prompt_tokens) == (other.pieces, other.prompt_tokens)
    assert one.grid == other.grid
    for name, scale in (("p_correct", 1), ("joint", 1), ("logprob", 10), ("remaining", 20)):
        left, right = getattr(one, name), getattr(other, name)
        assert left.dtype == right.dtype == np.float32
        np.testing.assert_allclose(left, right, atol=scale * tolerance, err_msg=name)


# ---- the same numbers as elsewhere


def test_every_decision_of_the_decoder_saw_what_is_predicted_at_its_position(lm):
    """With a window and an interval of one token, each decision records one read of the head."""
    compared = 0
    for result in decode(lm, TEXTS, EVERY_STEP, seed=3):
        pairs = [(result.prompt, p.token_ids) for p in result.prefixes if p.token_ids]
        ids = [p.id for p in result.prefixes if p.token_ids]
        read = dict(zip(ids, predict(lm, pairs), strict=True))
        for decision in result.trace:
            for i, prefix in enumerate(decision.prefix_ids):
                if prefix not in read or decision.finished[i]:
                    continue  # the joint after the last token of a finished prefix is never read
                seen = read[prefix]
                at = seen.prompt_tokens - 1 + decision.tokens[i]
                assert decision.expected_reward[i] == pytest.approx(seen.p_correct[at], abs=1e-5)
                remaining = pytest.approx(seen.remaining[at], abs=1e-4)
                assert decision.expected_remaining[i] == remaining
                compared += 1
    assert compared > 50


def test_the_joint_at_a_position_is_the_decoders_own_for_a_text_that_ends_there(lm):
    engine = Engine(lm, EVERY_STEP, 0)
    ids = lm.tokenizer.encode(TEXTS[2])
    (read,) = predict(lm, [ids])
    count = len(ids)
    pool = empty_pool(engine.settings, PoolSizes(slots=count, tokens=64, pages=count))
    lane = np.arange(count, dtype=np.int32)[None]
    tokens = np.tile(np.asarray(ids, np.int32), (1, count, 1))
    prompts = PrefillInputs(lane, lane[..., None], tokens, np.zeros_like(lane), lane + 1)
    _, joints, _ = prefill(engine.settings, engine.params, pool, prompts, count)
    expected = np.asarray(joints)[0].reshape(read.joint.shape)
    np.testing.assert_allclose(read.joint, expected, atol=1e-6)
    assert np.abs(np.diff(read.joint, axis=0)).max() > 0.01, "positions differ"


@pytest.mark.parametrize("tokenizer", [chatml, gemma])
def test_joint_and_log_probabilities_are_those_of_the_exported_model_in_torch(tmp_path, tokenizer):
    """Gemma's reserved ids lie in the middle of the vocabulary, Qwen's behind it."""
    lm = tiny_chat_lm(tokenizer())
    export(lm, tmp_path / "out", dtype=jnp.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    (read,) = predict(lm, [("State the answer: 4 + 3 =", "Think step by step, 7.")])
    logits = torch.from_numpy(torch_logits(model, read.token_ids[None])[0]).double()

    reserved = slice(lm.head.first_id, lm.head.last_id)
    cells = torch.softmax(logits[:, reserved], dim=-1).numpy().reshape(read.joint.shape)
    np.testing.assert_allclose(read.joint, cells, atol=1e-5)
    np.testing.assert_allclose(read.p_correct, cells.sum(2) @ TINY_GRID.reward_centres, atol=1e-5)
    middles = [(a + b) / 2 for a, b in itertools.pairwise(TINY_GRID.length_edges)]
    np.testing.assert_allclose(read.remaining, cells.sum(1) @ middles, atol=1e-4)

    logits[:, reserved] = -torch.inf
    logits[:, lm.tokenizer.used :] = -torch.inf
    following = torch.from_numpy(read.token_ids[1:].astype(np.int64))[:, None]
    expected = torch.log_softmax(logits, dim=-1)[:-1].gather(1, following)[:, 0].numpy()
    np.testing.assert_allclose(read.logprob[1:], expected, atol=1e-4)
    assert np.isnan(read.logprob[0]), "nothing stands before the first token"


# ---- nothing else in the batch matters


def test_predictions_do_not_depend_on_company_batch_size_or_order(lm):
    together = predict(lm, TEXTS)
    for text, read in zip(TEXTS, together, strict=True):
        assert_close(predict(lm, [text])[0], read)
    for one, other in zip(predict(lm, TEXTS, batch_tokens=1), together, strict=True):
        assert_close(one, other)
    for one, other in zip(predict(lm, TEXTS[::-1]), together[::-1], strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("mesh", [{"data": 8, "tensor": 1}, {"data": 2, "tensor": 2}])
def test_all_devices_of_a_mesh_give_the_same_predictions(lm, mesh):
    for one, other in zip(predict(on_mesh(lm, **mesh), TEXTS), predict(lm, TEXTS), strict=True):
        assert_close(one, other)


def test_logits_of_the_vocabulary_are_taken_in_parts_and_give_the_same(lm, monkeypatch):
    whole = predict(lm, TEXTS)
    monkeypatch.setattr(api, "LOGITS", 8 * 4 * lm.config.vocab_size)  # of 8 x 32 positions
    assert api.logit_chunks(lm, 8, 32) == 8
    for one, other in zip(predict(lm, TEXTS), whole, strict=True):
        assert_close(one, other)


def test_batches_of_any_number_of_items_have_few_shapes(lm, monkeypatch):
    shapes = []
    monkeypatch.setattr(forward, "_hidden", lambda *args: shapes.append(args[4].shape))
    for ways in (1, 4):
        model, shapes[:] = on_mesh(lm, ways, 1), []
        for count in range(1, 60):
            sizes = np.full(count, 20)
            read = lambda numbers: [np.ones(20, np.int32)] * len(numbers)  # noqa: E731
            settings = ScoringConfig(32 * 24)
            batches = list(hidden_batches(model, sizes, read, settings, few_shapes=True))
            assert sorted(i for batch in batches for i in batch.members) == list(range(count))
        assert all(rows % ways == 0 and rows <= 24 for rows, _ in shapes)
        assert len(set(shapes)) <= 6


# ---- what an item may be


def with_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Its texts begin and end with special tokens of their own."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    around = [(t, backend.token_to_id(t)) for t in ("<|begin_of_text|>", "<|end_of_text|>")]
    single = f"{around[0][0]} $A {around[1][0]}"
    backend.post_processor = tokenizers.processors.TemplateProcessing(single, None, around)
    kept = tokenizer.eos_tokens, tokenizer.chat_template, tokenizer.special_tokens
    return Tokenizer(backend, *kept)


def test_a_text_a_chat_and_a_pair_are_read_as_the_decoder_reads_them():
    tokenizer = with_special_tokens(llama())
    lm = tiny_chat_lm(tokenizer)
    chat_text = tokenizer.chat(CHAT, date_string="today")
    chat_ids = tokenizer.encode_prompt(chat_text, chat=True)
    text_ids = tokenizer.encode_prompt("4 + 3 =")
    answer_ids = tokenizer.encode("42, I think.")
    assert (text_ids[0], text_ids[-1]) == tokenizer.added_ids[0] + tokenizer.added_ids[1]
    assert (chat_ids[0], chat_ids[-1]) != (text_ids[0], text_ids[-1]), "no end behind a chat"
    items = ["4 + 3 =", CHAT, ("4 + 3 =", "42, I think."), (CHAT, answer_ids)]
    expected = [text_ids, chat_ids, text_ids + answer_ids, chat_ids + answer_ids]
    read = predict(lm, items, chat_template_kwargs={"date_string": "today"})
    assert [p.token_ids.tolist() for p in read] == expected
    assert [p.prompt_tokens for p in read] == [0, 0, len(text_ids), len(chat_ids)]
    assert [p.start for p in read] == [0, 0, len(text_ids) - 1, len(chat_ids) - 1]
    for one, ids in zip(read, expected, strict=True):
        assert_close(dataclasses.replace(one, prompt_tokens=0), predict(lm, [ids])[0])
    (bare,) = predict(lm, ["4 + 3 ="], add_special_tokens=False)
    assert bare.token_ids.tolist() == text_ids[1:-1]


def test_ids_may_be_a_list_a_tuple_or_an_array(lm):
    ids = lm.tokenizer.encode(TEXTS[0])
    arrays = [np.asarray(ids, np.uint8), jnp.asarray(ids), [np.int64(i) for i in ids]]
    read = predict(lm, [ids, tuple(ids), *arrays, ids[:2]])
    for one in read[:-1]:
        assert_close(one, read[0])
    assert len(read[-1]) == 2, "two numbers are ids, and no pair"
    (pair,) = predict(lm, [(jnp.asarray(ids[:3]), np.asarray(ids[3:]))])
    assert_close(dataclasses.replace(pair, prompt_tokens=0), read[0])


@pytest.mark.parametrize("tokenizer", [chatml, gemma, llama])
def test_pieces_add_up_to_the_text_with_its_special_tokens(tokenizer):
    """Characters of several tokens, and bytes that never become a character."""
    tok = tokenizer()
    rng = np.random.default_rng(0)
    names = [tok.backend.id_to_token(i) for i in range(tok.size)]
    usable = [i for i, name in enumerate(names) if not re.fullmatch("<(0x..|unused.*)>", name)]
    texts = ["数学 🦊👩‍🚀 ½ a\n\tb", "été"]
    for ids in [*(tok.encode_prompt(t) for t in texts), rng.choice(usable, 200).tolist()]:
        pieces = tok.pieces(ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == tok.backend.decode(ids, skip_special_tokens=False)
    fox = tok.encode("🦊")
    assert len(fox) > 1
    assert tok.pieces(fox) == ("",) * (len(fox) - 1) + ("🦊",)


def test_a_dict_of_predictions_goes_through_json_and_comes_back(lm):
    (read,) = predict(lm, [(TEXTS[0], TEXTS[3])])
    data = json.loads(json.dumps(read.to_dict(), allow_nan=False))
    assert data["logprob"][0] is None
    assert data["grid"] == TINY_GRID.to_dict()
    assert data["pieces"] == list(read.pieces)
    again = TokenPredictions.from_dict(data)
    assert_close(again, read, tolerance=0)
    assert again.joint.shape == (len(read), TINY_GRID.n_reward, TINY_GRID.n_length)
    np.testing.assert_allclose(read.joint.sum((1, 2)), 1, atol=1e-5)
    assert read.text == "".join(read.pieces) == f"{TEXTS[0]} {TEXTS[3]}"


# ---- lists and iterators


def test_a_list_gives_a_list_and_an_iterator_is_read_as_predictions_are_taken(lm):
    listed = predict(lm, TEXTS)
    assert isinstance(listed, list)
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield TEXTS[i % len(TEXTS)]

    read = predict(lm, endless(), batch_tokens=32)
    assert taken == [], "nothing is read before the first prediction is asked for"
    for i, one in enumerate(itertools.islice(read, 30)):
        assert_close(one, listed[i % len(TEXTS)])
        # Each item is one row of 32 tokens, and four batches are read together.
        assert len(taken) <= i + 4
    assert len(taken) >= 30


def test_what_ends_an_iterator_is_raised_after_the_predictions_for_the_items_before(lm):
    def items():
        yield from TEXTS[:2]
        raise OSError("the disk is gone")

    for source, error in ((items(), OSError), (iter([*TEXTS[:2], "", "3"]), UsageError)):
        read = predict(lm, source)
        assert [next(read).text for _ in range(2)] == TEXTS[:2]
        with pytest.raises(error, match=r"disk is gone|item 2: it is empty"):
            next(read)


def test_many_items_show_a_progress_bar_and_one_batch_shows_none(lm, capsys):
    predict(lm, TEXTS)
    assert capsys.readouterr().err == ""
    predict(lm, TEXTS, batch_tokens=32)
    assert f"predict {len(TEXTS)}/{len(TEXTS)}" in capsys.readouterr().err
    predict(lm, TEXTS, batch_tokens=32, progress=False)
    assert capsys.readouterr().err == ""
    predict(lm, TEXTS, progress=True)
    assert f"predict {len(TEXTS)}/{len(TEXTS)}" in capsys.readouterr().err


def test_a_progress_bar_counts_the_items_of_an_iterator(lm, monkeypatch):
    counted = []

    @contextlib.contextmanager
    def bar(title, total, done=0):
        yield lambda now, status: counted.append((title, total, now))

    monkeypatch.setattr(api, "progress_bar", bar)
    list(predict(lm, iter(TEXTS), batch_tokens=32))  # two windows: four items, then one
    assert counted == [("predict", None, 4), ("predict", None, 5)]
    list(predict(lm, iter(TEXTS), batch_tokens=32, progress=False))
    assert len(counted) == 2


# ---- bad input


BAD_ITEMS = [
    ("", "item 1: it is empty"),
    ([], "item 1: it is empty"),
    (np.array([]), "item 1: it is empty"),
    (("a", ""), r"item 1, its response: it is empty.*pass the prompt alone"),
    (("", "a"), "item 1, its prompt: it is empty"),
    (5, "item 1: 5 of type int: it is no text, chat, list of token ids or .*pair"),
    (None, "item 1: None of type NoneType"),
    (b"bytes", "item 1: b'bytes' of type bytes"),
    ({"role": "user"}, "item 1: .* of type dict"),
    ([1, True], "item 1: .*True.* of type list"),
    ([1.0, 2.0], "item 1: .* of type list"),
    (np.array([1.5]), "item 1: .* of type ndarray"),
    (np.ones((2, 2), int), "item 1: .* of type ndarray"),
    (("a", "b", "c"), r"item 1: .* of type tuple: .*Fix: pass a str"),
    (("a", 5), r"item 1, its response: 5 of type int: a response is a text or token ids"),
    (("a", CHAT), r"item 1, its response: .* of type list: a response is a text or token ids"),
    ((("a", "b"), "c"), r"item 1, its prompt: .* of type tuple"),
    ([3, -7], r"item 1 with ids -7 \(None\): the vocabulary has the ids 0 to 127"),
    ([3, 128], r"item 1 with ids 128 \(None\): the vocabulary has the ids 0 to 127"),
    ([3, 10**30], r"item 1 with id 10{30}: the vocabulary has the ids 0 to 127"),
    (np.array([2**63 + 5], np.uint64), r"item 1 with id 9223372036854775813: the vocabulary has"),
    (("a", [24]), r"item 1, its response with ids 24 .*: they are reserved or unused"),
    ([3, 127], r"item 1 with ids 127 \(None\): they are reserved or unused"),
    ([3] * 97, r"item 1 of 97 tokens: the model has 96 positions\. Fix: cut it to 96 tokens"),
    ((" ".join(["a"] * 50), [3] * 47), "item 1 of 97 tokens: the model has 96 positions"),
    ("a zebra", r"item 1: .*zebra.*lacks these words"),
    ("a \ud800", "item 1: it is not text that can be encoded"),
    (CHAT, "item 1: chat messages: the tokenizer has no chat template"),
]


@pytest.mark.parametrize(("item", "message"), BAD_ITEMS)
def test_a_bad_item_in_a_list_is_named_before_the_model_runs(lm, monkeypatch, item, message):
    monkeypatch.setattr(forward, "_hidden", None)
    assert lm.head.first_id <= 24 < lm.head.last_id, "24 is reserved, 127 is padding"
    with pytest.raises(UsageError, match=message) as refusal:
        predict(lm, ["a", item, "b"])
    assert len(str(refusal.value)) < 900


def test_an_item_of_megabytes_is_refused_in_a_paragraph(lm):
    for item in ("a " * 10**6, [3] * 10**6, ["x" * 10**6], ["y"] * 10**6):
        with pytest.raises(UsageError, match="item 0") as refusal:
            predict(lm, [item])
        assert len(str(refusal.value)) < 900


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ("text", r"items given as one string: .*Fix: pass \[text\]"),
        (("prompt", "response"), r"items given as a tuple: .*Fix: pass a list: \[\(prompt"),
        (CHAT, r"items given as one chat: .*Fix: pass \[messages\]"),
        ([1, 2, 3], r"items given as the token ids of one item: .*Fix: pass \[ids\]"),
        ([], r"items=\[\]: there is nothing to predict"),
        ({"a": 1}, r"items of type dict"),
        (5, r"items of type int"),
        (None, r"items of type NoneType"),
    ],
)
def test_one_item_is_not_taken_for_a_list_of_items(lm, items, message):
    with pytest.raises(UsageError, match=message):
        predict(lm, items)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 0}, "batch_tokens=0"),
        ({"batch_tokens": True}, "batch_tokens=True: it counts tokens"),
        ({"batch_tokens": "many"}, "batch_tokens='many': it counts tokens"),
        ({"chat_template_kwargs": {"date": "x"}}, "no item is a chat, so no template reads them"),
        ({"chat_template_kwargs": ["x"]}, "they are variables by name"),
    ],
)
def test_impossible_options_are_refused(lm, options, message):
    with pytest.raises(UsageError, match=message):
        predict(lm, TEXTS, **options)


def test_a_model_without_a_head_is_refused(lm):
    with pytest.raises(UsageError, match=r"model without a ZIP head: .*`zip-rc train`"):
        predict(lm.without_head(), TEXTS)
    with pytest.raises(UsageError, match="model without a ZIP head"):
        predict(lm.without_head(), iter(TEXTS))  # at once, not with the first prediction


def test_reading_the_head_needs_nothing_of_training_and_evaluation():
    """They lie above it, and have dependencies of their own."""
    code = """
import sys, zip_rc_jax.predictions
rooms = ("training", "evaluation", "pipeline", "cli", "data.rollouts")
found = [m for m in sys.modules if m.startswith(tuple(f"zip_rc_jax.{room}" for room in rooms))]
assert not found, found
assert "tensorflow_datasets" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
