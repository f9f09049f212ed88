# Two commands: `make demo` shows the memory at work, `make test` checks everything. Each makes .venv if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: demo test test-quick test-oldest test-newest test-page docs lint types clean

demo: $(VENV)/.demo
	$(BIN)/fwpkm demo $(ARGS)

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder -m "not browser" $(ARGS)

# The core of every surface, in about two minutes on two cores: while you work. `make test` decides.
test-quick: $(VENV)/.test
	HYPOTHESIS_PROFILE=quick OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder -m quick $(ARGS)
	KERAS_BACKEND=torch $(BIN)/pytest -q tests/keras_suite/test_refusals.py tests/keras_suite/test_functions.py

# The quick tests with the oldest version of every package (constraints-oldest.txt), then transformers' oldest, which needs a
# newer safetensors, and Flax's, which needs a newer JAX. Old packages beside new ones warn of deprecations that are theirs.
OLD := .venv-oldest
test-oldest: $(OLD)/.done
	HYPOTHESIS_PROFILE=quick OMP_NUM_THREADS=1 $(OLD)/bin/pytest -n auto --dist loadfile -m quick \
		-W ignore::DeprecationWarning --ignore-glob='tests/test_transformers*' --ignore=tests/test_nnx_and_equinox.py $(ARGS)
	$(OLD)/bin/pip install --quiet transformers==5.17.0
	OMP_NUM_THREADS=1 $(OLD)/bin/pytest -n auto -W ignore::DeprecationWarning tests/test_transformers_cache.py tests/test_transformers_states.py \
		tests/test_transformers_turns.py
	$(OLD)/bin/pip install --quiet flax==0.12.1 equinox==0.13.0 jax==0.8.1 jaxlib==0.8.1 'numpy<2.1'
	OMP_NUM_THREADS=1 $(OLD)/bin/pytest -n auto -W ignore::DeprecationWarning tests/test_nnx_and_equinox.py
	rm $(OLD)/.done

$(OLD)/.done: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv --clear $(OLD)
	$(OLD)/bin/pip install --quiet --constraint constraints-oldest.txt --editable '.[torch,jax,keras,triton,demo,conform]' \
		equinox flax optax orbax-checkpoint pytest pytest-timeout pytest-xdist tensorflow-cpu
	touch $@

# The quick tests with the newest version of every package, whatever constraints.txt says. JAX after 0.10 needs Python 3.12:
# `make test-newest PYTHON=python3.13`. (Python 3.13.0 alone slows torch.compile, of which torch warns.)
NEW := .venv-newest
test-newest: $(NEW)/.done
	HYPOTHESIS_PROFILE=quick OMP_NUM_THREADS=1 $(NEW)/bin/pytest -n auto --dist loadfile -m quick \
		-W "ignore:Guards may run slower" $(ARGS)

$(NEW)/.done: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "newer packages need Python 3.12 or later; try: make test-newest PYTHON=python3.13")'
	$(PYTHON) -m venv --clear $(NEW)
	$(NEW)/bin/pip install --quiet --upgrade --editable '.[test]'
	touch $@

# The page of `fwpkm inspect` and the site in a browser, which must be installed: apt-get install chromium, or Chrome.
test-page: $(VENV)/.test docs
	$(BIN)/pytest -n 0 -m browser tests/test_page_in_browser.py tests/test_site.py

# The documentation site, in site/: open site/index.html. Nothing comes from the net; every warning is an error (which
# --quiet would hide before it is counted).
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(OLD) $(NEW) build dist site *.egg-info src/*.egg-info

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[torch,demo]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fwpkm needs Python 3.11 or newer; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
