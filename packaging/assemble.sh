#!/bin/sh
# assemble.sh PYTHON WHEELS DIRECTORY: the daemon and all that it needs as a virtual environment that will be
# at /usr/lib/provider-proxy, whatever DIRECTORY is now. Needs no network.
#
# Nothing in it depends on when or where it was built.
set -eu
python=$1
wheels=$2
mkdir -p "$3"
app=$(cd "$3" && pwd)
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT

"$python" -m venv "$tools/venv"
"$python" -m venv --without-pip "$app"
"$tools/venv/bin/python" -m pip --disable-pip-version-check --python "$app/bin/python3" \
    install -q --no-compile --no-index --no-deps "$wheels"/*.whl

# The launcher is the only command; the others would hold this machine's paths.
rm -rf "$app/include" "$app/share" "$app"/lib64 "$app/.gitignore"
find "$app/bin" -mindepth 1 -delete
ln -s "$python" "$app/bin/python3"
site=$(echo "$app"/lib/python3*/site-packages)
printf 'home = %s\ninclude-system-site-packages = false\nversion = %s\n' \
    "$(dirname "$python")" "$("$python" -c 'import platform; print(platform.python_version())')" > "$app/pyvenv.cfg"
# dpkg keeps the list of files; the others say where pip found its wheels.
rm -f "$site"/*.dist-info/RECORD "$site"/*.dist-info/REQUESTED "$site"/*.dist-info/direct_url.json
# Tests and sources of the packages' own.
find "$site" -depth -type d \( -name tests -o -name _tests -o -name __pycache__ \) -exec rm -rf {} +
find "$site" \( -name '*.c' -o -name '*.h' -o -name '*.pyx' \) -delete
find "$site" -type f -name '*.py' -exec sed -i '1{/^#!/s/.*/#/}' {} +  # modules, not programs
find "$site" -type f -exec chmod 644 {} +
find "$site" -type f -name '*.so*' -exec strip --strip-unneeded --remove-section=.comment {} +
# No code may run by itself when Python starts.
if find "$site" -name '*.pth' | grep .; then echo "assemble.sh: a .pth file would run code at every start" >&2; exit 3; fi
# The daemon cannot write here, so compile now: checked by content, not by time, with the host's paths.
(cd "$site" && "$app/bin/python3" -m compileall -q -j 1 --invalidation-mode unchecked-hash \
    -s . -p "/usr/lib/provider-proxy/lib/$(basename "$(dirname "$site")")/site-packages" .)
