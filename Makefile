# make demo       from nothing to a sample of a GPT trained here; needs Python 3.10+ and a package index
#                 TORCH_INDEX=... takes PyTorch from another index: on Linux its CPU build is gigabytes smaller; the address
#                 is the one after --index-url at https://pytorch.org/get-started/locally
# make check      lint and the tests of the core, in half a minute: while you edit
# make test       lint and all fast tests
# make test-slow  the tests that take minutes
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
RUN = $(VENV)/bin/python

.PHONY: demo check test test-slow lint clean

CHECK = $(patsubst %,tests/test_%.py,structure model kernels dataset configure settings optimizer) \
	tests/test_train.py::test_golden_losses tests/test_train.py::test_golden_losses_of_qwen3_and_muon

demo: $(VENV)/installed
	$(RUN) data/shakespeare_char/prepare.py
	$(RUN) train.py config/train_shakespeare_char_cpu.py
	$(RUN) sample.py --out_dir=out-shakespeare-char-cpu --num_samples=1 --start="ROMEO:"
	@echo "Before you run other commands: . $(VENV)/bin/activate"

check: $(VENV)/installed-dev lint
	$(RUN) -m pytest -q -n 2 $(CHECK)

test: $(VENV)/installed-dev lint
	$(RUN) -m pytest -q -n 2 --durations=10

test-slow: $(VENV)/installed-dev
	$(RUN) -m pytest -q -n 2 --dist worksteal -m slow --durations=10

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check .

$(VENV)/installed: requirements.txt constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'StoneGPT needs Python 3.10 or newer, \
	this is ' + sys.version.split()[0] + '; name another one: make demo PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	@if [ "$$(uname -sm)" = "Linux x86_64" ] && [ -z "$(TORCH_INDEX)$$PIP_EXTRA_INDEX_URL$$PIP_FIND_LINKS" ] \
	&& ! command -v nvidia-smi > /dev/null; then \
		echo "No NVIDIA GPU here, and PyTorch's usual build for Linux has gigabytes for one. For the CPU build stop this,"; \
		echo "and give its address (https://pytorch.org/get-started/locally, after --index-url): make demo TORCH_INDEX=..."; \
	fi
	$(RUN) -m pip install --disable-pip-version-check -r requirements.txt -c constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(RUN) -m pip install --disable-pip-version-check -q -r requirements-dev.txt -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) out-* .pytest_cache .ruff_cache
