"""Why a connection failed, in words that say what to check: one mapping for every client.

httpx, httpcore, anyio and trio each wrap the error of the layer below, and some of them keep no text. So
the whole chain of causes is searched, and its most specific error is put into words. Text from outside
is cut to one short printable line.
"""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Iterator

MAX_CAUSES = 32  # a circle of causes ends, too
SHOWN_CHARS = 200
NOT_TLS = "it does not speak TLS: must the URL begin with http://?"
ONLY_TLS = "it speaks TLS, and the request came without: use https://"
NO_CERTIFICATE = "it requires a client certificate, and none was sent"
CLOSED = (
    "it closed the connection without an answer: must the URL begin with https://? Does it require "
    "a client certificate, and is yours valid and from a CA that it trusts?"
)

# X509_V_ERR_…, x509_vfy.h of OpenSSL
_NAME_MISMATCH = (62, 63, 64)
_UNTRUSTED = (2, 18, 19, 20, 21, 24, 27)
_NOT_YET, _EXPIRED = 9, 10
_CRL_EXPIRED, _REVOKED = 12, 23

_OF_REASON = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": NO_CERTIFICATE,
    "SSLV3_ALERT_BAD_CERTIFICATE": "it refuses your certificate",
    "TLSV1_ALERT_UNKNOWN_CA": "it refuses your certificate: it does not trust the CA that signed it",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it refuses your certificate: it has expired",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "it refuses your certificate: it was revoked",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it refuses your certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "it refuses your certificate: it is not for clients",
    "TLSV1_ALERT_ACCESS_DENIED": "it refuses your certificate: access denied",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "it refuses the handshake: does it require a client certificate?",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it shares no version of TLS with this program",
    "UNSUPPORTED_PROTOCOL": "it shares no version of TLS with this program",
    "TLSV1_UNRECOGNIZED_NAME": "it does not serve the name in the URL",
    "WRONG_VERSION_NUMBER": NOT_TLS,
    "HTTP_REQUEST": NOT_TLS,
    "HTTPS_PROXY_REQUEST": NOT_TLS,
    "RECORD_LAYER_FAILURE": NOT_TLS,
    "PACKET_LENGTH_TOO_LONG": NOT_TLS,
}
_OF_ERRNO = {
    errno.ECONNREFUSED: "connection refused: nothing listens there",
    errno.ECONNRESET: CLOSED,
    errno.EPIPE: CLOSED,
    errno.ETIMEDOUT: "it timed out",
    errno.EHOSTUNREACH: "there is no route to it",
    errno.ENETUNREACH: "there is no route to it",
    errno.EMFILE: "this process has no file descriptors left",
}
_DISCONNECTED = "Server disconnected"  # h11's words, by way of httpcore
_TLS_ALERT = (r"bytearray(b'\x15\x03", r"bytearray(b'\x16\x03")


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what lies below it: its cause or its context, the first of a group."""
    at: BaseException | None = error
    for _ in range(MAX_CAUSES):
        if at is None:
            return
        yield at
        below = at.__cause__ or at.__context__
        at = at.exceptions[0] if isinstance(at, BaseExceptionGroup) else below


def is_certificate_refused(error: BaseException) -> bool:
    """True where this program refused the certificate of the other side."""
    return any(isinstance(each, ssl.SSLCertVerificationError) for each in causes(error))


def why(error: BaseException) -> str:
    """Why there was no answer: the rest of a sentence that begins with the server's name."""
    chain = list(causes(error))
    for words in (_of_tls, _of_system, _of_http):
        for each in chain:
            found = words(each)
            if found is not None:
                return found
    text = next((str(each) for each in chain if str(each)), "")
    return (
        printable(text) if text else CLOSED
    )  # trio and anyio say that a stream broke, and no more


def _of_tls(error: BaseException) -> str | None:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {_of_verification(error)}"
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return CLOSED
    if isinstance(error, ssl.SSLWantReadError | ssl.SSLWantWriteError):
        return None  # how asyncio waits; another error says why the wait ended
    if isinstance(error, ssl.SSLError):
        reason = error.reason or ""
        return _OF_REASON.get(reason) or f"TLS failed: {reason.replace('_', ' ').lower() or error}"
    return None


def _of_verification(error: ssl.SSLCertVerificationError) -> str:
    code, words = error.verify_code, printable(error.verify_message).rstrip(".")
    if code in _NAME_MISMATCH:
        return f"{words}: use a name in its certificate, or set that name (--tls-name, tls_name)"
    if code == _EXPIRED:
        return "it has expired"
    if code == _NOT_YET:
        return "it is not valid yet: is the clock of this machine right?"
    if code in _UNTRUSTED:
        return f"{words}: is the CA file the right one?"
    return words


def _of_system(error: BaseException) -> str | None:
    if isinstance(error, socket.gaierror):
        return f"its name cannot be resolved: {error.strerror}"
    if not isinstance(error, OSError):
        return None
    if isinstance(error, TimeoutError) and error.errno is None:
        return "it timed out"
    return _OF_ERRNO.get(error.errno or 0) or error.strerror


def _of_http(error: BaseException) -> str | None:
    text = str(error)
    if text.startswith(_DISCONNECTED):
        return CLOSED
    if any(alert in text for alert in _TLS_ALERT):
        return ONLY_TLS
    if not text and type(error).__name__.endswith("Timeout"):  # httpx's, which is no OSError
        return "it timed out"
    return None


def printable(text: str) -> str:
    """Foreign text as one short line."""
    return "".join(c if c.isprintable() else "?" for c in text[:SHOWN_CHARS])
