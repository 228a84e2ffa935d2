"""Every reader of foreign bytes, fed with bytes that hypothesis makes: a `UsageError` in one
paragraph, or a right result.

Files are made by the code that makes them, changed at random places, and read by the code that
reads them. Where a file carries a digest, a right result is what was written. Where it carries none
(published models, texts of people), it is one that keeps the promises of its reader. `pytest -s`
prints how many inputs were refused and how many were read.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.damage import check_message
from harness.gguf_files import read as read_gguf
from harness.gguf_files import write as write_gguf
from harness.hf_models import torch_model
from harness.processes import rollouts
from harness.tiny import TINY_MODEL, tiny_lm
from zip_rc_jax.cli.main import main
from zip_rc_jax.config import DecodeConfig, PipelineConfig
from zip_rc_jax.config.files import load_config
from zip_rc_jax.data.parquet import GenerationInfo, read_parquet, write_parquet
from zip_rc_jax.data.problems import problems_from_jsonl
from zip_rc_jax.data.rollouts import PartialRollouts, read_rollouts, write_rollouts
from zip_rc_jax.grading.answers import extract_answer
from zip_rc_jax.inference.api import resolve
from zip_rc_jax.inference.engine import Engine
from zip_rc_jax.inference.requests import RejectedRequest, Request, TokenizedRequest
from zip_rc_jax.models.io.load import export, load
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.storage import Journal

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
COUNTS: collections.Counter[str] = collections.Counter()


@pytest.fixture(scope="module", autouse=True)
def counts():
    yield
    print("\n" + "\n".join(f"{name}: {count}" for name, count in sorted(COUNTS.items())))


def refused_or(name, read):
    """What `read()` gives; None where it is refused in one short paragraph.

    Any other exception fails the test.
    """
    try:
        found = read()
    except UsageError as error:
        check_message(error)
        COUNTS[f"{name}, refused"] += 1
        return None
    COUNTS[f"{name}, read"] += 1
    return found


# ---- bytes that went wrong

SHARE = st.floats(0, 1, exclude_max=True)
EDIT = st.one_of(
    st.tuples(st.just("flip"), SHARE, st.integers(0, 7)),
    st.tuples(st.just("cut"), SHARE, st.just(0)),
    st.tuples(st.just("insert"), SHARE, st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("write"), SHARE, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("zeros"), SHARE, st.integers(1, 300)),
    st.tuples(st.just("repeat"), SHARE, st.integers(1, 50)),
)
EDITS = st.lists(EDIT, min_size=1, max_size=3)
# Pieces that parsers of text know.
PIECES = st.sampled_from(
    [
        "{",
        "}",
        "[",
        "]",
        '"',
        ":",
        ",",
        "null",
        "NaN",
        "1e400",
        "-1",
        "true",
        "\\ud800",
        "0" * 30,
        "- ",
        "\t",
        "&a ",
        "*a",
        "!!",
        "\ufeff",
    ]
)
TEXT_EDITS = st.lists(st.tuples(SHARE, st.integers(0, 6), PIECES), min_size=1, max_size=3)


def damaged(content: bytes, edits) -> bytes:
    for kind, share, what in edits:
        at = int(share * len(content))
        if kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ 1 << what]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + what + content[at:]
        elif kind == "write":
            content = content[:at] + what + content[at + len(what) :]
        elif kind == "zeros":
            content = content[:at] + bytes(what) + content[at + what :]
        elif kind == "repeat":
            content = content[: at + what] + content[at:]
    return content


def misspelled(text: str, edits) -> str:
    """Text with pieces put in the place of a few characters."""
    for share, length, piece in edits:
        at = int(share * len(text))
        text = text[:at] + piece + text[at + length :]
    return text


def with_changed(path, content, read):
    """`read()` while the file holds `content`; the file is then as it was."""
    kept = path.read_bytes()
    path.write_bytes(content)
    try:
        return read()
    finally:
        path.write_bytes(kept)


def files_of(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def choose(files, share):
    return files[int(share * len(files))]


# ---- what carries digests comes back as it was


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "m"
    lm = tiny_lm()
    lm.save(directory)
    return directory, lm, files_of(directory)


@given(SHARE, EDITS)
@settings(max_examples=60)
def test_a_model(model, share, edits):
    directory, lm, files = model
    path = choose(files, share)
    found = with_changed(
        path,
        damaged(path.read_bytes(), edits),
        lambda: refused_or("model", lambda: load(directory)),
    )
    if found is not None:
        assert (found.config, found.head, found.tokenizer.to_dict()) == (
            lm.config,
            lm.head,
            lm.tokenizer.to_dict(),
        ), path
        jax.tree.map(np.testing.assert_array_equal, found.params, lm.params)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dataset") / "r"
    made = rollouts(12)
    write_rollouts(directory, made, metadata={"a": [1, 2]})
    return directory, made, files_of(directory)


def assert_same(found, made):
    assert len(found) == len(made)
    for a, b in zip(found, made, strict=True):
        for field in dataclasses.fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if isinstance(y, float):  # ArrayRecord keeps float32
                np.testing.assert_allclose(x, y, rtol=1e-7)
            else:
                np.testing.assert_array_equal(x, y)


@given(SHARE, EDITS)
@settings(max_examples=150)
def test_a_dataset(dataset, share, edits):
    directory, made, files = dataset
    path = choose(files, share)
    found = with_changed(
        path,
        damaged(path.read_bytes(), edits),
        lambda: refused_or("dataset", lambda: read_rollouts(directory)),
    )
    if found is not None:
        assert_same(found, made)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "r.parquet"
    made = [dataclasses.replace(r, task="") for r in rollouts(12)]
    info = GenerationInfo(
        model_id="m", temperature=1.0, min_p=0.1, max_model_len=64, reasoning_enabled=False
    )
    write_parquet(path, made, settings=info, metadata={"a": 1})
    return path, read_parquet(path)


@given(EDITS)
@settings(max_examples=200)
def test_a_parquet_table(table, edits):
    path, made = table
    content = path.read_bytes()
    found = with_changed(
        path, damaged(content, edits), lambda: refused_or("Parquet", lambda: read_parquet(path))
    )
    if found is not None:
        assert_same(found, made)


@given(EDITS)
@settings(max_examples=150)
def test_a_journal(tmp_path_factory, edits):
    path = tmp_path_factory.mktemp("journal") / "results.partial.jsonl"
    journal, values = (
        Journal(path, fingerprint={"a": 1}),
        [{"x": i, "text": "é" * i} for i in range(5)],
    )
    for value in values:
        journal.add(value)
    path.write_bytes(damaged(path.read_bytes(), edits))
    found = refused_or("journal", lambda: Journal(path, fingerprint={"a": 1}).values)
    if found is not None:  # its last lines may be lost, as by a kill
        assert found == values[: len(found)]


@given(SHARE, EDITS)
@settings(max_examples=100)
def test_chunks(tmp_path_factory, share, edits):
    directory, made = tmp_path_factory.mktemp("chunks") / "p", rollouts(9)
    partial = PartialRollouts(directory, fingerprint={"a": 1})
    for number in range(3):
        partial.add(number, made[3 * number : 3 * number + 3])
    path = choose(files_of(directory), share)
    path.write_bytes(damaged(path.read_bytes(), edits))
    found = refused_or(
        "chunks", lambda: list(PartialRollouts(directory, fingerprint={"a": 1}).all())
    )
    if found is not None:  # a damaged chunk is made again
        known = {(r.prompt_index, r.sample_index): r for r in made}
        for r in found:
            assert_same([r], [known[r.prompt_index, r.sample_index]])


# ---- published models


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    directory = tmp_path_factory.mktemp("published") / "hf"
    export(tiny_lm(dataclasses.replace(TINY_MODEL, n_heads=4)), directory)
    return directory, files_of(directory)


@given(SHARE, st.one_of(EDITS, TEXT_EDITS))
@settings(max_examples=120)
def test_a_hugging_face_directory(published, share, edits):
    directory, files = published
    path = choose(files, share)
    content = path.read_bytes()
    as_text = len(edits[0]) == 3 and isinstance(edits[0][0], float)
    if as_text and path.suffix == ".safetensors":
        return
    content = (
        misspelled(content.decode(), edits).encode("utf-8", "surrogatepass")
        if as_text
        else damaged(content, edits)
    )
    lm = with_changed(path, content, lambda: refused_or("Hugging Face", lambda: load(directory)))
    if lm is not None:
        assert all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in jax.tree.leaves(lm.params))


@given(SHARE, TEXT_EDITS)
@settings(max_examples=150)
def test_a_tokenizer(published, share, edits):
    directory, files = published
    path = choose([p for p in files if p.suffix in (".json", ".jinja")], share)
    content = misspelled(path.read_text(encoding="utf-8"), edits).encode("utf-8", "surrogatepass")

    def read():
        tokenizer = Tokenizer.from_pretrained(directory)
        return tokenizer.encode("1 + 2 =")

    ids = with_changed(path, content, lambda: refused_or("tokenizer", read))
    assert ids is None or all(isinstance(i, int) and i >= 0 for i in ids)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(
        path,
        torch_model(
            "llama",
            hidden_act="silu",
            rope_parameters={"rope_type": "default", "rope_theta": 321.0},
        ),
    )
    return path


@given(EDITS)
@settings(max_examples=120)
def test_a_gguf_file(gguf_file, edits):
    content = gguf_file.read_bytes()
    found = with_changed(
        gguf_file, damaged(content, edits), lambda: refused_or("GGUF", lambda: read_gguf(gguf_file))
    )
    if found is not None:
        assert all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in jax.tree.leaves(found[1]))


# ---- texts of people

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
    max_leaves=8,
)
LINE = st.dictionaries(
    st.sampled_from(["question", "problem", "answer", "level", "id"]),
    JSON | st.sampled_from(["What?", "42", 42, "#### 7"]),
    max_size=5,
)


@given(st.lists(LINE, max_size=4), st.none() | TEXT_EDITS, st.none() | EDITS)
@settings(max_examples=400)
def test_a_jsonl_file(tmp_path_factory, lines, text_edits, edits):
    path = tmp_path_factory.mktemp("jsonl") / "problems.jsonl"
    text = "\n".join(map(json.dumps, lines))
    text = misspelled(text, text_edits) if text_edits else text
    content = text.encode("utf-8", "surrogatepass")
    path.write_bytes(damaged(content, edits) if edits else content)
    for p in refused_or("JSONL", lambda: problems_from_jsonl(path)) or ():
        assert p.question.strip()
        assert p.answer == p.answer.strip() != ""
        f"{p.question}{p.answer}".encode()


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@given(st.sampled_from(CONFIGS), TEXT_EDITS)
@settings(max_examples=200)
def test_a_config(tmp_path_factory, config, edits):
    path = tmp_path_factory.mktemp("config") / "c.yaml"
    path.write_text(misspelled(config.read_text(encoding="utf-8"), edits), encoding="utf-8")
    found = refused_or("YAML", lambda: load_config(str(path)))
    assert found is None or isinstance(found, PipelineConfig)


KEYS = st.sampled_from([f.name for f in dataclasses.fields(DecodeConfig)]) | st.text(max_size=8)
VALUES = st.text(max_size=12) | PIECES | st.integers().map(str) | st.floats().map(str)


@given(st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=3))
@settings(max_examples=250)
def test_options_of_the_command_line(options):
    arguments = [f"{key}={value}" for key, value in options if not key.startswith("-")]
    try:
        status = main(["decode", "no/such/model", "--prompt", "x", *arguments])
    except SystemExit as ended:  # the parser's own word for what is no option
        status = ended.code
    COUNTS["command line"] += 1
    assert status == 2


@given(
    st.text(max_size=400),
    st.lists(
        st.sampled_from(
            ["Answer:", "\\boxed{", "####", "<answer>", "The answer is", "\n", "42", "}", "$"]
        ),
        max_size=12,
    ),
)
@settings(max_examples=400)
def test_a_response(text, pieces):
    COUNTS["responses"] += 1
    answer = extract_answer("".join([text, *pieces]))
    assert answer is None or answer.strip()


# ---- requests, as a server would pass them on

JUNK = (
    JSON
    | st.binary(max_size=5)
    | st.sampled_from(
        [
            math.nan,
            math.inf,
            10**400,
            -1,
            0,
            1,
            2**31,
            2**64,
            (),
            (0,),
            (1, -1),
            object(),
            np.int64(2),
            np.float32(0.5),
            "",
        ]
    )
)
FIELDS = [f.name for f in dataclasses.fields(Request) if f.name != "prompt"]
TURN = st.dictionaries(
    st.sampled_from(["role", "content", "tool_calls", "x"]),
    JSON | st.sampled_from(["user", "assistant"]),
    max_size=4,
)


@pytest.fixture(scope="module")
def engine():
    return Engine(
        tiny_lm(), DecodeConfig(n=2, max_num_seqs=4, interval=4, window=2, max_tokens=8), seed=0
    )


@given(
    st.lists(
        st.tuples(
            JUNK | st.just("1 + 2 =") | st.lists(TURN, max_size=2),
            st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=3),
        ),
        max_size=3,
    )
)
@settings(max_examples=400)
def test_requests(engine, asked):
    """A good request between them is always accepted, and each of the others is accepted or refused
    for itself."""
    requests = [
        Request("1 + 2 ="),
        *(Request(prompt, **options) for prompt, options in asked),
        "3 + 4 =",
    ]
    found = list(engine.processor.tokenize(iter(requests), "result"))
    assert [x.number for x in found] == list(range(len(requests)))
    assert all(isinstance(x, TokenizedRequest | RejectedRequest) for x in found)
    assert isinstance(found[0], TokenizedRequest)
    assert isinstance(found[-1], TokenizedRequest)
    for x in found:
        COUNTS[f"requests, {'read' if isinstance(x, TokenizedRequest) else 'refused'}"] += 1
        assert isinstance(x, TokenizedRequest) or 0 < len(x.reason) < 1000


@given(st.dictionaries(KEYS, JUNK, max_size=3))
@settings(max_examples=400)
def test_options_of_a_decode(options):
    found = refused_or("options", lambda: resolve(None, options))
    assert found is None or isinstance(found, DecodeConfig)
