"""What a log shows of long work."""

from __future__ import annotations

import time

from zip_rc_jax.runtime.progress import progress


def test_the_time_left_is_that_of_the_work_after_the_first_part_which_also_compiles(
    monkeypatch, capsys
):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with progress("work", 10, done=2) as bar:
        for now, seconds in ((3, 100.0), (4, 10.0), (6, 20.0), (10, 40.0)):
            clock[0] += seconds
            bar(now, f"{now} parts" if now != 6 else None)
    assert capsys.readouterr().err.splitlines() == [
        "work 3/10  ETA 700s  3 parts",  # nothing else is known yet
        "work 6/10  ETA 40s  4 parts",  # 10 s a part; too soon for a line after the fourth
        "work 10/10  ETA 0s  10 parts",
    ]


def test_work_of_unknown_size_is_counted_without_an_estimate(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with progress("work", None) as bar:
        for now in (1, 2, 3):
            clock[0] += 10.0
            bar(now, f"{now} parts")
    assert capsys.readouterr().err.splitlines() == ["work 2  2 parts"]  # a line every 15 s
