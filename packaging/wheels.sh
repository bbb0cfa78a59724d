#!/bin/sh
# wheels.sh PYTHON DIRECTORY: this program and all Python packages of locks/host.txt as wheels for PYTHON.
#
# Every download is checked against its hash. Two runs on one commit give the same bytes: nothing in a wheel
# depends on when or where it was built. Keeps its tools in build/tools.
set -eu
cd "$(dirname "$0")/.."
python=$1
out=$2
mkdir -p "$out"
out=$(cd "$out" && pwd)
umask 022
: "${SOURCE_DATE_EPOCH:=$(packaging/source-date.sh)}"
export SOURCE_DATE_EPOCH
# Compile with our flags: do not use a wheel that pip cached earlier.
export PIP_CACHE_DIR="$PWD/build/pip-cache"

# Tools of another Python would make wheels for that Python.
which='import os, sys; print(os.path.realpath(sys._base_executable), sys.version)'
[ "$(build/tools/bin/python -Ic "$which" 2>/dev/null)" = "$("$python" -Ic "$which")" ] || rm -rf build/tools
packaging/venv.sh "$python" build/tools packaging/locks/build.txt packaging/locks/package.txt
# A temporary folder, whose name differs each time: the name must not get into a wheel.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# No debugging information, so that no path of this machine is in the one package that is compiled here.
TMPDIR="$work" CFLAGS="-g0 -O2 -ffile-prefix-map=$work=." LDFLAGS="-Wl,--build-id=none" \
    build/tools/bin/python -m pip --disable-pip-version-check wheel -q --require-hashes --no-deps \
    --no-build-isolation -w "$work/wheels" -r packaging/locks/host.txt
# Our own wheel is built from a copy, so that setuptools leaves no files here and finds none of an earlier build.
mkdir "$work/source"
cp -r provider_proxy pyproject.toml README.md LICENSE "$work/source"
find "$work/source" -name __pycache__ -prune -exec rm -rf {} +
build/tools/bin/python -m pip --disable-pip-version-check wheel -q --no-deps --no-build-isolation \
    -w "$work/wheels" "$work/source"
build/tools/bin/python packaging/tidy_wheels.py "$work/wheels"
rm -f "$out"/*.whl
cp "$work/wheels"/*.whl "$out"
