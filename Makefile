# make run    everything that a server needs, then the server (PORT=3001 make run: elsewhere)
# make test   everything that the tests need, then all of them
# make check  format, lint, types, tests: what CI runs
# make vm-test  tests on Debian's own kernel with cgroup v2, in QEMU (tests/vm/README.md)
# make deploy-test  a bare Debian 12 from install to purge, in a container (deploy/README.md)
# make bench  what is measured, side by side (bench/README.md)

# Where this is set, all modules would be compiled at each start of a server.
unexport PYTHONDONTWRITEBYTECODE

PORT ?= 3000
VENV := .venv
BIN := $(VENV)/bin
# Of pytest-xdist: three for two cores, as tests wait as long as they compute.
JOBS ?= $(shell expr $$(nproc) \* 3 / 2)
TESTS ?=

# The system's own Python comes first: one from a home directory (pyenv, conda) may lie where a
# sandbox's user cannot read it.
PYTHON ?= $(shell for python in /usr/bin/python3 python3.13 python3.12 python3.11 python3; do \
	"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info)' 2>/dev/null \
	&& { echo "$$python"; break; }; done)

.PHONY: run test vm-test deploy-test check format lint types bench doctor clean install install-dev packages test-packages

run: packages install
	exec $(BIN)/heyvm --api --port $(PORT)

doctor: packages install
	$(BIN)/heyvm doctor

test: packages test-packages install-dev
	$(BIN)/python -m pytest -n $(JOBS) $(TESTS)

vm-test: install-dev
	tests/vm/run $(TESTS)

deploy-test: install-dev
	tests/deploy/run

check: packages test-packages install-dev
	$(BIN)/ruff format --check .
	$(MAKE) lint types
	$(BIN)/python -m pytest -n $(JOBS) $(TESTS)

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: install-dev
	$(BIN)/ruff check .

types: install-dev
	$(BIN)/mypy

bench: packages test-packages install-dev
	@deploy/need wrk:wrk
	$(BIN)/python bench/bench.py
	$(BIN)/python bench/ports.py
	$(BIN)/python bench/shells.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

packages:
	@deploy/need @deploy/packages.must
	@deploy/need --or-go-on @deploy/packages.may

test-packages:
	@deploy/need --or-go-on --without-services curl:curl gcc:gcc nginx:nginx-light chromium:chromium openssl:openssl \
		'/usr/include/*/sys/types.h':libc6-dev \
		node:nodejs npm:npm docker-registry:docker-registry htpasswd:apache2-utils \
		ssh:openssh-client rsync:rsync mmdebstrap:mmdebstrap iptables:iptables sysctl:procps mkfs.ext4:e2fsprogs \
		/var/lib/dpkg/info/busybox-static.list:busybox-static $$([ "$$(uname -m)" != x86_64 ] || echo /usr/include/x86_64-linux-gnu/gnu/stubs-x32.h:gcc-multilib)

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(BIN)/python: | packages
	@test -n "$(PYTHON)" || { echo "heyvm needs a Python of 3.11 or newer; none was found" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || deploy/need $$($(PYTHON) -c \
		'import sys, sysconfig; print("%s/ensurepip/__init__.py:python%d.%d-venv" % (sysconfig.get_path("stdlib"), *sys.version_info[:2]))')
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt pyproject.toml $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@
