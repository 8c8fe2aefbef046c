# Every target sets up what it needs, in a virtual environment of its own, and does nothing twice:
# a stamp file in each environment is newer than the sources that were built into it.
#
#   .venv        release build, editable; for work, demo, benchmarks, lint
#   .venv-debug  DOMI_DEBUG=1     .venv-asan  DOMI_SANITIZE=1     .venv-3.10, .venv-3.13  release
#   .venv-fuzz   DOMI_FUZZ=1, by clang
#
# All but the first hold an installed copy, so that each has the compiled module of its own variant.

PYTHON ?= python3
VENV ?= .venv
OLDEST ?= 3.10
NEWEST ?= 3.13
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# The variants share src/*.egg-info, which two builds at once would spoil.
.NOTPARALLEL:

PY := $(VENV)/bin/python
PYTEST := -m pytest

# What an inherited environment must not change.
unexport PYTHONPATH PYTHONHOME DOMI_DEBUG DOMI_SANITIZE DOMI_FUZZ
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_REQUIRE_VIRTUALENV := 1

BUILD_FILES := pyproject.toml setup.py
CORE := $(wildcard src/domi_fast/*.pyx src/domi_fast/*.pxd src/domi_fast/*.h \
	src/domi_fast/_core_parts/*)
# The folders are listed for the files that disappear from them.
PACKAGE := $(shell find src/domi_fast ! -name '*.so' ! -name '__pycache__' ! -name '*.pyc')

# ---------------------------------------------------------------------------------------------------
# Setting up

# Runs on whatever $(PYTHON) is, hence a program that Python 2 can read too.
define CHECK_PYTHON
import os, sys
def stop(text):
    sys.stderr.write("\ndomi_fast: " + text + "\n\n")
    sys.exit(1)
have = ".".join(map(str, sys.version_info[:2]))
if sys.version_info < (3, 10):
    stop(sys.executable + " is Python " + have + "; 3.10 or later is needed.\n"
         "Name another one: make PYTHON=/path/to/python3.11 ...")
if sys.maxsize < 2**32:
    stop(sys.executable + " is a 32-bit Python; a 64-bit one is needed.")
try:
    import ensurepip, venv
except ImportError:
    stop(sys.executable + " (Python " + have + ") cannot make virtual environments: it has no "
         "venv or no ensurepip.\nOn Debian and Ubuntu: apt-get install python" + have + "-venv; "
         "or name another one: make PYTHON=...")
import shlex, shutil, sysconfig
header = os.path.join(sysconfig.get_path("include"), "Python.h")
if not os.path.exists(header):
    stop("the headers of Python " + have + " are missing (" + header + ").\n"
         "On Debian and Ubuntu: apt-get install python" + have + "-dev; on Fedora: python3-devel.")
compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
if not shutil.which(shlex.split(compiler)[0]):
    stop("there is no C compiler (" + compiler + ").\nOn Debian and Ubuntu: apt-get install gcc; "
         "or name one: make CC=...")
endef
export CHECK_PYTHON

# make has a CC of its own, which is not to be taken for a wish.
ifneq ($(filter default undefined,$(origin CC)),)
unexport CC
else
export CC
endif

# $(call make_venv,folder,python)
define make_venv
@command -v $(2) >/dev/null || { \
	echo "domi_fast: there is no $(2); name a Python of 3.10 or later: make PYTHON=..." >&2; exit 1; }
@$(2) -c "$$CHECK_PYTHON"
@echo "$(1): a virtual environment of $$($(2) -c 'import platform; print("Python " + platform.python_version())')"
@$(2) -m venv --clear $(1)
@$(1)/bin/python -m pip install -q 'setuptools>=77' 'Cython>=3.1'
@touch $@
endef

# $(call install,folder,variables,what)
# build/*/lib* keeps modules that are gone from src, and an installation would bring them back.
define install
@echo "$(1): installing$(if $(2), ($(2)))"
@find build -type f -path '*/lib*/domi_fast/*' ! -name '*.so' -delete 2>/dev/null || true
@$(2) $(1)/bin/python -m pip install -q --no-build-isolation $(3)
@touch $@
endef

# A different PYTHON than the one in .venv would be ignored without a word.
ifneq ($(origin PYTHON),file)
ifneq ($(wildcard $(PY)),)
BASE := import sys; print(sys.version_info[:3], getattr(sys, "base_prefix", ""))
ifneq ($(shell $(PYTHON) -c '$(BASE)'),$(shell $(PY) -c '$(BASE)'))
$(error PYTHON is $(PYTHON), but $(VENV) holds another Python: add VENV=.venv-other, or run make distclean)
endif
endif
endif

$(VENV)/.made:
	$(call make_venv,$(VENV),$(PYTHON))
$(VENV)/.ready: $(VENV)/.made $(BUILD_FILES) $(CORE)
	$(call install,$(VENV),,-e '.[dev]')

.venv-debug/.made:
	$(call make_venv,.venv-debug,$(PYTHON))
.venv-debug/.ready: .venv-debug/.made $(BUILD_FILES) $(PACKAGE)
	$(call install,.venv-debug,DOMI_DEBUG=1,'.[test]')

.venv-asan/.made:
	$(call make_venv,.venv-asan,$(PYTHON))
.venv-asan/.ready: .venv-asan/.made $(BUILD_FILES) $(PACKAGE)
	$(call install,.venv-asan,DOMI_SANITIZE=1,'.[test]')

# What the variant is told about the core lies with the fuzz targets.
FUZZ_FILES := tests/fuzz/unsanitized.txt tests/fuzz/covered.txt
.venv-fuzz/.made:
	$(call make_venv,.venv-fuzz,$(PYTHON))
.venv-fuzz/.ready: .venv-fuzz/.made $(BUILD_FILES) $(FUZZ_FILES) $(PACKAGE)
	@sh tests/fuzz/install_clang.sh >.venv-fuzz/compiler
	$(call install,.venv-fuzz,CC="$$(cat .venv-fuzz/compiler)" DOMI_FUZZ=1,'.[fuzz]')

# A shim may be on PATH for a Python that is not there, so the candidates are tried.
find_python = $(shell for python in python$(1) \
	"$$(pyenv root 2>/dev/null || echo "$${PYENV_ROOT:-$$HOME/.pyenv}")"/versions/$(1).*/bin/python$(1); \
	do "$$python" -c 'import sys; print(sys.executable)' 2>/dev/null && break; done)

ifneq ($(filter setup-others test-oldest .venv-$(OLDEST)/%,$(MAKECMDGOALS)),)
OLDEST_PYTHON := $(call find_python,$(OLDEST))
endif
ifneq ($(filter setup-others test-newest .venv-$(NEWEST)/%,$(MAKECMDGOALS)),)
NEWEST_PYTHON := $(call find_python,$(NEWEST))
endif

.venv-$(OLDEST)/.made:
	$(call make_venv,.venv-$(OLDEST),$(OLDEST_PYTHON))
.venv-$(OLDEST)/.ready: .venv-$(OLDEST)/.made $(BUILD_FILES) $(PACKAGE)
	$(call install,.venv-$(OLDEST),,'.[test]')

.venv-$(NEWEST)/.made:
	$(call make_venv,.venv-$(NEWEST),$(NEWEST_PYTHON))
.venv-$(NEWEST)/.ready: .venv-$(NEWEST)/.made $(BUILD_FILES) $(PACKAGE)
	$(call install,.venv-$(NEWEST),,'.[test]')

# ---------------------------------------------------------------------------------------------------
# Targets

.PHONY: help setup setup-others demo test test-alone test-together consul-agent lint lint-js format \
	test-debug test-asan fuzz \
	test-oldest test-newest bench bench-peers bench-smoke guard soak sdist check-sdist clean distclean

help: ## Say what can be made
	@echo 'domi_fast: make TARGET [ARGS="..."] [PYTHON=python3.12] [VENV=.venv-3.12]'
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 16
	@echo
	@echo 'ARGS goes to the program that the target runs: make test ARGS="-x -k frame".'

setup: $(VENV)/.ready ## Build the library into .venv, with all that is needed to work on it

demo: $(VENV)/.ready ## Run the demonstration
	@$(PY) examples/demo/main.py $(ARGS)

# The servers that the tests talk to: installed on Debian, if this is root; otherwise named. Consul
# is built, where Go is.
.PHONY: servers
servers:
	@sh tests/install_servers.sh
	@sh tests/native/consul/build.sh --cheap
	@sh tests/autobahn/install.sh || true

consul-agent: ## Build the Consul that the tests start, in some minutes (needs Go)
	@sh tests/native/consul/build.sh

test: servers $(VENV)/.ready ## Run the tests
	$(PY) $(PYTEST) $(ARGS)

# The same in two halves, which CI runs at once: most of their tests wait. Each hears what its own
# say (test_secrecy.py).
ALONE := tests/unit tests/property tests/serial tests/fuzz
test-alone: servers $(VENV)/.ready ## Run the half of the tests that is of the parts
	$(PY) $(PYTEST) $(ALONE) tests/test_secrecy.py $(ARGS)
test-together: servers $(VENV)/.ready ## Run the other half
	$(PY) $(PYTEST) tests $(addprefix --ignore=,$(ALONE)) $(ARGS)

# stubtest says "Success" of a private module whose stub it did not find, hence MYPYPATH.
lint: $(VENV)/.ready ## Check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	PATH="$(VENV)/bin:$$PATH" cython-lint src/domi_fast
	$(PY) -m mypy
	MYPYPATH=src $(PY) -m mypy.stubtest --ignore-disjoint-bases domi_fast._core

lint-js: ## Check the types of the JavaScript client (node and npm)
	@sh tests/browser/check_types.sh

format: $(VENV)/.ready ## Put the Python files in form
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format .

# What a build of the core changes, the other servers' registries, the command, the wings, plain
# Python, and programs in C of their own do not show, nor do a picture and a browser; and the two builds
# share the loops between them, whose parts of the core are the same (--loop=both: both).
OF_THE_CORE := not external and not command and not wing and not native and not picture and not browser
test-debug: .venv-debug/.ready ## Run the tests with run-time checks, live-object counters, asyncio's debug mode
	DOMI_DEBUG=1 PYTHONASYNCIODEBUG=1 .venv-debug/bin/python -X dev $(PYTEST) -m "$(OF_THE_CORE)" \
		--loop=asyncio $(ARGS)

# The debug build looks for leaks; LeakSanitizer would report the interpreter's own. ASan reports to
# files, so that a process which a test started does not die unheard; UBSan knows only the standard
# error, which pytest must therefore leave alone.
SANITIZER_LOG := $(CURDIR)/build/sanitizer
test-asan: .venv-asan/.ready ## Run the tests under AddressSanitizer and UndefinedBehaviorSanitizer (gcc)
	@rm -f "$(SANITIZER_LOG)".*
	@status=0; DOMI_SANITIZE=1 PYTHONMALLOC=malloc \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so)" \
	ASAN_OPTIONS="detect_leaks=0:log_path='$(SANITIZER_LOG)'" \
	UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	.venv-asan/bin/python $(PYTEST) --capture=sys -m "$(OF_THE_CORE)" --loop=uvloop $(ARGS) || status=$$?; \
	if ls "$(SANITIZER_LOG)".* >/dev/null 2>&1; then cat "$(SANITIZER_LOG)".* >&2; exit 1; fi; \
	exit $$status

