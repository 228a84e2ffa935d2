"""Packed batches: the right labels at the right positions, nothing lost or doubled, and a resumable
order."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
import time
import tracemalloc

import jax
import numpy as np
import pytest

from zip_rc_jax.config.files import load_config
from zip_rc_jax.data.batches import (
    TrainBatch,
    advice,
    example,
    fill_rate,
    steps_of_epochs,
    train_batches,
)
from zip_rc_jax.data.packing import PackedBatches
from zip_rc_jax.data.rollouts import Rollout, RolloutSource, Selection, summary_of, write_rollouts
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.sharding import TRAIN_RULES, Layout, make_mesh

FIELDS = [
    field.name
    for field in dataclasses.fields(TrainBatch)
    if field.name not in ("hidden", "teacher", "weight")
]


def make_rollouts(n, seed=0, longest=20):
    rng = np.random.default_rng(seed)
    return [
        Rollout(
            prompt_index=i, sample_index=0, level=0, seed=0, task="chain_sum", prompt="",
            question="", answer="", entry_json="",
            prompt_token_ids=[1000 + i, *rng.integers(1, 300, rng.integers(0, 9))],
            output_token_ids=rng.integers(1, 300, rng.integers(1, longest)),
            response="", finished=bool(i % 3), correct=float(i % 2), value=i / n,
        )
        for i in range(n)
    ]  # fmt: skip


ROLLOUTS = make_rollouts(50)
OPTIONS = {"label": "value", "batch_rows": 4, "row_tokens": 40, "seed": 5}


def segments(batches):
    """Every packed rollout of the batches, as a dict of plain lists, one entry per input
    position."""
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
        rows["reward"].append(float(np.float32(getattr(rollout, label))) if trained else 0.0)
        # none of the tokens seen was the end, so at least one more follows
        cut = not rollout.finished
        rows["remaining"].append(len(output) - generated + cut if trained else 0)
        rows["censored"].append(trained and cut)
    return dict(rows)


@pytest.mark.parametrize("label", ["correct", "value"])
def test_every_position_has_the_label_that_the_definition_gives(label):
    found = {
        s["tokens"][0] - 1000: s
        for s in segments(train_batches(ROLLOUTS, **OPTIONS | {"label": label, "epochs": 1}))
    }
    for i, rollout in enumerate(ROLLOUTS):
        plain = expected(rollout, label)
        alone = example(rollout, label)
        assert found[i].pop("segment_ids")
        assert alone.pop("segment_ids").tolist() == [1] * len(plain["tokens"])
        assert found[i] == plain == {name: array.tolist() for name, array in alone.items()}
        # The root knows nothing yet; before the last token one token remains.
        assert (
            sum(plain["labelled"])
            == len(rollout.output_token_ids)
            == max(plain["remaining"]) - (not rollout.finished)
        )
        assert plain["remaining"][-1] == 1 + (not rollout.finished)


def test_with_features_the_labelled_positions_alone_are_packed_each_with_its_own():
    counts = [len(r.output_token_ids) for r in ROLLOUTS]
    features = np.stack(
        [np.repeat(np.arange(50), counts), np.concatenate([np.arange(m, 0, -1) for m in counts])], 1
    ).astype(np.float32)
    found = []
    for batch in train_batches(
        ROLLOUTS, **OPTIONS | {"epochs": 1, "row_tokens": 20}, features=features
    ):
        assert batch.hidden.shape == (4, 20, 2)
        real = batch.segment_ids > 0
        assert batch.labelled[real].all()
        found += zip(
            *batch.hidden[real].T.tolist(),
            batch.reward[real].tolist(),
            batch.remaining[real].tolist(),
            strict=True,
        )
    wanted = [
        (i, left, float(np.float32(r.value)), left + (not r.finished))
        for i, r in enumerate(ROLLOUTS)
        for left in range(counts[i], 0, -1)
    ]
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("epochs", [1, 3])
def test_every_token_of_every_rollout_appears_exactly_once_per_epoch(epochs):
    found = collections.Counter(
        (*s["tokens"], s["targets"][-1])
        for s in segments(train_batches(ROLLOUTS, **OPTIONS | {"epochs": epochs}))
    )
    assert found == collections.Counter(
        {(*r.prompt_token_ids.tolist(), *r.output_token_ids.tolist()): epochs for r in ROLLOUTS}
    )


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_the_steps_of_epochs_see_every_rollout_as_often(epochs):
    """Counted on the batches of an endless run, at the first step where all passes are made."""
    rollouts = make_rollouts(23)
    packing = {"batch_rows": 2, "row_tokens": 48, "pack_batches": 1, "seed": 3}
    steps = steps_of_epochs(rollouts, epochs, label="correct", labelled_only=False, **packing)
    endless = train_batches(rollouts, label="correct", epochs=None, **packing)
    tokens = [int((b.segment_ids > 0).sum()) for b in itertools.islice(endless, steps)]
    whole = epochs * sum(len(r.prompt_token_ids) + len(r.output_token_ids) - 1 for r in rollouts)
    assert sum(tokens[:-1]) < whole <= sum(tokens)
    half = steps_of_epochs(rollouts, epochs / 2, label="correct", labelled_only=False, **packing)
    assert steps / 2 - 1 <= half <= steps / 2 + 1
    packing["row_tokens"] = 3
    with pytest.raises(UsageError, match="rollouts are never truncated"):
        steps_of_epochs(rollouts, epochs, label="correct", labelled_only=False, **packing)


def test_batches_have_fixed_shapes_and_types_and_empty_padding():
    batches = list(train_batches(ROLLOUTS, **OPTIONS | {"epochs": 1}))
    types = dict.fromkeys(FIELDS, np.int32) | {
        "labelled": np.bool_,
        "censored": np.bool_,
        "reward": np.float32,
    }
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
    # One rollout a row shows the order itself: packing into several rows permutes it within a
    # batch.
    single = order(
        train_batches(ROLLOUTS, **OPTIONS | {"batch_rows": 1, "row_tokens": 28, "epochs": 3})
    )
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


class Counted(RolloutSource):
    """Counts the rollouts that are read."""

    def __init__(self, directory):
        super().__init__(directory)
        self.read = []

    def __getitems__(self, indices):
        self.read += indices
        return super().__getitems__(indices)

    def __getitem__(self, index):
        raise AssertionError("rollouts are read many at once")


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    "mesh", [{"fsdp": 8}, {"data": 4, "fsdp": 2}, {"fsdp": 4, "tensor": 2}], ids=str
)
def test_a_process_reads_the_rollouts_of_its_own_rows_alone_and_together_they_have_the_batches_of_one(  # noqa: E501
    tmp_path, count, mesh
):
    write_rollouts(tmp_path / "r", ROLLOUTS, metadata={})
    layout = Layout(make_mesh(**mesh), TRAIN_RULES)
    devices = layout.mesh.devices.flatten()
    rows = 8
    options = OPTIONS | {"batch_rows": rows, "epochs": 1, "pack_batches": 2}
    processes = [
        (
            Counted(tmp_path / "r"),
            layout.rows_of(devices[index * 8 // count : (index + 1) * 8 // count], rows),
        )
        for index in range(count)
    ]
    whole = list(train_batches(ROLLOUTS, **options))
    shares = [list(train_batches(source, **options, local_rows=own)) for source, own in processes]
    for batch, *parts in zip(whole, *shares, strict=True):
        owners = [
            next(i for i, (_, own) in enumerate(processes) if own[row]) for row in range(rows)
        ]
        assert set(owners) == set(range(count)), "each has rows of its own"
        for name in FIELDS:
            mine = np.stack([getattr(parts[owner], name)[row] for row, owner in enumerate(owners)])
            np.testing.assert_array_equal(mine, getattr(batch, name))
        for part, (_, own) in zip(parts, processes, strict=True):
            # the plan is everybody's, so all count the same tokens
            np.testing.assert_array_equal(part.segment_ids, batch.segment_ids)
            assert not part.tokens[~np.array(own)].any()
    read = [source.read for source, _ in processes]
    assert sorted(itertools.chain(*read)) == list(range(len(ROLLOUTS))), (
        "no rollout is read twice in an epoch, none by two processes"
    )
    assert max(map(len, read)) < 1.6 * len(ROLLOUTS) / count


def test_rows_of_the_devices_of_a_process():
    """Six rows on eight devices: the last ones hold padding."""
    layout = Layout(make_mesh(data=2, fsdp=4), TRAIN_RULES)
    devices = layout.mesh.devices.flatten()
    assert layout.rows_of(devices[:4], 6) == [True] * 4 + [False] * 2
    assert layout.rows_of(devices[4:], 6) == [False] * 4 + [True] * 2
    assert layout.rows_of(devices[6:], 6) == [False] * 6
    assert Layout(make_mesh(tensor=8), TRAIN_RULES).rows_of(devices[5:6], 3) == [True] * 3
    assert Layout(make_mesh(), TRAIN_RULES).rows_of(devices[1:], 3) == [False] * 3


def test_memory_does_not_grow_with_the_tokens_of_all_rollouts(tmp_path):
    template = ROLLOUTS[0]
    many = (
        dataclasses.replace(template, output_token_ids=np.full(4000, i % 300)) for i in range(400)
    )
    write_rollouts(tmp_path / "r", many, metadata={})
    all_tokens = 4 * 400 * 4000
    tracemalloc.start()
    source = RolloutSource(tmp_path / "r")
    batches = iter(train_batches(source, label="correct", batch_rows=2, row_tokens=4096, seed=0))
    for _ in range(20):
        next(batches)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < all_tokens / 3


def test_ten_thousand_rollouts_take_about_a_second():
    rollouts = make_rollouts(10_000, longest=60)
    start = time.process_time()
    batches = train_batches(
        rollouts, label="correct", batch_rows=64, row_tokens=128, seed=0, epochs=1
    )
    assert sum(int((b.segment_ids.max(1)).sum()) for b in batches) == 10_000
    assert time.process_time() - start < 8  # about 1 here; the limit leaves room for busy machines


def naive_best_fit_decreasing(sizes, room):
    """Rows of sizes, by looking at every row for every size."""
    rows = []
    for size in sorted(sizes, reverse=True):
        fitting = [row for row in rows if sum(row) + size <= room]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            rows.append([size])
    return rows


def plan(lengths, rows, tokens, pack_batches=4, epochs=None):
    return PackedBatches(
        np.asarray(lengths),
        batch_rows=rows,
        row_tokens=tokens,
        pack_batches=pack_batches,
        seed=0,
        epochs=epochs,
    )


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_packed_as_by_best_fit_decreasing(seed):
    """A last window that has more than enough rows holds what the naive packer gives."""
    lengths = np.random.default_rng(seed).integers(1, 41, 60)
    found = [lengths[row] for batch in plan(lengths, 64, 40, 1, epochs=1) for row in batch]
    assert sorted(sorted(row) for row in map(list, found)) == sorted(
        sorted(row) for row in naive_best_fit_decreasing(lengths, 40)
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_window_takes_the_next_rollouts_of_the_order_until_no_row_has_room(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 41, 300)
    packed = plan(lengths, 4, 40, 3)
    start = 0
    for _ in range(20):
        batches, end = packed.window(start)
        rows = [row for batch in batches for row in batch]
        order = [packed._order[i] for i in range(start, end)]
        assert sorted(np.concatenate(rows).tolist()) == sorted(order)
        assert [len(batch) for batch in batches] == [4, 4, 4]
        assert all(lengths[row].sum() <= 40 for row in rows)
        assert len(naive_best_fit_decreasing(lengths[[*order, packed._order[end]]], 40)) >= 12, (
            "all rows are needed"
        )
        assert all(
            np.all(np.diff([order.index(i) for i in row]) > 0)
            for row in rows
            if len(set(order)) == len(order)
        ), "in order"
        start = end


def chain_sums(rng):
    level = rng.integers(0, 4, 4000)
    return 12 + 4 * level, rng.gamma(6, (level + 1) * 2.2).astype(int) + 6


def few_shot(rng):
    """The four kinds of few-shot prompts of the SmolLM2 config, each of nearly one length; answers
    of five tokens, seldom more."""
    prompt = np.array([171, 197, 202, 247])[rng.integers(0, 4, 1600)] + rng.integers(0, 4, 1600)
    return prompt, np.where(rng.random(1600) < 0.95, 5, rng.integers(6, 9, 1600))


def worked_sums(rng):
    """Sums of two, four and six terms that SmolLM2 works out once or twice."""
    level = rng.integers(0, 3, 1800)
    once = np.array([14, 32, 50])[level] + rng.integers(0, 8, 1800)
    return np.array([35, 41, 47])[level], np.where(rng.random(1800) < 0.3, 2, 1) * once


def long_answers(rng):
    """A reasoning model's, log-normal; the longest are cut off at 32,000 tokens."""
    return rng.integers(50, 300, 3000), np.minimum(
        rng.lognormal(np.log(9000), 0.9, 3000).astype(int), 32000
    )


