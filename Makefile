PYTHON ?= python3.11
BIN := .venv/bin
# Ray's own choice of authentication depends on what an earlier program left in the home folder; ours does not.
export RAY_AUTH_MODE ?= disabled

.PHONY: install quickstart test test-slow test-gguf check format serve
.PHONY: bench-data bench-train bench-checkpoint bench-spot bench-convert

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

quickstart: install
	$(BIN)/python jobs/quickstart.py

test: install
	$(BIN)/python -m pytest -m "not slow and not gpu and not network"

test-slow: install
	$(BIN)/python -m pytest -m "slow"

# llama.cpp has no wheels: this builds it, for minutes.
test-gguf: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[gguf]"
	$(BIN)/python -m pytest tests/convert/test_llamacpp.py tests/checkpoint/test_gguf.py

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

serve: install
	$(BIN)/serve run serving.app:build model=$(or $(MODEL),runs/quickstart/finetune/export) quant=$(or $(QUANT),nf4)

bench-data: benchmarks/.venv/installed
	benchmarks/.venv/bin/python benchmarks/data.py

bench-train: install
	$(BIN)/python benchmarks/train.py

bench-checkpoint: install
	$(BIN)/python benchmarks/checkpoint.py

bench-convert: install
	$(BIN)/python benchmarks/convert.py

bench-spot: install
	$(BIN)/python benchmarks/spot.py --trace mixed
	$(BIN)/python benchmarks/spot.py --trace bamboo-p3

# The peers' own packages on top of ours; requirements.txt says why without their requirements.
benchmarks/.venv/installed: .venv/installed benchmarks/requirements.txt
	$(PYTHON) -m venv benchmarks/.venv
	benchmarks/.venv/bin/python -m pip install --quiet --no-deps --requirement benchmarks/requirements.txt
	echo $(CURDIR)/.venv/lib/python3.11/site-packages > benchmarks/.venv/lib/python3.11/site-packages/main.pth
	touch $@