fuzz: .venv-fuzz/.ready ## Fuzz the frame reader and the handshake, for a minute (clang)
	CC="$$(cat .venv-fuzz/compiler)" .venv-fuzz/bin/python -m tests.fuzz.run $(ARGS)

setup-others: $(if $(OLDEST_PYTHON),.venv-$(OLDEST)/.ready) $(if $(NEWEST_PYTHON),.venv-$(NEWEST)/.ready) ## Build the library for the oldest and the newest Python that are here

# On other Pythons each external registry shows that it keeps the contract, and the faults of its
# server are left to the first; so are one of the two loops, the browsers, and the pictures: no
# matplotlib there.
ON_ANOTHER := (contract or not external) and not native and not picture and not browser

# $(call on_other,version,found)
define on_other
@echo "domi_fast: Python $(1) is not installed here (neither on PATH nor under pyenv)" >&2; \
	$(if $(SKIP_MISSING),echo "domi_fast: skipped the tests on Python $(1)" >&2,exit 1)
endef

ifneq ($(OLDEST_PYTHON),)
test-oldest: servers .venv-$(OLDEST)/.ready
	.venv-$(OLDEST)/bin/python $(PYTEST) -m "$(ON_ANOTHER)" --loop=asyncio $(ARGS)
else
test-oldest: ## Run the tests on the oldest Python
	$(call on_other,$(OLDEST))
