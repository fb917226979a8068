# make demo: set up and run the demonstration.     make test: lint, then the test suite.
# make test-full: the complete matrices as well.   make lint: ruff and mypy.
# make test-npu: the ops and models on an Ascend NPU that is not there: see test/npu.
# make models: run every model type of transformers and write docs/models.md.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRANSFORMERS_457 := .deps/transformers-4.57
TRANSFORMERS_500 := .deps/transformers-5.0
ENGINES := .deps/engines
export LIGER_TEST_ENGINES := $(CURDIR)/$(ENGINES)
export LIGER_TEST_TRANSFORMERS_457 := $(CURDIR)/$(TRANSFORMERS_457)
export LIGER_TEST_TRANSFORMERS_500 := $(CURDIR)/$(TRANSFORMERS_500)
TRL := .deps/trl
export LIGER_TEST_TRL := $(CURDIR)/$(TRL)

NPU := .deps/npu

.PHONY: demo test test-full test-npu models lint
.DELETE_ON_ERROR:

demo: $(VENV)/.train
	$(BIN)/liger-kernel demo

test: lint $(TRANSFORMERS_457)/.done $(TRANSFORMERS_500)/.done $(ENGINES)/.done $(TRL)/.done
	$(BIN)/pytest test -n auto -m "not slow" --ignore=test/npu

test-full: lint $(TRANSFORMERS_457)/.done $(TRANSFORMERS_500)/.done $(ENGINES)/.done $(TRL)/.done
	$(BIN)/pytest test -n auto --ignore=test/npu

# triton-ascend takes over the name triton, so it lies in a folder of its own, before the others.
test-npu: $(VENV)/.dev
	.ci/npu $(BIN)/python $(NPU)
	PYTHONPATH=$(CURDIR)/$(NPU) $(BIN)/pytest test/npu -n auto -rs

models: $(VENV)/.dev
	PYTHONPATH=test HF_HUB_OFFLINE=1 $(BIN)/python -W ignore -m models.matrix --write docs/models.md

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.torch:
	.ci/venv $(PYTHON) $(VENV)
	touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -qq -e '.[train]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -qq -e '.[dev]'
	touch $@ $(VENV)/.train

# The oldest transformers that is supported, beside the current one: what it needs that the current one does not.
$(TRANSFORMERS_457)/.done: $(VENV)/.dev
	rm -rf $(TRANSFORMERS_457)
	$(BIN)/pip install -qq --no-deps --target $(TRANSFORMERS_457) 'transformers==4.57.3' 'tokenizers>=0.22,<0.23' \
		'huggingface_hub>=0.34,<1.0' 'hf-xet>=1.1.3,<2' requests urllib3 certifi charset_normalizer idna
	touch $@

# TRL's first and last versions that call liger_kernel.chunked_loss, and the newest, each with what it alone needs.
REQUESTS := requests urllib3 certifi charset_normalizer idna
$(TRL)/.done: $(VENV)/.dev
	rm -rf $(TRL)
	$(BIN)/pip install -qq --no-deps --target $(TRL)/0.24 trl==0.24.0 'datasets>=4,<5' httpx httpcore h11 anyio
	$(BIN)/pip install -qq --no-deps --target $(TRL)/1.12 trl==1.12.0 $(REQUESTS)
	$(BIN)/pip install -qq --no-deps --target $(TRL)/1.16 trl==1.16.0 $(REQUESTS)
# The first transformers 5, whose interfaces differ from the current one's.
$(TRANSFORMERS_500)/.done: $(VENV)/.dev
	rm -rf $(TRANSFORMERS_500)
	$(BIN)/pip install -qq --no-deps --target $(TRANSFORMERS_500) 'transformers==5.0.0' 'tokenizers==0.22.1' \
		'huggingface_hub>=1.3,<2' 'hf-xet>=1.1.3,<2' httpx httpcore h11 anyio sniffio idna certifi shellingham typer-slim
	touch $@

# DeepSpeed, Lightning and Megatron-Core for the tests on two ranks: without what they bring that the tests do not need.
$(ENGINES)/.done: $(VENV)/.dev
	rm -rf $(ENGINES)
	DS_BUILD_OPS=0 $(BIN)/pip install -qq --no-deps --target $(ENGINES) 'deepspeed>=0.19,<0.20' 'megatron-core>=0.16,<0.20' \
		hjson py-cpuinfo msgpack einops pydantic pydantic-core typing-inspection annotated-types \
		'lightning>=2.6,<3' lightning-utilities torchmetrics
	touch $@
