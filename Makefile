# make demo    sets up, serves devices, and shows the results
# make check   runs lint and the unit tests: for every edit
# make test    sets up, installs the packages for the tests (as root; otherwise prints their names), runs all tests
# make help    lists all targets

PYTHON ?= python3
VENV := .venv
# rustup installs cargo here, but only login shells have this directory in PATH.
export PATH := $(PATH):$(HOME)/.cargo/bin
export PYO3_PYTHON := $(abspath $(VENV)/bin/python)
# Where pkg-config does not find OpenSSL: links to its headers and libraries; see scripts/openssl_headers.py.
OPENSSL := $(abspath .cache/openssl)
ifneq ($(shell pkg-config --exists openssl 2>/dev/null && echo found),found)
export OPENSSL_LIB_DIR := $(OPENSSL)/lib
export OPENSSL_INCLUDE_DIR := $(OPENSSL)/include
OPENSSL_LINKS := $(OPENSSL)/lib/libssl.so
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_QUIET := 1

# Steps share .venv and apt, and their output must stay in order.
.NOTPARALLEL:
.PRECIOUS: $(VENV)/.%-tools

SOURCES := pyproject.toml $(shell find engine -path engine/target -prune -o \
	'(' -name '*.rs' -o -name Cargo.toml -o -name Cargo.lock ')' -print)
KERNEL := .cache/kernel
QEMU := .cache/qemu
DEMO_PACKAGES := libnbd-bin
TEST_PACKAGES := qemu-utils nbdkit nbd-server libnbd-bin python3-libnbd nbd-client fio file fuse3 mount dmsetup \
	e2fsprogs xfsprogs btrfs-progs fdisk gdisk parted zsh fish
KERNEL_PACKAGES := qemu-system-x86 kmod

CARGO := cargo --config term.quiet=true
# The crate with the Python bindings has no logic to test, and its tests would need libpython's development files.
ENGINE_TESTS := --manifest-path engine/Cargo.toml --workspace --exclude blkloom-python
FUZZ_CASES ?= 2000
# Seconds for each fuzzer; preemptions in one interleaving of a model's threads.
VERIFY_SECONDS ?= 300
VERIFY_PREEMPTIONS ?= 5
VERIFY_STEPS ?=

.PHONY: help setup demo check test survival test-tools lint bench bench-mails fuzz verify verify-quick clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

# Compile the bytecode here: with PYTHONDONTWRITEBYTECODE set, every start would compile all modules that it imports.
setup: $(VENV)/.built ## .venv/bin/blkloom, built in release mode; quick when nothing changed
	@$(VENV)/bin/python -m compileall -q python/blkloom
	@echo "$(VENV)/bin/blkloom is ready"

$(VENV)/.created:
	@scripts/toolchain.sh $(PYTHON)
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@touch $@

$(OPENSSL)/lib/libssl.so: | $(VENV)/.created
	@$(PYTHON) scripts/openssl_headers.py $(OPENSSL)

# An editable install uses the Python sources in place, so only the engine's sources are prerequisites.
$(VENV)/.built: $(VENV)/.build-tools $(OPENSSL_LINKS) $(SOURCES)
	@echo "building the engine (a minute or two the first time)"
	@VIRTUAL_ENV="$(abspath $(VENV))" $(VENV)/bin/maturin develop --release --quiet
	@touch $@

# Installs a dependency group of pyproject.toml: build (of the build back end), test, lint, verify.
$(VENV)/.%-tools: $(VENV)/.created pyproject.toml
	@$(VENV)/bin/python scripts/requirements.py $* | $(VENV)/bin/pip install -r /dev/stdin
	@touch $@

demo: setup ## serves files and memory over NBD, writes, reads back, compares, and prints the results
	@$(VENV)/bin/python scripts/debian.py install $(DEMO_PACKAGES)
	@$(VENV)/bin/python scripts/demo.py

test-tools: $(VENV)/.test-tools ## installs the Debian packages for the tests, and unpacks kernels and a QEMU into .cache
	@$(VENV)/bin/python scripts/debian.py install $(TEST_PACKAGES) $(KERNEL_PACKAGES)
	@$(VENV)/bin/python scripts/guest_kernel.py $(KERNEL)
	@$(VENV)/bin/python scripts/qemu_peer.py $(QEMU)