SHIPPED = {
    "chain_sum": chain_sums,
    "chain_sum_demo": chain_sums,
    "smollm2_135m": few_shot,
    "smollm2_sums": worked_sums,
    "qwen3_1.7b": long_answers,
    "lfm2_350m": long_answers,
    "lfm2_1.2b": long_answers,
}


@pytest.mark.parametrize("stage", ["critic", "final", "lite"])
@pytest.mark.parametrize("name", SHIPPED)
def test_rows_of_the_shipped_configs_are_at_least_95_percent_full(name, stage):
    train = getattr(load_config(f"configs/{name}.yaml"), stage)
    prompt, output = SHIPPED[name](np.random.default_rng(0))
    lengths = np.minimum(output if train.cache_features else prompt + output - 1, train.row_tokens)
    batches = itertools.islice(
        plan(lengths, train.batch_rows, train.row_tokens, train.pack_batches), 20
    )
    filled = [
        lengths[np.concatenate(batch)].sum() / (train.batch_rows * train.row_tokens)
        for batch in batches
    ]
    assert np.mean(filled) >= 0.95


def fixed_lengths(*lengths):
    return [
        dataclasses.replace(
            ROLLOUTS[0], prompt_token_ids=[1], output_token_ids=np.ones(n, np.int32)
        )
        for n in lengths
    ]


