"""Pins from registrars at an import: `[hosts.NAME] registrar` in a fleet's file.

A watcher asks the registrar repeatedly, and compares its record with the pin. A fleet has pins in its
database, the same for every member, and members ask no registrar. So an import asks. It checks the record
as a watcher does (the AK's attributes, the EK's chain, the existing pin), and makes it the pin.
"""

from __future__ import annotations

import trio

from provider_proxy.errors import HostError, ProviderProxyError
from provider_proxy.tenant.policies import PolicyFiles
from provider_proxy.tenant.watch.budget import Budget
from provider_proxy.tenant.watch.questions import HostQuestions, Setting
from provider_proxy.tenant.watch.registrars import KnownAks, Registrars
from provider_proxy.tenant.watch.store import HostRecords
from provider_proxy.tenant.watch.tables import HostRules, WatchConfig
from provider_proxy.tenant.watch.watcher import Endpoints

AT_ONCE = 16
MAX_NAMED = 5


async def pin_from_registrars(config: WatchConfig) -> int:
    """Ask the registrars about every host that names one, and pin what passes.

    Returns:
        How many hosts were asked about.

    Raises:
        HostError: some hosts' records must not be trusted, or could not be read; names the first.
    """
    wanted = {
        name: rules
        for name, rules in config.hosts.items()
        if rules.registrar is not None and rules.need_provider_quote
    }
    if not wanted:
        return 0
    registrars, failed = Registrars(config), {}
    aks, endpoints, limit = KnownAks(registrars), Endpoints(), trio.CapacityLimiter(AT_ONCE)

    async def ask(name: str, rules: HostRules) -> None:
        async with limit:
            try:
                setting = Setting(
                    rules=rules, files=PolicyFiles(), aks=aks, endpoint=endpoints.of(name, rules)
                )
                questions = HostQuestions(name, setting, HostRecords(), budget=Budget())
                try:
                    await aks.trusted(name, rules, questions.host_shows)
                finally:
                    await questions.aclose()
            except ProviderProxyError as exc:
                failed[name] = str(exc)

    try:
        async with trio.open_nursery() as nursery:
            for name, rules in wanted.items():
                nursery.start_soon(ask, name, rules)
    finally:
        await registrars.aclose()
    if failed:
        some = "; ".join(f"{name}: {failed[name]}" for name in sorted(failed)[:MAX_NAMED])
        more = f"; and {len(failed) - MAX_NAMED} more" if len(failed) > MAX_NAMED else ""
        raise HostError(f"nothing is imported: no pin from the registrar for {some}{more}")
    return len(wanted)
