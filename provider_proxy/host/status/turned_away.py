"""Which clients the server turned away, and why: a few lines in the log, and the last ones in the status.

A client that fails the TLS handshake, or whose certificate is not a known tenant's, leaves no other
trace: the operator sees here what the client sees as a closed connection. The number of log lines is
bounded, so that a port scan cannot fill the log. Values that a client chose, such as the names in its
certificate, are cut and made printable.
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
UNREMARKED = ("ok", "silent", "client_gone")  # not turned away: the client left by itself
WHY = {
    "no_certificate": "it did not show a client certificate",
    "bad_certificate": "its certificate was refused",
    "crowded_out": "its TLS handshake was the slowest, and there were too many at once",
    "protocol": "it did not speak TLS 1.2 or later",
    "timeout": "its TLS handshake took too long",
}


class TurnedAway:
    """The clients that were turned away last.

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
            words: OpenSSL's about the certificate: "certificate has expired".
        """
        if reason not in UNREMARKED:
            self.note(WHY.get(reason, reason) + (f": {words}" if words else ""), address)

    def note(self, reason: str, address: str, certificate: bytes | None = None) -> None:
        """Remember a client, and log it unless this minute's lines are used up.

        Args:
            address: of the client; an IP address, or a unix socket's number.
            certificate: DER, from TLS or a front; None where the client showed none or TLS refused it.
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