def test_who_trains_on_emptier_rows_is_told_once_and_what_would_be_better():
    data = fixed_lengths(*np.random.default_rng(0).integers(175, 255, 400))
    options = {"batch_rows": 8, "row_tokens": 512, "pack_batches": 4, "seed": 0}
    passes, told = advice(data, steps=100, labelled_only=False, **options)
    seen = sum(len(r.prompt_token_ids) + len(r.output_token_ids) - 1 for r in data)
    assert passes == f"100 steps are at most {100 * 8 * 512 / seen:.2g} passes over 400 rollouts"
    now, better = (f"{np.mean([fill_rate(b) for b in itertools.islice(train_batches(data, label='correct', **o), 16)]):.1%} full" for o in  # noqa: E501
                   (options, options | {"batch_rows": 2, "row_tokens": 2048}))  # fmt: skip
    assert told == (
        f"row_tokens=512: the rows are only {now}: what is left of them is too short for rollouts "
        "of 175 to 254 tokens. "
        f"Fix: set row_tokens=2048 and batch_rows=2, and they are {better}."
    )
    assert (
        len(
            advice(
                data,
                steps=1,
                labelled_only=False,
                **options | {"batch_rows": 2, "row_tokens": 2048},
            )
        )
        == 1
    )
    # Labelled positions alone are packed otherwise: 13 times 5 are 65.
    fives = functools.partial(advice, fixed_lengths(*[5] * 40), steps=1, labelled_only=True)
    assert fives(**options | {"row_tokens": 64})[1].startswith("row_tokens=64: the rows are only")
    assert len(fives(**options | {"row_tokens": 65})) == 1


