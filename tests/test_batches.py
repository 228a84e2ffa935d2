"""Packed batches: the right labels at the right positions, nothing lost or doubled, and a resumable order."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import time

import jax
import numpy as np
import pytest

from zip_rc_jax.data.batches import TrainBatch, example, fill_rate, train_batches
from zip_rc_jax.data.records import Rollout, RolloutSource, write_rollouts
from zip_rc_jax.errors import UsageError

FIELDS = [field.name for field in dataclasses.fields(TrainBatch) if field.name not in ("hidden", "teacher")]


def make_rollouts(n, seed=0, longest=20):
    rng = np.random.default_rng(seed)
    return [
        Rollout(
            prompt_index=i, sample_index=0, level=0, seed=0, task="chain_sum", prompt="", question="", answer="", entry_json="",
            prompt_token_ids=[1000 + i, *rng.integers(1, 300, rng.integers(0, 9))],
            output_token_ids=rng.integers(1, 300, rng.integers(1, longest)),
            response="", finished=bool(i % 3), correct=float(i % 2), value=i / n,
        )
        for i in range(n)
    ]  # fmt: skip


ROLLOUTS = make_rollouts(50)
OPTIONS = {"label": "value", "batch_rows": 4, "row_tokens": 40, "seed": 5}


def segments(batches):
    """Every packed rollout of the batches, as a dict of plain lists, one entry per input position."""
    for batch in batches:
        for row in range(batch.tokens.shape[0]):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                at = np.flatnonzero(batch.segment_ids[row] == segment)
                assert np.all(np.diff(at) == 1), "a segment is one span"
                yield {name: getattr(batch, name)[row, at].tolist() for name in FIELDS}


def expected(rollout, label):
    """The definition, one position at a time."""
    prompt, output = rollout.prompt_token_ids.tolist(), rollout.output_token_ids.tolist()
    sequence = prompt + output
    rows = collections.defaultdict(list)
    for t in range(len(sequence) - 1):
        generated = t + 1 - len(prompt)  # response tokens in the prefix that ends at t
        trained = generated >= 0
        rows["tokens"].append(sequence[t])
        rows["targets"].append(sequence[t + 1])
        rows["positions"].append(t)
        rows["labelled"].append(trained)
        rows["lm_weight"].append(1.0 if trained else 0.0)
        rows["reward"].append(float(np.float32(getattr(rollout, label))) if trained else 0.0)
        rows["remaining"].append(len(output) - generated if trained else 0)
        rows["censored"].append(trained and not rollout.finished)
    return dict(rows)


@pytest.mark.parametrize("label", ["correct", "value"])
def test_every_position_has_the_label_that_the_definition_gives(label):
    found = {s["tokens"][0] - 1000: s for s in segments(train_batches(ROLLOUTS, **OPTIONS | {"label": label, "epochs": 1}))}
    for i, rollout in enumerate(ROLLOUTS):
        plain = expected(rollout, label)
        alone = example(rollout, label)
        assert found[i].pop("segment_ids")
        assert alone.pop("segment_ids").tolist() == [1] * len(plain["tokens"])
        assert found[i] == plain == {name: array.tolist() for name, array in alone.items()}
        # The root knows nothing yet; before the last token one token remains.
        assert sum(plain["labelled"]) == len(rollout.output_token_ids) == max(plain["remaining"])
        assert plain["remaining"][-1] == 1


def test_with_features_the_labelled_positions_alone_are_packed_each_with_its_own():
    counts = [len(r.output_token_ids) for r in ROLLOUTS]
    features = np.stack([np.repeat(np.arange(50), counts), np.concatenate([np.arange(m, 0, -1) for m in counts])], 1).astype(np.float32)
    found = []
    for batch in train_batches(ROLLOUTS, **OPTIONS | {"epochs": 1, "row_tokens": 20}, features=features):
        assert batch.hidden.shape == (4, 20, 2)
        real = batch.segment_ids > 0
        assert batch.labelled[real].all()
        found += zip(*batch.hidden[real].T.tolist(), batch.reward[real].tolist(), batch.remaining[real].tolist(), strict=True)
    wanted = [(i, left, float(np.float32(r.value)), left) for i, r in enumerate(ROLLOUTS) for left in range(counts[i], 0, -1)]
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("epochs", [1, 3])
def test_every_token_of_every_rollout_appears_exactly_once_per_epoch(epochs):
    found = collections.Counter((*s["tokens"], s["targets"][-1]) for s in segments(train_batches(ROLLOUTS, **OPTIONS | {"epochs": epochs})))
    assert found == collections.Counter({(*r.prompt_token_ids.tolist(), *r.output_token_ids.tolist()): epochs for r in ROLLOUTS})


def test_batches_have_fixed_shapes_and_types_and_empty_padding():
    batches = list(train_batches(ROLLOUTS, **OPTIONS | {"epochs": 1}))
    types = dict.fromkeys(FIELDS, np.int32) | {"labelled": np.bool_, "censored": np.bool_, "reward": np.float32, "lm_weight": np.float32}
    for batch in batches:
        padding = batch.segment_ids == 0
        assert fill_rate(batch) == 1 - padding.mean()
        for name in FIELDS:
            array = getattr(batch, name)
            assert (array.shape, array.dtype) == ((4, 40), types[name])
            assert not array[padding].any()
    assert np.mean([fill_rate(batch) for batch in batches[:-1]]) > 0.75
    assert len(jax.tree.leaves(batches[0])) == len(FIELDS)


def order(batches):
    return [s["tokens"][0] for s in segments(batches)]


def test_the_order_is_drawn_anew_each_epoch_from_the_seed_alone():
    three = order(train_batches(ROLLOUTS, **OPTIONS | {"epochs": 3}))
    assert three == order(train_batches(ROLLOUTS, **OPTIONS | {"epochs": 3}))
    assert three != order(train_batches(ROLLOUTS, **OPTIONS | {"epochs": 3, "seed": 6}))
    # One rollout a row shows the order itself: packing into several rows permutes it within a batch.
    single = order(train_batches(ROLLOUTS, **OPTIONS | {"batch_rows": 1, "row_tokens": 28, "epochs": 3}))
    epochs = [single[:50], single[50:100], single[100:]]
    assert all(sorted(epoch) == [1000 + i for i in range(50)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_without_epochs_it_never_ends():
    assert len(list(itertools.islice(train_batches(ROLLOUTS, **OPTIONS), 100))) == 100


@pytest.mark.parametrize("epochs", [2, None])
def test_an_interrupted_iterator_continues_exactly(epochs):
    def same(a, b):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            jax.tree.map(np.testing.assert_array_equal, x, y)

    def new():
        return iter(train_batches(ROLLOUTS, **OPTIONS | {"epochs": epochs}))

    whole = list(itertools.islice(new(), 14))
    for stop in range(len(whole) + 1):
        iterator = new()
        same(list(itertools.islice(iterator, stop)), whole[:stop])
        state = json.loads(json.dumps(iterator.get_state()))  # as it lies in a checkpoint
        resumed = new()
        next(resumed)  # a state replaces whatever the iterator did before
        resumed.set_state(state)
        same(list(itertools.islice(resumed, 14 - stop)), whole[stop:14])


def test_rollouts_on_disk_give_the_same_batches(tmp_path):
    write_rollouts(tmp_path / "r", ROLLOUTS, metadata={})
    stored = train_batches(RolloutSource(tmp_path / "r"), **OPTIONS | {"epochs": 1})
    for a, b in zip(stored, train_batches(ROLLOUTS, **OPTIONS | {"epochs": 1}), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_ten_thousand_rollouts_take_about_a_second():
    rollouts = make_rollouts(10_000, longest=60)
    start = time.process_time()
    batches = train_batches(rollouts, label="correct", batch_rows=64, row_tokens=128, seed=0, epochs=1)
    assert sum(int((b.segment_ids.max(1)).sum()) for b in batches) == 10_000
    assert time.process_time() - start < 8  # about 1 here; the limit leaves room for busy machines


def change(i, **fields):
    return [dataclasses.replace(r, **fields) if j == i else r for j, r in enumerate(ROLLOUTS)]


@pytest.mark.parametrize(
    ("rollouts", "options", "message"),
    [
        (change(7, output_token_ids=np.ones(99)), {}, r"row_tokens=40: rollout 7 has \d+ input tokens.*Fix: set row_tokens to at least"),
        (change(7, value=float("nan")), {}, r"rollouts \[7\]: 1 of 50 have no 'value' label.*zip-rc label"),
        (change(7, correct=float("nan")), {"label": "correct"}, r"rollouts \[7\].*no 'correct' label.*zip-rc grade"),
        (change(7, value=1.5), {}, r"rollouts \[7\].*outside \[0, 1\]"),
        (change(7, output_token_ids=[]), {}, r"rollouts \[7\].*empty prompt or response"),
        (change(7, prompt_token_ids=[]), {}, r"rollouts \[7\].*empty prompt or response"),
        (ROLLOUTS, {"label": "finished"}, "label='finished'.*correct, value"),
        (ROLLOUTS, {"seed": -1}, "seed=-1"),
        ([], {}, "there are none"),
    ],
)
def test_mistakes_are_named_before_any_batch(rollouts, options, message):
    with pytest.raises(UsageError, match=message):
        train_batches(rollouts, **OPTIONS | options)


def test_a_rollout_may_fill_its_row_exactly():
    """The last token is never fed, so p + m = row_tokens + 1 fits."""
    rollout = change(0, prompt_token_ids=np.arange(1, 11), output_token_ids=np.arange(11, 42))[0]
    (batch,) = train_batches([rollout], **OPTIONS | {"batch_rows": 1, "epochs": 1})
    assert fill_rate(batch) == 1.0
    assert batch.tokens[0].tolist() == list(range(1, 41))
    assert batch.targets[0, -1] == 41
