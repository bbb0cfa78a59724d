"""The daemon's end of provider-proxy-vtpm's socket: which VMs are here now.

A message counts while heartbeats come (for `LEASE_S` after each) and only as long as the connection is
open. Without the helper no VM is known to run, and there are no claims. A look-up takes one dict access
and one clock reading, on the event loop.
"""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from provider_proxy.errors import HostError, VtpmError
from provider_proxy.host.vtpm.hook_server import read_line
from provider_proxy.host.vtpm.sightings import (
    LEASE_S,
    MAX_LINE_BYTES,
    Alive,
    Gone,
    Sighting,
    Window,
    encode_question,
    parse_window,
    parse_word,
)

log = logging.getLogger(__name__)

RETRY_S = 0.5
CHECK_LIMIT_S = 17.5
RECEIVE_BYTES = 64 * 1024


class Follower:
    """Follows what provider-proxy-vtpm sees.

    Args:
        path: of its socket.
        take: called with each `Sighting` once it counts, and with each VM that no longer does.
        max_vms: further VMs are ignored.
    """

    def __init__(
        self,
        path: Path,
        take: Callable[[Sighting | Gone], Awaitable[None]],
        *,
        max_vms: int,
    ) -> None:
        self._path = path
        self._take = take
        self._max_vms = max_vms
        self._sightings: dict[uuid.UUID, Sighting] = {}
        self._counts_until = -math.inf

    def current(self, vm: uuid.UUID) -> Sighting | None:
        """What is seen of a VM now; None where it is not here, or without a heartbeat for `LEASE_S`."""
        if trio.current_time() > self._counts_until:
            return None
        return self._sightings.get(vm)

    @property
    def is_up(self) -> bool:
        """Whether provider-proxy-vtpm is connected."""
        return trio.current_time() <= self._counts_until

    def sightings(self) -> tuple[Sighting, ...]:
        """All VMs that were reported and not reported gone."""
        return tuple(self._sightings.values())

    async def run(self) -> None:
        """Follow until cancelled; connects again and again where the helper does not answer."""
        told = ""
        while True:
            why = await self._follow_once()
            if self._counts_until > -math.inf or why != told:
                log.error(
                    "vtpm.helper: %s; no VM has claims until provider-proxy-vtpm answers again", why
                )
            told = why
            self._counts_until = -math.inf
            for vm in list(self._sightings):
                del self._sightings[vm]
                await self._take(Gone(vm=vm))
            await trio.sleep(RETRY_S)

    async def _follow_once(self) -> str:
        """Follow one connection; why it ended."""
        try:
            async with await trio.open_unix_socket(self._path) as stream:
                await stream.send_all(encode_question("watch"))
                return await self._read_words(stream)
        except OSError as exc:
            return f"cannot connect to {self._path}: {exc.strerror}"
        except (trio.BrokenResourceError, trio.TooSlowError):
            return "provider-proxy-vtpm sends no messages"
        except VtpmError as exc:
            return f"provider-proxy-vtpm sent an invalid message: {exc}"

    async def _read_words(self, stream: trio.SocketStream) -> str:
        buffered = b""
        is_listed = False
        listed: set[uuid.UUID] = set()
        while True:
            with trio.fail_after(LEASE_S):
                part = await stream.receive_some(RECEIVE_BYTES)
            if not part:
                return "provider-proxy-vtpm closed the connection"
            *lines, buffered = (buffered + part).split(b"\n")
            if len(buffered) > MAX_LINE_BYTES:
                raise VtpmError("a line is too long")
            for line in lines:
                word = parse_word(line)
                if isinstance(word, Alive):
                    if not is_listed:
                        log.info(
                            "vtpm: provider-proxy-vtpm is connected; it sees %d VMs", len(listed)
                        )
                    is_listed = True
                    self._counts_until = trio.current_time() + LEASE_S
                    continue
                if isinstance(word, Sighting):
                    if word.vm not in self._sightings and len(self._sightings) >= self._max_vms:
                        log.warning(
                            "vtpm: more than vtpm.max_vms = %d VMs; the others are ignored",
                            self._max_vms,
                        )
                        continue
                    listed.add(word.vm)
                    self._sightings[word.vm] = word
                else:
                    self._sightings.pop(word.vm, None)
                await self._take(word)

    async def check(self, vm: uuid.UUID) -> Window:
        """Ask whether a VM's vTPM is being made now, and what it holds.

        Raises:
            HostError: the helper does not answer, or its answer cannot be read.
        """
        try:
            with trio.fail_after(CHECK_LIMIT_S):
                async with await trio.open_unix_socket(self._path) as stream:
                    await stream.send_all(encode_question(vm))
                    return parse_window(await read_line(stream, MAX_LINE_BYTES))
        except OSError as exc:
            raise HostError(
                f"vtpm.helper: provider-proxy-vtpm does not answer at {self._path}: {exc.strerror}; "
                "is provider-proxy-vtpm.service running?"
            ) from exc
        except (trio.BrokenResourceError, trio.TooSlowError) as exc:
            raise HostError("vtpm.helper: provider-proxy-vtpm did not answer in time") from exc
        except VtpmError as exc:
            raise HostError(
                f"vtpm.helper: provider-proxy-vtpm's answer is not valid: {exc}"
            ) from exc
