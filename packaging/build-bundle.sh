#!/bin/sh
# build-bundle.sh PYTHON OUT: one archive that installs provider-proxy on a host with systemd and that Python.
#
# Two builds of one commit give the same archive. Its SBOM lies beside it.
set -eu
cd "$(dirname "$0")/.."
python=$1
out=$2
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
SOURCE_DATE_EPOCH=$(packaging/source-date.sh)
export SOURCE_DATE_EPOCH PYTHONHASHSEED=0
umask 022
facts=$("$python" -Ic 'import platform, sys; print("%d.%d" % sys.version_info[:2], platform.machine(), platform.libc_ver()[1])')
read -r python_version machine glibc <<END
$facts
END
name=provider-proxy-$version-python$python_version-$machine
work=build/bundle
tree=$work/$name
rm -rf $work
mkdir -p "$tree" "$out"

packaging/wheels.sh "$python" "$tree/wheels"
build/tools/bin/python -m pip --disable-pip-version-check download -q --require-hashes --no-deps \
    -d "$tree" -r packaging/locks/pip.txt
# Written by its own programs: manual pages, completion, the list of components.
# The interpreter itself: what $python names may be a link, a script or a virtual environment's.
interpreter=$("$python" -Ic 'import os, sys; print(os.path.realpath(sys._base_executable))')
packaging/assemble.sh "$interpreter" "$tree/wheels" $work/app
site=$(echo build/tools/lib/python3*/site-packages)
PYTHONPATH="$site" $work/app/bin/python3 -B packaging/completion.py "$tree/completion"
$work/app/bin/python3 -B packaging/manpages.py "$tree/man"
gzip -9n "$tree"/man/*
packaging/sbom.sh build/tools $work/app/bin/python3 "$out/$name.cdx.json"

cp -r systemd "$tree/systemd"
mkdir "$tree/hooks"
cp provider_proxy/host/vtpm/hooks/provider-proxy-ekhook provider_proxy/host/vtpm/hooks/provider-proxy-vmhook provider_proxy/host/vtpm/hooks/provider-proxy-vtpm-secret "$tree/hooks"
cp packaging/bundle/install.sh packaging/bundle/uninstall.sh packaging/debian/provider-proxy.toml LICENSE CHANGELOG.md "$tree"
cp packaging/debian/launcher "$tree/provider-proxy"
cp docs/install.md "$tree/INSTALL.md"
chmod 755 "$tree/install.sh" "$tree/uninstall.sh"
printf 'PYTHON_VERSION=%s\nMACHINE=%s\nGLIBC=%s\n' "$python_version" "$machine" "$glibc" >"$tree/target"
(cd "$tree" && find . -type f ! -name SHA256SUMS -print0 | LC_ALL=C sort -z | xargs -0 sha256sum >SHA256SUMS)
rm -f "$out"/provider-proxy-*-python"$python_version"-*.tar.gz
tar -c -C $work --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" \
    --mode=u+rw,go+r-w "$name" | gzip -9n >"$out/$name.tar.gz"
ls "$out/$name.tar.gz" "$out/$name.cdx.json"
