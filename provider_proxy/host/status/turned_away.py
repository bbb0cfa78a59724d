"""Who was turned away at the server, and why: a few lines in the log, and the last of them in the status.

Whoever fails at TLS, or shows a certificate of nobody that is known, leaves nothing else behind: the
operator sees here what the tenant sees as a closed connection. Lines are few, however many come: a port
scan must not fill the log. What a client chose, its names above all, is short and printable.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from provider_proxy.common.failures import printable
from provider_proxy.common.few_lines import FewLines

log = logging.getLogger(__name__)

KEPT = 20
LINES_A_MINUTE = 10
UNREMARKED = ("ok", "silent", "client_gone")  # nobody was turned away: it went by itself
WHY = {
    "no_certificate": "it showed no client certificate",
    "bad_certificate": "its certificate was refused",
    "crowded_out": "its handshake took long, and others needed the room",
    "protocol": "it did not speak TLS, or no version from 1.2 on",
    "timeout": "its handshake took too long",
}


class TurnedAway:
    """The last ones.

    Args:
        now: seconds since the epoch.
    """

    def __init__(self, *, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._last: deque[dict[str, object]] = deque(maxlen=KEPT)
        self._lines = FewLines(LINES_A_MINUTE, now=now)

    def shaken(self, reason: str, address: str, words: str = "") -> None:
        """A TLS handshake has ended.

        Args:
            reason: "ok", or why it failed.
            words: OpenSSL's on the certificate: "certificate has expired".
        """
        if reason not in UNREMARKED:
            self.note(WHY.get(reason, reason) + (f": {words}" if words else ""), address)

    def note(self, reason: str, address: str, certificate: bytes | None = None) -> None:
        """Remember one, and log it where there is room this minute.

        Args:
            address: of the client; an IP address, or a unix socket's number.
            certificate: DER, as TLS or a front handed it on; None where it showed none or TLS refused it.
        """
        now = self._now()
        subject, fingerprint = _facts(certificate)
        self._last.append(
            {
                "at": round(now, 3),
                "address": address,
                "reason": printable(reason),
                "subject": subject,
                "fingerprint": fingerprint,
            }
        )
        more = self._lines.take()
        if more is None:
            return
        log.warning(
            "turned away: address=%s reason=%r subject=%r sha256=%s%s",
            address,
            printable(reason),
            subject or "none",
            fingerprint or "none",
            more,
        )

    def values(self) -> list[dict[str, object]]:
        """As a status has them, the newest first."""
        return list(reversed(self._last))


def _facts(der: bytes | None) -> tuple[str | None, str | None]:
    """Subject and fingerprint of a certificate; untrusted bytes."""
    if der is None:
        return None, None
    try:
        certificate = x509.load_der_x509_certificate(der)
        return (
            printable(certificate.subject.rfc4514_string()),
            certificate.fingerprint(hashes.SHA256()).hex(),
        )
    except ValueError:
        return None, None
