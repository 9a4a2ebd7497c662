# mistral-trt: checkpoint → ONNX → TensorRT engine → report and text.
#
# File targets are the manifests that each stage writes last. Everything a variable alters has that
# variable in its path, so two settings never share a folder. Every target makes .venv when it needs it.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory --no-builtin-rules

PYTHON ?= python3
DEMO_MODEL := build/models/smollm2-135m-instruct
# Set these on make's command line. A variable of that name in the environment is not ours (GNU screen sets
# WINDOW, for one) and does not count.
MODEL = $(DEMO_MODEL)
# One GPU, several with blanks between them for an engine each, or with commas for one that serves them all.
GPU = a10g
PRECISION = fp16
FLAVOR = auto
# auto, embedded (in the plan) or external (beside it)
WEIGHTS =
# Left empty, these keep the checkpoint's window and the defaults of `mistral-trt export`.
WINDOW =
CHUNK =
MAX_BATCH =
MAX_CONTEXT =
# Adapters to merge, DIR or DIR:SCALE, with blanks between them.
LORA =

# For the quantized precisions; left empty, they mean the defaults of `mistral-trt export`.
CALIBRATION =
CALIBRATION_SAMPLES =
CALIBRATION_TOKENS =
# Linears that stay float16, patterns with blanks between them, and a budget: perplexity=1.03 or kl=0.01.
KEEP =
QUALITY =
LM_HEAD =
# How much a report validates: quick, default or full.
BUDGET = default
RUN =

LORA_FLAGS = $(foreach adapter,$(LORA),--lora '$(adapter)')

UNQUANTIZED = CALIBRATION= CALIBRATION_SAMPLES= CALIBRATION_TOKENS= KEEP= QUALITY= LM_HEAD=

