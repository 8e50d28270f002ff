# `make demo` and `make test` set everything up from nothing: .venv, dependencies, native build.
PYTHON ?= python3
# Processes of `make test`; 0: this one.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_BENCH := $(VENV)/.ready-bench
READY_ALL := $(VENV)/.ready-all
READY_PEERS := $(VENV)/.ready-peers
# What verl's modules import. Its own requirements would bring another torch and transformers.
VERL := verl tensordict pyvers orjson cloudpickle codetiming hydra-core omegaconf \
  antlr4-python3-runtime ray msgpack protobuf jsonschema jsonschema-specifications referencing \
  rpds-py attrs
# The oldest triton that pyproject.toml allows compiles the kernels, too, from a folder of its own.
OLD_TRITON := 3.6.0
OTHER_TRITON := $(VENV)/triton-$(OLD_TRITON)
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/CMakeLists.txt)

# Results and logs of `make gpu`.
OUT ?= out/gpu

.PHONY: demo study test test-all test-peers gpu bench bench-pytest docs lint clean

demo: $(READY)
	$(BIN)/fused-rl demo $(ARGS)

# The tables and pictures of docs/kl.md: ARGS="all --out docs/study".
study: $(READY)
	$(BIN)/fused-rl study $(ARGS)

# Each process takes a file at a time and has all the threads that torch takes. Threads that wait
# sleep, and leave the processor to the other process.
test: $(READY) $(OTHER_TRITON)
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	  -m "not slow and not gpu" $(ARGS)

test-all: $(READY_PEERS)
	$(BIN)/pytest $(ARGS)

# Liger's and verl's own tests, with our functions in the place of theirs: minutes.
test-peers: $(READY_PEERS)
	$(BIN)/python tests/peers/run.py $(ARGS)

# On a machine with a GPU whose python3 has torch and triton: nothing is built or fetched. WHEELS: a
# folder with the peers' wheels. SANITIZE=1: compute-sanitizer, too.
gpu:
	$(PYTHON) bench/gpu_all.py --out $(OUT) $(WHEELS:%=--wheels %) \
	  $(if $(filter 1,$(SANITIZE)),--sanitize) $(ARGS)

bench: $(READY_BENCH)
	$(BIN)/python bench/run.py $(ARGS)

bench-pytest: $(READY_BENCH)
	$(BIN)/pytest bench $(ARGS)

# The tables that the code knows, and the reference of every public name, into out/docs.
docs: $(READY)
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/optimum.py
	$(BIN)/python docs/planned.py
	$(BIN)/python docs/mismatch.py
	$(BIN)/python bench/predictions.py
	$(BIN)/python docs/reference.py out/docs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch comes first: the native library is built against the torch that is there.
$(READY): pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt torch scikit-build-core cmake ninja
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation \
	  -e ".[test,demo]" ruff
	$(BIN)/fused-rl doctor
	touch $@

# The peers that the benchmark runs beside us.
$(READY_BENCH): $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[bench]"
	touch $@

# Another compiler of the kernels. A folder that is half filled has no name yet.
$(OTHER_TRITON): $(READY)
	rm -rf $@ $@.part
	$(BIN)/python -m pip install --quiet --no-deps --target $@.part \
	  "triton==$(OLD_TRITON); platform_system == 'Linux'"
	mkdir -p $@.part && mv $@.part $@

# What the parity tests run beside us.
$(READY_ALL): $(READY_BENCH) $(OTHER_TRITON)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[trl,hub]"
	touch $@

$(READY_PEERS): $(READY_ALL)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps $(VERL)
	touch $@

clean:
	rm -rf $(VENV) build dist out .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
