"""A Keylime agent as the quoter: the host already runs one, and it owns the chip.

Every answer is verified before it is taken, with the AK that the provider's registrar vouches for and
that stays the same for as long as the daemon runs. Failures climb the same ladder as the chip's; a fatal
one opens the circuit until the agent is well again and still has this AK.

What such an agent signs is not ours alone: it also signs raw nonces, for whoever may ask it. So nothing
may rest on "only the proxy has this signed": a host with this quoter makes no claims about VMs.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from provider_proxy.errors import (
    AkChangedError,
    HostError,
    PcrDigestError,
    QuoteError,
    VerificationError,
)
from provider_proxy.evidence import attestation
from provider_proxy.evidence.model import AttestationKey, HashAlg, Quote, QuoteRequest
from provider_proxy.evidence.wire import LogsPart
from provider_proxy.host.logs.follow import TOO_LONG, UNREADABLE
from provider_proxy.host.logs.ima_list import ImaList, TooLongError
from provider_proxy.host.logs.parts import Logs, share_out
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.quoters.agent_http import AgentClient, AgentError, AgentReply
from provider_proxy.host.quoters.circuit import PROBE_S, Circuit
from provider_proxy.host.quoters.tpm_opener import HostIdentity
from provider_proxy.host.tpm.pace import Pace
from provider_proxy.host.tpm.response_codes import Step, wait_s
from provider_proxy.host.tpm.state import ChipState

log = logging.getLogger(__name__)

WHOLE_LIMIT_S = (
    180.0  # registrar, version and quote, with retries: at the start, and for each probe
)
OPEN_TRIES = 10  # some four seconds of an agent that is busy, or just coming up
BOOT_MASK = 1  # PCR 0, which makes an agent send the firmware's log


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentBinding:
    """What the provider's registrar says of the agent, checked.

    Attributes:
        identity: of the host whose TPM the agent owns.
        client: speaks to the agent, whose certificate is the record's.
    """

    ak: AttestationKey
    identity: HostIdentity
    client: AgentClient


Bind = Callable[[], Awaitable[AgentBinding]]
"""Asks the provider's registrar. Raises `HostError` where it does not vouch for the agent."""


