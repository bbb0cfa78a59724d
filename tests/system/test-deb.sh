#!/bin/bash
# test-deb.sh PACKAGE: the life of the package in a copy of this system that is thrown away, see package_life.sh.
#
# Packages that the new one depends on, and that are missing here, come by apt.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
# shellcheck source=tests/system/package_life.sh
. "$here/package_life.sh"
[ "${1:-}" = --inside ] || enter_copy "$0" -- "$1"
cp "$2" /tmp/package.deb
cd /tmp

rm -rf /etc/provider-proxy /var/lib/provider-proxy  # of this copy's: the host may have a trial's
is "nothing of it is here" "$(traces)" ""
apt-get install -y -qq --no-install-recommends ./package.deb >/tmp/out 2>&1 || { cat /tmp/out; fail "apt-get install"; }
first=$(dpkg-query -W -f '${Version}' provider-proxy)
ok "installed $first"
is "the configuration is its group's" "$(owner $CONFIG)" "644 root:root"
is "so is its folder" "$(owner /etc/provider-proxy)" "750 root:provider-proxy"
is "secrets are root's" "$(owner /etc/provider-proxy/secrets)" "700 root:root"
is "the user is in the TPM's group" "$(id -nG provider-proxy)" "provider-proxy tss"
check "systemd has no complaint about the units" systemd-analyze verify --man=no provider-proxy.service provider-proxy.socket
check "the command runs" provider-proxy --help
check "nothing is written by running it" sh -c '! find /usr/lib/provider-proxy -newer /tmp/out -type f | grep .'
for page in provider-proxy provider-proxy-serve provider-proxy-verify provider-proxy.toml; do
    [ -f /usr/share/man/man[15]/$page.[15].gz ] || grep -qs '^path-exclude.*man' /etc/dpkg/dpkg.cfg.d/* || fail "no page $page"
done
ok "manual pages are there"

configure
before=$(sha256sum $CONFIG)
start
ok "started by $(id -un "$(stat -c %u /proc/$daemon)") with $(sed -n 's/^CapEff:\t//p' /proc/$daemon/status) as capabilities"
ask first

# The same package, a version further, with another configuration in it.
dpkg-deb -R package.deb next
sed -i "s/^Version: .*/Version: $first+next/" next/DEBIAN/control
echo "# a line that is new" >>next$CONFIG
dpkg-deb -b --root-owner-group next next.deb >/dev/null
stop
dpkg --force-confdef --force-confold -i next.deb >/tmp/out 2>&1 || { cat /tmp/out; fail "upgrade"; }
ok "upgraded to $(dpkg-query -W -f '${Version}' provider-proxy)"
is "the configuration was kept" "$(sha256sum $CONFIG)" "$before"
check "the new one lies beside it" grep -q "a line that is new" $CONFIG.dpkg-dist
start
ask next
check "the host's key is the same" cmp ak-first.b64 ak-next.b64
stop

apt-get remove -y -qq provider-proxy >/tmp/out 2>&1 || { cat /tmp/out; fail "remove"; }
check "removed: the program is gone" sh -c '! test -e /usr/bin/provider-proxy && ! test -e /usr/lib/provider-proxy'
is "the configuration is there still" "$(sha256sum $CONFIG)" "$before"
check "and the host's key" test -s /var/lib/provider-proxy/ak.json
apt-get purge -y -qq provider-proxy >/tmp/out 2>&1 || { cat /tmp/out; fail "purge"; }
is "purged: nothing of it is left" "$(traces)" ""
ok "but its user: $(getent passwd provider-proxy)"
