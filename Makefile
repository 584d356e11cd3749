# make demo    install, take the embedded model, unlearn, evaluate, write a report
# make test    install and run every test that takes seconds; make test-slow: those that take minutes
# make bench   time a step against the published recipe's, on a GPU if there is one; BENCH_OPTIONS="--shape opt-1.3b"
#              takes random weights of a published shape; benchmarks/gpu_table.py measures all sizes on a GPU
# make planted teach the embedded model people, wrong facts and texts, and a twin that never saw what goes of them
# make recipe NAME=people   forget on the planted model what a recipe is for, and compare with the twin: people, facts,
#              copyright; harm is the demo, on the embedded model; consent and policy are chains of requests to a ledger
# make recipe-full NAME=people   the same with three seeds and attacks; of a chain, beside one run over all that is in
#              force, and a second time bit for bit
# make sweep   search over the settings in configs/sweep.yaml; goes on where it was stopped. make sweep NAME=people sets the
#              objectives of recipes/people/objectives.yaml side by side, against the twin and under attack: hours
# make lint    ruff, rules and format, and which room takes from which
# make audit   known vulnerabilities in the pinned packages (asks a public database)
# make lm-eval-env   an environment with lm-evaluation-harness, for evaluate_unlearning.py --lm_eval TASKS
# make lm-eval MC_DATA=mc_task.json TEXT=wikitext2_test.txt   our MC1, MC2 and perplexity against that harness, offline
#              and on a task file of our own: it compares the arithmetic, not the harness's own tasks

VENV   := .venv
PYTHON := $(VENV)/bin/python
export PIP_CACHE_DIR ?= $(CURDIR)/.cache/pip
export HF_HOME ?= $(CURDIR)/.cache/huggingface
export MPLCONFIGDIR ?= $(CURDIR)/.cache/matplotlib
export HF_HUB_OFFLINE ?= 1

# A second call does only what is missing: the model is a file of make's; what the models said, and how it was judged, is read from the report's folder.

.PHONY: install demo planted recipe recipe-full test test-slow picture bench sweep lint audit lm-eval lm-eval-env signing-env clean

install: $(VENV)/.installed
$(VENV)/.installed: requirements.txt requirements-embedded.txt requirements-dev.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	$(PYTHON) -m pip install --quiet --no-deps -r requirements-embedded.txt
	touch $@

demo: models/demo/unlearn_args.json
	$(PYTHON) evaluate_unlearning.py --model_name models/demo --train_log logs/demo.jsonl --prompts_per_group 48

models/demo/unlearn_args.json: configs/demo.yaml recipes/selective/recipe.yaml data/harmful.jsonl data/benign.jsonl data/neighbours.jsonl data/questions.jsonl data/twins.jsonl | $(VENV)/.installed
	$(PYTHON) setup_demo.py
	$(PYTHON) unlearn_harm.py --config configs/demo.yaml --overwrite --resume

planted: models/planted/finetune_args.json models/planted_twin/finetune_args.json
	$(PYTHON) evaluate_unlearning.py --config configs/planted_check.yaml

models/%/finetune_args.json: configs/%.yaml recipes/finetune/recipe.yaml setup_planted.py data/planted/facts.jsonl data/planted/story.txt data/planted/kept_bees.txt data/planted/kept_bridge.txt | $(VENV)/.installed
	$(PYTHON) setup_demo.py
	$(PYTHON) setup_planted.py
	$(PYTHON) finetune.py --config $< --overwrite --resume

ifeq ($(NAME),harm)
recipe: demo
recipe-full: demo
	$(PYTHON) evaluate_unlearning.py --model_name models/demo --train_log logs/demo.jsonl --attacks all
else ifeq ($(NAME),policy)
recipe recipe-full: $(VENV)/.installed
	$(PYTHON) setup_demo.py
	$(PYTHON) benchmarks/request_chain.py policy $(if $(filter recipe-full,$@),--union --repeat)