class AgentLogs:
    """The host's logs as the agent sends them along with quotes; a `batcher.LogSource`.

    The list is kept, so that a window brings its new lines only: in a file without a name.

    Args:
        directory: where that file is made.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self.forget()

    def forget(self) -> None:
        """Begin from the start: what is kept is another boot's.

        A part of the old list may be on its way just now: its file goes with the last who reads it.
        """
        self._list: ImaList | None = None
        self._lost = 0  # lines of a list that is not kept
        self._missing: str | None = None
        self._uefi: bytes | None = None

    def close(self) -> None:
        """Forget all."""
        self.forget()

    @property
    def next_entry(self) -> int:
        """Which part of the list to ask the agent for."""
        return self._lost if self._list is None else self._list.lines

    def take(self, reply: AgentReply) -> bool:
        """Add what an answer brought; False where its lines do not join those that we have.

        Blocks where the list is long.
        """
        if reply.uefi is not None:
            self._uefi = reply.uefi
        if reply.ima is None:
            return True
        if reply.ima_entry == 0 != self.next_entry:  # all of it, once more
            self._list, self._lost, self._missing = None, 0, None
        if reply.ima_entry != self.next_entry:
            return False
        text = reply.ima[: reply.ima.rfind("\n") + 1]  # half a line is what a limit has left
        lines = reply.ima_entry + text.count("\n")
        if self._missing is not None:  # it is not asked for from its beginning each time
            self._lost = lines
            return True
        try:
            if self._list is None:
                self._list = ImaList(self._directory)
            self._list.append(text.encode("utf-8", "surrogatepass"))
        except (TooLongError, OSError) as exc:
            self._missing = TOO_LONG if isinstance(exc, TooLongError) else UNREADABLE
            self._list, self._lost = None, lines
            log.warning(
                "the agent's IMA list is not kept, answers go without it: %s", self._missing
            )
        return True

    async def read(self, requests: tuple[QuoteRequest, ...]) -> tuple[LogsPart | None, ...]:
        """For each request the logs that its mask asks for, as JSON; None where it asks for none."""
        logs = Logs(ima=self._list, ima_missing=self._missing, uefi=self._uefi)
        return await trio.to_thread.run_sync(share_out, requests, logs)


class AgentQuoter:
    """A `batcher.Quoter` over a Keylime agent. Made by `open_quoter`.

    Attributes:
        logs: the host's logs.
    """

    def __init__(
        self,
        bound: AgentBinding,
        bind: Bind,
        pace: Pace,
        metrics: Metrics,
        directory: Path | None = None,
    ) -> None:
        self._client = bound.client
        self._bind = bind
        self._pace = pace
        self._metrics = metrics
        self._circuit = Circuit(metrics, "the Keylime agent")
        self._turn = trio.Lock()
        self._rest_until = 0.0
        self._reset_count: int | None = None
        self.ak = bound.ak
        self.identity = bound.identity
        self.logs = AgentLogs(directory)

    @property
    def state(self) -> ChipState:
        """How the agent does now. Nothing hangs: a request to it has a deadline of its own."""
        return self._pace.state(time.monotonic(), trouble=self._circuit.why)

    async def ready(self) -> None:
        """Return when the agent is free and its TPM has rested, or in trouble."""
        while self._circuit.why is None:
            rest = self._rest_until - time.monotonic()
            if self._turn.locked():
                async with self._turn:  # wait our turn
                    pass
            elif rest > 0:
                await trio.sleep(rest)
            else:
                break
        await trio.lowlevel.checkpoint()

    async def quote(self, qualifying: bytes, bank: HashAlg, mask: int) -> Quote:
        """Have the PCRs quoted; cancel it at your deadline.

        The quote holds PCR 16 too, whatever the mask: agents put a key of theirs there.

        Raises:
            QuoteError: no quote can be had now.
        """
        if bank is not self.ak.signature_hash:
            raise QuoteError("an agent quotes the bank of its AK's hash alone")
        tries = 0
        while self._circuit.why is None:
            try:
                return await self._ask(qualifying, mask)
            except AgentError as exc:
                self._metrics.tpm_errors.labels(exc.cause, exc.step.value).inc()
                if exc.step is Step.FATAL:
                    self._circuit.open(str(exc))
                    raise QuoteError("the agent refused", retry_after_s=PROBE_S) from exc
                tries += 1
                self._metrics.tpm_retries.labels(exc.step.value).inc()
                log.warning("agent: %s; %s, try %d", exc, exc.step.value, tries + 1)
                await trio.sleep(wait_s(exc.step, tries))
        raise QuoteError(self._circuit.why, retry_after_s=PROBE_S)

    async def _ask(self, qualifying: bytes, mask: int) -> Quote:
        """One request, alone and after the rest; its answer judged.

        Raises:
            AgentError: there is no usable quote.
        """
        async with self._turn:
            rest = self._rest_until - time.monotonic()
            if rest > 0:
                await trio.sleep(rest)
            begin = time.monotonic()
            try:
                reply = await self._client.quote(
                    qualifying.decode("ascii"), mask, self.logs.next_entry
                )
            finally:  # cancelled or not: the chip was at work
                took = time.monotonic() - begin
                self._rest_until = begin + took + self._pace.rest_after(took)
                self._pace.worked(begin, begin + took)
            self._pace.learn(took)
        self._check(reply.quote, qualifying, mask)
        if not await trio.to_thread.run_sync(self.logs.take, reply):
            self.logs.forget()
            raise AgentError(
                "the agent's IMA list does not go on where it ended",
                step=Step.CLEAN,
                cause="IMA_ENTRY",
            )
        return reply.quote

    def _check(self, quote: Quote, qualifying: bytes, mask: int) -> None:
        """Take nothing for a quote that a tenant would refuse.

        Raises:
            AgentError: it is not signed by our AK, not over this, or not of these PCRs.
        """
        try:
            attest = attestation.check_quote(quote, self.ak)
        except PcrDigestError as exc:  # a PCR moved between reading and quoting
            raise AgentError(
                f"the agent's PCR values are not those quoted: {exc}",
                step=Step.AGAIN,
                cause="PCRS",
            ) from exc
        except VerificationError as exc:
            raise AgentError(
                f"the agent's quote does not verify: {exc}", step=Step.FATAL, cause="UNVERIFIED"
            ) from exc
        if attest.extra_data != qualifying or attest.mask & mask != mask:
            raise AgentError(
                "the agent quoted something else than it was asked for",
                step=Step.FATAL,
                cause="UNVERIFIED",
            )
        reset_count = attest.clock.reset_count
        if self._reset_count not in (None, reset_count):
            self._reset_count = reset_count
            self.logs.forget()
            raise AgentError(
                "the host has rebooted; its logs begin anew", step=Step.AGAIN, cause="REBOOT"
            )
        self._reset_count = reset_count

    async def run(self) -> None:
        """Probe an open circuit until the agent quotes again, for ever."""
        await self._circuit.run(self.probe)

    async def probe(self) -> None:
        """Ask the registrar and the agent anew.

        Raises:
            AkChangedError: the agent has another AK now: nothing may be served under the old name.
            HostError: there is no quote.
        """
        with _whole("the agent did not come back"):
            await self._probe()

    async def _probe(self) -> None:
        bound = await self._bind()
        if bound.ak.name != self.ak.name:
            await bound.client.close()
            raise AkChangedError(
                f"the agent had the AK {self.ak.name.hex()} and now has {bound.ak.name.hex()}"
            )
        await self._client.close()
        self._client = bound.client
        await self.try_quote()

    async def try_quote(self) -> None:
        """A quote for nobody, of PCR 0.

        Raises:
            AgentError: there is none.
        """
        await self._ask(secrets.token_hex(16).encode("ascii"), BOOT_MASK)

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()


@asynccontextmanager
async def open_quoter(
    bind: Bind,
    max_duty: float,
    metrics: Metrics,
    directory: Path | None = None,
    *,
    ima_wait_s: float | None = None,
) -> AsyncIterator[AgentQuoter]:
    """Find the agent and have a first quote, for as long as the context lasts.

    Args:
        max_duty: share of the chip's time that our requests may take.
        directory: where the copy of the host's IMA list is made.
        ima_wait_s: bound on what the host's IMA waits for us on average; None for no bound.

    Raises:
        HostError: the registrar does not vouch for the agent, or the agent gives no quote.
    """
    began = trio.current_time()
    with _whole("the agent's record at the registrar did not come", began):
        bound = await bind()
    quoter = AgentQuoter(bound, bind, Pace(max_duty, ima_wait_s), metrics, directory)
    try:
        with _whole("the agent gave no first quote", began):
            await _first_quote(quoter)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(quoter.run)
            yield quoter
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await quoter.close()


@contextmanager
def _whole(what: str, began: float | None = None) -> Iterator[None]:
    """Bound a procedure of several steps, each of which waits for somebody else.

    Args:
        what: has happened where it takes too long.
        began: when, where the procedure goes over several such blocks.

    Raises:
        HostError: it took longer than `WHOLE_LIMIT_S`.
    """
    began = trio.current_time() if began is None else began
    try:
        with trio.fail_at(began + WHOLE_LIMIT_S):
            yield
    except trio.TooSlowError as exc:
        raise HostError(f"{what} within {WHOLE_LIMIT_S:g} s") from exc


async def _first_quote(quoter: AgentQuoter) -> None:
    """Learn its time, and the firmware's log, before the first tenant asks.

    Raises:
        HostError: it gives none.
    """
    for tries in range(1, OPEN_TRIES + 1):
        try:
            await quoter.try_quote()
        except AgentError as exc:
            if exc.step is Step.FATAL or tries == OPEN_TRIES:
                raise
            log.warning("agent: %s; asking again", exc)
            await trio.sleep(wait_s(exc.step, tries))
        else:
            return
