# make install | install-gpu | install-te | demo | test | lint | benchmark | clean — everything happens in .venv (another: VENV=…), with the exact
# pins of requirements/cpu.txt (Python 3.11) or, after install-gpu, of requirements/gpu.txt (Python 3.12). Another interpreter: PYTHON=…
PYTHON     ?= python3.11
GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),python3.12,$(PYTHON))
VENV       := .venv
BIN        := $(VENV)/bin
CPU_STAMP  := $(VENV)/.installed
GPU_STAMP  := $(VENV)/.installed-gpu
# What the other targets need: the installation that is there, otherwise the one for CPUs.
STAMP      := $(if $(wildcard $(GPU_STAMP)),$(GPU_STAMP),$(CPU_STAMP))
PIP        := $(BIN)/pip --disable-pip-version-check
TE         ?= 2.11.0
# Two cores: one thread a process unless the caller says otherwise.
export OMP_NUM_THREADS ?= 1

.PHONY: install install-gpu install-te demo test lint benchmark clean
install: $(STAMP)

$(CPU_STAMP): requirements/cpu.txt setup.py tools/mend_torchvision.py
	$(PYTHON) -V >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or call make PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet setuptools==78.1.1 wheel
	# The pins are complete, so nothing is resolved: --no-deps keeps out torchaudio and torchcodec, whose CUDA builds do not load here.
	$(PIP) install --quiet --no-deps -r requirements/cpu.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python tools/mend_torchvision.py
	touch $@

install-gpu: $(GPU_STAMP)
	@echo "installed. Next: $(BIN)/eureka doctor, then on the GPU node: bash tools/gpu_check.sh --python $(BIN)/python --out gpu-check"

$(GPU_STAMP): requirements/gpu.txt setup.py
	$(GPU_PYTHON) -V >/dev/null || { echo "error: $(GPU_PYTHON) not found; install Python 3.12 or call make install-gpu PYTHON=..." >&2; exit 1; }
	test ! -e $(CPU_STAMP) || { echo "error: $(VENV) holds the CPU installation; make install-gpu VENV=.venv-gpu, or remove it" >&2; exit 1; }
	test -x $(BIN)/python || $(GPU_PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || { echo "error: $(VENV) is not Python 3.12, which the GPU pins are for: remove it, then make install-gpu PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PIP) install -r requirements/gpu.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Optional, for model.backend: te. Its torch half is compiled here against the torch of .venv (hence no build isolation), with the headers of
# CUDA, cuDNN and NCCL that .venv holds, unless CUDA_HOME names a toolkit: minutes, and a C++ compiler. If it fails: make install-te TE=2.20.2.
install-te: $(GPU_STAMP)
	$(PIP) install --quiet wheel==0.48.0
	nvidia=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia; \
	export CUDA_HOME="$${CUDA_HOME:-$$nvidia/cu13}" CPATH="$$nvidia/cudnn/include:$$nvidia/nccl/include$${CPATH:+:$$CPATH}"; \
	$(PIP) install --no-build-isolation --constraint requirements/gpu.txt 'transformer-engine[pytorch,core-cu13]==$(TE)'
	$(BIN)/python -c 'import transformer_engine.pytorch; print("Transformer Engine $(TE) imports")'

demo: $(STAMP)
	$(BIN)/eureka demo --out demo

test: $(STAMP)
	$(BIN)/python tests/run.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	if command -v shellcheck >/dev/null; then shellcheck -x slurm/*; else echo "shellcheck is not installed: slurm/ is not linted"; fi

# At most half an hour on two idle cores; also makes .venv-trl, the environment of the peer. Each script alone: tools/benchmark/NAME.py --help.
benchmark: $(STAMP)
	$(BIN)/python tools/benchmark/all.py --peer-venv .venv-trl

clean:
	rm -rf demo build *.egg-info .pytest_cache .ruff_cache .mypy_cache
