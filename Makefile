# make install | demo | test | lint | clean — everything happens in .venv, with the exact pins of requirements/cpu.txt
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Two cores: one thread a process unless the caller says otherwise.
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test lint clean
install: $(STAMP)

$(STAMP): requirements/cpu.txt setup.py tools/mend_torchvision.py
	command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or call make PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check setuptools==78.1.1 wheel
	# The pins are complete, so nothing is resolved: --no-deps keeps out torchaudio and torchcodec, whose CUDA builds do not load here.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements/cpu.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(BIN)/python tools/mend_torchvision.py
	touch $@

demo: $(STAMP)
	$(BIN)/eureka demo --out demo

test: $(STAMP)
	$(BIN)/python tests/run.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf demo build *.egg-info .pytest_cache .ruff_cache
