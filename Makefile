# make install   installs what is missing: Debian packages, then Python packages into .venv
# make demo      200 tenants on one TPM (a swtpm), every answer verified; installs only what it needs
# make test      the tests (fetches Chromium and promtool for them, if it can)
# make keylime   installs the real Keylime that the tests use, into .venv-keylime
# make keylime-trial  that Keylime's registrar and verifier, in keylime-trial/ until Ctrl-C, to try the bridge with
# make check     format, lint, types, tests, wheel
# make test-bare make demo and make test in a minimal Debian with an empty environment (as root);
#                RELEASE=trixie, BARE_USER=1 for an ordinary user with sudo, BARE="deb test-deb" for other targets
# make mutants   breaks the pure core on purpose, and checks that a test fails (SAMPLE=130 for some; JOBS=2)
# make docs      writes docs/api.md, docs/reference.md, docs/mistakes.md and the example file's comments
# make picture   writes docs/img/status-page.png: the status page of a daemon under load
# make messages  prints every text that a person may see (WORDS="…" for those with a word)
# make bench     measures this machine
# make man       writes the manual pages and the shells' completion into build/
# make deb       builds the Debian package and its SBOM into dist/, and checks it with lintian
# make bundle    builds one archive for other systemd hosts, with its SBOM, into dist/
# make lock      writes the lock files of all Python packages, from pyproject.toml and packaging/locks/*.in
#
# Long tests, one by one or all with `make test-slow` (as root):
# make test-libvirt    5 min  the vTPM link with a real libvirt and guests that boot; installs libvirt, QEMU
# make test-deb        4 min  installs, starts, queries, upgrades and purges the package in a copy of this system
# make test-upgrade    5 min  installs and uses the last release's package, then upgrades it: nothing is lost
# make test-bundle     2 min  installs the bundle without a network, starts, queries and removes it, likewise
# make test-reproducible 10 min  builds package and bundle twice: both have the same bytes
# make test-kvm       20 min  the package in a virtual machine with a TPM, IMA and systemd; with reboot and new kernel
# make test-keylime-bridge   15 min  the bridge with Keylime 7.14.3 and 7.13.1: policies, lies, restarts, 100 hosts
# make test-keylime-releases  5 min  what each release of Keylime can do, as docs/keylime-releases.md says
# make soak           30 min  faults of the chip, attacks on the listeners, hostile hosts: SOAK_SECONDS=600 each
#
# sudo is used only where this is not root and a Debian package is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCKS := packaging/locks
HOST := $(VENV)/.host
DEV := $(VENV)/.dev
KEYLIME_VENV := .venv-keylime
WHEEL_VENV := .venv-wheel
# For the daemon, and for tpm2-pytss, which has to be compiled.
DEBIAN := swtpm libtss2-dev gcc libc6-dev pkg-config python3-dev python3-venv
DEBIAN_TESTS := swtpm-tools tpm2-tools libefivar1 libpq5 util-linux openssl systemd systemd-container man-db
# PostgreSQL for a fleet, fronts, a browser for the status page, and programs that check manuals and completions. If
# one cannot be installed, its tests are skipped.
DEBIAN_OPTIONAL := postgresql haproxy nginx libnginx-mod-stream chromium chromium-driver mandoc zsh fish git
DEBIAN_BUILD := build-essential debhelper dpkg-dev fakeroot lintian
# What a host of the bundle needs beside the TPM libraries, and iproute2 for the loopback of its test.
DEBIAN_BUNDLE := systemd procps iproute2
DEBIAN_KVM := e2fsprogs mmdebstrap ovmf qemu-system-x86
# For test-libvirt alone.
DEBIAN_LIBVIRT := libvirt-daemon-system libvirt-clients qemu-system-x86 iproute2
GUEST := .guest/.unpacked
PROMTOOL := .promtool/usr/bin/promtool
# How many tests may be skipped, beside those of a program of DEBIAN_OPTIONAL or promtool that cannot be installed:
# the tests of test-slow, and those that need material outside this repository; for an ordinary user those of the
# vTPM, too.
MAX_SKIPPED ?= $(shell [ "$$(id -u)" = 0 ] && echo 30 || echo 50)
SUDO = $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: help install system system-tests system-deb promtool libvirt guest keylime keylime-trial demo test test-keylime-bridge test-keylime-releases test-libvirt test-bare test-slow check format lint types wheel soak bench docs man lock deb test-deb test-upgrade test-reproducible bundle test-bundle system-kvm test-kvm clean mutants messages picture

install: $(DEV)

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

