#!/bin/sh
# old-package.sh COMMIT OUT: builds the Debian package of an earlier commit, as its own script does, into OUT.
#
# Needs .venv (make demo) and build/tools (make deb), and that commit in this clone's history.
set -eu
cd "$(dirname "$0")/../.."
commit=$1
out=$2
[ -z "$(ls "$out"/*.deb 2>/dev/null)" ] || exit 0
git -c safe.directory='*' cat-file -e "$commit^{commit}" 2>/dev/null || { echo "commit $commit is not in this clone" >&2; exit 3; }
top=$PWD
tree=build/old/source
rm -rf build/old/source
mkdir -p $tree/.venv/bin "$out"
out=$(cd "$out" && pwd)
git -c safe.directory='*' archive "$commit" | tar -x -C $tree
# What writes its completion scripts: its own code, beside today's packages.
cat >$tree/.venv/bin/python <<END
#!/bin/sh
PYTHONPATH="$top/$tree:$(echo "$top"/build/tools/lib/python3*/site-packages)" exec "$top/.venv/bin/python" "\$@"
END
chmod +x $tree/.venv/bin/python
(cd $tree && ./packages/build-deb.sh "$out")
