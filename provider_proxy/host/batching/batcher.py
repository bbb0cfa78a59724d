"""Answers each request with one shared quote and its own proof.

`submit` puts a request into the request queue and waits. Two tasks, with room for one batch between
them, do the rest:

    fill   waits until a line is ripe and the chip is ready, seals a batch, builds its tree, quotes
    flush  runs the tenants' own checks over the batch and answers every waiter

A line is ripe (it may be sealed) when its oldest request has waited for the window, when it holds
`max_leaves`, or at drain. While the chip is busy or rests, lines keep collecting: under load they
collect for as long as a quote takes.

Invariants: every waiter gets a result or an error, whatever happens; nothing is sent that `verify`
would refuse. Uses no sockets, no files and no TPM.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import trio

from provider_proxy.errors import (
    ClientGoneError,
    DeadlineError,
    DrainingError,
    HostError,
    NotFoundError,
    QuoteError,
    RequestError,
    SelfCheckError,
    ServiceError,
    VerificationError,
)
from provider_proxy.evidence import inclusion
from provider_proxy.evidence.model import (
    AttestationKey,
    HashAlg,
    Quote,
    QuoteRequest,
    Tenant,
)
from provider_proxy.evidence.wire import EvidenceEncoder, LogsPart
from provider_proxy.host.batching.batch import (
    Answer,
    Batch,
    SealedBy,
    Waiter,
    build_batch_tree,
    check_batch,
)
from provider_proxy.host.batching.queue import BatchSettings, RequestQueue
from provider_proxy.host.batching.report import report
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.tpm.state import ChipState

STOPPED = "the proxy stopped before it could answer this request"


class Quoter(Protocol):
    """Something that signs quotes, one at a time: the host's TPM, or a Keylime agent."""

    @property
    def ak(self) -> AttestationKey:
        """The key that signs."""
        ...

    @property
    def state(self) -> ChipState:
        """The state of its chip."""
        ...

    async def ready(self) -> None:
        """Return when a quote could start at once."""
        ...

    async def quote(self, qualifying: bytes, bank: HashAlg, mask: int) -> Quote:
        """Take one quote.

        Raises:
            HostError, ServiceError: it could not.
        """
        ...


class LogSource(Protocol):
    """Reads the host's logs after a quote."""

    async def read(self, requests: tuple[QuoteRequest, ...]) -> tuple[LogsPart | None, ...]:
        """For each request the logs that its mask asks for, of `encode_logs`; None for none."""
        ...


ClaimsSource = Callable[[Tenant, QuoteRequest], bytes]
"""Claims about the VM that a request names. Raises `NotFoundError` where there are no such claims."""


Audit = Callable[[Batch], Awaitable[None]]
"""Records a batch that was answered or refused."""

Observe = Callable[[Batch], None]
"""Called with each batch once its waiters have their answers or error. Quick; raises nothing."""

