# `make` lists what can be made. Every target first makes .venv: the pinned dependencies, once.
# PYTHON names the interpreter that makes it: make PYTHON=python3.12 demo
.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lab readme docs constraints clean
.DELETE_ON_ERROR:

# Constraints were resolved on 3.11, so it comes first. A name is taken only if it runs: pyenv leaves shims that do not.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
STAMP := $(VENV)/.installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

install: $(STAMP) ## make .venv with the pinned dependencies and this package (every target does)

# A machine without ensurepip (Debian's python3 without python3-venv) still has pip, which can install into another environment.
# The merge driver stands with its full path, so that git finds it from any shell and any worktree.
$(STAMP): settings.ini constraints.txt pyproject.toml setup.py
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer is needed and was not found. Install it, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit(f"$(PYTHON) is Python {v.major}.{v.minor}; 3.11 or newer is needed. Name another one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)")'
	@echo "installing the pinned dependencies into $(VENV): a few minutes, once" >&2
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) 2>/dev/null || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(VENV)/bin/python install -q pip; }
	@$(VENV)/bin/python -m pip install -q -e '.[dev]' -c constraints.txt
	@if [ -e .git ]; then \
		git config merge.jupyternotebook.name "three-way merge of notebooks, cell by cell"; \
		git config merge.jupyternotebook.driver "'$(CURDIR)/$(VENV)/bin/nbdev-merge' %O %A %B %P"; \
		hook=$$(git rev-parse --git-path hooks/pre-commit); mkdir -p "$${hook%/*}"; [ -e "$$hook" ] || cp .githooks/pre-commit "$$hook"; fi
	@touch $(STAMP)

demo: $(STAMP) ## prepare, finetune and evaluate on the embedded data and model: a table in under 5 minutes
	@llmops demo

# Stored numbers are compared strictly in test-all; another kind of processor trains other numbers, so test only tells where they differ.
# The tests leave runs/ alone. Two at a time fill two cores, so each of them gets one thread: two threads each would wait for one another.
test: $(STAMP) ## every test that CI runs: pytest, then every library notebook top to bottom, its stored outputs compared
	@runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && export LLMOPS_RUNS="$$runs" OMP_NUM_THREADS=1 LLMOPS_WARM=0 && \
	python -m pytest tests --durations=10 -n 2 --dist loadfile && \
	LLMOPS_WARM=1 llmops verify-notebooks nbs --workers 2 --lenient && \
	echo "make test: all passed"

test-all: $(STAMP) ## the same with the long versions: slow tests, and the jobs with the defaults they ship with
	@runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && export LLMOPS_RUNS="$$runs" OMP_NUM_THREADS=1 LLMOPS_WARM=0 && \
	python -m pytest tests --durations=20 -m '' -n 2 --dist loadfile && \
	LLMOPS_WARM=1 llmops verify-notebooks nbs --workers 2 --flags slow && \
	echo "make test-all: all passed"

# The server's root is the project, so that runs/ can be browsed too; notebooks are cleaned of volatile metadata as they are saved.
lab: $(STAMP) ## JupyterLab on nbs/
	@jupyter lab --ServerApp.root_dir='$(CURDIR)' --ServerApp.default_url=/lab/tree/nbs \
		--ContentsManager.pre_save_hook=nbdev.clean.clean_jupyter $(LAB)

# README_DIR is where a test renders it to compare. On the site a link to a page is relative to nbs/, in README.md to the project.
README_DIR ?= .
readme: $(STAMP) ## render README.md from nbs/index.ipynb
	@jupyter nbconvert --log-level ERROR --to markdown nbs/index.ipynb --output-dir '$(README_DIR)' --output README \
		--RegexRemovePreprocessor.patterns='^#\|\s*hide' && \
	sed -E -i.bak 's#\]\((runs|data|models|training|evaluation|jobs|tutorials)/#](nbs/\1/#g; /^#\| /d' '$(README_DIR)/README.md' && \
	rm '$(README_DIR)/README.md.bak'

docs: $(STAMP) ## build the documentation site into _docs/ (needs Quarto)
	@command -v quarto >/dev/null || { echo "The site is built by Quarto 1.5 or newer, which is not installed. Get it from https://quarto.org/docs/get-started/ (a .deb, .pkg, .msi or .tar.gz; it needs no Python), then run make docs again." >&2; exit 1; }
	@nbdev-docs

constraints: $(STAMP) ## resolve every requirement and extra again and rewrite constraints.txt (slow; on Python 3.11)
	@extras=$$(python -c 'from configparser import ConfigParser as C; c = C(); c.read("settings.ini"); print(",".join(c["extras"]))') && \
	python -m pip install --dry-run --ignore-installed --quiet --report $(VENV)/report.json "torch==2.13.0" ".[$$extras]" && \
	{ sed -n '/^#/p' constraints.txt; echo 'appnope==1.0.0; sys_platform == "darwin"'; python -c 'import json; \
		found = {p["metadata"]["name"].lower(): p["metadata"]["version"].split("+")[0] for p in json.load(open("$(VENV)/report.json"))["install"]}; \
		found.pop("llmops_kit"); print("\n".join(f"{name}=={found[name]}" for name in sorted(found)))'; } > $(VENV)/constraints.txt && \
	mv $(VENV)/constraints.txt constraints.txt

clean: ## clean the notebooks and generate the modules again, as they are committed
	@nbdev-clean && nbdev-export
