PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Each target sets up what it needs on a fresh machine.
$(VENV)/installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .$(if $(filter-out user,$*),[$*])
	touch $@

.PHONY: demo test types bench gpu-check docs clean

# What we would use, for images of 8x8.
DEMO := --recipe recommended --population-size 64 --generations 700 --depth 1 --num-epochs 60 \
	--kernel-width 64 --kernel-images 500 --networks-per-member 2 --company 4

demo: $(VENV)/installed-user
	rm -rf runs/demo
	$(BIN)/evojax-suite ga-distillation --dataset digits --name demo $(DEMO)

test: $(VENV)/installed-dev
	$(BIN)/ruff check evojax_suite tests experiments
	$(BIN)/python -m pytest -n 2 --max-worker-restart 0 --dist loadfile \
		--no-loadscope-reorder $(PYTEST)

types: $(VENV)/installed-dev
	$(BIN)/pyright

# Against PyTorch; let nothing else run.
bench: $(VENV)/installed-bench
	$(BIN)/python experiments/benchmarks/suite.py $(BENCH)

# Programs compiled for a GPU that is not there, and what they would take; an environment of its own.
GPU_JAX ?= jax[cuda13]
.venv-gpu/installed: pyproject.toml
	test -x .venv-gpu/bin/python || $(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --upgrade pip
	.venv-gpu/bin/python -m pip install --quiet --editable '.[gpu]' '$(GPU_JAX)'
	touch $@

gpu-check: .venv-gpu/installed
	.venv-gpu/bin/python experiments/benchmarks/gpu_check.py $(GPU_CHECK)

docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-gpu build site *.egg-info