endif

ifneq ($(NEWEST_PYTHON),)
test-newest: servers .venv-$(NEWEST)/.ready
	.venv-$(NEWEST)/bin/python $(PYTEST) -m "$(ON_ANOTHER)" --loop=uvloop $(ARGS)
else
test-newest: ## Run the tests on the newest Python
	$(call on_other,$(NEWEST))
endif

bench: $(VENV)/.ready ## Measure, beside the peers that are installed
	$(PY) -m bench $(ARGS)

bench-peers: $(VENV)/.ready ## Install the peers of the benchmarks that can be had (on Debian as root: nats-server too)
	$(PY) -m bench.peers.install

bench-smoke: $(VENV)/.ready ## See that the benchmarks run; the numbers mean nothing
	$(PY) -m bench.machine
	$(PY) -m bench.peers.c_echo --count 2000 --warm-up 200
	$(PY) -m bench.peers.c_echo --count 2000 --warm-up 200 --unix
	$(PY) -m bench --smoke

guard: $(VENV)/.ready ## Hold the instructions of the hottest paths against their stored figures (valgrind)
	$(PY) -m bench.guard $(ARGS)

soak: servers $(VENV)/.ready ## Run the tests, and without ARGS fuzz too, for hours rather than seconds
	DOMI_SOAK=1 $(PY) $(PYTEST) -o timeout=0 -o faulthandler_timeout=0 $(ARGS)
