PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Each target sets up what it needs on a fresh machine.
$(VENV)/installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .$(if $(filter-out user,$*),[$*])
	touch $@

.PHONY: demo test lint bench clean

demo: $(VENV)/installed-user
	rm -rf runs/demo
	$(BIN)/evojax-suite ga-distillation --name demo $(DEMO)

test: $(VENV)/installed-dev
	$(BIN)/ruff check evojax_suite tests experiments
	$(BIN)/python -m pytest $(PYTEST)

clean:
	rm -rf $(VENV) build *.egg-info
