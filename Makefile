# Two commands for a newcomer: `make demo` and `make test`. Both install what they need into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT = out/demo

# What stands on make's own command line goes to `astroformer train`; a variable of that name in the environment does not
option = $(if $(findstring command,$(origin $(1))),--$(2) "$($(1))")
options = $(call option,DATA,data) $(call option,CATALOG,catalog) $(call option,IMAGES,images) $(call option,FILE,x) \
          $(call option,LABEL,y) $(call option,CLASSES,classes) $(call option,BAD,bad) \
          $(call option,ARCH,arch) $(call option,SIZE,size) $(call option,BANDS,bands) $(call option,PXSCALE,pxscale) $(call option,EPOCHS,epochs) $(call option,PRETRAINED,pretrained) \
          $(call option,SEED,seed) $(call option,RECIPE,recipe) $(call option,DEVICE,device) $(call option,PRECISION,precision) \
          $(call option,CALIBRATION,calibration) $(call option,LOG,log) $(if $(findstring command,$(origin RESUME)),$(if $(filter-out 0,$(RESUME)),--resume))

.PHONY: demo test lab slow docs

demo: $(VENV)/ready
	@$(BIN)/astroformer train --out "$(OUT)" $(options)

# Two processes of one thread each are faster than two that fight over the cores
test slow: export OMP_NUM_THREADS = 1

test: $(VENV)/ready
	$(BIN)/python tests/check_notebooks.py
	$(BIN)/nbdev-test --n-workers 2
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