ifeq ($(strip $(ARGS)),)
	DOMI_SOAK=1 $(MAKE) --no-print-directory fuzz
endif

sdist: $(VENV)/.ready ## Make the source distribution, in dist
	@rm -rf dist
	@$(PY) -m build --sdist --no-isolation --outdir dist . >build/sdist.log 2>&1 \
		|| { cat build/sdist.log >&2; exit 1; }
	@ls dist/*.tar.gz

check-sdist: sdist ## Install the source distribution as a user would, and import it
	@rm -rf build/sdist-venv
	@$(PYTHON) -m venv build/sdist-venv
	@build/sdist-venv/bin/python -m pip install -q dist/*.tar.gz
	@cd build/sdist-venv && bin/python -W error -c "$$CHECK_INSTALLED"
	@rm -rf build/sdist-venv

define CHECK_INSTALLED
import importlib.metadata, pathlib, domi_fast, domi_fast._core
here = pathlib.Path(domi_fast.__file__).parent
for name in ("py.typed", "_core.pyi", "_core.pxd", "_serial.pxd", "gateway/client.js"):
    assert (here / name).is_file(), name + " is missing from the installation"
assert not list(here.rglob("*.pyx")), "the sources of the core were installed"
print("domi_fast", importlib.metadata.version("domi-fast"), "installs and imports from its sdist")
endef
export CHECK_INSTALLED

clean: ## Remove what was built, but not the virtual environments
	rm -rf build dist bench/out src/*.egg-info src/domi_fast/_core*.so src/domi_fast/_core.c
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(VENV)/.ready .venv*/.ready
	find $(wildcard src tests bench examples) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove the virtual environments too
	rm -rf $(VENV) .venv .venv-*