# One process per CPU; tests that need the system for themselves are groups (tests/conftest.py).
# Each run has its own base directory: pytest would share one for all its runs, and remove the files of another.
PYTEST := $(VENV)/bin/python -m pytest -n auto --dist loadgroup --durations=20 --durations-min=5
in_own_directory = files=$$(mktemp -d -p /tmp); $(1) --basetemp=$$files/t || \
	{ echo "the files of the tests are in $$files"; exit 1; }; rm -rf $$files

test: setup test-tools ## the engine's tests, then the others
	$(CARGO) test $(ENGINE_TESTS)
	@$(call in_own_directory,$(PYTEST))

survival: setup test-tools ## what takes hours: all tests of virtual machines, workers killed often, little memory
	@export BLKLOOM_LONG=1; $(call in_own_directory,$(VENV)/bin/python -m pytest -v tests/kernel \
		tests/life/test_attach_survival.py tests/life/test_attach_deaths.py tests/life/test_client_deaths.py \
		tests/life/test_vhost_user.py tests/life/test_vhost_user_deaths.py tests/conformance/test_rust_driver.py)

check: lint ## lint and the unit tests, one process per CPU; two minutes when nothing is built
	@$(call in_own_directory,$(PYTEST) -q tests/unit)

# mypy needs the imported packages.
lint: setup $(VENV)/.lint-tools $(VENV)/.test-tools ## formatting, lints and types in both languages
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy --strict
	MYPYPATH=scripts $(VENV)/bin/mypy --strict scripts
	MYPYPATH=python:bench $(VENV)/bin/mypy --strict bench
	MYPYPATH=python $(VENV)/bin/python -m mypy.stubtest blkloom._engine
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/python scripts/rooms.py
	$(VENV)/bin/python scripts/docstrings.py
	cargo fmt --manifest-path engine/Cargo.toml --all --check
	$(CARGO) clippy --manifest-path engine/Cargo.toml --workspace --all-targets -- -D warnings
	RUSTFLAGS="--cfg loom" CARGO_PROFILE_DEV_OPT_LEVEL=1 $(CARGO) clippy --manifest-path engine/Cargo.toml \
		--package blkloom-core --lib --profile test --target-dir engine/target/verify/loom -- -D warnings
	cargo fmt --manifest-path engine/fuzz/Cargo.toml --check
	$(CARGO) clippy --manifest-path engine/fuzz/Cargo.toml --no-default-features --target-dir engine/target \
		--all-targets -- -D warnings

bench: setup ## compares with other servers on this machine; needs fio and these servers
	@$(VENV)/bin/python scripts/debian.py install fio qemu-utils nbdkit linux-perf
	@$(VENV)/bin/python scripts/qemu_peer.py $(QEMU)
	$(CARGO) build --release --quiet --manifest-path engine/Cargo.toml --package blkloom-core --package blkloom-fuse-wire --examples
	$(VENV)/bin/python bench/run.py

bench-mails: setup test-tools ## the test scripts of the mails, here (as root) and in virtual machines; an hour
	$(VENV)/bin/python bench/mail_scripts.py host
	$(VENV)/bin/python bench/mail_scripts.py guest 6.12 7.3
	$(VENV)/bin/python bench/run.py --report

fuzz: setup $(VENV)/.test-tools ## the property tests with many cases: make fuzz FUZZ_CASES=100000
	PROPTEST_CASES=$(FUZZ_CASES) $(CARGO) test --release $(ENGINE_TESTS)
	BLKLOOM_FUZZ_CASES=$(FUZZ_CASES) $(VENV)/bin/python -m pytest --timeout=0 tests/property tests/conformance tests/qcow2 tests/life/test_attach_deaths.py
	$(VENV)/bin/python fuzz/qcow2_images.py --cases $(FUZZ_CASES)

verify: setup $(VENV)/.test-tools $(VENV)/.verify-tools ## fuzzers, models of threads, Miri, sanitizers, mutants
	@$(VENV)/bin/python scripts/debian.py install g++
	@$(VENV)/bin/python scripts/verify.py --seconds $(VERIFY_SECONDS) --preemptions $(VERIFY_PREEMPTIONS) $(VERIFY_STEPS)

verify-quick: ## the quick steps of verify, for a short time, as in CI
	@$(MAKE) --no-print-directory verify VERIFY_SECONDS=10 VERIFY_PREEMPTIONS=2 VERIFY_STEPS="fuzz handshake models"

clean: ## removes all build results, but not the kernel for tests
	rm -rf $(VENV) engine/target python/blkloom/_engine*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
