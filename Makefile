# Two commands for a newcomer: `make demo` and `make test`. Both install what they need into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/demo

# Passed on to `astroformer train`: make demo CATALOG=labels.csv IMAGES=cutouts LABEL=class
options = $(if $(DATA),--data "$(DATA)") $(if $(CATALOG),--catalog "$(CATALOG)") $(if $(IMAGES),--images "$(IMAGES)") \
          $(if $(FILE),--x "$(FILE)") $(if $(LABEL),--y "$(LABEL)") $(if $(BAD),--bad "$(BAD)") $(if $(ARCH),--arch "$(ARCH)") \
          $(if $(SIZE),--size "$(SIZE)") $(if $(EPOCHS),--epochs "$(EPOCHS)") $(if $(PRETRAINED),--pretrained "$(PRETRAINED)") \
          $(if $(SEED),--seed "$(SEED)")

.PHONY: demo test lab slow docs

demo: $(VENV)/ready
	@$(BIN)/astroformer train --out "$(OUT)" $(options)

# Two processes of one thread each are faster than two that fight over the cores
test slow: export OMP_NUM_THREADS = 1

test: $(VENV)/ready
	$(BIN)/python tests/check_notebooks.py
	$(BIN)/nbdev-test --n_workers 2
	$(BIN)/pytest -q -n 2

slow: $(VENV)/ready
	$(BIN)/nbdev-test --flags slow
	$(BIN)/pytest -q -m slow

lab: $(VENV)/ready
	$(BIN)/jupyter lab nbs/70_tutorial.first_galaxies.ipynb

docs: $(VENV)/ready
	$(BIN)/python tests/check_notebooks.py --fix

$(VENV)/ready: settings.ini setup.py pyproject.toml
	@echo "installing into $(VENV): a few minutes, several GB for PyTorch"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set it with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
