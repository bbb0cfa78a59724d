"""`provider-proxy register`: one round of registration by hand, step by step."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from functools import partial

import trio

from provider_proxy.cli.arguments import add_config_argument
from provider_proxy.errors import HostError, ProviderProxyError, UsageError, first_of
from provider_proxy.host.config.load import EMBEDDED, load_config
from provider_proxy.host.config.registrars import RegistrarTable
from provider_proxy.host.config.tables import Config
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.quoters.local_tpm import open_quoter
from provider_proxy.host.registration.registrations import HostRegistration, Registrations
from provider_proxy.trust.registration.state import GOOD, Report, State

EXIT_REFUSED = 1
EXIT_ENVIRONMENT = 3
SAID_NO = frozenset((State.CONFLICT, State.UNREAD, State.REFUSED, State.WRONG_CHALLENGE))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="name of a [registrars.NAME] table; without it, all of them",
    )
    add_config_argument(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Register, and say what happened.

    Raises:
        HostError: no TPM, or a file is missing.
        ConfigError, UsageError: no such registrar.
    """
    config = load_config(args.config)
    tables = _chosen(config, args.name)
    try:
        done = trio.run(partial(_register, config, tables, quiet=args.json))
    except BaseExceptionGroup as group:
        ours, others = group.split(ProviderProxyError)
        if others is not None or ours is None:
            raise
        raise first_of(ours) from group
    except HostError as exc:
        if config.tpm.tcti != EMBEDDED:
            raise
        raise HostError(
            f"{exc}\nan embedded TPM serves one process: while the daemon runs, send it SIGHUP "
            "instead, and look at `provider-proxy registrations`"
        ) from exc
    if args.json:
        print(json.dumps({"registrations": [_values(each, report) for each, report in done]}))
    return max((_exit_code(report.state) for _, report in done), default=0)


def _chosen(config: Config, name: str | None) -> Mapping[str, RegistrarTable]:
    if not config.registrars:
        raise UsageError("the configuration has no [registrars.NAME]")
    if name is None:
        return config.registrars
    if name not in config.registrars:
        known = ", ".join(sorted(config.registrars))
        raise UsageError(f"the configuration has no [registrars.{name}]; it has {known}")
    return {name: config.registrars[name]}


async def _register(
    config: Config, tables: Mapping[str, RegistrarTable], *, quiet: bool
) -> list[tuple[HostRegistration, Report]]:
    metrics = Metrics()
    done = []
    async with open_quoter(
        config.tpm, config.state_dir, metrics, host_uuid=config.host_uuid
    ) as quoter:
        directory = Registrations(
            quoter, metrics, host_uuid=quoter.identity.host_uuid, state_dir=config.state_dir
        )
        made = await trio.to_thread.run_sync(
            directory.make, config.registrars
        )  # all: ids must differ
        for each in made:
            if each.name not in tables:
                continue
            if not quiet:
                print(f"{each.name}: {each.table.url} as {each.agent_id}", flush=True)
            report = await each.once()
            done.append((each, report))
            if not quiet:
                _show(each.name, report)
    return done


def _show(name: str, report: Report) -> None:
    for step in report.steps:
        print(f"  {'ok  ' if step.good else 'FAIL'} {step.name:9} {step.text}")
    print(f"{name}: {report.state.value}", flush=True)


def _values(registration: HostRegistration, report: Report) -> dict[str, object]:
    return {
        "registrar": registration.name,
        "url": registration.table.url,
        "agent_id": registration.agent_id,
        "state": report.state.value,
        "steps": [{"name": s.name, "good": s.good, "text": s.text} for s in report.steps],
    }


def _exit_code(state: State) -> int:
    if state in GOOD:
        return 0
    return EXIT_REFUSED if state in SAID_NO else EXIT_ENVIRONMENT
