# Sourced by test-deb.sh and test-bundle.sh: a copy of this system that is thrown away, and the daemon in it.
#
# The copy is an overlay over / in a mount and process namespace of its own, so that nothing here changes. No systemd
# runs in there: the daemon is started as its unit says, by hand; `make test-kvm` has a real one. Needs root.
# shellcheck shell=bash

CONFIG=/etc/provider-proxy/provider-proxy.toml

# enter_copy SCRIPT [unshare's options] -- FILE...: runs SCRIPT --inside /tmp/FILE... in the copy.
enter_copy() {
    local script options=()
    script=$(readlink -f "$1")
    shift
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    if [ "$(id -u)" != 0 ]; then exec sudo "$script" "$@"; fi
    exec unshare --mount --pid --fork --kill-child "${options[@]}" bash -c "$MAKE_COPY" bash "$script" "$@"
}

# shellcheck disable=SC2016  # for the inner shell
MAKE_COPY='
set -eu
script=$1
shift
mount --make-rprivate /
work=/mnt
mount -t tmpfs -o size=3g tmpfs $work
mkdir $work/upper $work/work $work/root
mount -t overlay -o "lowerdir=/,upperdir=$work/upper,workdir=$work/work" overlay $work/root
mount -t proc proc $work/root/proc
mount --rbind /dev $work/root/dev
mount -t tmpfs tmpfs $work/root/run
mount -t tmpfs tmpfs $work/root/tmp
cp "$script" "$(dirname "$script")/package_life.sh" $work/root/tmp
files=()
for file; do cp "$file" $work/root/tmp; files+=("/tmp/${file##*/}"); done
! ip link set lo up 2>/dev/null || true
exec chroot $work/root /usr/bin/env -i HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
    PATH=/usr/sbin:/usr/bin:/sbin:/bin bash "/tmp/${script##*/}" --inside "${files[@]}"
'

ok() { echo "ok: $*"; }
fail() { echo "FAILED: $*" >&2; exit 1; }
check() { local what=$1; shift; "$@" >/tmp/out 2>&1 || { cat /tmp/out >&2; fail "$what"; }; ok "$what"; }
is() { [ "$2" = "$3" ] || fail "$1: $2, not $3"; ok "$1"; }
owner() { stat -c '%a %U:%G' "$1"; }
traces() { find /etc /usr /lib /var/lib/provider-proxy -xdev -path '*provider-proxy*' -print 2>/dev/null || true; }

find_port() { python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

unit_file() { local folder; for folder in /usr/lib /lib; do [ ! -f $folder/systemd/system/provider-proxy.service ] || echo $folder/systemd/system/provider-proxy.service; done | head -1; }

start() {  # as the unit says: its user, its rights, its command, its credentials
    local command file folder
    command=$(sed -n 's/^ExecStart=//p' "$(unit_file)")
    rm -rf /run/credentials && mkdir -p /run/credentials/provider-proxy.service
    for file in /etc/provider-proxy/secrets/*; do
        [ ! -f "$file" ] || install -m 400 -o provider-proxy "$file" "/run/credentials/provider-proxy.service/secret_${file##*/}"
    done
    for folder in /var/lib /run; do install -d -m 700 -o provider-proxy -g provider-proxy $folder/provider-proxy; done
    # shellcheck disable=SC2086  # words
    setpriv --reuid=provider-proxy --regid=provider-proxy --init-groups --no-new-privs \
        --bounding-set=-all --inh-caps=-all \
        env -i PATH="$PATH" CREDENTIALS_DIRECTORY=/run/credentials/provider-proxy.service \
        $command >>/tmp/daemon.log 2>&1 &
    daemon=$!
    for _ in $(seq 300); do
        grep -q "INFO listening on" /tmp/daemon.log && return
        kill -0 $daemon 2>/dev/null || { cat /tmp/daemon.log >&2; fail "the daemon ended"; }
        sleep 0.2
    done
    fail "the daemon is not ready"
}

stop() {
    kill -TERM $daemon
    wait $daemon || { cat /tmp/daemon.log >&2; fail "the daemon ended with $?"; }
    rm /tmp/daemon.log
    ok "stopped in order"
}

# Certificates, a free port and a TPM of software for the daemon of this copy.
configure() {
    PORT=$(find_port)
    URL=https://localhost:$PORT
    provider-proxy pki init pki --host localhost >/dev/null
    cp pki/server.crt /etc/provider-proxy/tls.crt
    install -m 600 pki/server.key /etc/provider-proxy/secrets/tls.key
    sed -i -e "s/127.0.0.1:8890/127.0.0.1:$PORT/" -e 's/device:\/dev\/tpmrm0/embedded/' $CONFIG
}

ask() {
    provider-proxy identity "$URL" --ca pki/ca.crt --save-ak "ak-$1.b64" >/dev/null
    provider-proxy fetch "$URL" --ca pki/ca.crt --pcrs 0,7
    provider-proxy verify evidence.json --request request.json --ak-tpm "ak-$1.b64" --insecure-any-state | head -1
}
