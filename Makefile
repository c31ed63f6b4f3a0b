# make demo       train, generate and score on the embedded model; ends with runs/demo/report.html
# make app        all commands as pages in a browser, with a toyworld subject to begin with
# make test       the test suite: offline, on the CPU
# make numerical  those of its tests that compare floating-point numbers, as on the poorest processor
# make extras     those of its tests that need optional packages (--quantize, --optimizer, HEIC)
# make app-tests  the pages in Debian's chromium (apt install chromium)
# make check      formatting, lint, types
# make format     let ruff mend style and imports
# make clean      remove the environment and the caches; runs/ stays
#
# Each target first sets up .venv, once, and again when pyproject.toml changes.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help demo app test numerical extras app-tests check format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(READY)
	$(BIN)/singlora demo --output_dir runs/demo

# An environment on top of the first one: what Gradio brings along would change what other libraries import.
APP := $(VENV)/app
$(APP)/.ready: $(READY) Makefile
	$(BIN)/python -m venv $(APP)
	$(APP)/bin/python -c 'import site, sysconfig; open(sysconfig.get_path("purelib") + "/below.pth", "w").write( \
	    "import site; site.addsitedir(\"" + "$(abspath $(VENV))/" + sysconfig.get_path("purelib").split("/app/")[-1] + "\")")'
	$(APP)/bin/python -m pip install --disable-pip-version-check -q "gradio>=6" playwright axe-playwright-python
	@touch $@

app: $(APP)/.ready
	@test -d runs/app/subjects/dog-1 || $(BIN)/singlora toyworld subject --name dog-1 --output_dir runs/app/subjects/dog-1
	$(APP)/bin/python -m singlora_diffusion.cli app --output_dir runs/app

PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 4
test numerical extras: export HF_HUB_OFFLINE := 1
test numerical extras: export CUDA_VISIBLE_DEVICES :=
test numerical extras: export OMP_NUM_THREADS := 1
test: $(READY)
	$(PYTEST) $(PYTEST_FLAGS)

# PyTorch's, oneDNN's and MKL's kernels for the oldest x86 processors; sums come in another order there.
numerical: export ATEN_CPU_CAPABILITY := default
numerical: export ONEDNN_MAX_CPU_ISA := SSE41
numerical: export MKL_ENABLE_INSTRUCTIONS := SSE4_2
numerical: $(READY)
	$(PYTEST) -m numerical $(PYTEST_FLAGS)

# In a folder of their own: what is installed changes what other libraries import.
EXTRAS := $(VENV)/extras
$(EXTRAS)/.ready: $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check -q --upgrade --no-deps --target $(EXTRAS) \
	    bitsandbytes torchao prodigyopt schedulefree pillow-heif \
	    ray msgpack jsonschema jsonschema-specifications referencing rpds-py attrs
	@touch $@
extras: export PYTHONPATH := $(EXTRAS)
extras: $(EXTRAS)/.ready
	$(BIN)/python -m pytest -q tests/test_quantized.py tests/test_training_pieces.py $(PYTEST_FLAGS)
	$(BIN)/python -m pytest -q tests/test_trainer.py -k optimizer $(PYTEST_FLAGS)
	$(BIN)/python -m pytest -q tests/test_images.py -k heic $(PYTEST_FLAGS)
	$(BIN)/python -m pytest -q tests/test_compare_ray.py $(PYTEST_FLAGS)

app-tests: export HF_HUB_OFFLINE := 1
app-tests: export CUDA_VISIBLE_DEVICES :=
app-tests: export OMP_NUM_THREADS := 1
app-tests: $(APP)/.ready
	$(APP)/bin/python -m pytest -q -n 2 --dist loadfile \
	    tests/test_app.py tests/test_app_access.py tests/test_app_handlers.py $(PYTEST_FLAGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml
	@command -v $(PYTHON) >/dev/null || \
	    { echo "$(PYTHON) not found: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$$($(PYTHON) --version) is too old: install Python 3.10 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "Python's venv is missing: install it (Debian, Ubuntu: sudo apt install python3-venv)" >&2; exit 1; }
	@echo "Setting up $(VENV): PyTorch and the rest are about 3 GB, this takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find singlora_diffusion eval benchmarks tests -name __pycache__ -prune -exec rm -rf {} +