else ifeq ($(NAME),consent)
recipe recipe-full: models/planted/finetune_args.json
	$(PYTHON) benchmarks/request_chain.py consent $(if $(filter recipe-full,$@),--union --repeat)
else
recipe: models/planted/finetune_args.json models/planted_twin/finetune_args.json
	@test -f "recipes/$(NAME)/planted.yaml" || { echo "make recipe: name one, as NAME=people"; exit 2; }
	$(PYTHON) unlearn_harm.py --config recipes/$(NAME)/planted.yaml --overwrite --resume
	$(PYTHON) evaluate_unlearning.py --config recipes/$(NAME)/evaluate.yaml

recipe-full: models/planted/finetune_args.json models/planted_twin/finetune_args.json
	$(PYTHON) benchmarks/recipe_seeds.py $(NAME)
endif

test: $(VENV)/.installed
	$(PYTHON) setup_demo.py
	$(PYTHON) -m pytest --numprocesses 2 --dist loadfile

test-slow: $(VENV)/.installed
	$(PYTHON) setup_demo.py
	$(PYTHON) -m pytest tests/slow

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache

# the picture at the top of README: how the page of a report begins (facts, which nobody is harmed by)
REPORT ?= reports/facts/report.html
picture:
	@command -v chromium > /dev/null || { echo "make picture: needs chromium, which is not on the path"; exit 2; }
	@test -f "$(REPORT)" || { echo "make picture: no $(REPORT); make recipe NAME=facts writes it"; exit 2; }
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1200,1120 \
	    --screenshot=docs/report.png "file://$(abspath $(REPORT))"

bench: $(VENV)/.installed
	$(PYTHON) setup_demo.py
	$(PYTHON) benchmarks/bench_step.py $(BENCH_OPTIONS)

audit: $(VENV)/.installed
	$(PYTHON) -m pip install --quiet pip-audit
	$(PYTHON) -m pip_audit --requirement requirements.txt --no-deps --disable-pip

LM_EVAL := .venv-lm-eval
$(LM_EVAL)/.installed: requirements.txt requirements-lm-eval.txt
	python3 -m venv $(LM_EVAL)
	$(LM_EVAL)/bin/python -m pip install --quiet -r requirements.txt -r requirements-lm-eval.txt
	touch $@

lm-eval-env: $(LM_EVAL)/.installed

lm-eval: $(LM_EVAL)/.installed
	@test -n "$(MC_DATA)" -a -n "$(TEXT)" || { echo "make lm-eval: name MC_DATA=mc_task.json and TEXT=text.txt"; exit 2; }
	$(LM_EVAL)/bin/python benchmarks/lm_eval_check.py --mc_data $(MC_DATA) --text $(TEXT) $(LM_EVAL_OPTIONS)

SIGNING := .venv-signing
signing-env: $(SIGNING)/.installed
$(SIGNING)/.installed: requirements-signing.txt
	python3 -m venv $(SIGNING)
	$(SIGNING)/bin/python -m pip install --quiet -r requirements-signing.txt
	touch $@

ifdef NAME
sweep: models/planted/finetune_args.json models/planted_twin/finetune_args.json
	@test -f "recipes/$(NAME)/objectives.yaml" || { echo "make sweep: recipes/$(NAME)/objectives.yaml is not there: NAME=people"; exit 2; }
	$(PYTHON) sweep.py --config recipes/$(NAME)/planted.yaml --grid recipes/$(NAME)/objectives.yaml --sweep_dir sweeps/$(NAME) --evaluation recipes/$(NAME)/evaluate.yaml --attacks quantise prefill few_shot relearn
else
sweep: $(VENV)/.installed
	$(PYTHON) setup_demo.py
	$(PYTHON) sweep.py --config configs/demo.yaml --grid configs/sweep.yaml --sweep_dir sweeps/demo
endif

clean:
	rm -rf $(LM_EVAL) $(SIGNING) $(VENV) .cache .pytest_cache .ruff_cache models/demo models/smollm2-135m-instruct reports/demo logs/demo.* data/cache data/harmbench.jsonl
