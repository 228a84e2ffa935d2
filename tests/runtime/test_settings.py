"""What is on disk against the settings of today, and names that are near to a wrong one."""

from __future__ import annotations

import pytest

from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.settings import check_same_settings, nearest

STORED = {"train": {"steps": 7, "sizes": [1, 2], "mesh": {}}, "seed": 0}


def check(given, stored=STORED, **more):
    check_same_settings("run x", stored, given, fix="delete it", **more)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            STORED | {"seed": 5},
            r"run x: it was made with other settings: seed was 0, now 5\. Fix: delete it\.",
        ),
        (STORED | {"train": STORED["train"] | {"steps": 8}}, r"train\.steps was 7, now 8"),
        (
            STORED | {"train": STORED["train"] | {"sizes": [1, 3]}},
            r"train\.sizes was \[1, 2\], now \[1, 3\]",
        ),
        (STORED | {"more": "x"}, r"more was None, now 'x'"),
        ({"train": STORED["train"]}, r"seed was 0, now None"),
        (STORED | {f"a{i}": i for i in range(7)}, r"a4 was None, now 4; and 2 more"),
    ],
)
def test_the_first_settings_that_differ_are_named(given, message):
    with pytest.raises(UsageError, match=message):
        check(given)


def test_equal_settings_pass_whatever_json_makes_of_their_types():
    check(STORED)
    check(STORED | {"train": STORED["train"] | {"sizes": (1, 2)}})


def test_free_settings_may_differ():
    check(STORED | {"seed": 5}, free=["seed"])
    with pytest.raises(UsageError, match="train"):
        check({"seed": 5}, free=["seed"])


def test_what_holds_no_settings_is_refused():
    with pytest.raises(UsageError, match="its settings are a JSON list, not an object"):
        check(STORED, stored=[1])


@pytest.mark.parametrize(
    ("name", "most", "fix"),
    [
        ("stpes", 1, "did you mean 'steps'?"),
        ("step", 2, "did you mean 'steps' or 'stem'?"),
        ("zzz", 1, "the options are steps, stem, seed"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest_or_with_all(name, most, fix):
    assert nearest(name, ["steps", "stem", "seed"], "the options are", most) == fix
