"""Claims in buckets: one living owner at a time, whatever the clocks say."""

from __future__ import annotations

import threading

import pytest

from harness.stores import memory_store, now_and_then
from zip_rc_jax.runtime import claims as claims_module
from zip_rc_jax.runtime.buckets import Bucket
from zip_rc_jax.runtime.claims import Claims
from zip_rc_jax.runtime.errors import UsageError

BUCKET = "memory://b/run"


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def memory():
    with memory_store() as store:
        yield store


@pytest.fixture
def owners(memory, monkeypatch):
    """Makes owners as if each were another machine's; none of them beats by itself."""
    made = []
    monkeypatch.setattr(claims_module, "this_process", lambda: f"{len(made):08x}-1-1")

    def owner(clock=None):
        made.append(Claims(Bucket(BUCKET), "claims", beat_seconds=1e6, clock=clock or Clock()))
        return made[-1]

    yield owner
    for one in made:
        one.close()


def test_of_many_owners_one_gets_a_claim(owners):
    many = [owners() for _ in range(6)]
    won, ready = [], threading.Barrier(6)

    def take(one):
        ready.wait()
        if one.take("chunk"):
            won.append(one)

    threads = [threading.Thread(target=take, args=(one,)) for one in many]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert won[0].take("chunk"), "what is ours stays ours"
    assert not any(one.take("chunk") for one in many if one is not won[0])
    assert many[0].take("another")


def test_the_holder_is_known_and_nobody_holds_what_is_free(owners):
    one, other = owners(), owners()
    assert other.holder("chunk") is None
    one.take("chunk")
    holder = other.holder("chunk")
    assert {"host", "pid", "since"} <= set(holder)
    assert holder["owner"] == one.id


def test_a_closed_owner_frees_its_claims_at_once(owners):
    one, other = owners(), owners()
    one.take("chunk")
    one.close()
    assert other.holder("chunk") is None
    assert other.take("chunk")


def test_a_silent_owner_is_replaced_by_the_clock_of_the_watcher_alone(owners):
    clock = Clock()
    one, other = owners(), owners(clock)
    assert one.take("chunk")
    assert not other.take("chunk")
    clock.now = 60
    one.beat()
    assert not other.take("chunk"), "it beat since"
    clock.now = 149
    assert not other.take("chunk")
    clock.now = 151
    assert other.take("chunk")
    assert one.lost("chunk")
    assert not one.take("chunk")
    assert not other.lost("chunk")


def test_of_several_that_replace_a_silent_owner_one_succeeds(owners):
    clock = Clock()
    dead, *others = owners(), *[owners(clock) for _ in range(4)]
    dead.take("chunk")
    assert not any(one.take("chunk") for one in others)
    clock.now = 1_000
    for one in others[1:]:
        one.beat()
    assert [one.take("chunk") for one in others] == [True, False, False, False]


def test_a_dead_process_of_this_machine_is_replaced_without_waiting(memory, monkeypatch):
    from zip_rc_jax.runtime.temporaries import this_process

    machine, _, start = this_process().split("-")
    monkeypatch.setattr(claims_module, "this_process", lambda: f"{machine}-4000000-{start}")
    dead = Claims(Bucket(BUCKET), "claims", beat_seconds=1e6)
    assert dead.take("chunk")
    monkeypatch.undo()
    with Claims(Bucket(BUCKET), "claims", beat_seconds=1e6) as other:
        assert other.take("chunk")
    dead.close()


def test_claims_hold_among_failures_that_pass(owners, memory):
    memory.before = staticmethod(now_and_then(0.3, 1))
    memory.after = staticmethod(now_and_then(0.3, 2))
    one, other = owners(), owners()
    mine = {n for n in range(30) if (one if n % 2 else other).take(str(n))}
    assert mine == set(range(30))
    assert not any((other if n % 2 else one).take(str(n)) for n in range(30))


def test_owners_beat_by_themselves(memory):
    bucket = Bucket(BUCKET)
    with Claims(bucket, "claims", beat_seconds=0.01) as one:
        before = bucket.read(f"claims/beats/{one.id}")
        for _ in range(1000):
            if bucket.read(f"claims/beats/{one.id}") != before:
                break
            threading.Event().wait(0.01)
        else:
            pytest.fail("its beat never changed")


def test_a_store_that_cannot_refuse_a_second_writer_is_refused():
    bucket = Bucket(BUCKET)
    bucket.scheme = "ftp"
    with pytest.raises(UsageError, match="ftp:// cannot create an object only where there is none"):
        Claims(bucket, "claims")
