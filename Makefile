# make quickstart: from nothing to text that a model of your own wrote, in a few minutes. make test: lint and tests.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.installed
	$(RUN) fineweb.py config/data/stdlib.py
	$(RUN) train_gpt2.py config/quickstart.py --resume=True
	$(RUN) sample.py --model=out/quickstart --start="def main" --max_new_tokens=600
	@echo
	@echo "data: data/stdlib   run: out/quickstart (checkpoints, metrics.jsonl, report.md and its plots)"
	@echo "next: source $(VENV)/bin/activate && python sample.py --model=out/quickstart --start='import os' --seed=2"

test: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:  # the environment and caches; data/ and out/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache __pycache__ */__pycache__