system:
	@packaging/system-packages.sh $(DEBIAN)

system-tests: system
	@packaging/system-packages.sh $(DEBIAN_TESTS)
	@packaging/system-packages.sh --optional "the tests that need it" $(DEBIAN_OPTIONAL)

# Checks the alert rules. It is unpacked, not installed: the package would start a Prometheus here.
promtool: | system
	@[ -x $(PROMTOOL) ] || packaging/unpack-promtool.sh .promtool

libvirt:
	@packaging/system-packages.sh $(DEBIAN_LIBVIRT)

# What the guests of test-libvirt boot, unpacked from Debian packages: a kernel and busybox.
guest: $(GUEST)

$(GUEST): | system
	@echo "unpacking a kernel and busybox, for the guests"
	@mkdir -p .guest && cd .guest && rm -f *.deb && \
	  get() { apt-get download -qq -o APT::Sandbox::User=root busybox-static \
	    $$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-\)/\1/p'); } && \
	  { get || { $(SUDO) apt-get update -qq && get; }; } && \
	  dpkg-deb --fsys-tarfile linux-image-*.deb | tar -xO --wildcards './boot/vmlinuz-*' >vmlinuz && \
	  dpkg-deb --fsys-tarfile busybox-static_*.deb | tar -x --strip-components=2 --wildcards '*/bin/busybox' && \
	  rm *.deb && touch .unpacked

# The daemon alone first: the demo needs no more.
$(HOST): pyproject.toml $(LOCKS)/build.txt $(LOCKS)/host.txt | system
	@packaging/venv.sh $(PYTHON) $(VENV) $(LOCKS)/build.txt $(LOCKS)/host.txt
	@$(BIN)/python -m pip --disable-pip-version-check install -q --no-deps --no-build-isolation -e .
	@touch $@

$(DEV): $(HOST) $(LOCKS)/dev.txt
	@packaging/venv.sh $(PYTHON) $(VENV) $(LOCKS)/dev.txt
	@touch $@

# The real Keylime for the tests, apart from our dependencies. The last agent in Python is older.
keylime: $(KEYLIME_VENV)/.installed $(KEYLIME_VENV)-agent/.installed

$(KEYLIME_VENV)/.installed: tests/system/keylime/requirements.txt | system
	$(call into_venv,$(KEYLIME_VENV),$<)

$(KEYLIME_VENV)-agent/.installed: tests/system/keylime/agent_requirements.txt | system
	$(call into_venv,$(KEYLIME_VENV)-agent,$<)

# Other releases of Keylime, each in a folder of its own beside the dependencies of the newest.
RELEASES := $(shell sed -n 's/^keylime==\([0-9.]*\) .*/\1/p' tests/system/keylime/releases.txt)
$(RELEASES:%=$(KEYLIME_VENV)-%/.installed): $(KEYLIME_VENV)-%/.installed: tests/system/keylime/releases.txt | $(KEYLIME_VENV)/.installed
	@echo "installing Keylime $* into $(@D), for the tests"
	@mkdir -p $(@D) && grep '^keylime==$* ' $< >$(@D)/requirements.txt && \
	  $(KEYLIME_VENV)/bin/python -m pip --disable-pip-version-check install -q --no-deps --upgrade --require-hashes \
	    --target $(@D) -r $(@D)/requirements.txt && touch $@

define into_venv
	@echo "installing Keylime into $(1), for the tests"
	@packaging/venv.sh $(PYTHON) $(1) $(LOCKS)/build.txt $(2)
	@touch $(1)/.installed
endef

demo: $(HOST)
	@$(BIN)/provider-proxy --log-level warning demo

test: install keylime system-tests promtool
	$(BIN)/python -m pytest -q --max-skipped $(MAX_SKIPPED)

format: install
	$(BIN)/ruff format --check .

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

