# One word per chore; the same words run in .ci/run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: chat lint check test test-launches test-rest faults fuzz format clean

# With job control Ctrl-C reaches the chat alone. Make would wait for its end, too, but then call it an error. Ctrl-Z (148)
# reaches the chat alone as well: make is stopped after it, and the chat goes on as soon as make does.
chat: $(STAMP)           ## a chat with the demo model, split over two stage workers
	@if [ -t 0 ]; then set -m; fi; $(BIN)/glmpipe chat --layers cpu=1-3 --layers cpu=4-6; code=$$?; \
	while [ $$code -eq 148 ]; do kill -STOP $$PPID; \
	while ps -o stat= -p $$PPID | grep -q T; do sleep 0.2; done; fg > /dev/null; code=$$?; done; exit $$code

lint: $(STAMP)           ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint              ## and the fast tests
	$(BIN)/pytest -q -m "not slow"

test:                    ## the whole suite, in two halves at the same time: launches and their workers; all the rest
	@$(MAKE) --no-print-directory --keep-going --jobs=2 test-launches test-rest

LAUNCHES := tests/end_to_end tests/multihost
test-launches: $(STAMP)
	$(BIN)/pytest -q $(LAUNCHES)
test-rest: $(STAMP)
	$(BIN)/pytest -q $(addprefix --ignore=,$(LAUNCHES))

FAULT_RUNS ?= 3
faults: $(STAMP)         ## every fault on one host, FAULT_RUNS times in a row: no answer may change, nothing may be left
	for run in $$(seq $(FAULT_RUNS)); do $(BIN)/pytest -q tests/end_to_end/test_faults_*.py || exit 1; done

fuzz: $(STAMP)           ## a million hostile frames, ten thousand hostile files of each kind; with atheris where it can be had
	$(BIN)/pip install --quiet -e ".[fuzz]" || echo "no atheris for this Python: random mutations instead"
	$(BIN)/python -m fuzz frames --inputs 1000000
	for target in weights quantized plan prompts; do $(BIN)/python -m fuzz $$target --inputs 10000 --engine random || exit 1; done
	$(BIN)/python -m fuzz tokenizer --inputs 2000 --engine random

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The native kernels' sources are here so that libraries of an older checkout are built anew.
$(STAMP): pyproject.toml constraints.txt setup.py bin/glmpipe $(wildcard glm/kernels/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
