#!/usr/bin/env bash
# Tries the wheel and the sdist of a directory, from other directories.
#   usage: package_check.sh DIST PYTHON
# PYTHON is one with the packages of the `dev` extra. The wheel goes into an environment of its own that sees them, but for
# those of extras: what the base does not have must not be needed.
set -euo pipefail
dist=$(realpath "$1") python=$(realpath -s "$2")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# The wheel, with the packages of the environment but none of the extras, and not the checkout.
"$python" -m venv wheel
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$(wheel/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
wheel/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "$dist"/*.whl
# The path alone: the .pth file there that leads to the checkout is not read.
echo "$site" > "$own/dev.pth"
cat > "$own/extras_are_absent.pth" <<'PTH'
import sys; sys.modules.update(dict.fromkeys(("matplotlib", "reasoning_gym", "array_record", "grain", "pyarrow", "tensorflow_datasets", "gguf")))
PTH
wheel/bin/python - <<'PY'
import pathlib, zip_rc_jax
package = pathlib.Path(zip_rc_jax.__file__).parent
assert package.is_relative_to(pathlib.Path("wheel").resolve()), package
assert (package / "py.typed").is_file()
PY
question='State the final answer to the following arithmetic problem: 4 + 3 - 2 ='
wheel/bin/zip-rc decode embedded:chain_sum_zip --prompt "$question" n=2 interval=8 window=4 max_tokens=96 | tee answer
grep -q 'P(correct)' answer
if wheel/bin/zip-rc demo 2> missing; then echo "package-check: the demo ran without its extra" >&2; exit 1; fi
grep -qF "pip install 'zip-rc-jax[train]'" missing
echo "package-check: the wheel decodes with the packages of the base"

# The sdist: its tests find what they need in it, golden files too.
tar xzf "$dist"/*.tar.gz
cd zip_rc_jax-*/
"$python" -m pytest --collect-only -o addopts= -q > ../collected
echo "package-check: the sdist has $(grep -c :: ../collected) tests"
"$python" -m pytest -q tests/test_grid.py tests/search/test_meta_actions.py -k "grid or reproduced"
echo "package-check: the tests of the sdist run in it"
