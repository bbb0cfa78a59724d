#!/bin/sh
# uninstall.sh [--purge]: removes what install.sh installed.
#
# Configuration and state stay. --purge removes them, too: the state holds the authValue of the attestation key,
# without which the key in the TPM cannot be used any more. The user stays, because it may own files elsewhere.
set -eu
app=/usr/lib/provider-proxy
[ "$(id -u)" = 0 ] || { echo "uninstall.sh: run this as root" >&2; exit 3; }
[ -f $app/installed-files ] || { echo "uninstall.sh: nothing to remove: install.sh was not used on this host" >&2; exit 3; }

if [ -d /run/systemd/system ]; then
    # The socket first: a tenant's request must not start the daemon again.
    for unit in $(sed -n 's/.*\/\(provider-proxy[^/]*\.socket\)$/\1/p' $app/installed-files) \
        $(sed -n 's/.*\/\(provider-proxy[^/]*\.service\)$/\1/p' $app/installed-files); do
        case "$unit" in
        *@.service) systemctl stop "${unit%.service}*.service" || true ;;
        *) systemctl disable --now "$unit" || true ;;
        esac
    done
fi
while read -r file; do rm -f "$file"; done <$app/installed-files
rm -rf $app
[ ! -d /run/systemd/system ] || systemctl daemon-reload
[ "${1:-}" != --purge ] || rm -rf /var/lib/provider-proxy /etc/provider-proxy /var/lib/provider-proxy-watch /etc/provider-proxy-watch \
    /var/lib/provider-proxy-bridge /etc/provider-proxy-bridge
echo "removed"
