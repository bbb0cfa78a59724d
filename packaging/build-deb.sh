#!/bin/sh
# build-deb.sh OUT [REVISION]: builds the Debian package of these sources, as a copy in build/deb, and its SBOM.
#
# Two builds of one commit give the same package: times are the commit's. The Python packages
# are downloaded first, each checked against its hash; the package itself is built without a network.
set -eu
cd "$(dirname "$0")/.."
out=$1
revision=${2:-1}
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
SOURCE_DATE_EPOCH=$(packaging/source-date.sh)
export SOURCE_DATE_EPOCH
umask 022

# A package of this commit need not be built again.
built=$out/.deb-commit
commit=$(git -c safe.directory='*' rev-parse HEAD 2>/dev/null || true)
[ -z "$(git -c safe.directory='*' status --porcelain 2>/dev/null)" ] || commit=
package=$out/provider-proxy_${version}-${revision}_$(dpkg --print-architecture).deb
if [ -n "$commit" ] && [ -f "$package" ] && [ "$(cat "$built" 2>/dev/null)" = "$commit $package" ]; then
    echo "$package is this commit's"
    exit 0
fi

tree=build/deb/provider-proxy-$version
rm -rf build/deb
mkdir -p "$tree" "$out"
packaging/wheels.sh /usr/bin/python3 "$tree/wheels"
cp -r provider_proxy systemd docs packaging pyproject.toml README.md LICENSE CHANGELOG.md SECURITY.md "$tree"
find "$tree" -name __pycache__ -prune -exec rm -rf {} +
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
tools=$PWD/build/tools
(cd "$tree" && TOOLS="$tools" dpkg-buildpackage -b -us -uc > ../build.log 2>&1) || { tail -40 build/deb/build.log; exit 3; }
rm -f "$out"/provider-proxy_*
mv "build/deb/provider-proxy_${version}-${revision}_"*.deb "$out"
mv build/deb/sbom.cdx.json "${package%.deb}.cdx.json"
echo "$commit $package" >"$built"
ls "$package" "${package%.deb}.cdx.json"
