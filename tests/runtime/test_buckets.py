"""Objects in buckets: written as a whole, created once, tried again after failures that pass."""

from __future__ import annotations

import sys
import threading

import pytest

from harness.stores import PASSING, FaultyMemory, HttpFailure, gcs_emulator, memory_store
from zip_rc_jax.runtime import buckets
from zip_rc_jax.runtime.buckets import Bucket
from zip_rc_jax.runtime.errors import UsageError


@pytest.fixture(scope="module")
def emulator():
    with gcs_emulator("test-bucket") as url:
        yield url


@pytest.fixture(params=["memory", "gs"])
def bucket(request):
    if request.param == "memory":
        with memory_store():
            yield Bucket("memory://test-bucket/run")
    else:
        request.getfixturevalue("emulator")
        yield Bucket(f"gs://test-bucket/{request.node.originalname}")


@pytest.fixture
def memory():
    with memory_store() as store:
        yield store


def test_what_is_written_reads_back_and_what_is_not_there_is_none(bucket, tmp_path):
    bucket.write("a/b", b"1")
    bucket.write("a/b", b"2")
    (tmp_path / "file").write_bytes(b"3" * 100_000)
    bucket.upload(tmp_path / "file", "c")
    assert bucket.read("a/b") == b"2"
    assert bucket.read("a") is None
    assert bucket.read("nothing") is None
    assert bucket.download("c", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"3" * 100_000
    assert not bucket.download("a", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert [bucket.exists(name) for name in ("a/b", "a", "c", "d")] == [True, False, True, False]


def test_names_are_those_below_a_folder_in_order(bucket):
    for name in ("b/2", "b/1", "b/c/3", "bb/4", "a"):
        bucket.write(name, b"")
    assert bucket.names("b") == ["b/1", "b/2", "b/c/3"]
    assert bucket.names() == ["a", "b/1", "b/2", "b/c/3", "bb/4"]
    assert bucket.names("nothing") == []
    bucket.delete(["a", "b/1", "nothing"])
    assert bucket.names() == ["b/2", "b/c/3", "bb/4"]


def test_of_several_that_create_an_object_one_succeeds(bucket):
    won, ready = [], threading.Barrier(8)

    def create(number):
        ready.wait()
        if bucket.create("claim", b"%d" % number):
            won.append(b"%d" % number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [bucket.read("claim")] == won


def test_a_bucket_that_can_be_used_is_left_as_it_was(bucket):
    bucket.check_writable()
    assert bucket.names() == []


@pytest.mark.parametrize("failure", PASSING)
def test_failures_that_pass_are_tried_again(memory, failure):
    bucket, left = Bucket("memory://b/run"), [3]

    def fail(operation, path):
        if left[0]:
            left[0] -= 1
            raise failure()

    memory.before = staticmethod(fail)
    bucket.write("a", b"1")
    assert left == [0]
    left[0] = 3
    assert bucket.read("a") == b"1"
    left[0] = 3
    assert bucket.names() == ["a"]
    assert left == [0]


def test_a_creation_whose_answer_was_lost_counts_as_ours(memory):
    bucket, lost = Bucket("memory://b/run"), [True]

    def lose(operation, path):
        if operation == "pipe_file" and lost[0]:
            lost[0] = False
            raise TimeoutError

    memory.after = staticmethod(lose)
    assert bucket.create("claim", b"mine")
    assert not bucket.create("claim", b"another's")
    assert bucket.read("claim") == b"mine"


def test_a_failure_that_does_not_pass_is_an_error_after_all_tries(memory):
    tries = []

    def fail(operation, path):
        tries.append(path)
        raise HttpFailure(503)

    memory.before = staticmethod(fail)
    with pytest.raises(UsageError, match=r"memory://b/run/a: the store did not answer.*resumes"):
        Bucket("memory://b/run").write("a", b"")
    assert len(tries) == len(buckets.PAUSES) + 1


@pytest.mark.parametrize(
    "failure",
    [
        PermissionError(13, "denied"),
        HttpFailure(403),
        HttpFailure(401),
        OSError("Forbidden: b/run"),
    ],
)
def test_a_refusal_is_an_error_at_once_that_names_the_role(memory, failure):
    tries = []

    def fail(operation, path):
        tries.append(path)
        raise failure

    memory.before = staticmethod(fail)
    with pytest.raises(UsageError, match=r"memory://b/run/a: access is denied.*objectAdmin"):
        Bucket("memory://b/run").read("a")
    assert len(tries) == 1


def test_a_bucket_that_is_not_there_is_an_error_with_the_command_that_makes_it(emulator):
    with pytest.raises(
        UsageError, match=r"there is no bucket gs://other.*gcloud storage buckets create gs://other"
    ):
        Bucket("gs://other/run").check_writable()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://", "names no bucket"),
        ("gs://bucket", "a folder of its own.*gs://bucket/run"),
        ("gs://bucket/a*b", r"it contains '\*'"),
        ("gs://bucket/a//b", "it contains '//'"),
        ("nothing://b/run", "fsspec knows no such scheme"),
    ],
)
def test_addresses_that_cannot_work_are_refused(url, message):
    with pytest.raises(UsageError, match=message):
        Bucket(url)


@pytest.mark.parametrize(
    ("scheme", "package", "command"),
    [
        ("gs", "gcsfs", r"pip install 'zip-rc-jax\[buckets\]'"),
        ("s3", "s3fs", "pip install s3fs"),
        ("abfs", "adlfs", "pip install adlfs"),
    ],
)
def test_a_missing_package_is_named_with_its_command(monkeypatch, scheme, package, command):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(UsageError, match=rf"{package} reads {scheme}://.*{command}"):
        Bucket(f"{scheme}://bucket/run")


def test_the_store_of_the_harness_loses_nothing_by_itself(memory):
    bucket = Bucket("memory://b/run")
    FaultyMemory.lag = 2
    bucket.write("a", b"1")
    assert [bucket.names() for _ in range(3)] == [[], [], ["a"]]
    assert bucket.read("a") == b"1"
