#!/bin/sh
# system-packages.sh [--optional WHY] PACKAGE...: installs the Debian packages that are missing.
#
# It uses sudo only where it is not root and something is missing. With --optional, a package that this
# Debian does not have, or that cannot be fetched, is named together with WHY, and the run goes on.
# Exit codes: 0 everything is there (or was optional), 3 something cannot be installed.
set -eu

why=
if [ "${1:-}" = --optional ]; then
    why=$2
    shift 2
fi

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    echo "not a Debian system; install these packages, or what they are called here: $*"
    exit 0
fi

missing=
for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

sudo=
if [ "$(id -u)" != 0 ]; then
    sudo=sudo
    command -v sudo >/dev/null || { echo "as root, run: apt-get install$missing" >&2; exit 3; }
fi
apt() { $sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 "$@"; }

# No installed package may start a service: a policy-rc.d forbids it while this script runs.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    $sudo sh -c "printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy"
    trap '$sudo rm -f $policy' EXIT
fi

echo "installing Debian packages:$missing"
apt update || echo "apt-get update failed; continuing with the package lists of this machine" >&2
if [ -z "$why" ]; then
    # shellcheck disable=SC2086  # words
    apt install -y --no-install-recommends $missing </dev/null >/dev/null || {
        echo "these Debian packages cannot be installed:$missing" >&2
        exit 3
    }
    exit 0
fi
for package in $missing; do
    apt install -y --no-install-recommends "$package" </dev/null >/dev/null 2>&1 ||
        echo "the Debian package $package cannot be installed; skipped: $why"
done
