# Two commands on a fresh machine with Python 3.11 and make: `make demo`, `make test`.
PYTHON ?= python3.11
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow lint format docs clean

demo: $(VENV)/.installed
	$(RUN) -m cluster demo

test: $(VENV)/.installed
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed
	$(RUN) -m pytest -m slow

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/.installed
	$(RUN) -m mkdocs build --strict
	@echo "site/index.html"

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): PyTorch and Ray take a few minutes the first time."
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .demo .cluster .pytest_cache .ruff_cache .hypothesis site build *.egg-info
