.DEFAULT_GOAL := help
.PHONY: help sbom serve check test test-slow lab site bench bench-quick train pictures clean

PYTHON ?= python3
PORT ?= 7860
VENV := .venv
PY := $(VENV)/bin/python
NPM := build/npm

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | awk -F '\t' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo "  variables: PYTHON=python3.12  PORT=7860  TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu (small CPU wheels)"

# torch goes first, alone: its index, when one is given, holds no other package of ours in the right version.
$(VENV)/torch.stamp: Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"aura_engine needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}: name another one, as in make PYTHON=python3.12")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install torch==2.13.0 $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
	@touch $@

$(VENV)/serve.stamp: $(VENV)/torch.stamp settings.ini setup.py
	$(PY) -m pip install -e .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/serve.stamp
	$(PY) -m pip install -e '.[dev]'
	@touch $@

serve: $(VENV)/serve.stamp ## start the engine
	@echo "open http://127.0.0.1:$(PORT)"
	PORT=$(PORT) exec $(PY) app.py

check: $(VENV)/dev.stamp ## ruff and the type checker (basic) on the package and its tools
	$(PY) -m ruff check .
	$(PY) -m basedpyright --level error

test: $(VENV)/dev.stamp ## every test but the slow ones
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest tests -m "not slow" -ra --timeout 600 -n auto --maxprocesses 4 --dist worksteal

test-slow: $(VENV)/dev.stamp $(VENV)/site.stamp ## the slow tests; prints what was skipped and why
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest tests -m slow -ra --timeout 1200 -n auto --maxprocesses 2 --dist loadfile

lab: $(VENV)/dev.stamp ## the notebooks in JupyterLab
	$(PY) -m jupyterlab nbs/00_start.ipynb

$(VENV)/site.stamp: $(VENV)/serve.stamp
	$(PY) -m pip install -q -e '.[site]'
	@touch $@

site: $(VENV)/site.stamp ## the notebooks and the interface as a web site, into site/
	$(PY) tools/pages.py
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "look at it: $(PY) -m http.server -d site --bind 127.0.0.1 8000"

bench: $(VENV)/dev.stamp ## compare the engine with its baselines on this machine (half an hour), figures into nbs/bench/
	$(PY) -m aura_engine.bench
	$(PY) -m aura_engine.waterfall
	$(PY) tools/nb.py run 14_bench 16_waterfall

bench-quick: $(VENV)/dev.stamp ## how many times as fast as a pipeline behind a lock: five minutes, three runs, nbs/bench/quick.json
	$(PY) -m aura_engine.bench --quick $(ARGS)

train: $(VENV)/dev.stamp ## train the embedded model again from its public art (hours; needs npm; ARGS="--minutes ...")
	npm install --prefix $(NPM) --ignore-scripts --no-save --no-audit --no-fund \
	  @iconify-json/fluent-emoji-flat@1.2.6 @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0
	$(PY) -m aura_engine.train --npm $(NPM)/node_modules --out build/train $(ARGS)

pictures: $(VENV)/dev.stamp ## make the pictures of the notebooks and README again, with this model and this look
	$(PY) tools/pictures.py
	$(PY) tools/nb.py run index
	$(PY) tools/nb.py readme

sbom: $(VENV)/dev.stamp ## every package of the image as CycloneDX JSON, into build/sbom.json
	$(PY) tools/lock.py sbom

clean: ## remove what make and the tests made, the environment included
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
