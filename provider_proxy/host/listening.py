"""The listeners of a configuration, its own or those that systemd hands over, open for as long as a
context lasts.

A socket that systemd names "front" (`FileDescriptorName=front`) is the front's listener; all others are
the tenants'. A front may ask for any tenant, so a socket becomes the front's by this name only.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from provider_proxy.common import systemd
from provider_proxy.errors import ConfigError, HostError
from provider_proxy.host.config.tables import Config, Listen
from provider_proxy.host.http import listeners
from provider_proxy.host.vtpm.open_service import share_socket

ADDRESS, FRONT = "listen.address", "listen.front"
FRONT_NAME = "front"

Opened = Sequence[listeners.Listener]


def adopt(listen: Listen, context: ssl.SSLContext | None) -> Mapping[str, Opened]:
    """The listeners that systemd hands over, by the key whose addresses they replace.

    Raises:
        ConfigError: a socket does not fit the configuration.
    """
    named = systemd.take_named_sockets()
    by_key = {
        ADDRESS: [sock for name, sock in named if name != FRONT_NAME],
        FRONT: [sock for name, sock in named if name == FRONT_NAME],
    }
    if by_key[FRONT] and not listen.front:
        raise ConfigError(
            'systemd hands over a socket named "front", but listen.front is not set: set it and '
            "listen.front_peers, or remove FileDescriptorName=front from the .socket unit"
        )
    return {
        key: listeners.adopt_listeners(sockets, context)
        for key, sockets in by_key.items()
        if sockets
    }


def listening(
    key: str,
    addresses: Sequence[str],
    context: ssl.SSLContext | None,
    adopted: Mapping[str, Opened],
) -> AbstractContextManager[Opened]:
    """The listeners of a key: those that systemd opened, or else the configured ones.

    Raises:
        HostError: see `open_listeners`.
    """
    if key in adopted:
        return opened(adopted[key], ours=False)
    return opened(listeners.open_listeners(key, addresses, context))


@contextmanager
def opened(found: Opened, *, ours: bool = True) -> Iterator[Opened]:
    """Close listeners at the end; our own unix sockets are removed, systemd's stay."""
    names = listeners.describe(found)
    try:
        yield found
    finally:
        listeners.close_all(found)
        if ours:
            listeners.remove_unix_sockets(names)


def open_hooks(config: Config) -> Opened:
    """The listener of swtpm's hooks; empty without `vtpm.enabled`.

    Raises:
        HostError: it cannot be opened, or its access cannot be set.
    """
    if not config.vtpm.enabled:
        return ()
    found = listeners.open_listeners("vtpm.socket", (f"unix:{config.vtpm.socket}",), None)
    try:
        share_socket(config.vtpm)
    except HostError:
        listeners.close_all(found)
        raise
    return found
