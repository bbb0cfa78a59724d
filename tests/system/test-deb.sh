#!/bin/bash
# test-deb.sh PACKAGE: the life of the package in a copy of this system that is thrown away.
#
# The copy is an overlay over / in a mount and process namespace of its own, so that nothing here changes.
# No systemd runs in there: the daemon is started as its unit says, by hand; `make test-kvm` has a real one.
# Needs root. Packages that the new one depends on, and that are missing here, come by apt.
set -euo pipefail

if [ "${1:-}" != --inside ]; then
    package=$(readlink -f "$1")
    [ "$(id -u)" = 0 ] || exec sudo "$0" "$package"
    exec unshare --mount --pid --fork --kill-child "$(readlink -f "$0")" --inside "$package"
fi

package=$2
export LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin
if [ "${3:-}" != --rooted ]; then
    mount --make-rprivate /
    work=/mnt
    mount -t tmpfs -o size=2g tmpfs $work
    mkdir $work/upper $work/work $work/root
    mount -t overlay -o "lowerdir=/,upperdir=$work/upper,workdir=$work/work" overlay $work/root
    mount -t proc proc $work/root/proc
    mount --rbind /dev $work/root/dev
    mount -t tmpfs tmpfs $work/root/run
    mount -t tmpfs tmpfs $work/root/tmp
    cp "$package" $work/root/tmp/package.deb
    cp "$0" $work/root/tmp/test-deb.sh
    exec chroot $work/root /tmp/test-deb.sh --inside /tmp/package.deb --rooted
fi

ok() { echo "ok: $*"; }
fail() { echo "FAILED: $*" >&2; exit 1; }
check() { local what=$1; shift; "$@" >/tmp/out 2>&1 || { cat /tmp/out >&2; fail "$what"; }; ok "$what"; }
is() { [ "$2" = "$3" ] || fail "$1: $2, not $3"; ok "$1"; }
owner() { stat -c '%a %U:%G' "$1"; }
traces() { find /etc /usr /lib /var/lib/provider-proxy -xdev -path '*provider-proxy*' -print 2>/dev/null || true; }

CONFIG=/etc/provider-proxy/provider-proxy.toml
UNIT=/lib/systemd/system/provider-proxy.service
PORT=$(python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
URL=https://localhost:$PORT
cd /tmp

start() {  # as the unit says: its user, its rights, its command, its credentials
    local command
    command=$(sed -n 's/^ExecStart=//p' $UNIT)
    rm -rf /run/credentials && mkdir -p /run/credentials/provider-proxy.service
    for file in /etc/provider-proxy/secrets/*; do
        install -m 400 -o provider-proxy "$file" "/run/credentials/provider-proxy.service/secret_${file##*/}"
    done
    for folder in /var/lib /run; do install -d -m 700 -o provider-proxy -g provider-proxy $folder/provider-proxy; done
    # shellcheck disable=SC2086  # words
    setpriv --reuid=provider-proxy --regid=provider-proxy --init-groups --no-new-privs \
        --bounding-set=-all --inh-caps=-all \
        env -i PATH="$PATH" CREDENTIALS_DIRECTORY=/run/credentials/provider-proxy.service \
        $command >>/tmp/daemon.log 2>&1 &
    daemon=$!
    for _ in $(seq 100); do
        grep -q "INFO listening on" /tmp/daemon.log && return
        kill -0 $daemon 2>/dev/null || { cat /tmp/daemon.log >&2; fail "the daemon ended"; }
        sleep 0.2
    done
    fail "the daemon is not ready"
}

stop() {
    kill -TERM $daemon
    wait $daemon || fail "the daemon ended with $?"
    rm /tmp/daemon.log
    ok "stopped in order"
}

ask() {
    provider-proxy identity "$URL" --ca pki/ca.crt --save-ak "ak-$1.b64" >/dev/null
    provider-proxy fetch "$URL" --ca pki/ca.crt --pcrs 0,7
    provider-proxy verify evidence.json --request request.json --ak-tpm "ak-$1.b64" --insecure-any-state | head -1
}

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

provider-proxy pki init pki --host localhost >/dev/null
cp pki/server.crt /etc/provider-proxy/tls.crt
install -m 600 pki/server.key /etc/provider-proxy/secrets/tls.key
sed -i -e "s/127.0.0.1:8890/127.0.0.1:$PORT/" -e 's/device:\/dev\/tpmrm0/embedded/' $CONFIG
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
