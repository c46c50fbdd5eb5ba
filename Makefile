PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: run test test-clients lint format requirements clean

run: .venv/run  ## serve on 127.0.0.1:3000
	@LIVECHAT_HOST=$${LIVECHAT_HOST:-127.0.0.1} exec $(BIN)/gunicorn

test: .venv/dev  ## run the tests
	$(BIN)/pytest

test-clients: .venv/dev tests/clients/node_modules  ## run Rocket.Chat's JavaScript client, which needs Node.js
	$(BIN)/python -m tests.clients

lint: .venv/dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev  ## put the code into its format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

requirements:  ## renew the pinned run-time dependencies
	rm -rf .venv/renew && $(PYTHON) -m venv .venv/renew
	.venv/renew/bin/pip install --quiet --disable-pip-version-check .
	( head -n 1 requirements.txt; .venv/renew/bin/pip freeze --exclude livechat-visitors ) > .venv/renewed
	mv .venv/renewed requirements.txt && rm -rf .venv/renew build

clean:  ## remove what make has made
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis tests/clients/node_modules

tests/clients/node_modules: tests/clients/package.json
	npm install --silent --no-audit --no-fund --no-package-lock --prefix tests/clients
	@touch $@

.venv/run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	@touch $@

.venv/dev: .venv/run setup.cfg pyproject.toml
	$(PIP) --constraint requirements.txt --editable '.[dev]'
	@touch $@
