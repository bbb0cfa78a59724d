"""The daemon's end of provider-proxy-vtpm's socket: which VMs are here, for as long as it is said.

What was said counts while the heartbeat comes, `LEASE_S` long, and not a moment longer than the
connection: a helper that is away means that no VM is known to run, and that there are no claims.
Looking up is one dict and one clock, on the event loop.
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
        take: told of each `Sighting` once it counts, and of each VM that no longer does.
        max_vms: more are not taken.
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
        """What is seen of a VM now; None where it is not here, or nobody has said so for `LEASE_S`."""
        if trio.current_time() > self._counts_until:
            return None
        return self._sightings.get(vm)

    @property
    def is_up(self) -> bool:
        """Whether provider-proxy-vtpm is there."""
        return trio.current_time() <= self._counts_until

    def sightings(self) -> tuple[Sighting, ...]:
        """All that was said and not taken back."""
        return tuple(self._sightings.values())

    async def run(self) -> None:
        """Follow, until cancelled; asks again for ever where nobody answers."""
        told = ""
        while True:
            why = await self._follow_once()
            if self._counts_until > -math.inf or why != told:
                log.error(
                    "vtpm.helper: %s; no VM has claims until provider-proxy-vtpm is back", why
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
            return "it says nothing"
        except VtpmError as exc:
            return f"it says what cannot be read: {exc}"

    async def _read_words(self, stream: trio.SocketStream) -> str:
        buffered = b""
        is_listed = False
        listed: set[uuid.UUID] = set()
        while True:
            with trio.fail_after(LEASE_S):
                part = await stream.receive_some(RECEIVE_BYTES)
            if not part:
                return "it has hung up"
            *lines, buffered = (buffered + part).split(b"\n")
            if len(buffered) > MAX_LINE_BYTES:
                raise VtpmError("a line has no end")
            for line in lines:
                word = parse_word(line)
                if isinstance(word, Alive):
                    if not is_listed:
                        log.info("vtpm: provider-proxy-vtpm is there; %d VMs are here", len(listed))
                    is_listed = True
                    self._counts_until = trio.current_time() + LEASE_S
                    continue
                if isinstance(word, Sighting):
                    if word.vm not in self._sightings and len(self._sightings) >= self._max_vms:
                        log.warning("vtpm: more than vtpm.max_vms = %d VMs", self._max_vms)
                        continue
                    listed.add(word.vm)
                    self._sightings[word.vm] = word
                else:
                    self._sightings.pop(word.vm, None)
                await self._take(word)

    async def check(self, vm: uuid.UUID) -> Window:
        """Ask whether a VM's vTPM is being made now, and what it holds.

        Raises:
            HostError: nobody answers, or what comes cannot be read.
        """
        try:
            with trio.fail_after(CHECK_LIMIT_S):
                async with await trio.open_unix_socket(self._path) as stream:
                    await stream.send_all(encode_question(vm))
                    return parse_window(await read_line(stream, MAX_LINE_BYTES))
        except OSError as exc:
            raise HostError(
                f"vtpm.helper: provider-proxy-vtpm does not answer at {self._path}: {exc.strerror}; "
                "does its unit run?"
            ) from exc
        except (trio.BrokenResourceError, trio.TooSlowError) as exc:
            raise HostError("vtpm.helper: provider-proxy-vtpm gives no answer") from exc
        except VtpmError as exc:
            raise HostError(f"vtpm.helper: provider-proxy-vtpm's answer: {exc}") from exc
