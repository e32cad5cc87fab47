# Everything runs in .venv, made from the locked requirements. `make` alone lists the targets.
#   make PYTHON=/path/to/python3.12 ...    another interpreter (3.11 or 3.12)
#   make demo DEMO=/somewhere              another folder for the demo

DEMO ?= demo
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c $(SUPPORTED) 2>/dev/null && echo $$p && break; done)
SUPPORTED := 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'

VENV := .venv
CRYSTAL := $(VENV)/bin/crystal-jax
PIP := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check

.DELETE_ON_ERROR:
.PHONY: help demo test drills test-transformers lint lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/installed $(DEMO)/data/tokenizer.json  ## train the tiny recipe on Python's standard library
	$(CRYSTAL) prepare --source=pystd-code --name=pystd-code --tokenizer=$(DEMO)/data/tokenizer.json --output=$(DEMO)/data --heldout=0.05
	$(CRYSTAL) prepare --source=pystd-text --name=pystd-text --tokenizer=$(DEMO)/data/tokenizer.json --output=$(DEMO)/data --heldout=0.05
	$(CRYSTAL) recipe show --config=configs/crystal_tiny.py
	$(CRYSTAL) train --config=configs/crystal_tiny.py --config.data.root=$(DEMO)/data --run_dir=$(DEMO)/run
	$(CRYSTAL) report --run_dir=$(DEMO)/run
	$(CRYSTAL) convert export --to=crystal --checkpoint=$(DEMO)/run --output=$(DEMO)/crystal-tiny-hf
	$(CRYSTAL) generate --checkpoint=$(DEMO)/run --prompt="def main(" --max_tokens=48
	@echo
	@echo "Report:       $(DEMO)/run/report/report.html"
	@echo "Checkpoints:  $(DEMO)/run/exports/ (each phase's calendar), $(DEMO)/run/checkpoints/ (to resume from)"
	@echo "Hugging Face: $(DEMO)/crystal-tiny-hf"
	@echo "Next:"
	@echo "  $(CRYSTAL) generate --checkpoint=$(DEMO)/run --prompt='import os' --temperature=0.8 --num_samples=3"
	@echo "  $(CRYSTAL) generate --checkpoint=$(DEMO)/run --prefix='def area(r):' --suffix='    return result'"
	@echo "  $(CRYSTAL) train --config=configs/crystal_tiny.py:10000 --config.data.root=$(DEMO)/data --run_dir=$(DEMO)/longer"

$(DEMO)/data/tokenizer.json: | $(VENV)/installed
	$(CRYSTAL) tokenizer train --input=pystd-code --input=pystd-text --vocab_size=4096 --output=$@

test: lint  ## lint, types and the test suite
	$(VENV)/bin/python -m pytest -n auto --maxprocesses=4 -m "not drill"

# They fight over time with real processes: one that fails on a busy machine is tried once more, alone.
drills: $(VENV)/installed-dev  ## the long exercises: kills, faults, races; their table goes into docs/reliability.md
	$(VENV)/bin/python -m pytest -n auto --maxprocesses=4 -m drill --drills-table=docs/reliability.md || \
	  $(VENV)/bin/python -m pytest -m drill --last-failed --last-failed-no-failures=none

# Exported folders must load in these too, each in an environment of its own: no two of them fit into one.
OLDER := $(foreach version,4.46.3 4.57.6,$(VENV)-transformers-$(version)/installed)

test-transformers: $(VENV)/installed-dev $(OLDER)  ## exported folders in older versions of transformers
	$(VENV)/bin/python -m pytest tests/test_transformers_versions.py

$(VENV)-transformers-%/installed:
	@echo "Installing transformers $* and torch into $(@D)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check torch==2.13.0 transformers==$* numpy safetensors
	@touch $@

lint: $(VENV)/installed-dev  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(VENV)/installed: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) -c $(SUPPORTED) || \
	  { echo "Needs Python 3.11 or 3.12, found '$(PYTHON)'; name one with: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Installing requirements.txt into $(VENV) (about 0.9 GB, a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --no-deps --require-hashes -r requirements.txt
	@$(PIP) --no-deps -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements/data.txt requirements/dev.txt requirements/torch.txt
	@echo "Installing requirements/data.txt, dev.txt and torch.txt into $(VENV) (about 3 GB)"
	@$(PIP) --no-deps --require-hashes -r requirements/data.txt
	@$(PIP) --no-deps --require-hashes -r requirements/dev.txt
	@$(PIP) -r requirements/torch.txt
	@touch $@

# A lock names everything, so that pip has nothing to resolve (--no-deps above).
# Keeps the versions that are locked; to move one: make lock LOCK_FLAGS='--upgrade-package=optax'
lock: LOCK = uv pip compile -q --universal --python-version=3.11 --fork-strategy=fewest --generate-hashes \
             --custom-compile-command='make lock' $(LOCK_FLAGS)
lock:  ## write the hashed requirements from pyproject.toml (needs uv)
	$(LOCK) pyproject.toml --extra=seqio --extra=beam --extra=gcs --extra=fast --extra=gguf --extra=eval -o requirements/data.txt
	$(LOCK) pyproject.toml -c requirements/data.txt -o requirements.txt
	$(LOCK) --group=dev -c requirements/data.txt -o requirements/dev.txt
	$(LOCK) pyproject.toml --extra=gcs --extra=tpu -c requirements/data.txt -o requirements/tpu.txt

clean:  ## remove .venv, caches and the demo
	rm -rf $(VENV) $(VENV)-transformers-* demo build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
