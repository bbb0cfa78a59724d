#!/bin/sh
# build-deb.sh OUT [REVISION]: builds the Debian package of these sources, as a copy in build/deb.
#
# Two builds of one commit give the same package: times are the commit's.
set -eu
cd "$(dirname "$0")/.."
out=$1
revision=${2:-1}
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
if git rev-parse -q --verify HEAD >/dev/null 2>&1; then
    SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
else
    SOURCE_DATE_EPOCH=$(stat -c %Y CHANGELOG.md)
fi
export SOURCE_DATE_EPOCH
umask 022
# What is compiled here is compiled with our flags: no wheel that pip made earlier for somebody else.
export PIP_CACHE_DIR="$PWD/build/pip-cache"

tree=build/deb/provider-proxy-$version
rm -rf build/deb
mkdir -p "$tree" "$out"
cp -r provider_proxy systemd docs packaging pyproject.toml README.md LICENSE CHANGELOG.md "$tree"
find "$tree" -name __pycache__ -prune -exec rm -rf {} +
.venv/bin/python packaging/completion.py "$tree/completion"
cp -r packaging/debian "$tree/debian"
rm "$tree/debian/launcher" "$tree/debian/provider-proxy.toml"
{
    echo "provider-proxy ($version-$revision) unstable; urgency=medium"
    echo
    echo "  * See /usr/share/doc/provider-proxy/changelog.gz."
    echo
    echo " -- The provider-proxy authors <provider-proxy@packages.debian.org>  $(date -R -u -d "@$SOURCE_DATE_EPOCH")"
} > "$tree/debian/changelog"
chmod 755 "$tree/debian/rules"
(cd "$tree" && dpkg-buildpackage -b -us -uc > ../build.log 2>&1) || { tail -40 build/deb/build.log; exit 3; }
mv "build/deb/provider-proxy_${version}-${revision}_"*.deb "$out"
ls "$out/provider-proxy_${version}-${revision}_"*.deb
