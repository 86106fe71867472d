# make demo     fresh clone -> talking model: set-up, sample data, prepare, pretrain, SFT, chart, questions
# make test     fresh clone -> tests passed; make test-slow: those that take minutes
# make demo VENV_FLAGS=--system-site-packages     use the torch this machine already has (Jetson, P40)

PYTHON ?= python3
VENV_FLAGS ?=
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

.venv/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV_FLAGS) .venv
	$(BIN)/python -m pip install -q -r requirements.txt $(PINS)
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install -q -r requirements-dev.txt $(PINS)
	touch $@

dataset/pretrain.txt:
	$(BIN)/python dataset/sample_world.py

dataset/prepared/sft_val.json: | dataset/pretrain.txt
	$(BIN)/python data.py

clean:
	rm -rf .venv dataset/prepared dataset/*.txt dataset/*.jsonl checkpoint train_*.log train_*.metrics.jsonl
