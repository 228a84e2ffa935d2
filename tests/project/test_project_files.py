"""The files of a project: they parse, agree with each other, and are in the sdist."""

from __future__ import annotations

import os
import pathlib
import re
import tomllib

import yaml

import zip_rc_jax

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def read_yaml(name):
    return yaml.safe_load((ROOT / name).read_text())


def test_the_license_is_apache_2_in_full_and_the_metadata_say_so():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability" in text
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]


def test_one_version_stands_in_the_package_the_metadata_and_the_citation():
    citation = read_yaml("CITATION.cff")
    assert zip_rc_jax.__version__ == PROJECT["version"] == citation["version"]


def test_the_citation_has_what_the_format_requires_and_names_the_paper():
    citation = read_yaml("CITATION.cff")
    assert {"cff-version", "title", "message", "authors"} <= citation.keys()
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert paper["url"].endswith("2512.01457")


def test_the_hooks_run_the_tools_that_lint_runs():
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    tools = {pathlib.Path(hook["entry"].split()[0]).name for hook in repository["hooks"]}
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    assert tools == set(re.findall(r"\$\(BIN\)/(\w+)", lint))
    assert all(
        hook["entry"].startswith(".venv/bin/") and hook["language"] == "system"
        for hook in repository["hooks"]
    )


def test_the_workflow_runs_what_ci_runs_on_the_oldest_python_and_a_newer_one():
    workflow = read_yaml(".github/workflows/ci.yml")
    (job,) = workflow["jobs"].values()
    assert {"run": "bash .ci/run"} in job["steps"]
    (versions,) = [
        step["with"]["python-version"].split()
        for step in job["steps"]
        if "python-version" in step.get("with", {})
    ]
    lowest = re.match(r">=([0-9.]+)", PROJECT["requires-python"])[1]
    assert versions[0] == lowest
    assert all(
        f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]
        for version in versions
    )


def test_every_target_that_ci_and_contributing_name_is_in_the_makefile():
    for name in (".ci/run", "CONTRIBUTING.md"):
        named = set(re.findall(r"\bmake ([a-z-]+[a-z])\b", (ROOT / name).read_text()))
        assert named, name
        assert named <= TARGETS, name


def test_every_script_is_executable():
    for path in (ROOT / ".ci/run", ROOT / "tests/project/package_check.sh"):
        assert os.access(path, os.X_OK), path


def test_the_jax_part_of_the_suite_names_tests_that_are_there():
    listed = (
        (ROOT / "Makefile")
        .read_text()
        .partition("JAX_TESTS :=")[2]
        .partition("\n\n")[0]
        .replace("\\", "")
        .split()
    )
    assert len(listed) > 5
    for path, _, test in (item.partition("::") for item in listed):
        assert not test or f"\ndef {test}(" in (ROOT / path).read_text()
        assert (ROOT / path).exists(), path


def test_ci_runs_the_jax_part_on_the_newest_python():
    assert "\nmake test-newest" in (ROOT / ".ci/run").read_text()


def test_jax_and_flax_come_in_pairs_on_the_oldest_python_and_as_a_range_on_others():
    found = {
        (item.partition(">")[0], item.partition("python_version ")[2]): item
        for item in PROJECT["dependencies"]
        if "python_version" in item
    }
    assert set(found) == {
        (name, marker) for name in ("jax", "flax") for marker in ("< '3.12'", ">= '3.12'")
    }
    assert ">=0.10.2,<0.13;" in found["jax", ">= '3.12'"]


def test_nothing_private_of_jax_is_imported():
    pattern = re.compile(r"^\s*(?:from|import) +jax(?:\.\w+)*\._", re.MULTILINE)
    private = [
        path
        for folder in ("zip_rc_jax", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if pattern.search(path.read_text())
    ]
    assert not private
    assert pattern.search("    from jax._src import distributed"), "the pattern finds none"
