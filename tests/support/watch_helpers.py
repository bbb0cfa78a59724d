"""What tests of the watcher share: proxies on memory streams over a `SoftTpm`, and hosts over them."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
import trio.testing
from helpers import make_answer, make_evidence
from link_claims import claims_bytes

from provider_proxy.errors import ProviderProxyError
from provider_proxy.evidence.model import ClockState, QuoteRequest, TrustedHost
from provider_proxy.evidence.query import parse_quote_query
from provider_proxy.tenant.policies import PolicyFiles
from provider_proxy.tenant.watch.budget import Budget
from provider_proxy.tenant.watch.host import HostWatch, Shared
from provider_proxy.tenant.watch.http import Endpoint
from provider_proxy.tenant.watch.metrics import WatchMetrics
from provider_proxy.tenant.watch.questions import Setting, Trust
from provider_proxy.tenant.watch.reports import Report, Settled
from provider_proxy.tenant.watch.store import StateStore
from provider_proxy.tenant.watch.tables import HostRules
from provider_proxy.testing.soft_tpm import SoftTpm
from provider_proxy.trust.ek_judges import AskHost


def response(
    status: int = 200, body: bytes = b"", *headers: str, length: int | None = None
) -> bytes:
    """A response as a proxy writes it."""
    size = len(body) if length is None else length
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {size}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


class FakeProxy:
    """A proxy on memory streams.

    Attributes:
        answer: makes the bytes that go back; None to be silent, b"" to hang up.
        asked: requests so far, and when on trio's clock.
        connections: opened so far.
        refuses: connections are refused.
        kept: it keeps connections open between requests.
        delay_s: before each answer.
        drip_s: between two bytes of one; 0 to send it at once.
    """

    def __init__(self, tpm: SoftTpm | None = None) -> None:
        self.tpm = tpm or SoftTpm(pcrs={0: b"firmware"})
        self.asked: list[tuple[float, QuoteRequest]] = []
        self.connections = 0
        self.refuses = False
        self.kept = True
        self.delay_s = 0.0
        self.drip_s = 0.0
        self.logs: dict[str, Any] = {}
        self.identity: bytes | None = None  # what /verifier/identity answers
        self.answer: Callable[[QuoteRequest], bytes | None] = self.good
        self._nursery: trio.Nursery | None = None

    def good(self, request: QuoteRequest) -> bytes:
        """Evidence, with `logs` put in."""
        body = make_evidence(self.tpm, request)
        if self.logs:
            values = json.loads(body)
            values["results"] |= self.logs
            body = json.dumps(values).encode()
        return response(200, body)

    def serve_in(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    async def connect(self) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        if self.refuses:
            raise ConnectionRefusedError(111, "Connection refused")
        self.connections += 1
        ours, theirs = trio.testing.memory_stream_pair()
        assert self._nursery is not None
        self._nursery.start_soon(self._serve, theirs)
        return ours

    async def _serve(self, stream: trio.abc.Stream) -> None:
        buffer = b""
        try:
            while data := await stream.receive_some(65536):
                buffer += data
                if b"\r\n\r\n" not in buffer:
                    continue
                head, _, buffer = buffer.partition(b"\r\n\r\n")
                path, _, text = head.split(b" ")[1].partition(b"?")
                if path == b"/verifier/identity":
                    await stream.send_all(self.identity or response(404, b"{}"))
                    continue
                query = text.decode()
                request = parse_quote_query(query)
                self.asked.append((trio.current_time(), request))
                reply = self.answer(request)
                if reply is None:
                    await trio.sleep_forever()
                await trio.sleep(self.delay_s)
                if self.drip_s:
                    for byte in reply or b"":
                        await stream.send_all(bytes([byte]))
                        await trio.sleep(self.drip_s)
                await stream.send_all(reply or b"")
                if not reply or not self.kept:
                    await stream.aclose()
                    return
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeEndpoint(Endpoint):
    """Leads to a `FakeProxy`."""

    proxy: FakeProxy

    async def connect(self) -> trio.abc.Stream:
        return await self.proxy.connect()


class FakeAks:
    """Trusts the proxy's own TPM, or raises."""

    def __init__(self, tpm: SoftTpm, newest: ClockState | None = None) -> None:
        self.tpm = tpm
        self.newest = newest
        self.error: ProviderProxyError | None = None

    async def trusted(self, name: str, rules: HostRules, ask_host: AskHost | None = None) -> Trust:
        if self.error is not None:
            raise self.error
        return Trust(host=TrustedHost(ak=self.tpm.ak, label=name), newest=self.newest)


@dataclass
class Rig:
    """One watched host over one fake proxy."""

    directory: Path
    proxy: FakeProxy = field(default_factory=FakeProxy)
    reports: list[dict[str, Any]] = field(default_factory=list)
    settled: list[Settled] = field(default_factory=list)
    metrics: WatchMetrics = field(default_factory=WatchMetrics)
    budget: Budget = field(default_factory=lambda: Budget(in_worker=inline))

    def __post_init__(self) -> None:
        self.aks = FakeAks(self.proxy.tpm)
        self.store = StateStore(self.directory / "state")

    def setting(self, **rules: Any) -> Setting:
        given: dict[str, Any] = {"provider_ip": "192.0.2.1", "jitter": 0.0}
        if not {"tpm_policy", "ima", "uefi", "first_use_pcrs"} & set(rules):
            given |= {"insecure_any_state": True}
        endpoint = FakeEndpoint(
            host="192.0.2.1", port=8890, context=None, server_name="x", proxy=self.proxy
        )
        made = HostRules(**(given | rules))
        return Setting(
            rules=made,
            files=PolicyFiles(),
            aks=self.aks,
            endpoint=endpoint if made.need_provider_quote else None,
        )

    def host(self, *, last: Any = None, **rules: Any) -> HostWatch:
        shared = Shared(
            store=self.store,
            metrics=self.metrics,
            tell=self._tell,
            settled=self._settled,
            budget=self.budget,
            rng=random.Random(1),
            now=lambda: 1_800_000_000.0,
        )
        return HostWatch("h", self.setting(**rules), shared, last=last)

    def _tell(self, report: Report) -> None:
        self.reports.append(json.loads(json.dumps(report)))

    def _settled(self, settled: Settled) -> None:
        self.settled.append(settled)
        if settled.report is not None:
            self._tell(settled.report)

    def states(self) -> list[str]:
        return [report["state"] for report in self.reports if report["kind"] == "verdict"]

    def checks(self, result: str) -> float:
        return (
            self.metrics.registry.get_sample_value(
                "provider_proxy_watch_checks_total", {"result": result}
            )
            or 0.0
        )


async def inline(work: Callable[..., Any], *args: object) -> Any:
    """In place of a thread, which an autojump clock does not wait for."""
    await trio.lowlevel.checkpoint()
    return work(*args)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def link(proxy: FakeProxy, **changes: Any) -> None:
    """Let a proxy answer with the claims of a VM's link; changes are those of `link_claims`."""

    def answer(request: QuoteRequest) -> bytes:
        made = make_answer(proxy.tpm, request, claims=claims_bytes(**changes))
        return response(200, b"".join(made.body()))

    proxy.answer = answer
