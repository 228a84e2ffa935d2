"""Whatever happens to a file of a run, it is refused in one short paragraph that names it, or it
reads as it was.

Every file is written by the code that writes it in a run, damaged in all the ways of `damage.py`,
and read by the code that reads it.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import random

import numpy as np
import pyarrow.parquet as pq
import pytest

from harness.damage import (
    ABSENT,
    BYTES,
    JSON_FILE,
    TEXT,
    flipped,
    json_fields,
    name_of,
    of_another_type,
    refused_or_equal,
    replaced_by,
    truncated,
)
from harness.rollouts import assert_same, make_rollouts
from zip_rc_jax.config.files import load_config
from zip_rc_jax.data.parquet import (
    GenerationInfo,
    open_rollouts,
    read_generation,
    read_parquet,
    read_parquet_metadata,
    write_parquet,
)
from zip_rc_jax.data.rollouts import (
    PartialRollouts,
    RolloutSource,
    read_metadata,
    read_rollouts,
    write_rollouts,
)
from zip_rc_jax.grading.grader import Grader, check_entry
from zip_rc_jax.pipeline.evaluation.runner import read_stored
from zip_rc_jax.runtime.errors import LONGEST, UsageError
from zip_rc_jax.runtime.storage import Journal, with_digest, write_json
from zip_rc_jax.training.tracking import Tracker
from zip_rc_jax.training.trainer import _read_teacher

EVERY = (*BYTES, *TEXT, *JSON_FILE, *ABSENT)
METADATA = {"rollouts": {"seed": 3, "sampling": {"min_p": 0.1, "stop": [1, 2]}}, "policy": "a" * 64}


def equal_to(expected):
    def equal(found):
        assert_same(found, expected, tolerance=1e-7)
        return True

    return equal


def restore(path, content):
    """The file as it was, whatever stands there now."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    elif path.is_symlink() or path.exists():
        path.chmod(0o600, follow_symlinks=False) if not path.is_symlink() else None
        path.unlink()
    path.write_bytes(content)


# ---- a dataset of rollouts


def read_all_of(directory):
    source = RolloutSource(directory)
    assert read_metadata(directory) == METADATA == source.metadata, "the metadata is another"
    assert source.summary.output.tolist() == [len(r.output_token_ids) for r in source]
    return list(source)


@pytest.mark.parametrize(
    "name", ["metadata.json", "summary.npz", "dataset_info.json", "features.json", "digests.json"]
)
def test_a_dataset_with_a_damaged_file_is_refused_or_reads_as_it_was(tmp_path, name):
    rollouts = make_rollouts(9)
    write_rollouts(tmp_path / "r", rollouts, metadata=METADATA)
    path = tmp_path / "r" / name
    content, refused = path.read_bytes(), []
    random_flips = [flipped(random.Random(i).random(), i % 8) for i in range(60)]
    for damage in (*EVERY, *random_flips):
        damage(path)
        if refused_or_equal(
            lambda: read_all_of(tmp_path / "r"), equal_to(rollouts), str(tmp_path / "r")
        ):
            refused.append(name_of(damage))
        restore(path, content)
    assert len(refused) > len(EVERY), "hardly any damage was noticed"
    assert_same(read_all_of(tmp_path / "r"), rollouts, tolerance=1e-7)


def test_a_shard_with_a_damaged_byte_is_refused_or_reads_as_it_was(tmp_path):
    """ArrayRecord pads with zeros, which nobody reads; every other byte belongs to something that
    has a hash."""
    rollouts = make_rollouts(6)
    write_rollouts(tmp_path / "r", rollouts, metadata=METADATA)
    (path,) = (tmp_path / "r").glob("*array_record*")
    content = path.read_bytes()
    written = [at for at, byte in enumerate(content) if byte]
    changed = 0
    for number, at in enumerate(written[::17]):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << number % 8]) + content[at + 1 :])
        changed += refused_or_equal(
            lambda: read_all_of(tmp_path / "r"), equal_to(rollouts), str(tmp_path / "r")
        )
    assert changed > len(written) // 34
    for damage in (*BYTES, *ABSENT):
        restore(path, content)
        damage(path)
        refused_or_equal(
            lambda: read_all_of(tmp_path / "r"), equal_to(rollouts), str(tmp_path / "r")
        )


