#!/bin/sh
# venv.sh PYTHON VENV LOCK...: installs the packages of the locks into a virtual environment, made if missing.
#
# A lock names versions and hashes; pip installs nothing whose hash is not in it. The locks are complete, so
# dependencies are not looked up. The locks are installed one after the other: what has no wheel, as tpm2-pytss,
# is built here with the tools of locks/build.txt, which therefore comes before it.
# Exit codes: 0 done, 3 the environment cannot be made.
set -eu

python=$1
venv=$2
shift 2
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed; name it with PYTHON=…" >&2
    exit 3
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || exit 3
tss() { "$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("tpm2-pytss"))' 2>/dev/null || true; }
if cat "$@" | grep -q '^tpm2-pytss=='; then
    wanted=$(cat "$@" | sed -n 's/^tpm2-pytss==\([^ ]*\).*/\1/p' | head -1)
    if [ "$(tss)" != "$wanted" ]; then
        for program in cc pkg-config; do
            command -v $program >/dev/null || { echo "tpm2-pytss must be built, and $program is missing: install it" >&2; exit 3; }
        done
        pkg-config --exists tss2-esys || {
            echo "tpm2-pytss must be built, and the TPM library's headers are missing: install libtss2-dev" >&2
            exit 3
        }
        echo "tpm2-pytss $wanted has no wheel and is built from source; this takes about 20 s of one core"
    fi
fi
start=$(date +%s)
for lock in "$@"; do
    "$venv/bin/python" -m pip --disable-pip-version-check install -q \
        --require-hashes --no-deps --no-build-isolation -r "$lock" || exit 3
done
if [ -n "${wanted:-}" ]; then
    # Without cffi or the headers the build succeeds, but leaves the library out.
    "$venv/bin/python" -c 'import tpm2_pytss' || { echo "tpm2-pytss was built without the TPM library" >&2; exit 3; }
fi
echo "Python packages are in $venv after $(($(date +%s) - start)) s"
