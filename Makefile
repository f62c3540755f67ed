# `make serve` and `make test` do everything on a fresh machine: virtual environment, packages, model.
#
#   make serve                      the small default model on port 8080
#   make serve MODEL=path           any model folder or .gguf file
#   make serve PORT=9000 ARGS="--max-concurrent 8"
#   make test [TESTS=tests/runtime] [ARGS="-k stop"]

PYTHON ?= python3
VENV   ?= .venv
PORT   ?= 8080
MODEL  ?=
ARGS   ?=
TESTS  ?= tests
TORCH  ?= 2.13.0
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: serve test lint clean

serve: $(VENV)/.serve
	@model="$(MODEL)"; \
	if [ -z "$$model" ]; then model=$$($(BIN)/python tools/fetch_model.py) || exit 1; fi; \
	exec $(BIN)/crane serve --model-path "$$model" --port $(PORT) $(ARGS)

test: $(VENV)/.test
	$(BIN)/python tools/fetch_model.py > /dev/null
	$(BIN)/python -m pytest $(TESTS) $(ARGS)

lint: $(VENV)/.test
	$(BIN)/python -m flake8 crane tools tests

# Without a GPU the CPU build of torch is asked for by its local version, so that pip cannot bring
# gigabytes of CUDA packages. On other systems than Linux the plain build is the CPU (or Metal) build.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "crane needs Python 3.11 or newer; say which with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch $(TORCH) (once) ..."
	@if [ "$$(uname)" != Linux ] || nvidia-smi > /dev/null 2>&1; then \
		$(PIP) install "torch==$(TORCH)"; \
	else \
		$(PIP) install "torch==$(TORCH)+cpu" || { \
			echo "Your pip index has no CPU build of torch $(TORCH). Name one that has it in PIP_EXTRA_INDEX_URL"; \
			echo "(torch's install page tells), or take the CUDA build all the same: make TORCH_BUILD=cuda"; \
			[ "$(TORCH_BUILD)" = cuda ] && $(PIP) install "torch==$(TORCH)"; }; \
	fi
	@touch $@

$(VENV)/.serve: $(VENV)/.torch requirements.txt setup.cfg pyproject.toml
	@echo "installing crane and its packages ..."
	$(PIP) install -r requirements.txt
	$(PIP) install --no-deps -e .
	@touch $@

$(VENV)/.test: $(VENV)/.serve requirements-test.txt
	$(PIP) install -r requirements-test.txt -r requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
