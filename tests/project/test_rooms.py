"""The rooms of the package: which may import which, and what lies at the root."""

from __future__ import annotations

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE, TESTS = ROOT / "zip_rc_jax", ROOT / "tests"

# From the ground up. A room imports from its own floor and from those below it, never from above.
# A file of the root is a room of its own.
FLOORS = (
    ("runtime",),  # devices, processes, files, errors: knows nothing of models
    ("grid",),  # reward x length cells: the only place that knows units
    ("config",),  # settings and their files
    ("head",),  # where the joint lies in the vocabulary
    ("models",),  # transformer, cache, tokenizers, checkpoints
    ("search",),  # decisions from joints: no model, no files
    ("data",),  # problems, rollouts, batches
    ("grading",),  # answers and their graders
    ("inference",),  # decoding
    ("predictions",),  # reading the head off any text
    ("explorer",),  # the page that shows searches and evaluations
    ("evaluation",),  # baselines, metrics, reports
    ("training",),  # losses, steps, the trainer
    ("pipeline",),  # the stages of a run, from files to files
    ("aot",),  # compiling for machines that are not here
    ("serving",),  # a model behind HTTP
    ("cli",),  # the command line
    ("__init__", "__main__"),  # the public names, the program
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# (file, room that it imports from): where the direction is not kept yet. An entry that is no longer
# needed fails the test.
KNOWN: set[tuple[str, str]] = set()


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree):
    """Every name of a module that a file imports from this package, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (
                [f"{node.module}.{a.name}" for a in node.names]
                if node.module == "zip_rc_jax"
                else [node.module]
            )
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


def rooms_imported(path):
    names = (name.split(".") for name in imported(ast.parse(path.read_text())))
    found = {
        parts[1] if len(parts) > 1 else "__init__" for parts in names if parts[0] == "zip_rc_jax"
    }
    # a public name comes from the top
    return {room if room in FLOOR_OF else "__init__" for room in found}


def test_no_import_runs_upwards():
    upwards = {
        (str(path.relative_to(PACKAGE)), room)
        for path in modules()
        for room in rooms_imported(path)
        if FLOOR_OF[room] > FLOOR_OF[room_of(path)]
    }
    assert upwards - KNOWN == set()
    assert KNOWN - upwards == set(), "these keep the direction now: take them off the list"


def test_every_file_has_a_room_with_a_floor_and_every_room_says_what_it_is_for():
    assert {room_of(path) for path in modules()} == set(FLOOR_OF)
    for folder in sorted({path.parent for path in modules()}):
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def test_at_most_six_python_files_lie_at_the_root_of_the_package():
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_imports_are_absolute():
    """So that the test above sees them. The grading worker loads one folder by its path, without
    the package: inside it, files import their neighbors relatively."""
    by_path = PACKAGE / "grading" / "plain"
    for path in modules():
        relative = [
            n
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.ImportFrom) and n.level
        ]
        if path.parent == by_path:
            assert {n.level for n in relative} <= {1}, path
        else:
            assert not relative, path


@pytest.mark.parametrize(
    "path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS))
)
def test_no_test_module_imports_another(path):
    """What tests share lies in tests/harness."""
    names = {part for name in imported(ast.parse(path.read_text())) for part in name.split(".")}
    assert not [name for name in names if name.startswith("test_")]


def test_tests_lie_in_the_folders_of_the_package():
    folders = {
        path.relative_to(TESTS).parts[0]
        for path in TESTS.rglob("test_*.py")
        if path.parent != TESTS
    }
    assert folders - {folder.name for folder in PACKAGE.iterdir() if folder.is_dir()} <= {
        "project",
        "launch",
    }
