# Two commands matter: `make demo` and `make test`. Both install first, once.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test test-slow faults check format bench pocket clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dreamfleet needs Python 3.11 or 3.12, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --progress-bar off -c constraints.txt "torch==2.13.0" -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/dreamfleet demo --out out/demo

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: check
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile

test-slow: setup
	$(BIN)/pytest -m slow

faults: setup
	$(BIN)/pytest -m slow tests/ray_app/faults

bench: setup
	$(BIN)/python -m benchmarks

pocket: setup
	$(BIN)/python -m tools.pocket all

clean:
	rm -rf out storage .pytest_cache .mypy_cache .ruff_cache