def test_a_shard_of_another_dataset_is_not_taken_for_ones_own(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        write_rollouts(tmp_path / name, make_rollouts(6, seed), metadata=METADATA)
    ((mine,), (theirs,)) = ((tmp_path / name).glob("*array_record*") for name in "ab")
    mine.write_bytes(theirs.read_bytes())
    with pytest.raises(
        UsageError, match=r"rollout 0 is another than the one that summary\.npz was made from"
    ):
        read_rollouts(tmp_path / "a")


def test_datasets_of_earlier_versions_without_digests_are_read(tmp_path):
    rollouts = make_rollouts(5)
    write_rollouts(tmp_path / "r", rollouts, metadata=METADATA)
    (tmp_path / "r/digests.json").unlink()
    assert_same(read_all_of(tmp_path / "r"), rollouts, tolerance=1e-7)
    for content in (b"[]", b"null", b"\xff", b"[" * 100_000):
        (tmp_path / "r/metadata.json").write_bytes(content)
        with pytest.raises(UsageError, match=r"metadata\.json"):
            RolloutSource(tmp_path / "r")


# ---- partial chunks


def chunks_of(directory):
    partial = PartialRollouts(directory, fingerprint={"seed": 1})
    for missing in {0, 1, 2} - partial.done():  # as a resumed stage does
        partial.add(missing, make_rollouts(12)[4 * missing : 4 * missing + 4])
    return list(partial.all(range(3)))


@pytest.mark.parametrize("name", ["chunk-00000001.jsonl", "fingerprint.json"])
def test_a_damaged_chunk_is_made_again_or_refused_and_never_joined(tmp_path, name):
    rollouts = make_rollouts(12)
    assert_same(chunks_of(tmp_path / "p"), rollouts)
    path = tmp_path / "p" / name
    content, refused = path.read_bytes(), 0
    random_flips = [flipped(random.Random(i).random(), i % 8) for i in range(60)]
    for damage in (*EVERY, *random_flips):
        damage(path)
        refused += refused_or_equal(
            lambda: chunks_of(tmp_path / "p"), equal_to(rollouts), str(tmp_path / "p")
        )
        restore(path, content)
    assert refused > 60


def test_chunks_without_their_fingerprint_or_under_another_number_are_not_taken(tmp_path):
    chunks_of(tmp_path / "p")
    (tmp_path / "p/chunk-00000000.jsonl").write_bytes(
        (tmp_path / "p/chunk-00000001.jsonl").read_bytes()
    )
    with pytest.raises(UsageError, match=r"chunk-00000000\.jsonl: it is damaged"):
        chunks_of(tmp_path / "p")
    (tmp_path / "p/fingerprint.json").unlink()
    with pytest.raises(UsageError, match="nobody knows what its chunks are of"):
        PartialRollouts(tmp_path / "p", fingerprint={"seed": 2})


# ---- the journal of a decode

VALUES = [
    {
        "index": i,
        "result": {"text": f"é {i}", "expected_reward": 0.125 * i, "trace": [1, None, [i]]},
    }
    for i in range(4)
]


def journal_of(path):
    """The values after a resumed decode: those that were kept, and the others made again."""
    journal = Journal(path, fingerprint={"model": "m", "seed": 0})
    for value in VALUES:
        if value not in journal.values:
            assert value["index"] not in [v["index"] for v in journal.values], (
                "another value came back"
            )
            journal.add(value)
            journal.values.append(value)
    journal._file.close()
    return sorted(journal.values, key=lambda value: value["index"])


def test_a_damaged_journal_is_refused_or_gives_what_was_added(tmp_path):
    path = tmp_path / "results.partial.jsonl"
    assert journal_of(path) == VALUES == journal_of(path)
    content, refused = path.read_bytes(), 0
    random_flips = [flipped(random.Random(i).random(), i % 8) for i in range(120)]
    for damage in (*EVERY, *random_flips):
        damage(path)
        refused += refused_or_equal(
            lambda: journal_of(path), lambda found: found == VALUES, "results.partial.jsonl"
        )
        restore(path, content)
    assert refused > 100


# ---- what an evaluation keeps


def test_the_damaged_results_of_an_evaluation_are_refused_or_the_same(tmp_path):
    path = tmp_path / "sample_n.json"
    assert read_stored(path) == {}
    value = {
        "key": {"decode": {"beta": 0.5}},
        "seconds": 1.25,
        "grades": [[1.0, 0.0]],
        "results": [{"text": "7"}],
    }
    write_json(path, with_digest(value))
    content, refused = path.read_bytes(), 0
    for damage in (*EVERY, *(flipped(random.Random(i).random(), i % 8) for i in range(60))):
        damage(path)
        refused += refused_or_equal(
            lambda: read_stored(path), lambda found: found in (value, {}), "sample_n.json"
        )
        restore(path, content)
    for what, damaged in json_fields(value):
        changed = {**json.loads(content), **damaged}
        path.write_text(json.dumps(changed))
        same = json.dumps({**changed, "digest": 0}, sort_keys=True) == json.dumps(
            {**value, "digest": 0}, sort_keys=True
        )
        assert (
            refused_or_equal(
                lambda: read_stored(path), lambda found: found == value, "sample_n.json"
            )
            != same
        ), what
    assert refused > 60


# ---- metrics.jsonl


def test_damaged_metrics_are_refused_by_line_or_kept_as_they_are(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [
        {"step": step, "train/loss": 1.0 / step, "train/tokens_per_second": 2.0}
        for step in range(1, 9)
    ]
    with Tracker(tmp_path, 0) as tracker:
        for record in records:
            tracker.record(record)

    def again():
        with Tracker(tmp_path, 8):
            pass
        return [json.loads(line) for line in path.read_text().splitlines()]

    def are_records(found):
        """A flipped digit has no checksum here: these are numbers for people to look at, and
        nothing is computed from them."""
        return all(type(record["step"]) is int for record in found)

    content, refused = path.read_bytes(), 0
    for damage in EVERY:
        damage(path)
        refused += refused_or_equal(again, are_records, "metrics.jsonl")
        restore(path, content)
    assert refused >= 10
    assert again() == records
    for line in (
        b'{"step": 9, "train/loss": "low"}',
        b'{"step": "9"}',
        b"[9]",
        b"9",
        b'{"step": 9, "train/lo',
        b"\xff\xfe",
    ):
        path.write_bytes(content + line + b"\n")
        with pytest.raises(
            UsageError,
            match=r"metrics\.jsonl, line 9: it is damaged .*Fix: correct or delete the line",
        ):
            again()
        path.write_bytes(content + line)
        if not line.endswith(b"}"):
            assert again() == records, (
                "half a line at the end was being written when the process was killed"
            )


# ---- the teacher


def test_a_damaged_teacher_is_made_again_and_never_read(tmp_path, capsys):
    rng = np.random.default_rng(0)
    ids, log_probs = (
        rng.integers(0, 100, (50, 4)).astype(np.int32),
        rng.random((50, 4)).astype(np.float32),
    )
    made_from, path = (
        {"train": {"seed": 1}, "start": "abc", "positions": 50},
        tmp_path / "teacher_top_k.npz",
    )
    assert _read_teacher(path, made_from) is None
    with path.open("wb") as file:
        np.savez(file, made_from=json.dumps(made_from), ids=ids, log_probs=log_probs)

    def unharmed(found):
        return found is None or (
            np.array_equal(found.ids, ids) and np.array_equal(found.log_probs, log_probs)
        )

    content, lost = path.read_bytes(), 0
    for damage in (*EVERY, *(flipped(i / 700, i % 8) for i in range(700))):
        damage(path)
        found = _read_teacher(path, made_from)
        assert unharmed(found), name_of(damage)
        lost += found is None
        restore(path, content)
    assert lost > 400
    assert "teacher_top_k.npz is made again" in capsys.readouterr().err
    assert _read_teacher(path, made_from | {"positions": 49}) is None
    with path.open("wb") as file:
        np.savez(file, made_from=json.dumps(made_from), ids=ids[:7], log_probs=log_probs[:7])
    assert _read_teacher(path, made_from) is None


# ---- Parquet

INFO = GenerationInfo("a/model", 0.75, 0.1, 4096, True)


def parquet_rollouts(n):
    return [r for r in make_rollouts(3 * n) if len(r.output_token_ids)][:n]


def graded(n):
    return [
        dataclasses.replace(r, correct=float(i % 2), value=i / n)
        for i, r in enumerate(parquet_rollouts(n))
    ]


def read_parquet_as_written(path):
    assert read_parquet_metadata(path) == METADATA, "the metadata is another"
    assert read_generation(path) == [INFO] * 7, "the settings of the sampling are others"
    rollouts, identity = open_rollouts(path)
    assert identity["metadata"] == METADATA
    return list(rollouts)


def test_a_damaged_parquet_file_is_refused_or_reads_as_it_was(tmp_path):
    """The pages have checksums of their own.

    The footer, which names columns, offsets and our metadata, has none in Parquet.
    """
    path, rollouts = tmp_path / "t.parquet", graded(7)
    write_parquet(path, rollouts, settings=INFO, metadata=METADATA)
    content, refused = path.read_bytes(), 0
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    in_footer = [
        flipped((footer + i) / len(content), i % 8) for i in range(0, len(content) - footer, 11)
    ]
    for damage in (*EVERY, *(flipped(i / 150, i % 8) for i in range(150)), *in_footer):
        damage(path)
        refused += refused_or_equal(
            lambda: read_parquet_as_written(path), equal_to(rollouts), "t.parquet"
        )
        restore(path, content)
    assert refused > len(EVERY)
    assert_same(read_parquet_as_written(path), rollouts)


def test_a_table_that_another_program_wrote_again_from_ours_is_read(tmp_path):
    """Rows left out, values changed: the digests say nothing about such a table."""
    path, rollouts = tmp_path / "t.parquet", graded(7)
    write_parquet(path, rollouts, settings=INFO, metadata=METADATA)
    table = pq.read_table(path)
    everything = pq.ParquetFile(path).metadata.metadata
    assert b"zip_rc_jax_digests" in everything
    for kept in (
        table.schema.metadata,
        {k: v for k, v in everything.items() if k != b"ARROW:schema"},
    ):
        pq.write_table(table.slice(2, 3).replace_schema_metadata(kept), path)
        assert_same(read_parquet(path), rollouts[2:5])


@pytest.mark.parametrize("value", ["x" * 3_000_000, "\n" * 500, "[" * 100_000])
def test_metadata_of_a_foreign_table_that_is_no_json_is_refused_in_short(tmp_path, value):
    path = tmp_path / "t.parquet"
    write_parquet(path, graded(3), settings=INFO)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({b"zip_rc_jax": value.encode()}), path)
    assert refused_or_equal(lambda: open_rollouts(path), lambda _: False, "t.parquet")


# ---- entry_json


ENTRIES = [
    "{", "[]", "null", "3", '"x"', "\ufeff{}", '{"seed": 1}', "[" * 100_000, "x" * 3_000_000,
    '{"options": [], "seed": 1, '
    '"index": 0}', '{"options": {}, "seed": "1", '
                   '"index": 0}', '{"options": {}, "seed": 1, "index": true}',
    '{"options": {}, "seed": 1, "index": -1}', '{"options": {}, "seed": 1, "index": 0, "more": 2}',
]  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry[:12])
def test_an_entry_that_is_none_is_refused_before_it_is_graded(entry):
    rollout = dataclasses.replace(make_rollouts(1)[0], task="shortest_path", entry_json=entry)
    assert refused_or_equal(lambda: check_entry(rollout), lambda _: False, "entry_json")
    with Grader() as grader, pytest.raises(UsageError, match="entry_json"):
        grader.score(rollout, "Answer: 3")


