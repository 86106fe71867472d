# make demo     fresh clone -> talking model: set-up, sample data, prepare, pretrain, SFT, chart, questions
# make test     fresh clone -> tests passed; make test-slow: those that take minutes
# make lint     ruff (mistakes and formatting) and mypy (types)
#
# make demo EDGE=1     on a Jetson or a Raspberry Pi: only the core (requirements-edge.txt), nothing to compile,
#                      beside the torch that is installed there
# make demo VENV_FLAGS=--system-site-packages     everything, beside the torch this machine already has (P40)

PYTHON ?= python3
EDGE ?=
REQUIREMENTS ?= requirements$(if $(EDGE),-edge).txt
VENV_FLAGS ?= $(if $(EDGE),--system-site-packages)
BIN := .venv/bin
# A torch that is already there is kept as it is; otherwise the version the tests run with is installed.
PINS := $(if $(findstring --system-site-packages,$(VENV_FLAGS)),,-c constraints.txt)

.PHONY: demo test test-slow lint clean

demo: .venv/installed dataset/prepared/sft_val.json
	$(BIN)/python train.py -t pretrain --resume
	$(BIN)/python train.py -t sft --resume
	$(BIN)/python plot_loss.py -o checkpoint/demo.png -n $$(ls train_*.log)
	$(BIN)/python inference.py -i --eval dataset/eval.jsonl

test: .venv/installed-dev
	$(BIN)/python -m pytest -q -n auto --dist worksteal

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m slow

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: $(REQUIREMENTS) constraints.txt
	$(PYTHON) -m venv $(VENV_FLAGS) .venv
	$(BIN)/python -m pip install -q -r $(REQUIREMENTS) $(PINS)
ifneq ($(EDGE),)
	@$(BIN)/python -c "from importlib.util import find_spec; assert find_spec('torch')" 2>/dev/null || { echo "error: install torch, then run this again. On a Jetson:" \
	  "NVIDIA's build for your JetPack. Elsewhere: https://pytorch.org/get-started/locally/" >&2; exit 2; }
endif
	touch $@

# Also what requirements-edge.txt leaves out: the tests try everything.
.venv/installed-dev: .venv/installed requirements.txt requirements-dev.txt
	$(BIN)/python -m pip install -q -r requirements.txt -r requirements-dev.txt $(PINS)
	touch $@

dataset/pretrain.txt:
	$(BIN)/python dataset/sample_world.py

dataset/prepared/sft_val.json: | dataset/pretrain.txt
	$(BIN)/python data.py

clean:
	rm -rf .venv dataset/prepared dataset/*.txt dataset/*.jsonl checkpoint train_*.log train_*.metrics.jsonl
