#!/bin/bash
# In a container that systemd has booted: provider-proxy-vtpm.service as it is, over libvirt's folders with
# one VM; then ways_out.py in its place, and once more with its capability and no sandbox. OUT: results.
set -x
exec >"$OUT/scene.log" 2>&1
A=/usr/lib/provider-proxy
systemd-sysusers; systemd-tmpfiles --create provider-proxy.conf
mkdir -p /run/libvirt/qemu /run/provider-proxy /var/lib/provider-proxy /etc/libvirt/secrets
state=/var/lib/libvirt/swtpm/$VM/tpm2
mkdir -p "$state"; chown tss:tss "$state"; chmod 700 "$state"
setpriv --reuid=tss --regid=tss --clear-groups swtpm_setup --tpm2 --tpm-state "$state" --createek --not-overwrite
(exec "$PYTHON" $A/qemu.py /run/libvirt/qemu/web.pid) & qemu=$!
while [ ! -s /run/libvirt/qemu/web.pid ]; do sleep 0.1; done
umask 077
sed "s/pid='0'/pid='$(cat /run/libvirt/qemu/web.pid)'/" $A/status.xml >/run/libvirt/qemu/web.xml
echo secret >/run/secret; umask 022

echo state >/var/lib/provider-proxy/ak.json
systemctl start provider-proxy-vtpm.socket provider-proxy-vtpm.service
systemctl show provider-proxy-vtpm.service -p ActiveState -p MainPID >"$OUT/state"
grep -E "^(Cap|Seccomp|NoNewPrivs|Uid|Groups)" "/proc/$(systemctl show -P MainPID provider-proxy-vtpm.service)/status" >"$OUT/process"
setpriv --reuid=provider-proxy --regid=provider-proxy --clear-groups timeout 20 "$PYTHON" $A/ask.py >"$OUT/seen"
setpriv --reuid=tss --regid=tss --clear-groups timeout 20 "$PYTHON" $A/ask.py >"$OUT/seen-by-tss" 2>&1
journalctl -o cat -u provider-proxy-vtpm.service >"$OUT/journal"
systemctl stop provider-proxy-vtpm.service
ls -A /run/provider-proxy-vtpm >"$OUT/left" 2>&1

# The directory of EKs, with the unit of docs/watch.md and a list of one VM: what is left after each end.
"$PYTHON" $A/admin.py /run/provider-proxy/admin & admin=$!
eks=provider-proxy-eks.service
until_eks() { for _ in $(seq 100); do [ "$(ls /run/provider-proxy-eks/eks 2>/dev/null | wc -l)" = "$1" ] && break; sleep 0.2; done; }
eks_end() {  # NAME COMMAND: what the directory holds before it, and after it
  systemctl start $eks; until_eks 1; ls /run/provider-proxy-eks/eks >"$OUT/eks-before-$1" 2>&1
  "${@:2}" "$(systemctl show -P MainPID $eks)"; until_eks 0
  ls -R /run/provider-proxy-eks >"$OUT/eks-after-$1" 2>&1
  systemctl show -P Result $eks >"$OUT/eks-result-$1"; systemctl stop $eks; systemctl reset-failed $eks
}
eks_end stop systemctl stop $eks
eks_end kill kill -9
eks_end hang kill -STOP
kill $admin

"$PYTHON" $A/handle.py /run/secret >/run/handle
arguments="$(cat /run/handle) /run/libvirt/qemu /run/secret $qemu"
mkdir -p /run/systemd/system/provider-proxy-vtpm.service.d
cat >/run/systemd/system/provider-proxy-vtpm.service.d/try.conf <<X
[Service]
Type=oneshot
Restart=no
WatchdogSec=0
ExecStart=
ExecStart=$PYTHON $A/ways_out.py $arguments
StandardOutput=file:$OUT/inside
X
systemctl daemon-reload
systemctl start provider-proxy-vtpm.service
ls /run/escaped >"$OUT/escaped" 2>/dev/null
right=+dac_read_search
setpriv --reuid=provider-proxy-vtpm --regid=provider-proxy-vtpm --clear-groups --inh-caps=$right --ambient-caps=$right \
  --bounding-set=-all,$right "$PYTHON" $A/ways_out.py $arguments >"$OUT/outside"
kill $qemu
touch "$OUT/done"
systemctl poweroff --force
