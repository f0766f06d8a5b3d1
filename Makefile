# Everything sets itself up: each target makes .venv and installs into it when that is missing.
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: demo deployment-demo test

# ECLM against FedAvg on handwritten digits, 20 unequal devices of 2 classes each, on Flower and Ray.
demo: .venv/.installed
	$(RUN) -m simulations run --dataset digits --devices 20 --classes-per-device 2 \
		--per-round 5 --rounds 10 --evaluate-every 2 --engine ray --out runs/demo

# ECLM on a real SuperLink and four unequal SuperNodes on this host, over TLS; stops everything.
deployment-demo: .venv/.installed
	$(RUN) -m deployment demo

# Two processes or a few more; then, with the machine to themselves, the tests that start engines.
test: .venv/.installed
	$(RUN) -m pytest -m "not ray and not deployment" --numprocesses auto --maxprocesses 4 \
		--dist loadfile
	$(RUN) -m pytest -m "ray or deployment"

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@
