# `make demo` and `make test` need Python 3.11, git and make; everything else they install.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
REQUIREMENTS := requirements.txt requirements-dev.txt requirements-no-deps.txt

.PHONY: demo test lint types unit observations speed paper clean

demo: $(VENV)/.installed
	$(BIN)/python -m adaskip.sweep configs/demo.yaml

test: lint types unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

unit: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --timeout 600

observations: $(VENV)/.installed
	$(BIN)/python observations/ob0.py --model smollm2
	$(BIN)/python observations/ob1.py --model smollm2
	$(BIN)/python observations/ob2.py --model smollm2
	$(BIN)/python observations/ob3.py --model smollm2
	$(BIN)/python observations/stability.py --model smollm2

speed: $(VENV)/.installed
	$(BIN)/python speed/run_smollm2_speed.py --weights default --policies EE US ADA --minutes 11

paper: $(VENV)/.installed
	$(BIN)/python -m adaskip.sweep configs/paper.yaml

# The stamp is written last, so an interrupted installation is taken up again.
$(VENV)/.installed: $(REQUIREMENTS) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install -r requirements-dev.txt
	$(BIN)/python -m pip install --no-deps -r requirements-no-deps.txt
	$(BIN)/python -m pip install --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
