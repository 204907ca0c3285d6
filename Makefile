# Every target sets up what it needs: a virtual environment in .venv, and the package in it with the extras concerned.
#   make PYTHON=python3.12 ...   the interpreter that a new environment is made with
#   make ... ARGS="..."          passed on to what the target runs
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

bin := $(VENV)/bin
py := $(bin)/python
sources := settings.ini setup.py pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help compare test test-gpu gpu docs readme export outputs lint check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

compare: $(VENV)/.experiments ## train a small model with each optimizer: table, CSV, figure (ARGS for `sgd-sai compare`)
	$(bin)/sgd-sai compare $(ARGS)

# as many workers as cores, with one thread each: threads of several workers would wait for each other
test: $(VENV)/.dev ## run every notebook and every test (ARGS for pytest)
	OMP_NUM_THREADS=1 $(py) -m pytest tests --numprocesses auto --dist worksteal $(ARGS)

test-gpu: $(VENV)/.dev ## run the notebooks and tests that have something for a CUDA device, there
	$(py) -m pytest tests --gpu $(ARGS)

gpu: $(VENV)/.dev ## everything that wants a GPU, in nine minutes, into results/gpu (ARGS="--device cpu --quick": rehearsal)
	$(py) .ci/gpu.py $(ARGS)

docs: $(VENV)/.dev ## build the site into _docs/, by Quarto where present, otherwise by smalldocs
	$(py) .ci/docs.py $(ARGS)

readme: $(VENV)/.dev ## write README.md from nbs/index.ipynb
	$(py) .ci/readme.py

export: $(VENV)/.dev ## write sgd_sai/ and README.md from the notebooks, and clean and format what is written
	$(bin)/nbdev_export
	$(bin)/nbdev_clean
	$(bin)/ruff check --quiet --fix --select I sgd_sai
	$(bin)/ruff format --quiet sgd_sai
	$(py) .ci/readme.py
	$(py) .ci/colab.py

outputs: $(VENV)/.dev ## run notebooks and save what they print (ARGS: their names; default: all, which takes a while)
	$(py) .ci/outputs.py $(ARGS)

lint: $(VENV)/.dev ## check code and notebooks with ruff
	$(bin)/ruff check
	$(bin)/ruff format --check

check: export lint ## fail if `make export` changed anything that git knows, or if ruff has something to say
	git add --intent-to-add nbs sgd_sai README.md
	git diff --exit-code --stat -- nbs sgd_sai README.md

clean: ## remove what was built; .venv, data/ and runs/ stay
	rm -rf _proc _docs build dist *.egg-info .pytest_cache .hypothesis nbs/nbdev.yml
	find nbs sgd_sai tests .ci \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

$(py):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.experiments: $(sources) | $(py)
	@echo "Installing the package with its experiments into $(VENV); the first time this takes minutes (torch is large)."
	$(py) -m pip install --quiet --editable '.[experiments]'
	@touch $@

# dev contains experiments, so this serves for both
$(VENV)/.dev: $(sources) | $(py)
	@echo "Installing the package with all extras into $(VENV); the first time this takes minutes (torch is large)."
	$(py) -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.experiments