def test_an_entry_whose_problem_cannot_be_made_grades_nothing_as_wrong():
    entry = json.dumps({"options": {"no_such_option": 1}, "seed": 1, "index": 0})
    rollout = dataclasses.replace(make_rollouts(1)[0], task="shortest_path", entry_json=entry)
    with Grader() as grader, pytest.raises(UsageError, match="generates another problem"):
        grader.score(rollout, "Answer: 3")


# ---- configs

CONFIG = """# of a run
run_dir: runs/mine
problems: {train: {source: gym:chain_sum, levels: [{min_terms: 2, max_terms: 2}]}}
critic: {steps: 12, learning_rate: 1.0e-4, remat: true}
decode: {beta: 0.02, n: 3, stop_token_ids: [4, 5]}
grid: {length_edges: [0, 7, 9]}
"""


def loads_or_refuses(path):
    """A config has no digest: it is for people to write. It is read, or refused by name."""
    refused_or_equal(lambda: load_config(path), lambda config: config is not None, "c.yaml")


def test_a_damaged_config_is_read_or_refused_by_name(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    assert load_config(path).critic.steps == 12
    for damage in (
        *EVERY,
        *(flipped(i / 60, i % 7) for i in range(60)),
        *(truncated(i / 20) for i in range(20)),
    ):
        damage(path)
        loads_or_refuses(path)
        restore(path, CONFIG.encode())


VALUES_OF_YAML = [
    "null", "~", "true", "-1", "0", "1.5", ".nan", ".inf", "-.inf", "'x'", "[]", "[[1]]", "{}",
    "{a: 1}", "2024-01-01", "0x10", "1_000",
    "1e400", "!!binary aGVsbG8=", "!!set {a}", "!!timestamp x", "!!int ''", "!!bool x",
    "!!python/object:os.system {}", "!!float x",
    "*nowhere", "&a [*a]", "${nowhere}", "${run_dir}", "${oc.env:NO_SUCH_VARIABLE}", "???", '"\\0"',
    '"\\ud800"', str(2**200), "9" * 5000,
    "x" * 3_000_000, "[" * 20_000,
]  # fmt: skip
PLACES = ["run_dir: {}", "critic: {}", "critic: {{steps: {}}}", "critic: {{learning_rate: "
                                                                "{}}}", "critic: {{remat: {}}}",
                                                                "problems: {}",
          "problems: {{train: {}}}", "problems: {{train: {{source: gym:gcd, levels: {}}}}}",
          "problems: {{train: {{source: gym:gcd, levels: [{}]}}}}", "grid: {}",
          "grid: {{length_edges: "
                                                                        "{}}}",
                                                                        "grid: {{length_edges: "
                                                                        "[0, {}]}}",
          "grid: {{correct_centres: [0, "
          "{}]}}", "mesh: {{data: {}}}", "prompt: {{style: {}}}", "prompt: "
                                                                  "{{chat_template_kwargs: {}}}",
          "evaluate: {{betas: {}}}", "evaluate: {{candidates: "
                                     "[{}]}}", "rollout: {{seed: {}}}", "label: {{last: {}}}",
          "policy: {{train: {}}}", "evaluate: {{self_evaluation: {}}}", "{}: 1",
          "critic: {{{}: 1}}", "{}"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_every_value_in_every_place_of_a_config_is_read_or_refused_by_name(tmp_path, place):
    path = tmp_path / "c.yaml"
    for value in VALUES_OF_YAML:
        path.write_text(place.format(value) + "\n")
        loads_or_refuses(path)


@pytest.mark.slow
@pytest.mark.parametrize("value", [v for v in VALUES_OF_YAML if len(v) < 10_000])
def test_every_value_of_an_override_is_read_or_refused_by_name(tmp_path, value):
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    for key in (
        "run_dir",
        "critic",
        "critic.steps",
        "grid.length_edges",
        "problems.train.levels",
        "prompt.chat_template_kwargs",
        "decode.n",
        "a..b",
        ".",
    ):
        refused_or_equal(
            lambda key=key: load_config(path, [f"{key}={value}"]), lambda config: config is not None
        )
    refused_or_equal(
        lambda: load_config(path, ["critic=" + "[" * 3000]), lambda _: False, "override"
    )
    refused_or_equal(lambda: load_config(path, ["run_dir=" + "x" * 3_000_000]), lambda _: True)


@pytest.mark.parametrize("value", ["null", "[[1]]", ".nan", "!!bool x", str(2**200), "${nowhere}"])
def test_a_value_of_a_wrong_type_is_read_or_refused_by_name(tmp_path, value):
    """Some of the cases of the two slow tests above."""
    path = tmp_path / "c.yaml"
    for place in (
        "critic: {{steps: {}}}",
        "grid: {{length_edges: [0, {}]}}",
        "problems: {{train: {{source: gym:gcd, levels: {}}}}}",
    ):
        path.write_text(place.format(value))
        loads_or_refuses(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "critic:\n\tsteps: 1",
            r"c\.yaml, line 2, column 1: it is not YAML: found character.*spaces",
        ),
        (
            "run_dir: a\nrun_dir: b",
            r"c\.yaml, line 2, column 1: it is not YAML: found duplicate key run_dir",
        ),
        ("critic: {steps: 1, steps: 2}", "found duplicate key steps"),
        (
            "critic: {steps: 1.5}",
            r"critic\.steps in config .*c\.yaml: .*1\.5.* could not be converted to Integer",
        ),
        (
            "critic: {steps: 1606938044258990275541962092341162602522202993782792835301376}",
            r"critic\.steps|steps in config .*c\.yaml",
        ),
        ("critic: {learning_rate: .inf}", r"learning_rate=inf in config .*c\.yaml"),
        ("decode: {beta: -1}", r"beta=-1.* in config .*c\.yaml"),
        ("run_dir: ???", "run_dir is .*still to come"),
        ("a: " + "${run_dir}" * 21, r"21 interpolations .*20 are allowed"),
        ("- 1", r"config .*c\.yaml"),
    ],
)
def test_a_mistake_in_a_config_is_named_with_its_line_or_key(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_config(path)


def test_a_few_lines_that_stand_for_millions_are_refused_at_once(tmp_path):
    path, levels = tmp_path / "c.yaml", range(1, 12)
    for first, each in (
        ("&a0 [x, x]", lambda i: f"&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]"),
        ("xx", lambda i: f"${{.a{i - 1}}}" * 10),
    ):
        lines = [f"    a0: {first}", *(f"    a{i}: {each(i)}" for i in levels)]
        path.write_text("prompt:\n  style: chat\n  chat_template_kwargs:\n" + "\n".join(lines))
        with pytest.raises(UsageError, match=r"c\.yaml"):
            load_config(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfer\x00u\x00", "it is no UTF-8 text: byte 0 is 0xff"),
        (b"run_dir: \xe9", "byte 9 is 0xe9"),
        (b"x" * 2**21, "more than"),
    ],
)
def test_a_config_in_another_encoding_or_of_megabytes_says_so(tmp_path, content, message):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_config(tmp_path / "c.yaml")
    # as Windows' editors save it
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfrun_dir: here\r\n")
    assert load_config(tmp_path / "c.yaml").run_dir == "here"


