#!/bin/sh
# unpack-promtool.sh DIRECTORY: takes promtool out of its Debian package, into DIRECTORY/usr/bin.
#
# Debian 12 has it in prometheus, Debian 13 in a package of its own. If it cannot be fetched, the tests that
# need it are skipped: then this prints a line and does not fail.
set -u
mkdir -p "$1" && cd "$1" || exit 3
unpack() {
    for package in promtool prometheus; do
        rm -f ./*.deb
        apt-get download -qq -o APT::Sandbox::User=root "$package" >/dev/null 2>&1 || continue
        dpkg-deb --fsys-tarfile ./"$package"_*.deb | tar -x ./usr/bin/promtool 2>/dev/null
        rm -f ./*.deb
        [ ! -x usr/bin/promtool ] || return 0
    done
    return 1
}
update() { if [ "$(id -u)" = 0 ]; then apt-get update -qq; else sudo apt-get update -qq; fi; }

unpack || { update >/dev/null 2>&1 && unpack; } && exit 0
echo "promtool cannot be fetched; skipped: the tests of the alert rules"
