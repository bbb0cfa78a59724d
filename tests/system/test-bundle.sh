#!/bin/bash
# test-bundle.sh ARCHIVE: the life of the bundle in a copy of this system without a network, see package_life.sh.
#
# What the bundle needs of the system (Python, systemd, the TPM software stack) has to be here.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
# shellcheck source=tests/system/package_life.sh
. "$here/package_life.sh"
[ "${1:-}" = --inside ] || enter_copy "$0" --net -- "$1"
cd /tmp
tar -xzf "$2"
folder=$(echo /tmp/provider-proxy-*-python*/)
folder=${folder%/}

rm -rf /etc/provider-proxy /var/lib/provider-proxy
is "nothing of it is here" "$(traces)" ""
is "there is no network but the loopback" "$(ls /sys/class/net 2>/dev/null | grep -vx lo || true; cut -f1 /proc/net/route | grep -v Iface || true)" ""

refused() { # WHAT MESSAGE COMMAND...: it fails with 3, says why, and leaves nothing
    local what=$1 message=$2 code=0
    shift 2
    "$@" >/tmp/out 2>&1 </dev/null || code=$?
    is "$what: exit code" "$code" 3
    grep -q "$message" /tmp/out || { cat /tmp/out >&2; fail "$what: its message"; }
    is "$what: nothing was changed" "$(traces)" ""
}
cp -r "$folder" /tmp/bad
echo x >>/tmp/bad/LICENSE
refused "a damaged archive" "damaged" /tmp/bad/install.sh
refused "not as root" "as root" setpriv --reuid=65534 --regid=65534 --clear-groups "$folder/install.sh"
refused "another Python" "this archive needs Python" env PYTHON=/bin/true "$folder/install.sh"

check "installed" "$folder/install.sh" </dev/null
is "the configuration is its group's" "$(owner $CONFIG)" "644 root:root"
is "so is its folder" "$(owner /etc/provider-proxy)" "750 root:provider-proxy"
is "secrets are root's" "$(owner /etc/provider-proxy/secrets)" "700 root:root"
is "the user is in the TPM's group" "$(id -nG provider-proxy)" "provider-proxy tss"
check "systemd has no complaint about the units" systemd-analyze verify --man=no provider-proxy.service provider-proxy.socket
check "the command runs" provider-proxy --version
is "no code runs at each start of Python" "$(find /usr/lib/provider-proxy -name '*.pth')" ""
is "all Python files are compiled" "$(find /usr/lib/provider-proxy/lib -name '*.py' | wc -l)" \
    "$(find /usr/lib/provider-proxy/lib -name '*.cpython-*.pyc' | wc -l)"

configure
before=$(sha256sum $CONFIG)
start
ok "started by $(id -un "$(stat -c %u /proc/$daemon)") with $(sed -n 's/^CapEff:\t//p' /proc/$daemon/status) as capabilities"
ask first
stop

check "installed over itself" "$folder/install.sh" </dev/null
is "the configuration was kept" "$(sha256sum $CONFIG)" "$before"
check "the new one lies beside it" cmp "$folder/provider-proxy.toml" $CONFIG.new
start
ask next
check "the host's key is the same" cmp ak-first.b64 ak-next.b64
stop

check "removed" /usr/lib/provider-proxy/uninstall.sh
check "the program is gone" sh -c '! test -e /usr/bin/provider-proxy && ! test -e /usr/lib/provider-proxy'
is "the configuration is there still" "$(sha256sum $CONFIG)" "$before"
check "and the host's key" test -s /var/lib/provider-proxy/ak.json
check "installed again" "$folder/install.sh" </dev/null
check "purged" /usr/lib/provider-proxy/uninstall.sh --purge
is "nothing of it is left" "$(traces)" ""