BIN := .venv/bin
READY := .venv/.ready
CLI := $(BIN)/mistral-trt
GPUS := $(sort $(basename $(notdir $(wildcard engines/gpus/*.toml))))
comma := ,

override GPU := $(shell printf '%s' '$(GPU)' | tr 'A-Z' 'a-z')

PYTHON_OR_WHY = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo "Python 3.11 or newer is needed; found $$($(PYTHON) --version); set PYTHON=…" >&2; exit 1; }

# The catalogue's keys are what folders are named by; its other names are looked up: GPU="rtx 4090,NVIDIA L4".
ifneq ($(filter engine gpu-acceptance,$(MAKECMDGOALS)),)
  OTHER := $(filter-out $(GPUS),$(subst $(comma), ,$(GPU))) $(filter $(comma)% %$(comma),$(GPU))
  ifneq ($(if $(strip $(GPU)),$(strip $(OTHER)),none),)
    FOUND := $(shell { $(PYTHON_OR_WHY); PYTHONPATH=src $(PYTHON) engines/gpu.py '$(GPU)'; } 2>&1)
    ifneq ($(.SHELLSTATUS),0)
      $(error $(FOUND))
    endif
    override GPU := $(FOUND)
  endif
endif
ifeq ($(strip $(MODEL)),)
  $(error MODEL is empty; expected a checkpoint folder)
endif

ifneq ($(words $(BUDGET)) $(filter quick default full,$(BUDGET)),1 $(strip $(BUDGET)))
  $(error BUDGET is '$(BUDGET)'; expected quick, default or full)
endif

QUANTIZATION = $(if $(CALIBRATION),--calibration '$(CALIBRATION)') \
  $(if $(CALIBRATION_SAMPLES),--calibration-samples $(CALIBRATION_SAMPLES)) \
  $(if $(CALIBRATION_TOKENS),--calibration-tokens $(CALIBRATION_TOKENS)) \
  $(foreach pattern,$(KEEP),--keep '$(pattern)') $(if $(QUALITY),--quality '$(QUALITY)') \
  $(if $(LM_HEAD),--quantize-lm-head)
SUFFIX = $(if $(WINDOW),-w$(WINDOW))$(if $(CHUNK),-c$(CHUNK))$(if $(MAX_BATCH),-b$(MAX_BATCH))$(if $(MAX_CONTEXT),-t$(MAX_CONTEXT))$(if $(strip $(QUANTIZATION)),-q$(shell printf '%s' "$(QUANTIZATION)" | sha256sum | cut -c1-8))
EXPORT_FLAGS = $(if $(WINDOW),--sliding-window $(WINDOW)) $(if $(CHUNK),--prefill-chunk $(CHUNK)) \
  $(if $(MAX_BATCH),--max-batch-size $(MAX_BATCH)) $(if $(MAX_CONTEXT),--max-context $(MAX_CONTEXT)) \
  $(QUANTIZATION)
BUILD_FLAGS = --flavor $(FLAVOR) $(if $(WEIGHTS),--weights $(WEIGHTS))

.PHONY: help demo engine engines report onnx test test-all lint gpus gpu-acceptance bench bench-build bench-export bench-full-size bench-quantization bench-runtime bench-validation clean .engine .report .onnx

help: ## show this list
	@echo 'make TARGET [MODEL=checkpoint] [LORA=adapter] [GPU=a10g] [PRECISION=fp16] [WEIGHTS=auto] [BUDGET=default] [WINDOW= CHUNK= MAX_BATCH= MAX_CONTEXT=]'
	@echo '     PRECISION: fp32 fp16 bf16, or int8 int8-weight-only int4 fp8 with [CALIBRATION=text KEEP=pattern QUALITY=perplexity=1.03]'
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS=$$'\t' read -r target words; \
	  do printf '  %-12s %s\n' "$$target" "$$words"; done

# ---------------------------------------------------------------- what a person asks for

demo: $(READY) ## everything on a real small model: export, A10G engine, reports, a streamed answer
	@$(CLI) demo-model --out $(DEMO_MODEL) > /dev/null
	@run=build/$$($(CLI) identify $(DEMO_MODEL)); \
	  options="MODEL=$(DEMO_MODEL) RUN=$$run LORA= WEIGHTS= BUDGET=default WINDOW= CHUNK= MAX_BATCH= MAX_CONTEXT= $(UNQUANTIZED)"; \
	  $(MAKE) .report PRECISION=fp32 $$options; \
	  $(MAKE) .report .engine PRECISION=fp16 GPU=a10g FLAVOR=auto $$options; \
	  ln -sfn $$(basename $$run) build/demo
	@$(BIN)/python bench/demo_summary.py build/demo

engine: $(READY) $(if $(filter $(DEMO_MODEL),$(MODEL)),demo-model) ## a TensorRT engine for GPU=…, from MODEL=…
	@for gpu in $(GPU); do $(CLI) gpus --check $$gpu --precision $(PRECISION) --flavor $(FLAVOR); done
	@run=$$($(CLI) identify '$(MODEL)' $(LORA_FLAGS)); \
	  for gpu in $(GPU); do $(MAKE) .engine RUN=build/$$run GPU=$$gpu; done

engines: $(READY) $(if $(filter $(DEMO_MODEL),$(MODEL)),demo-model) ## an engine for every GPU that one can be built for here
	@run=build/$$($(CLI) identify '$(MODEL)' $(LORA_FLAGS)); built=; \
	  onnx=$$($(MAKE) .onnx RUN=$$run | tail -n 1); \
	  for gpu in $(GPUS); do \
	    if $(CLI) build $$onnx --gpu $$gpu $(BUILD_FLAGS) --out $$run/engines/$$gpu --dry-run > /dev/null; \
	    then $(MAKE) .engine RUN=$$run GPU=$$gpu; built=1; fi; \
	  done; \
	  test -n "$$built" || { echo 'no engine in $(PRECISION) can be built here, for the reasons above' >&2; exit 1; }

report: $(READY) $(if $(filter $(DEMO_MODEL),$(MODEL)),demo-model) ## the numeric report of MODEL=… at PRECISION=…
	@run=$$($(CLI) identify '$(MODEL)' $(LORA_FLAGS)) && $(MAKE) .report RUN=build/$$run

onnx: $(READY) $(if $(filter $(DEMO_MODEL),$(MODEL)),demo-model) ## the ONNX folder of MODEL=… at PRECISION=…
	@run=$$($(CLI) identify '$(MODEL)' $(LORA_FLAGS)) && $(MAKE) .onnx RUN=build/$$run

gpus: $(READY) ## the GPUs an engine can be built for
	@$(CLI) gpus

# A worker for each core, four at most; one thread each, or they fight. A file's tests share what its fixtures made.
BESIDE = OMP_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses logical --maxprocesses 4 --dist loadfile
ALONE = $(BIN)/pytest -q $$(grep --files-with-matches 'pytest\.mark\.alone' tests/test_*.py)

test: $(READY) ## the unit suite: some 4 minutes, 5 in a fresh clone
	$(BESIDE) -m 'not slow and not gpu and not alone'
	$(ALONE) -m 'alone and not slow and not gpu'

test-all: $(READY) ## everything that needs no GPU, real engine builds included
	$(BESIDE) -m 'not gpu and not alone'
	$(ALONE) -m 'alone and not gpu'

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) demo-model ## the figures of the README, measured here
	$(BIN)/python bench/pipeline.py $(DEMO_MODEL) --out bench/results/pipeline.json

bench-quantization: $(READY) demo-model ## what quantization costs and saves, measured here: 40 minutes
	$(BIN)/python bench/quantization.py $(DEMO_MODEL) --out bench/results/quantization.json

bench-build: $(READY) ## builds of a 7B at four depths beside what was predicted: an hour or so, 30 GB of disk
	$(BIN)/python bench/build.py --out bench/results/build.json

bench-export: $(READY) ## exports at full size, beside a copy of the files and beside other exporters: 25 minutes
	$(BIN)/python bench/export.py

bench-runtime: $(READY) ## what the runtime costs beside the graph, and beside onnxruntime-genai: a few minutes
	$(BIN)/python bench/runtime.py --out bench/results/runtime.json

bench-validation: $(READY) ## healthy artifacts of every precision against the gates' limits: half an hour, goes on after a stop
	$(BIN)/python bench/validation.py --out bench/results/validation.json

bench-full-size: $(READY) ## a 7B of random weights validated layer by layer within 8 GB: 40 minutes, 29 GB of disk
	$(BIN)/python bench/full_size.py --out bench/results/full_size.json

gpu-acceptance: $(READY) $(if $(filter $(DEMO_MODEL),$(MODEL)),demo-model) ## on a machine with GPU=…: its engine loaded, compared, timed
	@$(if $(or $(LORA),$(word 2,$(subst $(comma), ,$(GPU)))),echo 'gpu-acceptance takes one GPU and no LORA' >&2; exit 2)
	$(BIN)/python bench/gpu_acceptance.py '$(MODEL)' --gpu $(GPU) --precision $(PRECISION) \
	  --out build/gpu-acceptance/$(GPU)-$(PRECISION)$(SUFFIX) -- $(EXPORT_FLAGS)

clean: ## remove everything that was built (.venv stays)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info src/*.egg-info

.PHONY: demo-model
demo-model: $(READY)
	@$(CLI) demo-model --out $(DEMO_MODEL) > /dev/null

# ---------------------------------------------------------------- the environment

$(READY): requirements.lock pyproject.toml
	@$(PYTHON_OR_WHY)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# ---------------------------------------------------------------- the pipeline, inside one RUN folder
# RUN is build/<name>-<first 8 of the checkpoint's hash>: another checkpoint is another folder.

ifeq ($(RUN),)
.NOTPARALLEL: # two goals may want one folder
else
ONNX := $(RUN)/onnx-$(PRECISION)$(SUFFIX)
ENGINE := $(RUN)/engines/$(subst $(comma),+,$(GPU))-$(PRECISION)$(SUFFIX)$(if $(filter-out auto,$(FLAVOR)),-$(FLAVOR))$(if $(WEIGHTS),-$(WEIGHTS))
# "-quick", "-full", or nothing.
MORE := $(addprefix -,$(filter-out default,$(BUDGET)))
REPORT := $(RUN)/report-$(PRECISION)$(SUFFIX)$(MORE)
PASSED := $(RUN)/.report-$(PRECISION)$(SUFFIX)$(MORE).passed
CORE := $(wildcard src/mistral_trt/*.py)

.onnx: $(ONNX)/manifest.json
	@echo $(ONNX)
.engine: $(ENGINE)/manifest.json
	@echo $(ENGINE)
.report: $(PASSED)
	@echo $(REPORT)/report.html

$(ONNX)/manifest.json: $(wildcard export/*.py export/quantization/*.* $(CALIBRATION)) $(CORE)
	@$(CLI) export '$(MODEL)' $(LORA_FLAGS) --out $(@D) --precision $(PRECISION) $(EXPORT_FLAGS) > /dev/null

$(ENGINE)/manifest.json: $(ONNX)/manifest.json $(wildcard engines/*.py engines/*/*.py) $(patsubst %,engines/gpus/%.toml,$(subst $(comma), ,$(GPU)))
	@$(CLI) build $(ONNX) --gpu $(GPU) $(BUILD_FLAGS) --out $(@D) > /dev/null

# The report is kept when a gate fails; only the mark that it passed is missing, so it runs again.
$(PASSED): $(ONNX)/manifest.json $(wildcard validate/*.* validate/*/*.* runtime/*.py runtime/*/*.py) $(if $(wildcard $(REPORT)/report.json),,.again)
	@$(CLI) validate $(ONNX) --reference '$(MODEL)' $(LORA_FLAGS) $(addprefix -,$(MORE)) --out $(REPORT) | tail -n 1
	@touch $@

.PHONY: .again
.again:
endif
