PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: demo test test-faults lint golden bench clean

demo: .venv/installed  ## handwritten digits through every stage: less than three minutes after the install
	$(BIN)/simclr run configs/digits.yaml

test: .venv/installed-dev  ## all tests: nothing skipped, no accelerator, no network
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not alone"
	$(BIN)/python -m pytest -m alone

FAULTS := $(CURDIR)/build/faults.jsonl
test-faults: .venv/installed-dev  ## all trials of faults and hostile input, and docs/reliability.md from what they count
	@mkdir -p $(dir $(FAULTS)) && rm -f $(FAULTS)
	$(BIN)/python -m pytest tests/faults --all-faults --tally $(FAULTS) -n 2 --dist loadgroup -m "not alone"
	$(BIN)/python -m pytest tests/faults --all-faults --tally $(FAULTS) -m alone
	PYTHONPATH=tests $(BIN)/python -m faults.page $(FAULTS) docs/reliability.md

lint: .venv/installed-dev  ## style, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

bench: .venv/installed-bench  ## every comparison with other projects; QUICK=--quick, DATA=data/cifar10, DEVICE=cuda
	@failed=; for name in nt_xent losses views loader shard probe index pretrain engines learn; do \
		case $$name in nt_xent|losses|views|probe|pretrain) device="$(if $(DEVICE),--device $(DEVICE))";; *) device=;; esac; \
		echo "== $$name" >&2; \
		$(BIN)/python -m benchmarks.$$name $(QUICK) $(if $(DATA),--data $(DATA)) $$device || failed="$$failed $$name"; done; \
	test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

golden: .venv/installed-dev  ## write tests/golden.json anew, after a stage version was raised
	$(BIN)/python tests/golden.py

clean:  ## everything that can be made again; artifacts/ and data/ stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable .
	$(BIN)/python -m compileall -q pipeline stages  # as pip does for all but editable packages: commands start sooner
	@touch $@

.venv/installed-bench: .venv/installed
	$(INSTALL) --editable '.[bench]'
	@touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) --editable '.[dev]'
	@touch $@
