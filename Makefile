# make demo    install, take the embedded model, unlearn, evaluate, write a report
# make test    install and run every test that takes seconds; make test-slow: those that take minutes
# make bench   time a step against the published recipe's
# make lint    ruff, rules and format

VENV   := .venv
PYTHON := $(VENV)/bin/python
export PIP_CACHE_DIR ?= $(CURDIR)/.cache/pip
export HF_HOME ?= $(CURDIR)/.cache/huggingface
export MPLCONFIGDIR ?= $(CURDIR)/.cache/matplotlib
export HF_HUB_OFFLINE ?= 1

# A second call does only what is missing: the model is a file of make's, the report is reused by its options.

.PHONY: install demo test test-slow bench lint clean

install: $(VENV)/.installed
$(VENV)/.installed: requirements.txt requirements-embedded.txt requirements-dev.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	$(PYTHON) -m pip install --quiet --no-deps -r requirements-embedded.txt
	touch $@

demo: models/demo/unlearn_args.json
	$(PYTHON) evaluate_unlearning.py --model_name models/demo --train_log logs/demo.jsonl --reuse

models/demo/unlearn_args.json: configs/demo.yaml data/harmful.jsonl data/benign.jsonl data/neighbours.jsonl data/facts.jsonl | $(VENV)/.installed
	$(PYTHON) setup_demo.py
	$(PYTHON) unlearn_harm.py --config configs/demo.yaml --overwrite

test: $(VENV)/.installed
	$(PYTHON) setup_demo.py
	$(PYTHON) -m pytest

test-slow: $(VENV)/.installed
	$(PYTHON) -m pytest tests/slow

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(VENV)/.installed
	$(PYTHON) setup_demo.py
	$(PYTHON) benchmarks/bench_step.py

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache models logs data/cache data/harmbench.jsonl
