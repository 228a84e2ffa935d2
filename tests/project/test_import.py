"""What `import zip_rc_jax` and `zip-rc --help` load, and that every public name is there all the
same."""

from __future__ import annotations

import ast
import importlib
import json
import pathlib
import subprocess
import sys

import pytest

import zip_rc_jax

INIT = pathlib.Path(zip_rc_jax.__file__)
HEAVY = ("jax", "flax", "optax", "orbax", "transformers", "tokenizers", "tensorflow_datasets",
"grain", "pyarrow", "matplotlib", "gguf",
         "reasoning_gym", "sympy", "math_verify", "torch")  # fmt: skip
# Of what decoding needs, some is imported when a model is read, formulas are compared, or a kernel
# is compiled.
LATER = ("orbax", "transformers", "tensorflow_datasets", "grain", "pyarrow", "matplotlib", "gguf",
"reasoning_gym", "sympy", "torch",
         "jax.experimental.pallas")  # fmt: skip


def loaded(code):
    """The modules that a fresh process has after `code`."""
    report = "\nimport json, sys\nsys.stderr.write(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stderr))


def imported_for_type_checkers():
    """{public name: module} of the imports under `if TYPE_CHECKING` in `__init__`."""
    (block,) = [node for node in ast.parse(INIT.read_text()).body if isinstance(node, ast.If)]
    return {
        name.name: node.module.removeprefix("zip_rc_jax.")
        for node in block.body
        for name in node.names
    }


def test_the_import_loads_nothing_heavy():
    assert not loaded("import zip_rc_jax") & set(HEAVY)


def test_the_help_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['zip-rc', '--help']\nfrom zip_rc_jax.__main__ import "
        "main\ntry: main()\nexcept SystemExit: pass"
    )
    assert not loaded(code) & set(HEAVY)


def test_the_public_names_load_jax_and_flax_but_not_what_is_needed_later():
    code = "import zip_rc_jax\nfor name in zip_rc_jax.__all__: getattr(zip_rc_jax, name)"
    found = loaded(code)
    assert {"jax", "flax"} <= found
    assert not found & set(LATER)


def test_every_public_name_is_one_table_entry_one_import_for_type_checkers_and_there():
    assert zip_rc_jax.__all__ == sorted(zip_rc_jax.__all__)
    assert sorted(zip_rc_jax._DEFINED_IN) == zip_rc_jax.__all__
    assert imported_for_type_checkers() == zip_rc_jax._DEFINED_IN
    for name, module in zip_rc_jax._DEFINED_IN.items():
        assert getattr(zip_rc_jax, name) is getattr(
            importlib.import_module(f"zip_rc_jax.{module}"), name
        )
    assert {*zip_rc_jax.__all__, *zip_rc_jax._SUBMODULES} <= set(dir(zip_rc_jax))


def test_submodules_are_there_without_an_import_of_their_own():
    code = "import zip_rc_jax; print(zip_rc_jax.search.__name__, zip_rc_jax.evaluation.__name__)"
    assert (
        subprocess.check_output([sys.executable, "-c", code], text=True)
        == "zip_rc_jax.search zip_rc_jax.evaluation\n"
    )


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'zip_rc_jax' has no attribute 'decoed'"):
        _ = zip_rc_jax.decoed