CHIP_SLACK_S = (
    0.005  # a batch sealed this long after its window waited for the chip, not for a timer
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """The requests that wait for a batch now.

    Attributes:
        oldest_s: how long the first of them has waited; 0 where none waits.
    """

    waiting: int
    lines: int
    oldest_s: float


class Batcher:
    """Answers tenants' requests from shared quotes. `run` must be running in a nursery.

    Args:
        claims: the source of claims about VMs; None where the host makes none.
        logs: the source of the host's logs; None where it has none.
        boottime: of the host, seconds since the epoch; None where unknown.
        audit: records each batch after its waiters were answered; None for no records.
        observe: called with each batch, for the status; None for no calls.
        in_worker: runs the two long computations of a batch; a thread, except in tests of timing.
    """

    def __init__(
        self,
        quoter: Quoter,
        settings: BatchSettings,
        metrics: Metrics,
        *,
        claims: ClaimsSource | None = None,
        logs: LogSource | None = None,
        boottime: int | None = None,
        audit: Audit | None = None,
        observe: Observe | None = None,
        in_worker: Callable[..., Awaitable[Any]] = trio.to_thread.run_sync,
    ) -> None:
        self._in_worker = in_worker
        self._audit = audit
        self._observe_batch = observe
        self._quoter = quoter
        self._metrics = metrics
        self._claims = claims
        self._logs = logs
        self._boottime = boottime
        self._room = RequestQueue(settings, lambda: quoter.state)
        self._settings = settings
        metrics.queue.set_function(lambda: self._room.waiting)
        self._batches = 0
        self._sealed: set[Batch] = set()
        self._drain = trio.Event()
        self._wake = trio.Event()
        self._unanswered = 0
        self._all_answered = trio.Event()

    async def submit(
        self,
        request: QuoteRequest,
        tenant: Tenant,
        *,
        timeout_s: float,
        is_gone: Callable[[], bool] | None = None,
    ) -> Answer:
        """Wait for this request's quote and proof.

        Args:
            timeout_s: how long the tenant waits. The caller enforces it by cancelling; here it is
                only compared with the estimate.
            is_gone: True once the client has hung up; called when the batch is sealed.

        Raises:
            RequestError: the tenant may not have this, or is over a limit of its own.
            ServiceError: the proxy is overloaded or draining, or the quote failed.
        """
        if self._drain.is_set():
            raise DrainingError(
                "the proxy is shutting down", retry_after_s=self._room.retry_after_s()
            )
        chip = self._quoter.state
        if chip.trouble is not None:
            raise QuoteError(chip.trouble, retry_after_s=self._room.retry_after_s())
        if request.vm is not None:
            self._claims_of(tenant, request)  # refuses a VM without claims
        waiter, wakes = self._room.admit(
            request,
            tenant,
            chip,
            now=trio.current_time(),
            timeout_s=timeout_s,
            is_gone=is_gone,
            chip_idle=not self._sealed,
        )
        if wakes:
            self._wake.set()
        self._unanswered += 1
        try:
            await waiter.done.wait()
        finally:
            self._unanswered -= 1
            if self._drain.is_set() and not self._unanswered:
                self._all_answered.set()
            if not waiter.sealed:
                self._room.leave(waiter)
        if waiter.error is not None:
            # A copy: the batch shares the error, which would collect the traceback of every waiter.
            raise waiter.error.copy() from waiter.error.__cause__
        assert waiter.answer is not None  # done is set with one of the two
        return waiter.answer

    def _claims_of(self, tenant: Tenant, request: QuoteRequest) -> bytes:
        if self._claims is None:
            raise NotFoundError("no VM of yours with this UUID runs on this host")
        return self._claims(tenant, request)

    @property
    def queue(self) -> Queue:
        """The requests that wait for a batch now."""
        room = self._room
        oldest = room.ripe_at() - self._settings.window_s  # infinite where no request waits
        return Queue(
            waiting=room.waiting,
            lines=room.lines,
            oldest_s=max(0.0, trio.current_time() - oldest),
        )

    async def run(self) -> None:
        """Batch until cancelled; then refuse every waiter."""
        send, receive = trio.open_memory_channel[Batch](1)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._fill, send)
                nursery.start_soon(self._flush, receive)
        finally:
            self.abandon()

    async def drain(self) -> None:
        """Admit nothing new, seal what waits, and return when every waiter has its answer."""
        self._drain.set()
        self._wake.set()
        if not self._unanswered:
            self._all_answered.set()
        await self._all_answered.wait()

    def abandon(self) -> None:
        """Refuse every waiter: there will be no more quotes."""
        self._drain.set()
        for batch in self._sealed:
            batch.refuse(DrainingError(STOPPED))
        while keys := self._room.ripe(0, every=True):
            for waiter in self._room.take(keys[0])[0]:
                waiter.refuse(DrainingError(STOPPED))

    async def _fill(self, send: trio.MemorySendChannel[Batch]) -> None:
        while True:
            await self._until_ripe()
            await self._quoter.ready()
            batch = self._seal()
            if batch is None:
                continue
            self._sealed.add(batch)
            await self._quote(batch)
            await send.send(batch)

    async def _until_ripe(self) -> None:
        while not self._room.ripe(trio.current_time(), every=self._drain.is_set()):
            self._wake = trio.Event()
            with trio.move_on_at(self._room.ripe_at()):
                await self._wake.wait()

    def _seal(self) -> Batch | None:
        """Seal the next batch; None where all its waiters have gone."""
        now = trio.current_time()
        ripe = self._room.ripe(now, every=self._drain.is_set())
        if not ripe:
            return None
        taken, opened = self._room.take(ripe[0])
        waiters = [waiter for waiter in taken if self._stays(waiter)]
        if not waiters:
            return None
        self._batches += 1
        by = self._why_now(len(taken), now - opened)
        return Batch(self._batches, ripe[0][0], waiters, opened, now, by)

    def _why_now(self, taken: int, waited_s: float) -> SealedBy:
        if waited_s > self._settings.window_s + CHIP_SLACK_S:
            return SealedBy.CHIP
        if taken >= self._settings.max_leaves:
            return SealedBy.FULL
        return SealedBy.DRAIN if self._drain.is_set() else SealedBy.WINDOW

    def _stays(self, waiter: Waiter) -> bool:
        """Fix a waiter's claims; False where its client hung up or its VM has gone."""
        if waiter.is_gone is not None and waiter.is_gone():
            self._metrics.abandoned.inc()
            waiter.refuse(ClientGoneError("the client went away"))
            return False
        if waiter.request.vm is not None:
            try:
                waiter.claims = self._claims_of(waiter.tenant, waiter.request)
            except RequestError as exc:
                waiter.refuse(exc)
                return False
        return True

    async def _quote(self, batch: Batch) -> None:
        """Build the tree and quote its root; on failure every waiter gets the error."""
        root = await self._in_worker(build_batch_tree, batch)
        qualifying = inclusion.qualifying_data(root, batch.size)
        begin = trio.current_time()
        try:
            with trio.fail_at(batch.deadline):
                batch.quote = await self._quoter.quote(qualifying, batch.bank, batch.mask)
        except trio.TooSlowError:
            error: ServiceError = DeadlineError("the TPM did not answer in time")
        except HostError as exc:
            error = QuoteError("the TPM gave no quote", retry_after_s=self._room.retry_after_s())
            error.__cause__ = exc
        except ServiceError as exc:
            error = exc
        else:
            return
        finally:
            batch.quote_s = trio.current_time() - begin
        batch.refuse(error)

    async def _flush(self, receive: trio.MemoryReceiveChannel[Batch]) -> None:
        async with trio.open_nursery() as nursery:
            async for batch in receive:
                if any(waiter.request.wants_ima for waiter in batch.waiters):
                    # A long IMA list does not delay others.
                    nursery.start_soon(self._end, batch)
                else:
                    await self._end(batch)

    async def _end(self, batch: Batch) -> None:
        if batch.quote is not None:
            await self._finish(batch)
        self._sealed.discard(batch)
        self._observe(batch)
        if self._audit is not None:
            await self._audit(batch)

    async def _finish(self, batch: Batch) -> None:
        """Self-check, then answer."""
        assert batch.quote is not None
        quoter, quote = self._quoter, batch.quote
        try:
            await self._in_worker(check_batch, batch, quote, quoter.ak)
        except VerificationError as exc:
            self._metrics.selfcheck_failures.inc()
            error = SelfCheckError("the quote failed the proxy's own verification")
            error.__cause__ = exc
            batch.refuse(error)
            return
        requests = tuple(waiter.request for waiter in batch.waiters)
        logs: tuple[LogsPart | None, ...] = (None,) * len(requests)
        if self._logs is not None:
            logs = await self._logs.read(requests)
        encoder = EvidenceEncoder(
            quote,
            ak_name=quoter.ak.name,
            hash_alg=quoter.ak.signature_hash,
            enc_alg=quoter.ak.enc_alg,
            sign_alg=quoter.ak.sign_alg,
            quote_ms=batch.quote_s * 1000,
            boottime=self._boottime,
        )
        for waiter, proof, own_logs in zip(batch.waiters, batch.proofs, logs, strict=True):
            waiter.answer = Answer(
                encoder=encoder,
                proof=proof,
                claims=waiter.claims,
                logs=own_logs,
                queued_s=batch.sealed - waiter.arrived,
            )
            waiter.done.set()

    def _observe(self, batch: Batch) -> None:
        report(batch, self._metrics)
        if self._observe_batch is not None:
            self._observe_batch(batch)
