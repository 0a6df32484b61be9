# The two commands of the README are `make demo` and `make test`. Both make .venv and fetch their models on first use.
# `make demo ENGINE=vllm` runs the demo on vLLM.
PYTHON ?= python3
VENV := .venv
MODELS := .models
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
PACKAGES := -e integrations/langchain-cacheblend -e integrations/llama-index-llms-cacheblend
ENGINE := transformers
export CACHEBLEND_TEST_MODEL ?= $(CURDIR)/$(MODELS)/smollm2-135m-instruct

.PHONY: demo docs docs-links vllm test test-vllm test-others test-langchain test-llama-index test-slow test-gpu lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp $(if $(filter vllm,$(ENGINE)),$(VENV)/vllm.stamp) ## Warm the example corpus, ask it questions, compare with full prefill.
	$(BIN)/python examples/demo.py --engine $(ENGINE) --models $(MODELS) --work .demo

vllm: $(VENV)/vllm.stamp ## Add vLLM to .venv: the CPU build where there is no GPU.

test: vllm $(VENV)/test.stamp $(VENV)/browser.stamp $(MODELS)/smollm2-small $(MODELS)/all-minilm-l6-v2 lint ## Lint, types, and all tests but the slow ones.
	$(MAKE) -j2 --output-sync=target test-vllm test-others test-langchain test-llama-index

# Two side by side: each keeps little more than one core busy. More threads of torch would only get in each other's way.
test-vllm test-others test-langchain test-llama-index: export OMP_NUM_THREADS = 1
test-vllm:
	$(BIN)/python -m pytest -q tests/vllm

test-others: export TRITON_INTERPRET = 1
test-others:
	$(BIN)/python -m pytest -q tests --ignore=tests/vllm

test-langchain test-llama-index: test-%:
	$(BIN)/python -m pytest -q integrations/$*-*

test-slow: export CACHEBLEND_TEST_TOOL_MODEL ?= $(CURDIR)/$(MODELS)/qwen2.5-coder-0.5b-instruct
test-slow: vllm $(VENV)/test.stamp $(MODELS)/smollm2-small $(MODELS)/all-minilm-l6-v2 $(MODELS)/qwen2.5-coder-0.5b-instruct ## Tests that take minutes.
	$(BIN)/python -m pytest -q -m slow

test-gpu: ## Tests that need a CUDA GPU, with the Python that is active.
	$(PYTHON) -m pytest -q -rs -o addopts="--strict-markers --import-mode=importlib" -m gpu tests/attention/test_gpu.py tests/engines/test_gpu.py tests/vllm/test_gpu.py tests/vllm/test_parallel.py

docs: $(VENV)/test.stamp ## The documentation as a site, in docs/_build/html. A warning is an error.
	$(BIN)/python -m sphinx -q -E -W --keep-going docs docs/_build/html

docs-links: $(VENV)/test.stamp ## Asks for each link of the documentation that leads elsewhere.
	$(BIN)/python -m sphinx -q -b linkcheck docs docs/_build/links

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch by itself first: the version that constraints.txt names satisfies everyone who asks for it afterwards.
$(VENV)/demo.stamp: pyproject.toml $(wildcard integrations/*/pyproject.toml) constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	$(PIP) -e ".[demo]" $(PACKAGES)
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) -e ".[test]" $(PACKAGES)
	touch $@

$(VENV)/browser.stamp: tools/install_browser.py | $(VENV)/test.stamp
	$(BIN)/python $<
	touch $@

$(VENV)/vllm.stamp: $(VENV)/demo.stamp tools/install_vllm.py
	$(BIN)/python tools/install_vllm.py -c constraints.txt
	touch $@

$(MODELS)/%: | $(VENV)/demo.stamp
	$(BIN)/python examples/fetch_models.py $* $@

$(MODELS)/smollm2-small: tools/make_small_model.py | $(MODELS)/smollm2-135m-instruct
	rm -rf $@
	$(BIN)/python tools/make_small_model.py $(MODELS)/smollm2-135m-instruct $@

clean:
	rm -rf $(VENV) $(MODELS) .demo docs/_build
