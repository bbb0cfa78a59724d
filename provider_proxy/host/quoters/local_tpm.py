"""The host's TPM as a quoter: every command goes through the gate, every failure is handled by its step.

After a transient code the command is tried again; after a broken connection, or on an exhausted chip, the
chip is reopened first; both within the caller's deadline (the caller cancels). After a fatal code the
circuit opens: from then on every request is refused at once, and `run` probes until the same AK quotes
again. No restart is needed. A command that never returns keeps the gate closed; `state.trouble` says so.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import trio

from provider_proxy.errors import HostError, ProviderProxyError, QuoteError, TpmError
from provider_proxy.evidence.model import AttestationKey, HashAlg, Quote
from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.quoters.circuit import PROBE_S, Circuit
from provider_proxy.host.quoters.tpm_opener import HostIdentity, TpmOpener
from provider_proxy.host.tpm import chip, progress
from provider_proxy.host.tpm.gate import Gate
from provider_proxy.host.tpm.response_codes import Step, is_busy, name_of, step_for, wait_s
from provider_proxy.host.tpm.state import ChipState

T = TypeVar("T")

log = logging.getLogger(__name__)

OPEN_TRIES = 10  # about four seconds, for a chip that is busy when the daemon starts
LEARNING_QUOTES = 1  # so that the first estimate is this chip's
CLOSE_LIMIT_S = 2.0  # for the running command when the daemon ends


class EsysQuoter:
    """A `batcher.Quoter` over the host's TPM. Made by `open_quoter`."""

    def __init__(self, opener: TpmOpener, opened: chip.Chip, gate: Gate, metrics: Metrics) -> None:
        self._opener = opener
        self._chip: chip.Chip | None = opened
        self._gate = gate
        self._metrics = metrics
        self._circuit = Circuit(metrics, "the TPM")
        self.ak: AttestationKey = opener.ak
        self.identity: HostIdentity = opener.identity

    @property
    def state(self) -> ChipState:
        """The chip's state now."""
        return self._gate.pace.state(
            time.monotonic(), trouble=self._circuit.why, since=self._gate.in_flight_since
        )

    async def ready(self) -> None:
        """Return when the chip is free and rested, or when there is trouble."""
        if self._circuit.why is None:
            await self._gate.ready()
        else:
            await trio.lowlevel.checkpoint()

    async def quote(self, qualifying: bytes, bank: HashAlg, mask: int) -> Quote:
        """Read and quote the PCRs; cancel it at your deadline.

        Raises:
            QuoteError: the TPM gives no quote now.
        """
        quote = await self._climb(
            lambda opened: self._opener.quote(opened, qualifying, bank, mask), learn=True
        )
        self._metrics.tpm_quotes.inc()
        return quote

    async def activate_credential(self, credential: bytes, secret: bytes) -> bytes:
        """TPM2_ActivateCredential: proves that EK and AK are in one TPM.

        Needs two sessions, and waits while other programs hold them all. Leaves none behind,
        cancelled or not. A batch waits for one of these at most. Cancel it at your deadline.

        Args:
            credential: TPM2B_ID_OBJECT.
            secret: TPM2B_ENCRYPTED_SECRET.

        Returns:
            The secret that was wrapped for this AK.

        Raises:
            QuoteError: the TPM refuses, for example because the credential is not for these keys.
        """
        return await self.on_chip(lambda opened: opened.activate_credential(credential, secret))

    async def on_chip(self, command: Callable[[chip.Chip], T]) -> T:
        """Run another command on the chip: through the gate, counted in the duty, with retries.

        A fatal failure does not open the circuit, because quotes may still work. Gives way to quotes: a
        batch waits for one such command at most. Cancel it at your deadline.

        Args:
            command: runs in the gate's thread, again after a transient failure; raises `TpmError`.

        Raises:
            QuoteError: the TPM refuses, or the circuit is open.
            HostError: other errors of `command`.
        """
        return await self._climb(command, breaks_circuit=False, gives_way=True)

    async def _climb(
        self,
        command: Callable[[chip.Chip], T],
        *,
        learn: bool = False,
        breaks_circuit: bool = True,
        gives_way: bool = False,
    ) -> T:
        """Try a command until it succeeds, is fatal, or the caller's deadline cancels."""
        tries = 0
        reopen = False
        while self._circuit.why is None:
            try:
                return await self._gate.run(
                    lambda again=reopen: command(self._fresh(again)),  # type: ignore[misc]
                    learn=learn and not reopen,
                    gives_way=gives_way,
                )
            except TpmError as exc:
                step = step_for(exc)
                self._metrics.tpm_errors.labels(name_of(exc.code), step.value).inc()
                if step is Step.FATAL or isinstance(exc, _ReopenError):
                    if breaks_circuit:
                        self._circuit.open(str(exc))
                    raise QuoteError("the TPM refused", retry_after_s=PROBE_S) from exc
                tries += 1
                reopen = step is Step.CLEAN
                self._metrics.tpm_retries.labels(step.value).inc()
                log.warning("TPM: %s; %s, try %d", exc, step.value, tries + 1)
                await trio.sleep(wait_s(step, tries))
        raise QuoteError(self._circuit.why, retry_after_s=PROBE_S)

    def _fresh(self, reopen: bool) -> chip.Chip:
        """The open chip, reopened if `reopen` is set (in the gate's thread).

        Raises:
            _ReopenError: it cannot be reopened.
        """
        if self._chip is not None and not reopen:
            return self._chip
        self._close_chip()
        try:
            self._chip = self._opener.reopen()
        except HostError as exc:
            if isinstance(exc, TpmError) and is_busy(exc):
                raise  # the chip is busy: the next try opens it
            raise _ReopenError(str(exc)) from exc
        return self._chip

    def _close_chip(self) -> None:
        if self._chip is not None:
            with contextlib.suppress(TpmError):
                self._chip.close()
            self._chip = None

    async def run(self) -> None:
        """While the circuit is open, probe until the TPM quotes again; runs until cancelled."""
        await self._circuit.run(lambda: self._gate.run(self._probe))

    def _probe(self) -> None:
        """Reopen, find the same AK, quote (in the gate's thread)."""
        self._close_chip()
        self._chip = self._opener.reopen()
        nonce = secrets.token_hex(16).encode("ascii")
        self._opener.quote(self._chip, nonce, HashAlg.SHA256, 1)

    async def close(self) -> None:
        """Close the chip after the running command; give up on one that hangs."""
        with trio.move_on_after(CLOSE_LIMIT_S) as scope:
            await self._gate.close()
            self._close_chip()
        if scope.cancelled_caught:
            log.critical("a TPM command has not returned; ending without waiting for it")


