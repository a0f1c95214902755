# make demo   generate an image and a video with the embedded models, dense and with the best methods, as one strip
# make test   lint, types and tests
# make docs   build the docs site into outputs/site; fails on a broken link
# make package   build wheel and sdist, install the wheel into a fresh environment, and run it there
# Each makes its own virtual environment (.venv) when there is none. PYTHON picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
READERS ?= .venv-readers
READERS_STAMP := $(READERS)/.installed
COMFYUI_PYTHON ?= $(PYTHON)

.PHONY: demo test lint types unit docs docs-serve package test-matrix test-upstream test-readers test-comfyui hub-kernel clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,docs,eval,triton]"
	# Beside a CPU torch the wheel of torchvision does not import; the tests load its Python parts from a folder of its own.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(VENV)/test-packages torchvision==0.28.0 torch-fidelity==0.4.0
	# Its own requirements are ours, with a later torch than we ask for: without them no torch is replaced.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt cache-dit
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/dit-attn demo --output outputs/demo

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check dit_attn tests docs benchmarks $(wildcard examples)
	$(BIN)/ruff format --check --quiet dit_attn tests docs benchmarks $(wildcard examples)

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=40

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir outputs/site

docs-serve: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

package: $(STAMP)
	$(BIN)/python -m tests.packaging.check

test-matrix: $(STAMP)
	$(BIN)/python -m tests.families.matrix --output benchmarks/matrix.json

# DIFFUSERS=path is a work tree of diffusers; ARGS, further arguments of the runner.
test-upstream: $(STAMP)
	$(BIN)/python -m tests.upstream.run $(DIFFUSERS) --output benchmarks/upstream.json $(ARGS)

# anomalib, with libraries of its own, which do not come into the environment of the tests.
$(READERS_STAMP): tests/readers/requirements.txt
	test -x $(READERS)/bin/python || $(PYTHON) -m venv $(READERS)
	$(READERS)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/readers/requirements.txt
	touch $(READERS_STAMP)

test-readers: $(STAMP) $(READERS_STAMP)
	$(BIN)/python -m tests.readers.run --python $(READERS)/bin/python --output benchmarks/readers_anomalib.json

# COMFYUI=path is a ComfyUI, COMFYUI_PYTHON the Python it runs with. Nothing of either changes.
test-comfyui:
	PYTHONPATH=. $(COMFYUI_PYTHON) -m tests.comfyui.run "$(COMFYUI)" --output benchmarks/comfyui.json

# The kernels as a repository of the Hugging Face Hub: kernels.get_local_kernel("outputs/hub-kernel") loads it.
hub-kernel: $(STAMP)
	$(BIN)/python -m dit_attn.integrations.hub_kernel outputs/hub-kernel

clean:
	rm -rf $(VENV) $(READERS) outputs .pytest_cache .mypy_cache .ruff_cache
