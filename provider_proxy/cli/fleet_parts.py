"""The parts of `provider-proxy fleet`, each on an open database; `fleet` declares their options."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import trio
from psycopg import Connection, Error

from provider_proxy.errors import UsageError
from provider_proxy.tenant.fleet import imports, leases, schema, views
from provider_proxy.tenant.fleet.admin import host_values, status_values
from provider_proxy.tenant.fleet.database import again, connect, read_address, translated
from provider_proxy.tenant.fleet.hosts import read_fleet
from provider_proxy.tenant.fleet.registrars import pin_from_registrars
from provider_proxy.tenant.watch.config import load_watch_config
from provider_proxy.tenant.watch.tables import WatchConfig

MAX_SHOWN_CHANGES = 200


def _with_database(
    args: argparse.Namespace, work: Callable[[Connection[Any], WatchConfig], int]
) -> int:
    config = load_watch_config(args.config)
    if config.state is None:
        raise UsageError(f'{args.config} has no state = "postgresql://…"')
    with connect(read_address(config.state)) as connection:
        try:
            return again(lambda opened: work(opened, config), connection)
        except Error as exc:
            raise translated(exc) from exc


def _migrate(args: argparse.Namespace) -> int:
    def work(connection: Connection[Any], _: WatchConfig) -> int:
        before, after = schema.migrate(connection, shards=args.shards)
        if args.grant:
            schema.grant_daily(connection, args.grant)
        print(
            f"tables of version {after}" + ("" if before == after else f", were of {before}")
            if before
            else f"created the tables, version {after}, {schema.shards_of(connection)} shards"
        )
        return 0

    return _with_database(args, work)


def _import(args: argparse.Namespace) -> int:
    def work(connection: Connection[Any], config: WatchConfig) -> int:
        schema.check_version(connection)
        asked = trio.run(pin_from_registrars, config)
        if asked:
            print(f"asked registrars about {asked} hosts")
        fleet = read_fleet(config)
        if args.apply:
            plan = imports.apply(connection, fleet, remove=args.remove)
        else:
            plan = imports.plan(connection, fleet)
        for line in _plan_lines(plan, remove=args.remove):
            print(line)
        if not args.apply:
            print("nothing was changed; add --apply to change it")
        return 0

    return _with_database(args, work)


def _plan_lines(plan: imports.Plan, *, remove: bool) -> list[str]:
    lines = [f"+ {name}" for name in plan.added]
    lines += [f"~ {name}: {', '.join(words)}" for name, words in plan.changed.items()]
    kept = "" if remove else " (stays; --remove removes it)"
    lines += [f"- {name}{kept}" for name in plan.removed]
    if len(lines) > MAX_SHOWN_CHANGES:
        lines[MAX_SHOWN_CHANGES:] = [f"… and {len(lines) - MAX_SHOWN_CHANGES} more"]
    gone = len(plan.removed) if remove else 0
    lines.append(
        f"{len(plan.added)} new, {len(plan.changed)} changed, {gone} removed, {plan.same} the same"
    )
    return lines


def _status(args: argparse.Namespace) -> int:
    def work(connection: Connection[Any], _: WatchConfig) -> int:
        schema.check_version(connection)
        view = views.fleet_view(connection)
        if args.json:
            print(json.dumps(status_values(view)))
            return 0
        print(f"members  {len(view.members)}")
        names = Counter(member.name for member in view.members)
        for member in view.members:
            # Two with one name are told apart by their ids, which `fleet drain` takes, too.
            own = f" ({member.id})" if names[member.name] > 1 else ""
            draining = ", draining" if member.draining else ""
            print(f"  {member.name}{own}  {member.shards} shards, {member.version}{draining}")
        print(f"shards   {view.shards}, {view.free_shards} of them without a member")
        print(f"hosts    {sum(view.by_state.values())}")
        for state, count in sorted(view.by_state.items()):
            print(f"  {state}  {count}")
        print(f"oldest verdict  {_age(view.oldest_verdict_s)}")
        print(f"reports waiting  {view.waiting_reports}, the oldest {_age(view.oldest_report_s)}")
        return 0

    return _with_database(args, work)


def _age(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.0f} s old"


def _hosts(args: argparse.Namespace) -> int:
    def work(connection: Connection[Any], _: WatchConfig) -> int:
        schema.check_version(connection)
        found = views.host_views(connection, like=args.like, state=args.state)
        if args.json:
            print(json.dumps({"hosts": [host_values(host) for host in found]}))
            return 0
        width = max((len(host.name) for host in found), default=0)
        for host in found:
            since = host.since.isoformat(timespec="seconds") if host.since else "-"
            why = f"  {host.error}: {host.reason}" if host.error else ""
            print(f"{host.name:{width}}  {host.state}  {since}{why}")
        return 0

    return _with_database(args, work)


def _reports(args: argparse.Namespace) -> int:
    def work(connection: Connection[Any], _: WatchConfig) -> int:
        schema.check_version(connection)
        for report in views.report_views(connection, like=args.like, waiting=args.waiting):
            state = "delivered" if report.delivered else f"waiting, {report.tries} tries"
            print(f"{report.made.isoformat(timespec='seconds')}  {report.host}  {state}")
            print(f"  {report.body.decode('ascii', 'replace')}")
        return 0

    return _with_database(args, work)


def _silence(args: argparse.Namespace) -> int:
    if not 0 < args.minutes <= 60 * 24 * 31:
        raise UsageError("--minutes must be above 0 and at most 31 days")

    def work(connection: Connection[Any], _: WatchConfig) -> int:
        schema.check_version(connection)
        id_, count, ends = views.silence(connection, args.like, minutes=args.minutes, why=args.why)
        print(f"reports of {count} hosts wait until {ends.isoformat(timespec='seconds')}")
        print(f"end it sooner: provider-proxy fleet unsilence --config {args.config} {id_}")
        return 0

    return _with_database(args, work)


def _silences(args: argparse.Namespace) -> int:
    def work(connection: Connection[Any], _: WatchConfig) -> int:
        schema.check_version(connection)
        for one in views.silence_views(connection):
            print(
                f"{one.id}  {one.hosts}  until {one.ends.isoformat(timespec='seconds')}  {one.why}"
            )
        return 0

    return _with_database(args, work)


def _unsilence(args: argparse.Namespace) -> int:
    def work(connection: Connection[Any], _: WatchConfig) -> int:
        schema.check_version(connection)
        views.end_silence(connection, args.id)
        print("ended; the reports that it held back are delivered now")
        return 0

    return _with_database(args, work)


def _restored(args: argparse.Namespace) -> int:
    def work(connection: Connection[Any], _: WatchConfig) -> int:
        schema.check_version(connection)
        count = leases.restored(connection)
        print(
            f"epochs are raised; {count} hosts are shown as not verified until their next verdict"
        )
        return 0

    return _with_database(args, work)


def _drain(args: argparse.Namespace) -> int:
    def work(connection: Connection[Any], _: WatchConfig) -> int:
        schema.check_version(connection)
        count = views.drain(connection, args.member)
        print(f"{count} member{'s' if count > 1 else ''} will give back all shards")
        return 0

    return _with_database(args, work)


PARTS: dict[str, Callable[[argparse.Namespace], int]] = {
    "migrate": _migrate,
    "import": _import,
    "status": _status,
    "hosts": _hosts,
    "reports": _reports,
    "silence": _silence,
    "silences": _silences,
    "unsilence": _unsilence,
    "drain": _drain,
    "restored": _restored,
}