class _ReopenError(TpmError):
    """The TPM cannot be reopened; the cause says why."""


@asynccontextmanager
async def open_quoter(
    settings: Tpm,
    state_dir: Path,
    metrics: Metrics,
    *,
    host_uuid: uuid.UUID | None = None,
    ima_wait_s: float | None = None,
    open_context: chip.OpenContext = chip.open_context,
) -> AsyncIterator[EsysQuoter]:
    """Open the TPM, with its EK and AK, for as long as the context lasts.

    Args:
        ima_wait_s: limit of IMA's mean wait for our commands; None for no limit.
        open_context: opens a tpm2-tss string; tests and benchmarks pass a disturbed one.

    Raises:
        HostError: no TPM, no keys or a wrong authorisation; the message says which.
    """
    gate = Gate(settings.max_duty, ima_wait_s)
    opener = TpmOpener(
        settings,
        state_dir,
        host_uuid=host_uuid,
        open_context=open_context,
        count=metrics.count_quote_command,
    )
    try:
        quoter = await _within(
            settings.hang_limit_s, lambda: _begin(opener, gate, metrics, settings)
        )
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(quoter.run)
                yield quoter
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await quoter.close()
    finally:
        opener.stop()


async def _begin(opener: TpmOpener, gate: Gate, metrics: Metrics, settings: Tpm) -> EsysQuoter:
    """Open the chip, and learn the time of a quote.

    Raises:
        HostError: no chip, no keys, no quote.
    """
    quoter = EsysQuoter(opener, await _open(opener, gate), gate, metrics)
    try:
        with trio.fail_after(settings.hang_limit_s):
            for _ in range(LEARNING_QUOTES):
                nonce = secrets.token_hex(16).encode("ascii")
                await quoter.quote(nonce, settings.banks[0], 1)
    except trio.TooSlowError as exc:
        raise HostError(
            f"the TPM gave no quote within {settings.hang_limit_s:g} s (tpm.hang_limit_s): it is busy "
            "all the time; see the warnings before this message"
        ) from exc
    return quoter


async def _within(limit_s: float, work: Callable[[], Awaitable[T]]) -> T:
    """Await work on the chip; log the step that it waits for, and give up on one that takes too long.

    Raises:
        HostError: a step took longer than `limit_s`; its thread is left behind.
        What `work` raises.
    """
    results: list[T] = []
    errors: list[ProviderProxyError] = []
    with progress.looked_on() as looked:
        done = trio.Event()
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                try:
                    results.append(await work())
                except ProviderProxyError as exc:
                    errors.append(exc)
                done.set()

            nursery.start_soon(run)
            while not done.is_set():
                with trio.move_on_after(progress.POLL_S):
                    await done.wait()
                try:
                    looked.check(limit_s)
                except HostError as exc:
                    errors.append(exc)
                    nursery.cancel_scope.cancel()
                    break
    if errors:
        raise errors[0]
    return results[0]


async def _open(opener: TpmOpener, gate: Gate) -> chip.Chip:
    """Open for the first time; tries again if the chip is busy, but not if it is missing.

    Raises:
        HostError: see `TpmOpener.open`.
    """
    for tries in range(1, OPEN_TRIES):
        try:
            return await gate.run(opener.open)
        except TpmError as exc:
            if not is_busy(exc):
                raise
            log.warning("TPM: %s; trying again to open it", exc)
            await trio.sleep(wait_s(step_for(exc), tries))
    return await gate.run(opener.open)
