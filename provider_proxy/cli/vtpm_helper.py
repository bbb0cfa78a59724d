"""`provider-proxy vtpm-helper`: provider-proxy-vtpm, which looks at vTPMs for the daemon.

A process of its own, for it may read every file: no network, no TPM, no keys. Its unit is
systemd/provider-proxy-vtpm.service. Its settings are on its command line, because its unit has to
bind the same folders.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from provider_proxy.cli.trio_run import run_to_the_end
from provider_proxy.common import log, systemd
from provider_proxy.host.vtpm.helper import readback, serve
from provider_proxy.host.vtpm.helper.eyes import Eyes
from provider_proxy.host.vtpm.helper.presence import Presence
from provider_proxy.host.vtpm.helper.proxmox import ProxmoxPresence
from provider_proxy.host.vtpm.helper.window import read_mark

PLATFORMS: Mapping[str, tuple[type[Presence], Path]] = {
    "libvirt": (Presence, Path("/run/libvirt/qemu")),
    "proxmox": (ProxmoxPresence, Path("/run/qemu-server")),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--platform",
        choices=PLATFORMS,
        default="libvirt",
        help="what runs the VMs of this host (default: %(default)s)",
    )
    parser.add_argument(
        "--status-root",
        type=Path,
        metavar="DIR",
        help="its folder of status or pid files (default: /run/libvirt/qemu or /run/qemu-server)",
    )
    parser.add_argument(
        "--state-root",
        type=Path,
        metavar="DIR",
        default=Path("/var/lib/libvirt/swtpm"),
        help="libvirt's folder of vTPMs (default: %(default)s)",
    )
    parser.add_argument(
        "--marks",
        type=Path,
        metavar="DIR",
        default=Path("/run/provider-proxy-hooks"),
        help="the folder that provider-proxy-vmhook writes to (default: %(default)s)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        default=Path("/run/provider-proxy-vtpm"),
        help="folder for copies of states, in memory (default: %(default)s)",
    )
    parser.add_argument(
        "--swtpm-user",
        default="tss",
        metavar="USER",
        help="the user that swtpm runs as, libvirt's swtpm_user (default: %(default)s)",
    )
    parser.add_argument(
        "--daemon-user",
        default="provider-proxy",
        metavar="USER",
        help="the daemon's user, the only one that may ask (default: %(default)s)",
    )
    parser.add_argument(
        "--secrets",
        type=Path,
        metavar="PATH",
        help="socket of provider-proxy-vtpm-secret, for encrypted vTPMs; none are read without it",
    )
    parser.add_argument(
        "--socket",
        type=Path,
        metavar="PATH",
        help="unix socket to listen on, if systemd passes none",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until it is ended.

    Raises:
        HostError: libvirt's folder is not there, or cannot be read.
    """
    log.set_up(args.log_level or "info", log.TEXT)
    daemon_uid = serve.uid_of(args.daemon_user, "--daemon-user")
    swtpm_uid = serve.uid_of(args.swtpm_user, "--swtpm-user")
    sock = serve.open_socket(args.socket)
    readback.remove_copies(args.work)
    make, usual = PLATFORMS[args.platform]
    presence = make(args.status_root or usual)
    try:
        eyes = Eyes(
            presence,
            readback.StateSource(
                root=args.state_root, uid=swtpm_uid, work=args.work, secrets=args.secrets
            ),
            partial(read_mark, args.marks),
            on_look=lambda: systemd.notify("WATCHDOG=1", limit_s=0),
        )
        run_to_the_end(partial(serve.run, eyes, sock, daemon_uid=daemon_uid))
    finally:
        presence.close()
        sock.close()
    return 0
