# make demo: set up, quantize the small model that comes along in four ways, measure, recommend.
# make test: set up, check style, types and import directions, run the tests.
# make sanitize: the kernels' tests under the sanitizers.
# make neon: the ARM kernels, cross-compiled and run in an emulator.
# Nothing but Python 3.11+ is needed beforehand; everything goes into .venv.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test check sanitize neon install install-dev clean

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
	    $(addprefix src/lowbit/kernels/cpu/,dispatch.cpp pack.cpp pool.cpp decoder.cpp) \
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
