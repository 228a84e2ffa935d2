"""The documentation site: pages, links, and code that runs as it stands there."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import subprocess
import sys

import pytest
import yaml

import zip_rc_jax
from harness.documents import (
    DOCS,
    DOCUMENTS,
    ROOT,
    assert_prints,
    links,
    name_of,
    python_blocks,
    run_blocks,
)
from zip_rc_jax.models.io.reward_models import load_reward_model

pytestmark = pytest.mark.optimized  # what stands there is what users see

# Models that a reader has and these machines do not, and what stands in for them.
INSTEAD = {"runs/mine/final": "embedded:chain_sum_zip"}
SLOW = {
    "docs/tutorials/decode.md",
    "docs/tutorials/own_policy.md",
    "docs/tutorials/train_a_head.md",
}
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags are MkDocs' own."""


_Loader.add_constructor("!relative", lambda loader, node: loader.construct_scalar(node))


def site():
    return yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)


def pages(nav):
    """Every page of a navigation, which nests."""
    for entry in nav:
        for value in entry.values():
            yield from pages(value) if isinstance(value, list) else [value]


# ---- pages and links


def test_every_page_is_in_the_navigation_once():
    listed = list(pages(site()["nav"]))
    assert sorted(listed) == sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))


def test_a_reader_of_the_site_fetches_nothing_from_elsewhere():
    """No fonts, scripts or styles of other hosts; diagrams are files of the project."""
    config = site()
    assert config["theme"]["font"] is False
    assert not any(key.startswith("extra_") for key in config)
    for path in DOCUMENTS:
        text = path.read_text()
        assert "```mermaid" not in text, f"{name_of(path)}: mermaid comes from another host"
        assert not re.search(r"<script|!\[[^]]*\]\(https?:", text), name_of(path)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_link_and_picture_is_there(path):
    for target in links(path.read_text()):
        assert (path.parent / target).exists(), target
        if DOCS in path.parents:
            assert (path.parent / target).resolve().is_relative_to(DOCS), (
                f"{target} is no page of the site"
            )


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_included_file_is_there(path):
    for name in re.findall(r'^--8<-- "([^"]+)"', path.read_text(), re.MULTILINE):
        assert (ROOT / name).is_file(), name


def test_every_picture_is_shown_somewhere():
    shown = {(p.parent / t).resolve() for p in DOCUMENTS for t in links(p.read_text())}
    unseen = [
        name_of(p) for p in DOCS.rglob("*") if p.suffix in (".svg", ".png") and p not in shown
    ]
    assert unseen == []


# ---- the API pages


def documented():
    return re.findall(
        r"^::: ([\w.]+)$",
        "".join(p.read_text() for p in sorted(DOCS.glob("api/*.md"))),
        re.MULTILINE,
    )


@pytest.mark.parametrize("name", documented())
def test_what_the_api_pages_name_exists(name):
    module, found = name, None
    while module:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module = module.rpartition(".")[0]
    for part in name[len(module) + 1 :].split(".") if name != module else []:
        found = getattr(found, part)
    assert (found.__doc__ or "").strip()


def test_every_public_name_is_on_an_api_page():
    on_pages = {name.removeprefix("zip_rc_jax.") for name in documented()}
    assert set(zip_rc_jax.__all__) <= on_pages


# ---- code


def with_code():
    for path in DOCUMENTS[1:]:
        if python_blocks(path):
            marks = [pytest.mark.slow] if name_of(path) in SLOW else []
            yield pytest.param(path, id=name_of(path), marks=marks)


@pytest.mark.parametrize("path", list(with_code()))
def test_the_python_of_a_page_runs_and_prints_what_stands_there(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zip_rc_jax, "load", _load_instead(zip_rc_jax.load))
    monkeypatch.setattr(zip_rc_jax, "load_reward_model", _tiny_reward_model(tmp_path))
    run_blocks(path, python_blocks(path), {"__name__": "page"})


def _tiny_reward_model(directory):
    """Loads a tiny random one, whatever is asked for."""

    def load(source, **options):
        from harness.reward_models import saved_reward_model

        saved_reward_model(directory / "reward_model", num_hidden_layers=1)
        return load_reward_model(directory / "reward_model", **options)

    return load


def _load_instead(load):
    # Published models are absent here; the smallest one stands in (`make smollm2`).
    smollm2 = str(ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    return lambda source, **options: load(
        INSTEAD.get(source, smollm2 if "Qwen" in source else source), **options
    )


@pytest.mark.slow
def test_the_pictures_of_the_concepts_are_what_their_script_draws(tmp_path):
    """Texts alone are compared: another version of matplotlib draws other curves."""
    subprocess.run([sys.executable, DOCS / "draw_concepts.py", tmp_path], check=True, cwd=ROOT)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert len(drawn) == 3
    for path in drawn:
        was, is_ = (
            " ".join(re.findall(r"<text[^>]*>([^<]*)<", p.read_text()))
            for p in (DOCS / "images" / path.name, path)
        )
        assert was
        assert_prints(is_, was, path.name)


# ---- notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_opens_in_colab_and_installs_the_package_only_there(path):
    cells = json.loads(path.read_text())["cells"]
    assert "https://colab.research.google.com/" in "".join(cells[0]["source"])
    first = next(cell for cell in cells if cell["cell_type"] == "code")
    source = "".join(first["source"])
    assert 'if "google.colab" in sys.modules:' in source
    assert '"pip", "install"' in source.partition("google.colab")[2]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_runs_from_top_to_bottom_and_prints_what_it_shows(path, tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    shown = nbformat.read(path, as_version=4)
    ran = copy.deepcopy(shown)
    nbclient.NotebookClient(
        ran, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    for number, (was, is_) in enumerate(zip(shown.cells, ran.cells, strict=True)):
        if was.cell_type == "code":
            assert_prints(_printed(is_), _printed(was), f"{path.name}, cell {number}")
    assert any(_printed(cell) for cell in shown.cells if cell.cell_type == "code")


def _printed(cell):
    """What a cell writes to stdout. Progress bars go to stderr."""
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


# ---- the rules by which documents are read (tests/harness/documents.py)


def page(tmp_path, text):
    path = tmp_path / "page.md"
    path.write_text(text)
    return path


def test_what_a_block_prints_is_compared_with_the_text_behind_it(tmp_path):
    right = page(tmp_path, "```python\nx = 2\nprint(x)\n```\n\n```text\n2\n```\n")
    run_blocks(right, python_blocks(right), {})
    wrong = page(tmp_path, "```python\nprint(2)\n```\n\n```text\n3\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:2 prints 2 and not 3"):
        run_blocks(wrong, python_blocks(wrong), {})


def test_a_block_that_says_why_it_does_not_run_does_not_run(tmp_path):
    path = page(tmp_path, "<!-- not run: it needs a TPU -->\n```python\n1 / 0\n```\n")
    assert python_blocks(path) == []


@pytest.mark.parametrize(
    ("printed", "equal"),
    [
        ("P 0.79, 86", True),
        ("P 0.80, 86", True),
        ("P 0.81, 86", False),
        ("P 0.79, 87", False),
        ("P 0.7, 86", False),
        ("Q 0.79, 86", False),
    ],
)
def test_only_the_last_digit_of_a_decimal_number_may_differ(printed, equal):
    try:
        assert_prints(printed, "P 0.79, 86", "here")
    except AssertionError:
        assert not equal
    else:
        assert equal
