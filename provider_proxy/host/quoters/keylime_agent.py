"""A Keylime agent as the quoter, for a host that already runs one, which owns the chip.

Every answer is verified before use, with the AK from the provider's registrar, which stays the same for
as long as the daemon runs. Failures are handled with the same steps as the chip's (AGAIN, CLEAN, SLOW,
FATAL); a fatal one opens the circuit until the agent works again and still has this AK.

Such an agent also signs raw nonces for any client that may use it. So "only the proxy can have this
signed" is not true here: a host with this quoter makes no claims about VMs.
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
OPEN_TRIES = 10  # about four seconds, for an agent that is busy or just starting
BOOT_MASK = 1  # PCR 0, which makes an agent send the firmware's log


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentBinding:
    """The agent's record at the provider's registrar, checked.

    Attributes:
        identity: of the host whose TPM the agent owns.
        client: talks to the agent, which must show the record's certificate.
    """

    ak: AttestationKey
    identity: HostIdentity
    client: AgentClient


Bind = Callable[[], Awaitable[AgentBinding]]
"""Asks the provider's registrar. Raises `HostError` if the agent's record is missing or not valid."""


class AgentLogs:
    """The host's logs, as the agent sends them with quotes; a `batcher.LogSource`.

    The list is kept in a file without a name, so that each quote brings only new lines.

    Args:
        directory: of that file.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self.forget()

    def forget(self) -> None:
        """Start again from the beginning: the kept list is of an earlier boot.

        A part of the old list may be in use now: its file is removed with its last reader.
        """
        self._list: ImaList | None = None
        self._lost = 0  # number of lines of a list that is not kept
        self._missing: str | None = None
        self._uefi: bytes | None = None

    def close(self) -> None:
        """Forget everything."""
        self.forget()

    @property
    def next_entry(self) -> int:
        """The first entry to ask the agent for."""
        return self._lost if self._list is None else self._list.lines

    def take(self, reply: AgentReply) -> bool:
        """Add an answer's lines; False if they do not continue those that we have.

        Blocks where the list is long.
        """
        if reply.uefi is not None:
            self._uefi = reply.uefi
        if reply.ima is None:
            return True
        if reply.ima_entry == 0 != self.next_entry:  # the whole list again
            self._list, self._lost, self._missing = None, 0, None
        if reply.ima_entry != self.next_entry:
            return False
        text = reply.ima[: reply.ima.rfind("\n") + 1]  # a size limit may have cut the last line
        lines = reply.ima_entry + text.count("\n")
        if self._missing is not None:  # only counted, so as not to fetch all of it each time
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
                "the agent's IMA list is not kept, so answers do not contain it: %s", self._missing
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
        """The agent's state now. Never reports a hang: each request to it has a deadline."""
        return self._pace.state(time.monotonic(), trouble=self._circuit.why)

    async def ready(self) -> None:
        """Return when the agent is free and its TPM has rested, or when there is trouble."""
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
        """Get a quote of the PCRs; cancel it at your deadline.

        The quote also covers PCR 16, whatever the mask: agents put one of their keys there.

        Raises:
            QuoteError: the agent gives no quote now.
        """
        if bank is not self.ak.signature_hash:
            raise QuoteError("a Keylime agent quotes only the bank of its AK's hash")
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
        """One request at a time, after the rest; checks the answer.

        Raises:
            AgentError: the agent gave no usable quote.
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
            finally:  # also if cancelled: the chip has worked
                took = time.monotonic() - begin
                self._rest_until = begin + took + self._pace.rest_after(took)
                self._pace.worked(begin, begin + took)
            self._pace.learn(took)
        self._check(reply.quote, qualifying, mask)
        if not await trio.to_thread.run_sync(self.logs.take, reply):
            self.logs.forget()
            raise AgentError(
                "the agent's IMA list does not continue where it ended before",
                step=Step.CLEAN,
                cause="IMA_ENTRY",
            )
        return reply.quote

    def _check(self, quote: Quote, qualifying: bytes, mask: int) -> None:
        """Refuse everything that a tenant would refuse.

        Raises:
            AgentError: it is not signed by this AK, over other data, or of other PCRs.
        """
        try:
            attest = attestation.check_quote(quote, self.ak)
        except PcrDigestError as exc:  # a PCR changed between reading and quoting
            raise AgentError(
                f"the agent's PCR values do not match its quote: {exc}",
                step=Step.AGAIN,
                cause="PCRS",
            ) from exc
        except VerificationError as exc:
            raise AgentError(
                f"the agent's quote does not verify: {exc}", step=Step.FATAL, cause="UNVERIFIED"
            ) from exc
        if attest.extra_data != qualifying or attest.mask & mask != mask:
            raise AgentError(
                "the agent's quote is over other data or PCRs than requested",
                step=Step.FATAL,
                cause="UNVERIFIED",
            )
        reset_count = attest.clock.reset_count
        if self._reset_count not in (None, reset_count):
            self._reset_count = reset_count
            self.logs.forget()
            raise AgentError(
                "the host has rebooted; its logs start again", step=Step.AGAIN, cause="REBOOT"
            )
        self._reset_count = reset_count

    async def run(self) -> None:
        """While the circuit is open, probe until the agent quotes again; runs until cancelled."""
        await self._circuit.run(self.probe)

    async def probe(self) -> None:
        """Ask the registrar and the agent again.

        Raises:
            AkChangedError: the agent has another AK now: it must not serve under the old AK's name.
            HostError: the agent gives no quote.
        """
        with _whole("the agent did not answer again"):
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
        """A test quote of PCR 0.

        Raises:
            AgentError: the agent gave none.
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
    """Find the agent and take a first quote; the quoter is open as long as the context.

    Args:
        max_duty: share of the chip's time that our requests may take.
        directory: for the copy of the host's IMA list.
        ima_wait_s: limit of IMA's mean wait for our requests; None for no limit.

    Raises:
        HostError: the registrar's record is not valid, or the agent gives no quote.
    """
    began = trio.current_time()
    with _whole("did not get the agent's record from the registrar", began):
        bound = await bind()
    quoter = AgentQuoter(bound, bind, Pace(max_duty, ima_wait_s), metrics, directory)
    try:
        with _whole("the agent did not give a first quote", began):
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
    """Bound a procedure of several steps, each of which waits for another program.

    Args:
        what: the error's text if it takes too long.
        began: the start, if the procedure has several such blocks.

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
    """Learn the time of a quote and get the firmware's log, before the first request.

    Raises:
        HostError: the agent gives no quote.
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
