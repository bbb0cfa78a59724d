"""What an import would change in the database, and the change itself.

Members watch the hosts in the database; a watcher's file is only their source. So an import first shows
what it would change, and removes nothing unless it is told to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from psycopg import Connection

from provider_proxy.tenant.fleet import rows, schema
from provider_proxy.tenant.fleet.hosts import ImportedFleet, ImportedHost, parse_trust

SHOWN_DIGEST_CHARS = 12
HOSTS_AT_ONCE = 2000  # in a statement: 4 MB; each statement notifies members once


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The difference between a file and the database.

    Attributes:
        added, changed, removed: hosts by name; for changed ones the differences, in words.
        same: how many hosts are unchanged.
    """

    added: tuple[str, ...]
    changed: Mapping[str, tuple[str, ...]]
    removed: tuple[str, ...]
    same: int


def plan(connection: Connection[Any], fleet: ImportedFleet) -> Plan:
    """Compare a file's hosts with the database's."""
    shards = range(schema.shards_of(connection))
    there = {row.name: row for row in rows.read_hosts(connection, dict.fromkeys(shards, rows.ALL))}
    changed = {}
    for host in fleet.hosts:
        if host.name in there and (words := _differences(there[host.name], host)):
            changed[host.name] = words
    names = {host.name for host in fleet.hosts}
    return Plan(
        added=tuple(host.name for host in fleet.hosts if host.name not in there),
        changed=changed,
        removed=tuple(sorted(set(there) - names)),
        same=len(names & set(there)) - len(changed),
    )


def _differences(old: rows.HostRow, new: ImportedHost) -> tuple[str, ...]:
    words = []
    for key in sorted(old.rules.keys() | new.rules.keys()):
        before, after = old.rules.get(key, "default"), new.rules.get(key, "default")
        if before != after:
            words.append(f"{key} {before} -> {after}")
    for key in sorted(old.files.keys() | new.files.keys()):
        before, after = old.files.get(key, "none"), new.files.get(key, "none")
        if before != after:
            cut = SHOWN_DIGEST_CHARS
            words.append(f"{key} {before[:cut]} -> {after[:cut]}")
    before, after = _ak_of(old.name, old.pin), _ak_of(new.name, new.pin)
    if before != after:
        words.append(f"AK {before} -> {after}")
    return tuple(words)


def _ak_of(name: str, pin: bytes) -> str:
    return parse_trust(name, pin).host.ak.name.hex() if pin else "none"


def apply(connection: Connection[Any], fleet: ImportedFleet, *, remove: bool) -> Plan:
    """Make the database's hosts those of a file, in one transaction.

    Args:
        remove: also remove hosts that the file does not have, with all that is known of them.

    Returns:
        What was changed; `removed` names hosts that only `remove` removes.
    """
    with connection.transaction():
        connection.execute("lock table host in share row exclusive mode")
        found = plan(connection, fleet)
        shards = schema.shards_of(connection)
        with connection.cursor() as cursor:
            if fleet.policies:
                cursor.executemany(
                    "insert into policy (digest, body) values (%s, %s) on conflict do nothing",
                    list(fleet.policies.items()),
                )
            wanted = {*found.added, *found.changed}
            put = [host for host in fleet.hosts if host.name in wanted]
            for first in range(0, len(put), HOSTS_AT_ONCE):
                part = put[first : first + HOSTS_AT_ONCE]
                values = {
                    "names": [host.name for host in part],
                    "shards": [rows.shard_of(host.name, shards) for host in part],
                    "rules": [json.dumps(dict(host.rules)) for host in part],
                    "files": [json.dumps(dict(host.files)) for host in part],
                    "pins": [host.pin or None for host in part],
                }
                cursor.execute(_PUT, values)
            if remove and found.removed:
                cursor.execute("delete from host where name = any(%s)", (list(found.removed),))
            cursor.execute(_FORGET_POLICIES)
    return found


_PUT = """
insert into host (name, shard, rules, files, pin)
select name, shard, rules::jsonb, files::jsonb, pin
from unnest(%(names)s::text[], %(shards)s::int[], %(rules)s::text[], %(files)s::text[],
    %(pins)s::bytea[]) as new (name, shard, rules, files, pin)
on conflict (name) do update set rules = excluded.rules, files = excluded.files,
    pin = excluded.pin, change = nextval('host_change')
"""
_FORGET_POLICIES = """
delete from policy p where not exists (
    select from host h, jsonb_each_text(h.files) f where f.value = p.digest
)
"""