# The wheel as a tenant gets it, built from the source distribution, with cryptography alone.
wheel: install
	rm -rf dist/*.whl dist/*.tar.gz $(WHEEL_VENV)
	$(BIN)/python -m build --no-isolation --outdir dist . >/dev/null
	$(BIN)/python packaging/check_dists.py dist
	@packaging/venv.sh $(PYTHON) $(WHEEL_VENV) $(LOCKS)/tenant.txt
	$(WHEEL_VENV)/bin/python -m pip --disable-pip-version-check install -q --no-deps --no-index dist/*.whl
	cd tests/vectors && ../../$(WHEEL_VENV)/bin/python ../support/wheel_smoke.py

check: format lint types test wheel

# libvirtd, QEMU and this project's hooks in a mount namespace of their own; as root. It prints what it does.
test-libvirt: install keylime libvirt guest
	@[ "$$(id -u)" = 0 ] || { echo "test-libvirt needs root"; exit 3; }
	TEST_LIBVIRT=1 unshare --mount --propagation private $(BIN)/python -m pytest -q -s tests/system/test_vtpm_libvirt.py \
	  tests/system/test_vtpm_guest.py tests/system/test_vtpm_migration.py

# Until Ctrl-C. Its registrar answers at 8891, its verifier at 8881.
keylime-trial: install keylime
	@PYTHONPATH=tests/support $(BIN)/python tests/system/keylime_trial.py keylime-trial

# The long tests of the bridge; `make test` runs the others.
test-keylime-bridge: install keylime system-tests $(KEYLIME_VENV)-7.13.1/.installed
	TEST_KEYLIME_BRIDGE=1 $(BIN)/python -m pytest -q -s tests/system/test_keylime_bridge.py tests/system/test_keylime_push.py

test-keylime-releases: install keylime system-tests $(RELEASES:%=$(KEYLIME_VENV)-%/.installed)
	TEST_KEYLIME_RELEASES=1 $(BIN)/python -m pytest -q -s tests/system/test_keylime_releases.py

# What CI runs in a minimal Debian; downloads are kept in .cache.
RELEASE ?= bookworm
BARE ?= demo test
BARE_WHO := $(if $(BARE_USER),user,root)
test-bare:
	.ci/bare $(RELEASE) $(BARE_WHO) \
	  "$(if $(BARE_USER),sudo )sh -c '{ apt-get update && apt-get install -y make git; } >/dev/null 2>&1'" $(BARE:%="make %")

# All that `make test` leaves out, because it takes long or changes the machine.
test-slow: test-deb test-upgrade test-reproducible test-bundle test-keylime-bridge test-keylime-releases test-libvirt test-kvm soak

soak: install
	SOAK_SECONDS=$${SOAK_SECONDS:-600} $(BIN)/python -m pytest -q -s tests/system/test_soak.py tests/system/test_soak_hostile.py

mutants: install
	$(BIN)/python tests/support/mutants.py --sample $${SAMPLE:-0} --jobs $${JOBS:-1}

docs: install
	$(BIN)/python tests/support/api_page.py > docs/api.md
	$(BIN)/python packaging/reference.py > docs/reference.md
	$(BIN)/python packaging/example.py
	$(BIN)/python tests/support/mistakes_page.py > docs/mistakes.md.new && mv docs/mistakes.md.new docs/mistakes.md

picture: install
	@PYTHONPATH=tests/support $(BIN)/python tests/support/status_picture.py >/dev/null

messages: install
	@PYTHONPATH=tests/support $(BIN)/python tests/support/messages.py $(WORDS)

bench: install
	$(BIN)/provider-proxy bench quotes --json

man: install
	$(BIN)/python packaging/manpages.py build/man
	$(BIN)/python packaging/completion.py build/completion

lock:
	packaging/lock.sh

system-deb: system
	@packaging/system-packages.sh $(DEBIAN_BUILD)

deb: system-deb
	packaging/build-deb.sh dist
	lintian --fail-on error,warning --allow-root dist/provider-proxy_*.deb

test-deb: deb
	tests/system/test-deb.sh dist/provider-proxy_*.deb

test-reproducible: system-deb
	PYTHON=$(PYTHON) tests/system/test-reproducible.sh

# From the package of the release before this one, built from its commit.
OLD_RELEASE := 35e6226
test-upgrade: deb $(HOST)
	tests/system/old-package.sh $(OLD_RELEASE) build/old
	tests/system/test-upgrade.sh build/old/provider-proxy_*.deb dist/provider-proxy_*.deb

bundle: system
	packaging/build-bundle.sh $(PYTHON) dist

test-bundle: bundle
	@packaging/system-packages.sh $(DEBIAN_BUNDLE)
	tests/system/test-bundle.sh dist/provider-proxy-*-python*.tar.gz

system-kvm:
	@packaging/system-packages.sh $(DEBIAN_KVM)

# The first run fetches a Debian into build/kvm, through this machine's apt sources.
test-kvm: install system-kvm deb
	$(SUDO) $(BIN)/python tests/system/test_kvm.py dist/provider-proxy_*.deb

clean:
	rm -rf .promtool .guest $(VENV) $(WHEEL_VENV) $(KEYLIME_VENV) $(KEYLIME_VENV)-agent $(RELEASES:%=$(KEYLIME_VENV)-%) dist build *.egg-info
