# make train, make test: everything they need is installed into .venv first. PYTHON=python3 uses an
# interpreter that already has torch instead.

ifdef PYTHON
PY := $(PYTHON)
SETUP :=
WORKERS :=
else
PY := .venv/bin/python
SETUP := .venv/installed
WORKERS := -n 2 --dist loadgroup
endif

OUT := out-python-char
RESULTS := benchmarks/results

.PHONY: help train test proofs picture torture hosts lint gpu clean
help:
	@echo "make train   train a small model on Python's standard library, about three minutes on two cores"
	@echo "make test    run the tests; those that need a GPU skip where there is none"
	@echo "make proofs  run the tests that take long, which make test leaves out"
	@echo "make torture kill a small run a hundred times, and resume it each time; what only whole processes show"
	@echo "make hosts   as root, on Linux: a run on two hosts, of which one is unplugged; two network namespaces"
	@echo "make picture take the picture of a report that README shows, with Chromium"
	@echo "make lint    check the style"
	@echo "make gpu     on a GPU with 24 GB: benchmarks and the tests that need one, in stages; keeps what they measure;"
	@echo "             NANOGPT=folder, a checkout of nanoGPT to compare with"
	@echo "make clean   remove what the others made"

train: data/python_char/meta.pkl
	$(PY) train.py config/train_python_char.py --out_dir=$(OUT) --auto_fit=True
	$(PY) sample.py --out_dir=$(OUT) --num_samples=1 --max_new_tokens=400 --start="def "
	$(PY) report.py $(OUT)

test: $(SETUP)
	$(PY) -m pytest -q $(WORKERS)

picture:
	chromium --headless --no-sandbox --hide-scrollbars --window-size=1280,900 --virtual-time-budget=20000 \
		--screenshot=$(RESULTS)/report.png "file://$(CURDIR)/$(OUT)/report.html"

proofs: $(SETUP)
	$(PY) -m pytest -q $(WORKERS) -m proof

torture: $(SETUP)
	$(PY) tests/torture.py --kills=100
	$(PY) -m pytest -q tests/processes.py

hosts: $(SETUP)
	$(PY) tests/two_hosts.py

lint: $(SETUP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# The most valuable first. Each stage writes what it measures as it goes, and has four minutes: none costs the others.
STAGE := timeout --signal=INT 240
NANOGPT := ../nanoGPT
gpu: $(SETUP)
	mkdir -p $(RESULTS)
	-$(STAGE) $(PY) benchmarks/against_nanogpt.py --nanogpt=$(NANOGPT) --batch_size=12 --block_size=1024 --rounds=2 --compile=False \
		--save=$(RESULTS)/against_nanogpt-cuda-eager.json
	-$(STAGE) $(PY) benchmarks/against_nanogpt.py --nanogpt=$(NANOGPT) --batch_size=12 --block_size=1024 --rounds=1 \
		--save=$(RESULTS)/against_nanogpt-cuda-compiled.json
	-$(STAGE) $(PY) benchmarks/limits.py --limits=12 --save=$(RESULTS)/limits-12-cuda.json
	-$(STAGE) $(PY) -m pytest -v -m gpu tests/test_gpu.py tests/test_decoding.py 2>&1 | tee $(RESULTS)/gpu-tests.txt
	-$(STAGE) $(PY) benchmarks/simulated.py --save=$(RESULTS)/simulated-cuda.json
	-$(STAGE) $(PY) benchmarks/limits.py --limits=8,12,16,24 --save=$(RESULTS)/limits-cuda.json
	-$(STAGE) $(PY) benchmarks/fit_matrix.py --save=$(RESULTS)/fit_matrix-cuda.json

clean:
	rm -rf .venv $(OUT) $(addprefix data/python_char/,*.bin meta.pkl prepared.json) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

data/python_char/meta.pkl: data/python_char/prepare.py data/corpus.py $(SETUP)
	$(PY) data/python_char/prepare.py

.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
