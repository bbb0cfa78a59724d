"""A member's admin listener, on loopback: the fleet's page and its data, readiness and metrics.

It only reads. The page's queries go to the database one at a time, and the answer about the fleet is
cached for a moment, so that many open pages cost as much as one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import trio
from psycopg import Connection

from provider_proxy.common.pages import NO_SNIFF, check_host, page_headers
from provider_proxy.errors import ProviderProxyError, UsageError, WrongHostError
from provider_proxy.evidence.wire import encode_envelope
from provider_proxy.tenant.fleet import overview, views
from provider_proxy.tenant.fleet.database import Database, DatabaseError
from provider_proxy.tenant.watch.http_server import Answer, Asked

PAGE = "fleet.html"
HTML = b"text/html; charset=utf-8"
TEXT = b"text/plain; charset=utf-8"
METRICS_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
REMEMBERED_S = 2.0
MAX_WAITING = 8  # queries to the database at once; others are told to try again
MAX_MEMBERS = 200
MAX_SILENCES = 50


@dataclass(frozen=True, slots=True)
class Standing:
    """The status of this member.

    Attributes:
        trouble: why it does not serve normally; None where it does.
    """

    name: str
    version: str
    trouble: str | None


class FleetAdmin:
    """Answers of the listener.

    Args:
        metrics: in Prometheus' format.
    """

    def __init__(
        self, database: Database, standing: Callable[[], Standing], metrics: Callable[[], bytes]
    ) -> None:
        self._database = database
        self._standing = standing
        self._metrics = metrics
        self._page = resources.files("provider_proxy").joinpath(PAGE).read_bytes()
        self._headers = page_headers(self._page)
        self._limit = trio.CapacityLimiter(1)
        self._known: dict[int, tuple[float, bytes]] = {}

    async def answer(self, asked: Asked) -> Answer:
        """One answer; raises nothing but cancellation."""
        try:
            check_host(asked.host)
            if asked.method != "GET":
                return _refusal(405, "only GET is allowed here")
            return await self._get(asked.target)
        except WrongHostError as exc:
            return _refusal(421, str(exc))
        except UsageError as exc:
            return _refusal(400, str(exc))
        except ProviderProxyError as exc:
            return _refusal(503, str(exc))

    async def _get(self, target: str) -> Answer:
        """Raises: UsageError, DatabaseError."""
        parts = urlsplit(target)
        query = _query(parts.query)
        match parts.path:
            case "/":
                return Answer(status=200, body=self._page, content_type=HTML, headers=self._headers)
            case "/fleet":
                return _json(await self._fleet(_hours(query.pop("hours", "24")), query))
            case "/hosts":
                wanted = overview.Search(
                    text=query.pop("q", ""),
                    state=query.pop("state", ""),
                    after=query.pop("after", ""),
                )
                _demand_empty(query)
                return _json(await self._ask(partial(_host_page, wanted=wanted)))
            case "/healthz":
                return Answer(status=200, body=b"ok\n", content_type=TEXT)
            case "/readyz":
                trouble = self._standing().trouble
                text = (trouble or "ready") + "\n"
                return Answer(
                    status=503 if trouble else 200,
                    body=text.encode("ascii", "replace"),
                    content_type=TEXT,
                )
            case "/metrics":
                return Answer(status=200, body=self._metrics(), content_type=METRICS_TYPE)
        return _refusal(404, "no such path")

    async def _fleet(self, hours: int, query: dict[str, str]) -> bytes:
        _demand_empty(query)
        known = self._known.get(hours)
        if known is not None and trio.current_time() - known[0] < REMEMBERED_S:
            return known[1]
        body = await self._ask(partial(self._read_fleet, hours=hours))
        self._known[hours] = trio.current_time(), body
        return body

    async def _ask(self, work: Callable[[Connection[Any]], bytes]) -> bytes:
        """Raises: DatabaseError, also for too many requests at once."""
        if self._limit.statistics().tasks_waiting >= MAX_WAITING:
            raise DatabaseError("too many requests at once; try again in a moment")
        async with self._limit:
            return await self._database.run(work, limit_s=10)

    def _read_fleet(self, connection: Connection[Any], hours: int) -> bytes:
        view = views.fleet_view(connection)
        standing = self._standing()
        values = {
            "version": 1,
            "now": time.time(),
            "by": {
                "name": standing.name,
                "program": standing.version,
                "trouble": standing.trouble,
            },
            **status_values(view),
            "members": [_member_values(member) for member in view.members[:MAX_MEMBERS]],
            "trouble": list(overview.TROUBLE),
            "history": [
                {"at": at, "hosts": hosts} for at, hosts in overview.history(connection, hours)
            ],
            "silences": [
                {"id": str(s.id), "hosts": s.hosts, "why": s.why, "ends": s.ends.timestamp()}
                for s in views.silence_views(connection, most=MAX_SILENCES)
            ],
        }
        return encode_envelope(200, "Success", values)


def status_values(view: views.FleetView) -> dict[str, object]:
    """The fleet as `fleet status --json` prints it."""
    return {
        "members": [_member_values(member) for member in view.members],
        "shards": view.shards,
        "free_shards": view.free_shards,
        "hosts": view.by_state,
        "oldest_verdict_s": view.oldest_verdict_s,
        "waiting_reports": view.waiting_reports,
        "oldest_report_s": view.oldest_report_s,
    }


def _member_values(member: views.MemberView) -> dict[str, object]:
    return {
        "id": str(member.id),
        "name": member.name,
        "version": member.version,
        "shards": member.shards,
        "draining": member.draining,
    }


def host_values(host: views.HostView) -> dict[str, object]:
    """A host as `fleet hosts --json` prints it."""
    return {
        "name": host.name,
        "shard": host.shard,
        "state": host.state,
        "verdict_at": host.since.isoformat() if host.since else None,
        "error": host.error,
        "reason": host.reason,
    }


def _host_page(connection: Connection[Any], wanted: overview.Search) -> bytes:
    page = overview.search(connection, wanted, most=overview.MAX_PAGE)
    values = {
        "hosts": [host_values(host) for host in page.hosts],
        "count": min(page.count, overview.MAX_COUNTED),
        "more": page.count > overview.MAX_COUNTED,
        "next": page.next,
    }
    return encode_envelope(200, "Success", values)


def _query(text: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(
            text,
            keep_blank_values=True,
            strict_parsing=bool(text),
            max_num_fields=8,
            errors="strict",
        )
    except ValueError as exc:
        raise UsageError("the query cannot be read") from exc
    found = dict(pairs)
    if len(found) != len(pairs):
        raise UsageError("a parameter is given twice")
    return found


def _demand_empty(query: dict[str, str]) -> None:
    if query:
        raise UsageError(f"the parameter {sorted(query)[0][:40]!r} does not exist")


def _hours(text: str) -> int:
    if not text.isdecimal() or len(text) > 4 or int(text) not in overview.HOURS:
        raise UsageError(f"hours must be one of {', '.join(map(str, overview.HOURS))}")
    return int(text)


def _json(body: bytes) -> Answer:
    return Answer(status=200, body=body, headers=(NO_SNIFF,))


def _refusal(status: int, text: str) -> Answer:
    return Answer(status=status, body=encode_envelope(status, text, {}), headers=(NO_SNIFF,))
