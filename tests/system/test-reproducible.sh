#!/bin/sh
# test-reproducible.sh: builds package, bundle and both lists of components twice, in two folders: the same bytes.
set -eu
cd "$(dirname "$0")/../.."
work=$(mktemp -d /var/tmp/provider-proxy-twice.XXXXXX)
trap 'rm -rf "$work"' EXIT
# Both of one commit, also where somebody commits meanwhile.
git -c safe.directory='*' clone -q . "$work/one"
git -c safe.directory='*' clone -q "$work/one" "$work/the-other-one"
for name in one the-other-one; do
    (cd "$work/$name" && packaging/build-deb.sh out >/dev/null && packaging/build-bundle.sh "${PYTHON:-python3}" out >/dev/null)
    (cd "$work/$name/out" && sha256sum provider*) >"$work/$name.sums"
done
cat "$work/one.sums"
diff "$work/one.sums" "$work/the-other-one.sums"
echo "two builds gave the same bytes"
