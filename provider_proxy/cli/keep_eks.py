"""`vms --ek-dir`: a directory of the EKs that are confirmed of VMs that run on this host, for SPIRE."""

from __future__ import annotations

import logging
import re
import signal
from collections.abc import Mapping

import trio

from provider_proxy.cli.ask_admin import TIMEOUT_S, AdminClient
from provider_proxy.errors import HostError, ReplyError
from provider_proxy.tenant.watch.alive import beat
from provider_proxy.tenant.watch.ek_directory import EkDirectory

log = logging.getLogger(__name__)

_NAME_RE = re.compile(r"[0-9a-f]{64}")


async def keep(
    client: AdminClient, limit: int, directory: EkDirectory, *, interval_s: float
) -> None:
    """Keep the directory, until SIGTERM or SIGINT.

    Args:
        limit: of an answer, in bytes.

    Raises:
        HostError: the directory cannot be used.
    """
    directory.open()
    try:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(directory.run)
                nursery.start_soon(beat, directory.is_true)
                nursery.start_soon(_ask_often, client, limit, directory, interval_s)
                async for _ in signals:
                    break
                nursery.cancel_scope.cancel()
    finally:
        directory.close()


async def _ask_often(
    client: AdminClient, limit: int, directory: EkDirectory, interval_s: float
) -> None:
    known: Mapping[str, str] = {}
    while True:
        try:
            results = await trio.to_thread.run_sync(
                client.get, "/vms", limit, abandon_on_cancel=True
            )
            linked = linked_eks(results)
        except (HostError, ReplyError) as exc:
            log.error("ek_dir: %s", exc)  # what was proven goes when its time is over
        else:
            for who in known.keys() - linked.keys():
                directory.refuted(who)
            for who, name in linked.items():
                directory.proven(who, name, interval_s + TIMEOUT_S)
            known = linked
        await trio.sleep(interval_s)


def linked_eks(results: Mapping[str, object]) -> Mapping[str, str]:
    """The names of EKs that are confirmed of VMs that run, by VM and number.

    Raises:
        ReplyError: these are not results of `GET /vms`.
    """
    found = {}
    try:
        vms = results["vms"]
        if not isinstance(vms, list):
            raise TypeError
        for vm in vms:
            if vm["running"] is True and vm["confirmed"] is True:
                for number, name in enumerate(vm["spire"]):
                    if _NAME_RE.fullmatch(name):
                        found[f"{vm['vm']}/{number}"] = name
    except (KeyError, TypeError) as exc:
        raise ReplyError("the daemon's list of VMs cannot be read") from exc
    return found
