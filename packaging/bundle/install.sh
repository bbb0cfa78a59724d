#!/bin/sh
# install.sh: installs provider-proxy from this archive, or upgrades it. Asks nothing and needs no network.
#
# As root, on a host with systemd and the Python that the archive's name says. A configuration that is there is
# kept, and so is the state in /var/lib/provider-proxy. Nothing is enabled or started; a running daemon is
# restarted. PYTHON names another interpreter. Exit codes: 0 installed, 3 nothing was changed (stderr says why).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
app=/usr/lib/provider-proxy
config=/etc/provider-proxy/provider-proxy.toml
umask 022

fail() { echo "install.sh: $*" >&2; exit 3; }

# --- check that everything it needs is here ---

[ "$(id -u)" = 0 ] || fail "run this as root"
(cd "$here" && sha256sum --quiet -c SHA256SUMS) >&2 || fail "a file of this archive is damaged; unpack it again"
. "$here/target" # PYTHON_VERSION, MACHINE, GLIBC
command -v systemctl >/dev/null || fail "this host has no systemd"
systemd=$(systemctl --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
[ "${systemd:-0}" -ge 250 ] || fail "systemd 250 or newer is needed; this is ${systemd:-unknown}"
[ -x /bin/kill ] || fail "/bin/kill is missing, which the units need to reload; install procps (or util-linux)"
if command -v dpkg >/dev/null && dpkg -S /usr/bin/provider-proxy >/dev/null 2>&1; then
    fail "the Debian package provider-proxy is installed; upgrade that, or remove it first"
fi

fits='import platform, sys
version, machine, glibc = sys.argv[1:]
older = tuple(map(int, (platform.libc_ver()[1] or "0").split("."))) < tuple(map(int, glibc.split(".")))
if "%d.%d" % sys.version_info[:2] == version and platform.machine() == machine and not older:
    print("fits")'
python=
for candidate in ${PYTHON:-"/usr/bin/python$PYTHON_VERSION" /usr/bin/python3}; do
    if [ "$("$candidate" -Ic "$fits" "$PYTHON_VERSION" "$MACHINE" "$GLIBC" 2>/dev/null)" = fits ]; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || fail "this archive needs Python $PYTHON_VERSION on $MACHINE with glibc $GLIBC or newer, which this host does not have"

# --- build the environment beside the old one, and replace that when it works ---

rm -rf "$app.new" "$app.old"
trap 'rm -rf "$app.new"' EXIT
"$python" -Im venv --without-pip "$app.new" || fail "$python has no module venv"
pip=$(echo "$here"/pip-*.whl)
"$app.new/bin/python3" -I "$pip/pip" --isolated --disable-pip-version-check install -q --no-index --no-deps \
    --no-compile --no-cache-dir --root-user-action=ignore "$here"/wheels/*.whl || fail "the Python packages cannot be installed"
find "$app.new/bin" -mindepth 1 ! -name python3 -delete
ln -sf "$python" "$app.new/bin/python3"
why=$("$app.new/bin/python3" -IBc 'import tpm2_pytss, provider_proxy.host.daemon' 2>&1) || fail "the TPM library does not load; \
install the TPM software stack (tpm2-tss: esys, mu, rc, tctildr, fapi, policy and the device TCTI): $(echo "$why" | tail -1)"
cp "$here/uninstall.sh" "$app.new/uninstall.sh"

[ ! -e "$app" ] || mv "$app" "$app.old"
mv "$app.new" "$app"
rm -rf "$app.old"
"$app/bin/python3" -Im compileall -q -j 1 --invalidation-mode unchecked-hash "$app/lib" || true

# --- the files around it; uninstall.sh reads their list ---

list=$app/installed-files
: >"$list"
put() { # MODE FILE DIRECTORY
    install -D -m "$1" "$2" "$3/${2##*/}"
    echo "$3/${2##*/}" >>"$list"
}
put 755 "$here/provider-proxy" /usr/bin
for file in "$here"/hooks/*; do put 755 "$file" /usr/bin; done
for file in "$here"/systemd/*.service "$here"/systemd/*.socket "$here"/systemd/*.timer; do put 644 "$file" /usr/lib/systemd/system; done
put 644 "$here/systemd/sysusers.d/provider-proxy.conf" /usr/lib/sysusers.d
put 644 "$here/systemd/tmpfiles.d/provider-proxy.conf" /usr/lib/tmpfiles.d
rule=60-provider-proxy-tpm.rules
if ! grep -rls tpmrm /etc/udev/rules.d /usr/lib/udev/rules.d /lib/udev/rules.d 2>/dev/null | grep -qv "/$rule\$"; then
    put 644 "$here/systemd/udev/$rule" /usr/lib/udev/rules.d
fi
for file in "$here"/man/*.1.gz; do put 644 "$file" /usr/share/man/man1; done
for file in "$here"/man/*.5.gz; do put 644 "$file" /usr/share/man/man5; done
put 644 "$here/completion/provider-proxy" /usr/share/bash-completion/completions
put 644 "$here/completion/_provider-proxy" /usr/share/zsh/site-functions
put 644 "$here/completion/provider-proxy.fish" /usr/share/fish/vendor_completions.d

systemd-sysusers provider-proxy.conf
systemd-tmpfiles --create provider-proxy.conf
if [ -e "$config" ]; then
    cmp -s "$here/provider-proxy.toml" "$config" || cp "$here/provider-proxy.toml" "$config.new"
else
    install -m 644 "$here/provider-proxy.toml" "$config"
fi
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    ! command -v udevadm >/dev/null || udevadm control --reload || true
    systemctl try-restart provider-proxy.service provider-proxy-bridge.service
fi
echo "installed: $("$app/bin/python3" -IB /usr/bin/provider-proxy --version); configure it in $config, then: systemctl enable --now provider-proxy"