def test_a_position_of_another_packer_is_refused():
    with pytest.raises(
        UsageError,
        match="position in the data: batches were packed otherwise then.*start the run afresh",
    ):
        iter(train_batches(ROLLOUTS, **OPTIONS)).set_state({"parent": {"next_index": 3}})


def test_a_selection_reads_and_knows_some_of_the_rollouts(tmp_path):
    write_rollouts(tmp_path / "r", ROLLOUTS, metadata={})
    numbers = np.array([7, 3, 44])
    for source in (ROLLOUTS, RolloutSource(tmp_path / "r")):
        found = Selection(source, numbers)
        assert [r.prompt_index for r in found] == [r.prompt_index for r in found[:]] == [7, 3, 44]
        assert [r.prompt_index for r in found[1:]] == [3, 44]
        assert summary_of(found).output.tolist() == [
            len(ROLLOUTS[i].output_token_ids) for i in numbers
        ]
        within = Selection(found, np.array([2, 0]))
        assert (
            [r.prompt_index for r in within] == summary_of(within).prompt_index.tolist() == [44, 7]
        )


def change(i, **fields):
    return [dataclasses.replace(r, **fields) if j == i else r for j, r in enumerate(ROLLOUTS)]


@pytest.mark.parametrize(
    ("rollouts", "options", "message"),
    [
        (
            change(7, output_token_ids=np.ones(99)),
            {},
            r"row_tokens=40: rollout 7 has \d+ input tokens.*Fix: set row_tokens to at least",
        ),
        (
            change(7, value=float("nan")),
            {},
            r"rollouts \[7\]: 1 of 50 have no 'value' label.*zip-rc label",
        ),
        (
            change(7, correct=float("nan")),
            {"label": "correct"},
            r"rollouts \[7\].*no 'correct' label.*zip-rc grade",
        ),
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