# ---- messages


@pytest.mark.parametrize(
    "parts",
    [
        ("x" * 3_000_000, "y", "z"),
        ("x", "y" * 3_000_000, "z"),
        ("x", "y", "z" * 10**6),
        ("é" * 5000,) * 3,
        ("a\nb", "c\x1b[2Jd", "e\u2028f"),
    ],
)
def test_a_message_is_one_short_paragraph_whatever_it_is_about(parts):
    message = str(UsageError(*parts))
    assert len(message) <= LONGEST < 1000
    assert all(character.isprintable() for character in message), (
        "a line break, or something that moves the cursor"
    )


def test_a_long_message_keeps_the_start_and_the_end_of_what_is_long_and_all_of_the_rest():
    path = "/data/" + "deep/" * 1000 + "metadata.json"
    error = UsageError(f"file {path}", "it is damaged", "write it again")
    assert str(error).startswith("file /data/deep/")
    assert "metadata.json: it is damaged. Fix: write it again." in str(error)
    short = UsageError("beta=-1", "it is a price", "use a number >= 0")
    assert str(short) == "beta=-1: it is a price. Fix: use a number >= 0."


def test_an_error_comes_through_a_process_pool_as_it_is():
    error = UsageError("beta=-1", "it is a price", "use a number >= 0")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.value, again.reason, again.fix) == (
        UsageError,
        str(error),
        error.value,
        error.reason,
        error.fix,
    )


def test_another_type_of_json_where_a_dataset_has_an_object(tmp_path):
    write_rollouts(tmp_path / "r", make_rollouts(3), metadata=METADATA)
    (tmp_path / "r/digests.json").unlink()
    content = (tmp_path / "r/metadata.json").read_bytes()
    for damage in (
        of_another_type([1]),
        of_another_type(None),
        of_another_type("x"),
        replaced_by(b"NaN", "nan"),
        replaced_by(b"", "empty"),
    ):
        damage(tmp_path / "r/metadata.json")
        with pytest.raises(UsageError, match=r"metadata\.json"):
            read_metadata(tmp_path / "r")
        restore(tmp_path / "r/metadata.json", content)
