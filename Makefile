# make install   everything that is missing: Debian packages, then Python packages into .venv
# make demo      200 tenants, one TPM (a swtpm), every answer verified
# make test      the tests (fetches a Chromium and promtool for them)
# make keylime   the real Keylime that the tests talk to, into .venv-keylime
# make check     what CI runs: format, lint, types, tests, wheel
# make test-libvirt  the vTPM link with a real libvirt and guests that boot (as root; installs libvirt, QEMU)
# make soak      faults of all kinds in random order, for ten minutes (SOAK_SECONDS=600)
# make docs      docs/api.md from the OpenAPI description
# make bench     the figures of this machine
# make man       the manual pages and the shells' completion, into build/
# make deb       the Debian package, into dist/, looked at by lintian
# make test-deb  that package installed, started, asked, upgraded and purged, in a copy of this system (root)
# make test-kvm  the same in a virtual machine with a TPM, IMA and systemd, rebooted as well (root; 10 minutes)
#
# sudo is used only where this is not root and a Debian package is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
KEYLIME_VENV := .venv-keylime
WHEEL_VENV := .venv-wheel
DEBIAN := swtpm swtpm-tools tpm2-tools libtss2-dev gcc libc6-dev pkg-config python3-dev python3-venv util-linux openssl systemd man-db
# For the tests alone: a browser for the status page, and what reads manuals and completions.
DEBIAN_TESTS := chromium chromium-driver mandoc zsh fish git
DEBIAN_BUILD := debhelper dpkg-dev fakeroot lintian
DEBIAN_KVM := e2fsprogs mmdebstrap ovmf qemu-system-x86
# For test-libvirt alone.
DEBIAN_LIBVIRT := libvirt-daemon-system libvirt-clients qemu-system-x86
GUEST := .guest/.unpacked
PROMTOOL := .promtool/usr/bin/promtool
PIP := $(BIN)/python -m pip --disable-pip-version-check
missing = $(shell for p in $(1); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done)
SUDO = $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: install system system-deb browser promtool libvirt guest keylime demo test test-libvirt check format lint types wheel soak bench docs man deb test-deb system-kvm test-kvm clean

install: $(STAMP)

system:
	$(call into_system,$(DEBIAN))

browser:
	$(call into_system,$(DEBIAN_TESTS))

define into_system
	@missing="$(call missing,$(1))"; if [ -n "$$missing" ]; then \
	  echo "installing Debian packages: $$missing"; \
	  $(SUDO) apt-get update -qq && \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; \
	fi
endef

# Checks the alert rules. Taken out of its package: to install that would start a Prometheus here.
promtool: $(PROMTOOL)

$(PROMTOOL): | system
	@echo "unpacking promtool, for the tests"
	@mkdir -p .promtool && cd .promtool && rm -f prometheus_*.deb && \
	  { apt-get download -qq -o APT::Sandbox::User=root prometheus || { $(SUDO) apt-get update -qq && apt-get download -qq -o APT::Sandbox::User=root prometheus; }; } && \
	  dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin/promtool && rm prometheus_*.deb

libvirt:
	$(call into_system,$(DEBIAN_LIBVIRT))

# What the guests of test-libvirt boot, taken out of its packages: a kernel, and busybox.
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

$(STAMP): pyproject.toml constraints.txt | system
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name it with PYTHON=…"; exit 3; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@echo "installing Python packages into $(VENV)"
	@$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@

# The real Keylime for the tests; its dependencies must not meet ours. The last agent in Python is older.
keylime: $(KEYLIME_VENV)/.installed $(KEYLIME_VENV)-agent/.installed

$(KEYLIME_VENV)/.installed: tests/system/keylime/requirements.txt | system
	$(call into_venv,$(KEYLIME_VENV),$<)

$(KEYLIME_VENV)-agent/.installed: tests/system/keylime/agent_requirements.txt | system
	$(call into_venv,$(KEYLIME_VENV)-agent,$<)

define into_venv
	@[ -x $(1)/bin/python ] || $(PYTHON) -m venv $(1)
	@echo "installing Keylime into $(1), for the tests"
	@$(1)/bin/python -m pip --disable-pip-version-check install -q -r $(2)
	@touch $(1)/.installed
endef

demo: install
	@$(BIN)/provider-proxy --log-level warning demo

test: install keylime browser promtool
	$(BIN)/python -m pytest -q

format: install
	$(BIN)/ruff format --check .

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

# The wheel as a tenant gets it, built from the source distribution: nothing but cryptography beside it.
wheel: install
	rm -rf dist $(WHEEL_VENV)
	$(BIN)/python -m build --outdir dist . >/dev/null
	$(BIN)/python packaging/check_dists.py dist
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt dist/*.whl
	cd tests/vectors && ../../$(WHEEL_VENV)/bin/python ../support/wheel_smoke.py

check: format lint types test wheel

# libvirtd, QEMU and this project's hooks in a mount namespace of their own; as root. It tells what it does.
test-libvirt: install keylime libvirt guest
	@[ "$$(id -u)" = 0 ] || { echo "test-libvirt needs root"; exit 3; }
	TEST_LIBVIRT=1 unshare --mount --propagation private $(BIN)/python -m pytest -q -s tests/system/test_vtpm_libvirt.py tests/system/test_vtpm_guest.py

soak: install
	SOAK_SECONDS=$${SOAK_SECONDS:-600} $(BIN)/python -m pytest -q -s tests/system/test_soak.py

docs: install
	$(BIN)/python tests/support/api_page.py > docs/api.md

bench: install
	$(BIN)/provider-proxy bench quotes --json

man: install
	$(BIN)/python packaging/manpages.py build/man
	$(BIN)/python packaging/completion.py build/completion

system-deb:
	$(call into_system,$(DEBIAN_BUILD))

deb: system-deb install
	packaging/build-deb.sh dist
	lintian --fail-on error,warning --allow-root dist/provider-proxy_*.deb

test-deb: deb
	tests/system/test-deb.sh dist/provider-proxy_*.deb

system-kvm:
	$(call into_system,$(DEBIAN_KVM))

# The first time it fetches a Debian by this machine's apt sources, into build/kvm.
test-kvm: system-kvm deb
	$(SUDO) $(BIN)/python tests/system/test_kvm.py dist/provider-proxy_*.deb

clean:
	rm -rf .promtool .guest $(VENV) $(WHEEL_VENV) $(KEYLIME_VENV) $(KEYLIME_VENV)-agent dist build *.egg-info
