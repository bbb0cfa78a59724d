#!/bin/sh
# lock.sh: writes every lock file again, from pyproject.toml and the .in files beside the locks.
#
# A lock has the version and the hashes of every package, for Python 3.11 and newer on Linux, and no addresses.
# Versions that a lock has stay as they are where they still fit; UPGRADE=1 takes the newest.
# future-fstrings stays out: merklelib asks for it, it runs code at every start of Python, and
# provider_proxy/host/batching/merkle.py does without it.
set -eu
cd "$(dirname "$0")/.."

tools=build/lock
[ -x $tools/bin/uv ] || { "${PYTHON:-python3}" -m venv $tools && $tools/bin/python -m pip install -q uv; }
compile() {
    out=$1
    shift
    # shellcheck disable=SC2086  # words
    $tools/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
        --no-emit-package future-fstrings ${UPGRADE:+--upgrade} "$@" -o "$out"
    sed -i '1i# Written by `make lock`.' "$out"
}

locks=packaging/locks
compile $locks/dev.txt --all-extras pyproject.toml
compile $locks/host.txt --constraint $locks/dev.txt --extra host --extra client --extra watch --extra fleet pyproject.toml
compile $locks/tenant.txt --constraint $locks/dev.txt pyproject.toml
for name in build package pip; do
    compile $locks/$name.txt --constraint $locks/dev.txt $locks/$name.in
done
for name in requirements agent_requirements; do
    compile tests/system/keylime/$name.txt --no-deps tests/system/keylime/$name.in
done
