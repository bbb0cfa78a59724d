#!/bin/bash
# test-upgrade.sh OLD NEW: the package of an earlier release, used, and then this one over it: nothing is lost.
#
# In a copy of this system that is thrown away, see package_life.sh. Kept have to be the attestation key with its
# authValue, a tenant's pins, the registry of vTPMs, the audit log, tenants' tables and the configuration.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
# shellcheck source=tests/system/package_life.sh
. "$here/package_life.sh"
[ "${1:-}" = --inside ] || enter_copy "$0" -- "$1" "$2"
old=$2 new=$3
cd /tmp
VM=0b8c5f0e-8f5a-4b7e-9d3c-2a1f6e5d4c3b
STATE=/var/lib/provider-proxy
ADMIN=unix:/run/provider-proxy/admin

install_package() { apt-get install -y -qq --no-install-recommends -o Dpkg::Options::=--force-confold "$1" >/tmp/out 2>&1 || { cat /tmp/out; fail "apt-get install $1"; }; }
version() { dpkg-query -W -f '${Version}' provider-proxy; }

rm -rf /etc/provider-proxy $STATE
install_package "$old"
first=$(version)
configure
mkdir -p /etc/provider-proxy/tenants.d /etc/provider-proxy/conf.d
sed -i 's/^tls_key = /client_ca = "\/etc\/provider-proxy\/ca.crt"\n&/' $CONFIG
cp pki/ca.crt /etc/provider-proxy/ca.crt
cat >/etc/provider-proxy/conf.d/more.toml <<END
[audit]
enabled = true
path = "$STATE/audit.jsonl"
[vtpm]
enabled = true
[tenant_defaults]
accept_unlisted = false
END
cat >/etc/provider-proxy/tenants.d/acme.toml <<END
[tenants.acme]
identities = ["spiffe://provider-proxy/tenant/acme"]
vms = ["$VM"]
END
chmod 755 /etc/provider-proxy/conf.d /etc/provider-proxy/tenants.d
chmod 644 /etc/provider-proxy/conf.d/* /etc/provider-proxy/tenants.d/*
check "a tenant's certificate" provider-proxy pki tenant pki acme
own=(--ca pki/ca.crt --cert "$(find pki -name 'acme.crt')" --key "$(find pki -name 'acme.key')")

ask_pinned() { # NAME [VERIFY...]
    provider-proxy fetch "$URL" "${own[@]}" --pcrs 0,7 --request "request-$1.json" --evidence "evidence-$1.json" >/dev/null
    provider-proxy verify "evidence-$1.json" --request "request-$1.json" --pinned host7 --pins pins --insecure-any-state | head -1
}
nonce_of() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["nonce"])' "request-$1.json"; }
vms() { provider-proxy vms $ADMIN --json 2>/dev/null | tail -1 | python3 -c '
import json, sys
for vm in json.load(sys.stdin)["vms"]:
    print(vm["vm"], *sorted(json.dumps(ek, sort_keys=True) for ek in vm["eks"]))'; }

start
provider-proxy identity "$URL" "${own[@]}" --save-ak ak-first.b64 >/dev/null
provider-proxy pin add host7 --ak-tpm ak-first.b64 --pins pins >/dev/null
ask_pinned first

# libvirt makes a VM's vTPM: swtpm_setup calls the hook, which tells the daemon.
libvirt=/var/lib/libvirt/swtpm/$VM/tpm2
install -d -o tss -g tss "/var/lib/libvirt/swtpm/$VM" "$libvirt"
printf 'socket = "/run/provider-proxy/vtpm.sock"\n' >/etc/provider-proxy/vtpm-hook.toml
chmod 755 /etc/provider-proxy
chmod 644 /etc/provider-proxy/vtpm-hook.toml
printf 'create_certs_tool = /usr/bin/provider-proxy-ekhook\ncreate_certs_tool_config = /etc/provider-proxy/vtpm-hook.toml\ncreate_certs_tool_options = /etc/swtpm-localca.options\nactive_pcr_banks = sha256\n' >setup.conf
chmod 755 /run/provider-proxy
setpriv --reuid=tss --regid=tss --clear-groups swtpm_setup --tpm2 --ecc --tpm-state "dir://$libvirt" \
    --config /tmp/setup.conf --vmid "web:$VM" --create-ek-cert >/tmp/out 2>&1 || { cat /tmp/out; fail "swtpm_setup"; }
before_vms=$(vms)
[[ $before_vms == "$VM "*spki* ]] || fail "the VM is not in the registry: $before_vms"
ok "$first: a VM's vTPM is registered, a tenant has pinned the host"
stop
lines=$(wc -l <$STATE/audit.jsonl)
before=$(cd /etc/provider-proxy && find . -type f -exec sha256sum {} + | sort -k2)
key=$(sha256sum $STATE/ak.json)

install_package "$new"
[ "$(version)" != "$first" ] || fail "the two packages have one version"
ok "upgraded from $first to $(version)"
is "the configuration was kept, file by file" "$(cd /etc/provider-proxy && find . -type f ! -name '*.dpkg-*' -exec sha256sum {} + | sort -k2)" "$before"
check "the new program reads the old configuration" provider-proxy check-config
start
ask_pinned second
ok "a tenant that had pinned the host verifies as before"
provider-proxy identity "$URL" "${own[@]}" --save-ak ak-next.b64 >/dev/null
check "the host's key is the same" cmp ak-first.b64 ak-next.b64
is "its authValue, too" "$(sha256sum $STATE/ak.json)" "$key"
is "the registry of vTPMs has the VM and its EKs" "$(vms)" "$before_vms"
stop
[ "$(wc -l <$STATE/audit.jsonl)" -gt "$lines" ] || fail "the audit log does not go on"
for name in first second; do
    check "the audit log proves the $name request" provider-proxy audit prove --log $STATE/audit.jsonl \
        --nonce "$(nonce_of $name)" --evidence "evidence-$name.json"
done
