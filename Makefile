# make demo    sets up, then serves devices and shows what came of it
# make test    sets up, installs what the tests need (as root; else names it), runs them all
# make help    says the rest

PYTHON ?= python3
VENV := .venv
# rustup puts cargo here, and tells only login shells.
export PATH := $(PATH):$(HOME)/.cargo/bin
export PYO3_PYTHON := $(abspath $(VENV)/bin/python)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_QUIET := 1

# Steps share .venv and apt, and their output is meant to be read in order.
.NOTPARALLEL:
.PRECIOUS: $(VENV)/.%-tools

SOURCES := pyproject.toml $(shell find engine -path engine/target -prune -o \
	'(' -name '*.rs' -o -name Cargo.toml -o -name Cargo.lock ')' -print)
KERNEL := .cache/kernel
DEMO_PACKAGES := libnbd-bin
TEST_PACKAGES := qemu-utils nbdkit libnbd-bin python3-libnbd nbd-client fio file fuse3 mount dmsetup \
	e2fsprogs xfsprogs btrfs-progs fdisk gdisk parted zsh fish
KERNEL_PACKAGES := qemu-system-x86 kmod

CARGO := cargo --config term.quiet=true
# The glue to Python has no logic to test, and would need libpython's development files to link.
ENGINE_TESTS := --manifest-path engine/Cargo.toml --workspace --exclude blkloom-python
BESIDE := tests/kernel tests/unit tests/property tests/qcow2
FUZZ_CASES ?= 2000

.PHONY: help setup demo test test-tools lint bench fuzz clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

# Bytecode first: where PYTHONDONTWRITEBYTECODE is set every start would compile all it imports.
setup: $(VENV)/.built ## .venv/bin/blkloom, built in release mode; quick when nothing changed
	@$(VENV)/bin/python -m compileall -q python/blkloom
	@echo "$(VENV)/bin/blkloom is ready"

$(VENV)/.created:
	@scripts/toolchain.sh $(PYTHON)
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@touch $@

# Editable: Python's sources are used where they are, so only the engine's are listed.
$(VENV)/.built: $(VENV)/.build-tools $(SOURCES)
	@echo "building the engine (a minute or two the first time)"
	@VIRTUAL_ENV="$(abspath $(VENV))" $(VENV)/bin/maturin develop --release --quiet
	@touch $@

# The groups of pyproject.toml: build (the back end's), test, lint.
$(VENV)/.%-tools: $(VENV)/.created pyproject.toml
	@$(VENV)/bin/python scripts/requirements.py $* | $(VENV)/bin/pip install -r /dev/stdin
	@touch $@

demo: setup ## serves files and memory over NBD, writes, reads back, compares, tells
	@$(VENV)/bin/python scripts/debian.py install $(DEMO_PACKAGES)
	@$(VENV)/bin/python scripts/demo.py

test-tools: $(VENV)/.test-tools ## what the tests need: Debian packages, and a kernel in .cache
	@$(VENV)/bin/python scripts/debian.py install $(TEST_PACKAGES) $(KERNEL_PACKAGES)
	@$(VENV)/bin/python scripts/guest_kernel.py $(KERNEL)

# Two lines of tests, about as long as each other: those in virtual machines and those of one process first of all,
# and beside them those that start many. Each has a directory of its own: pytest would share one for all its
# runs, and the one that ends second fails when it removes what the first is removing.
test: setup test-tools ## the engine's tests, then the others
	$(CARGO) test $(ENGINE_TESTS)
	@files=$$(mktemp -d -p /tmp); log=$$files/log; here=0; beside=0; \
	$(VENV)/bin/python -m pytest --basetemp=$$files/b -o cache_dir=.pytest_cache/beside $(BESIDE) \
		>$$log 2>&1 & other=$$!; \
	$(VENV)/bin/python -m pytest --basetemp=$$files/a $(addprefix --ignore=,$(BESIDE)) || here=$$?; \
	echo "waiting for the tests in virtual machines, and for those of one process"; \
	wait $$other || beside=$$?; cat $$log; failed=$$((here ? here : beside)); \
	if [ $$failed -eq 0 ]; then rm -rf $$files; else echo "what the tests left is in $$files"; fi; \
	exit $$failed

# mypy reads what the code imports.
lint: setup $(VENV)/.lint-tools $(VENV)/.test-tools ## formatting, lints and types in both languages
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy --strict
	MYPYPATH=scripts $(VENV)/bin/mypy --strict scripts
	MYPYPATH=python:bench $(VENV)/bin/mypy --strict bench
	MYPYPATH=python $(VENV)/bin/python -m mypy.stubtest blkloom._engine
	cargo fmt --manifest-path engine/Cargo.toml --all --check
	$(CARGO) clippy --manifest-path engine/Cargo.toml --workspace --all-targets -- -D warnings

bench: setup ## against peers on this machine; needs fio and the peers
	@$(VENV)/bin/python scripts/debian.py install fio qemu-utils nbdkit linux-perf
	$(CARGO) build --release --quiet --manifest-path engine/Cargo.toml --package blkloom-core --examples
	$(VENV)/bin/python bench/run.py

fuzz: setup $(VENV)/.test-tools ## the property tests, at length: make fuzz FUZZ_CASES=100000
	PROPTEST_CASES=$(FUZZ_CASES) $(CARGO) test --release $(ENGINE_TESTS)
	BLKLOOM_FUZZ_CASES=$(FUZZ_CASES) $(VENV)/bin/python -m pytest --timeout=0 tests/property tests/conformance tests/qcow2
	$(VENV)/bin/python fuzz/qcow2_images.py --cases $(FUZZ_CASES)

clean: ## everything that was made, but not the kernel for tests
	rm -rf $(VENV) engine/target python/blkloom/_engine*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
